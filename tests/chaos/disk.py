"""A disk of limited size."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class Disk:
    """A file system in memory, which can be made larger."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def enlarge(self) -> None:
        subprocess.run(["mount", "-o", "remount,size=64m", str(self.place)], check=True)


@contextmanager
def limited_disk(place: Path, kib: int) -> Iterator[Disk]:
    """Mount a disk of so many KiB, until the block is left; skip the test where that is not allowed."""
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(place)], capture_output=True, check=False, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system of limited size can be mounted here: {mounted.stderr.strip()}")
    try:
        yield Disk(place)
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
