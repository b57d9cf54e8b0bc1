"""Jobs as commands of their own, the processes that descend from one, and what is left below a folder when it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
LONGEST_RUN = 400.0


@dataclass(frozen=True)
class Run:
    """A finished or failed command: exit code, summary, what it wrote to standard error, seconds from start to end."""

    code: int
    summary: dict[str, Any]
    errors: str
    seconds: float


class Job:
    """A job's command while it runs: ``python -m ray_jobs.NAME FLAGS``.

    Its environment is that of the tests without Ray's variables, and those given: a cluster of its own by default. What
    it says goes to files, which no process that outlives it can hold up.
    """

    def __init__(self, name: str, *flags: str, **environment: str) -> None:
        self._streams = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
        variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self._started = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"ray_jobs.{name}", *flags], cwd=REPOSITORY, env={**variables, **environment},
            stdout=self._streams[0], stderr=self._streams[1],
        )  # fmt: skip

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for stream in self._streams:
            stream.close()

    def wait_until(self, reached: Callable[[], bool]) -> None:
        """Wait for what the running job does; it may not end before."""
        while not reached():
            assert self.process.poll() is None, self.finished()
            assert time.monotonic() - self._started < LONGEST_RUN, "it never came so far"
            time.sleep(0.02)

    def kill(self) -> float:
        """End the driver with SIGKILL; give the seconds that it ran."""
        assert self.process.poll() is None, self.finished()
        self.process.kill()
        self.process.wait()
        return time.monotonic() - self._started

    def finished(self) -> Run:
        """Wait for its end."""
        try:
            code = self.process.wait(LONGEST_RUN)
        except subprocess.TimeoutExpired:
            self._streams[1].seek(0)
            raise AssertionError(f"it goes on for ever:\n{self._streams[1].read()}") from None
        seconds = time.monotonic() - self._started
        for stream in self._streams:
            stream.seek(0)
        said, complaints = (stream.read() for stream in self._streams)
        return Run(code, json.loads(said) if said else {}, complaints, seconds)


def titles_below(pid: int) -> dict[int, str]:
    """Give pid -> title of all that descend from a process, by the titles that Ray gives them."""
    parents, titles = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                titles[int(entry.name)] = (entry / "cmdline").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended while the list was read
    below = {pid}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    return {child: titles[child] for child in sorted(below)}


def processes_of(folder: Path) -> dict[int, str]:
    """Give pid -> title of the processes that belong to a cluster whose files lie in a folder, whoever their parent is.

    The folder stands in their environment, or in their command line; Ray's workers, whose titles overwrite both, write
    their logs into it or stand in it. This process, and what has ended but is still listed, are none of them.
    """
    name, found = os.fsencode(folder), {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if (entry / "stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX":
                continue
            title = (entry / "cmdline").read_bytes()
            traces = [title, (entry / "environ").read_bytes(), os.fsencode(os.readlink(entry / "cwd"))]
            if not any(name in trace for trace in traces):
                traces = [os.fsencode(os.readlink(file)) for file in (entry / "fd").iterdir()]
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended while the list was read, or is another user's
        if any(name in trace for trace in traces):
            found[int(entry.name)] = title.replace(b"\0", b" ").decode(errors="replace").strip()
    return found


def seconds_until_none(folder: Path, within: float) -> float:
    """Wait until no process of a folder's cluster is left, for so many seconds at most; give how long it took."""
    started = time.monotonic()
    while left := processes_of(folder):
        assert time.monotonic() - started < within, f"still there after {within:g} s: {left}"
        time.sleep(0.1)
    return time.monotonic() - started


def end_processes_of(folder: Path) -> None:
    """End what a failed test has left running."""
    for _ in range(20):
        for pid in processes_of(folder):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if not processes_of(folder):
            return
        time.sleep(0.2)
