"""A folder for each scenario's processes, and the table of what all scenarios came to.

The table goes to the terminal, and to the file that ``CHAOS_REPORT`` names.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import geneformer_ray.distribute  # noqa: F401  (sets what Ray reads when it is imported)
from tests.chaos.record import Record, markdown
from tests.integration.processes import end_processes_of, processes_of

RECORDS: pytest.StashKey[list[Record]] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDS] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    others = [
        f"{report.nodeid.rpartition('::')[2]}: {state}"
        for state in ("failed", "error", "skipped")
        for report in terminalreporter.getreports(state)
    ]
    if not config.stash[RECORDS] and not others:
        return
    table = markdown(config.stash[RECORDS], others)
    terminalreporter.section("chaos")
    terminalreporter.write_line(table)
    if path := os.environ.get("CHAOS_REPORT"):
        Path(path).write_text(table + "\n")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[Record], None]:
    """Takes what a scenario came to, once all that it promises has been checked."""
    return request.config.stash[RECORDS].append


def short_folder() -> Iterator[Path]:
    """A folder for a cluster's files, by which its processes are known; Ray's sockets need a short path."""
    folder = Path(tempfile.mkdtemp(prefix="gfr"))
    (folder / "ray").mkdir()
    yield folder
    left = processes_of(folder)
    end_processes_of(folder)
    shutil.rmtree(folder, ignore_errors=True)
    assert not left, f"still there at the end of the test: {left}"


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Where the clusters of a scenario keep their files; at its end no process may be left that belongs there."""
    yield from short_folder()
