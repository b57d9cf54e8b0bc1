"""What a scenario came to, and the table of all."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path


@dataclass(frozen=True)
class Record:
    """One scenario.

    Parameters
    ----------
    scenario, killed
        What ran; what was taken from it, and when.
    baseline, seconds
        From the command's start to its end: left alone, and disturbed. Of a command that was run twice, both together.
    free
        Seconds after the end until nothing of the run was left: no process, or on a cluster that lives on nothing that
        is taken.
    outcome
        What was compared, and that it was the same.
    """

    scenario: str
    killed: str
    baseline: float
    seconds: float
    free: float
    outcome: str

    def cells(self) -> list[str]:
        overhead = 100 * (self.seconds / self.baseline - 1)
        times = [f"{self.baseline:.0f}", f"{self.seconds:.0f}", f"{overhead:+.0f} %", f"{self.free:.0f}"]
        return [self.scenario, self.killed, *times, self.outcome]


HEADINGS = [
    "scenario", "what was taken, and when", "left alone (s)", "disturbed (s)", "overhead", "free again after (s)",
    "outcome",
]  # fmt: skip


def markdown(records: Sequence[Record], others: Sequence[str]) -> str:
    """Draw the table of what went well, list what did not, and say where and when."""
    rows = [HEADINGS, ["---", "---", "---:", "---:", "---:", "---:", "---"], *(record.cells() for record in records)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", *others, *([""] if others else []), circumstances()])


def circumstances() -> str:
    """Say on what machine, when, and with which versions."""
    information = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in information if line.startswith("model name")), "CPU")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {version(name)}" for name in ("ray", "torch", "mlflow"))
    cores = len(os.sched_getaffinity(0))
    return (
        f"{date.today()}, {cores} cores of {model}, {memory:.0f} GiB, Python {platform.python_version()}, {versions}."
    )
