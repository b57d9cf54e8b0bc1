"""Run a command and say how long it took and how much memory it held at most, all of its processes together."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import distributions, version
from pathlib import Path

SECONDS_BETWEEN_SAMPLES = 0.05


@dataclass(frozen=True)
class Measured:
    """What a command came to: wall clock seconds, peak MiB (see :func:`_memory`), and its last line of output."""

    seconds: float
    peak_mib: float
    last_line: str


def run(
    command: Sequence[str],
    cpus: Sequence[int] | None = None,
    every: float = SECONDS_BETWEEN_SAMPLES,
    **environment: str,
) -> Measured:
    """Run a command on some of the CPUs; fail if it fails. Its memory is asked for `every` so many seconds."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env={**os.environ, **environment},
        preexec_fn=(lambda: os.sched_setaffinity(0, cpus)) if cpus else None,
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, _memory(_descendants(process.pid)))
        time.sleep(every)
    seconds = time.perf_counter() - started
    output = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
    lines = output.strip().splitlines()
    return Measured(seconds, peak / 1024, lines[-1] if lines else "")


def _descendants(leader: int) -> list[int]:
    """List a process and all that descend from it."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended while the list was read
            parents[int(entry.name)] = int(fields[1])
    found = {leader}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found)


def _memory(pids: Sequence[int]) -> int:
    """Give the KiB that processes hold themselves: anonymous pages of each, and shared memory once.

    The kernel keeps these counts, so that asking for them twenty times a second disturbs nothing. Pages of files that
    are mapped, such as libraries, are the page cache's and are left out.
    """
    anonymous, shared = 0, 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended
        held = {
            name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines) if "Rss" in name
        }
        anonymous += held.get("RssAnon", 0)
        shared = max(shared, held.get("RssShmem", 0))
    return anonymous + shared


def machine() -> dict[str, str | int]:
    """Say what was measured on."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "date": date.today().isoformat(),
        "cpu": models[0].split(":")[1].strip() if models else platform.processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "pyarrow", "ray", "anndata", "datasets") if _is_there(name)},
    }


def _is_there(package: str) -> bool:
    """Whether a package is installed: what needs no Ray is also measured without it."""
    return any(True for _ in distributions(name=package))


def table(rows: Sequence[dict[str, object]]) -> str:
    """Lay out rows of equal keys as Markdown."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([str(row[name]) for name in head] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(path: str, content: object) -> None:
    """Write the figures as JSON."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(content, indent=1) + "\n")
