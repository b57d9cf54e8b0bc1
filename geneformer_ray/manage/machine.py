"""What a machine has for a job: room on its disks and in shared memory, memory, and CPUs without too many threads."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from geneformer_ray.finding import Finding, fault, note, ok, warning

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["check_cpus", "check_disk", "check_memory", "check_ray_folder", "check_shared_memory", "nearest_folder"]

GIB = 1024**3
# A screen's or a training's output is small beside this; a disk with less is full before the day is over.
FREE_AT_LEAST, FREE_BETTER = GIB // 2, 5 * GIB
# The quickstart took 3.8 GB at most.
MEMORY_BETTER = 4 * GIB
OBJECT_STORE = 512 * 1024**2  # of a local cluster, as geneformer_ray.distribute.cluster starts it
# Above this share Ray stops spilling and creating objects (its local_fs_capacity_threshold).
FULL_FOR_RAY = 0.95
# Ray's sockets stand in a folder of its session, and Linux takes 107 bytes of a socket's path.
SOCKET = "/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
SOCKET_BYTES = 107


def check_disk(name: str, folder: str | os.PathLike[str]) -> Iterator[Finding]:
    """Compare the free space where a folder lies, or will lie, with what jobs write."""
    at = nearest_folder(folder)
    free = shutil.disk_usage(at).free
    found = f"{_size(free)} free for {folder}"
    if free < FREE_AT_LEAST:
        yield fault(f"disk.{name}", found, f"free at least {_size(FREE_BETTER)}: df -h {at}")
    elif free < FREE_BETTER:
        yield warning(f"disk.{name}", found, f"{_size(FREE_BETTER)} are better: df -h {at}")
    else:
        yield ok(f"disk.{name}", found)


def check_ray_folder(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Look at the folder of Ray's sessions: it must be written to, short enough for sockets, and not full."""
    folder = Path(environment.get("RAY_TMPDIR") or environment.get("TMPDIR") or "/tmp", "ray")
    name, elsewhere = "disk.ray", "export RAY_TMPDIR=/another/folder"
    if len(os.fsencode(folder)) + len(SOCKET) > SOCKET_BYTES:
        yield fault(name, f"{folder} is too long a path for Ray's sockets", f"{elsewhere}, a short one such as /tmp")
        return
    try:
        with tempfile.TemporaryFile(dir=nearest_folder(folder)):
            pass
    except OSError as error:
        yield fault(name, f"{folder} cannot be written to ({error.strerror})", elsewhere)
        return
    # As Ray computes it: what is reserved for root counts as used.
    usage = shutil.disk_usage(nearest_folder(folder))
    used = 1 - usage.free / usage.total
    found = f"{_size(usage.free)} free for {folder}, its disk {used:.0%} full"
    if used >= FULL_FOR_RAY:
        yield fault(name, f"{found}: Ray takes no more objects above {FULL_FOR_RAY:.0%}", f"free space, or {elsewhere}")
    elif usage.free < FREE_BETTER:
        yield warning(name, found, f"{_size(FREE_BETTER)} are better for logs and spilled objects, or {elsewhere}")
    else:
        yield ok(name, found)


def check_shared_memory(
    folder: str = "/dev/shm", needed: int = OBJECT_STORE, *, running: bool = False
) -> Iterator[Finding]:
    """Compare shared memory with Ray's object store, which goes to a slow disk where it does not fit.

    Parameters
    ----------
    folder
        Where shared memory is mounted.
    needed
        Bytes of the object store.
    running
        Whether Ray runs already: then its store counts among what is used.
    """
    name = "memory.shared"
    if not Path(folder).is_dir():
        yield warning(name, f"no {folder}: Ray keeps its objects on disk, which is slow", f"mount a tmpfs at {folder}")
        return
    usage = shutil.disk_usage(folder)
    there = usage.total if running else usage.free
    found = f"{_size(there)} {'in' if running else 'free in'} {folder}, for an object store of {_size(needed)}"
    if there < needed:
        larger = f"docker run --shm-size {_size(2 * needed).replace(' GiB', 'g').replace(' MiB', 'm')}, or"
        do = f"{larger} mount -o remount,size={2 * needed // 1024**2}m {folder}"
        yield warning(name, f"{found}: Ray uses the disk instead, which is slow", do)
    else:
        yield ok(name, found)


def check_memory(
    control_group: Path = Path("/sys/fs/cgroup"), memory: Path = Path("/proc/meminfo")
) -> Iterator[Finding]:
    """Say how much memory is left for a job, under the limit of its control group."""
    available = next(int(line.split()[1]) * 1024 for line in memory.read_text().splitlines() if "MemAvailable" in line)
    limit, used = _group_memory(control_group)
    left = available if limit is None else min(available, limit - used)
    under = "" if limit is None else f", under a limit of {_size(limit)}"
    found = f"{_size(left)} available{under}"
    if left < MEMORY_BETTER:
        do = f"{_size(MEMORY_BETTER)} are better: end other programs, raise the limit, or fewer --num-workers"
        yield warning("memory.available", found, do)
    else:
        yield ok("memory.available", found)


def check_cpus(
    environment: Mapping[str, str] = os.environ, control_group: Path = Path("/sys/fs/cgroup")
) -> Iterator[Finding]:
    """Compare the CPUs that this process sees with its quota, and the threads that it was told to use with both."""
    cpus = len(os.sched_getaffinity(0))
    quota = _group_cpus(control_group)
    if quota is not None and quota < cpus:
        do = f"taskset -c 0-{max(1, int(quota)) - 1} COMMAND, or raise the quota: a local Ray takes every CPU it sees"
        yield warning("cpus.quota", f"{cpus} CPUs are seen, {quota:g} are granted", do)
    else:
        yield ok("cpus.quota", f"{cpus} CPUs")
    threads = environment.get("OMP_NUM_THREADS", "")
    if not threads:
        yield ok("cpus.threads", "OMP_NUM_THREADS is not set: each process uses the CPUs that it is given")
    elif not threads.isdigit() or int(threads) > cpus:
        found = f"OMP_NUM_THREADS={threads} on {cpus} CPUs: threads that wait for each other are up to 100 times slower"
        yield warning("cpus.threads", found, "unset OMP_NUM_THREADS")
    elif int(threads) < cpus:
        yield note("cpus.threads", f"OMP_NUM_THREADS={threads}: outside of Ray, {threads} of {cpus} CPUs compute")
    else:
        yield ok("cpus.threads", f"OMP_NUM_THREADS={threads}")


def nearest_folder(path: str | os.PathLike[str]) -> Path:
    """Give the folder, or where it does not exist yet the nearest one above it that does."""
    at = Path(path).absolute()
    while not at.is_dir() and at != at.parent:
        at = at.parent
    return at


def _group_memory(group: Path) -> tuple[int | None, int]:
    """Give a control group's limit, None where there is none, and what is used of it."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        text = _read(group / limit)
        # The first version writes a number near 2**63 for no limit.
        if text.isdigit() and int(text) < 2**60:
            return int(text), int(_read(group / used) or 0)
    return None, 0


def _group_cpus(group: Path) -> float | None:
    """Give a control group's quota in CPUs, None where there is none."""
    quota, _, period = _read(group / "cpu.max").partition(" ")
    if not quota:
        quota, period = _read(group / "cpu/cpu.cfs_quota_us"), _read(group / "cpu/cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _read(file: Path) -> str:
    return file.read_text().strip() if file.is_file() else ""


def _size(number: float) -> str:
    return f"{number / GIB:.1f} GiB" if number >= GIB else f"{number / 1024**2:.0f} MiB"
