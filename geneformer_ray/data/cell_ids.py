"""Cell ids over any number of files: whether one occurs twice, in memory that does not grow with them."""

from __future__ import annotations

import tempfile
from hashlib import blake2b
from typing import IO, TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from geneformer_ray.data.counts import CountFile

__all__ = ["repeated_ids"]

IDS_PER_READ = 1 << 16
HASHES_HELD = 4_000_000


def repeated_ids(files: Sequence[tuple[CountFile, str]]) -> tuple[str, str, str] | None:
    """Find a cell id that occurs twice.

    The ids are read once. Their hashes, 8 bytes each, go to a temporary file, which is then searched range by range of
    hashes. Equal hashes are a suspicion only: the ids themselves decide.

    Parameters
    ----------
    files
        Files, each with the prefix of its ids.

    Returns
    -------
    tuple of str or None
        The id with its prefix, and the paths of the first and of the second file that hold it (which may be one file).
    """
    n_cells = sum(len(file) for file, _ in files)
    # Hashes are spread evenly: three quarters as many as may be held leave room for chance.
    n_ranges = max(1, -(-n_cells * 4 // (HASHES_HELD * 3)))
    with tempfile.TemporaryFile() as hashes:
        for file, prefix in files:
            for start in range(0, len(file), IDS_PER_READ):
                hashes.write(_hashes(file.cell_ids(start, min(start + IDS_PER_READ, len(file))), prefix).tobytes())
        for number in range(n_ranges):
            for suspect in _repeated(hashes, number, n_ranges):
                found = _same_id(files, _positions(hashes, suspect))
                if found:
                    return found
    return None


def _hashes(ids: Sequence[str], prefix: str) -> NDArray[np.uint64]:
    # Salted by nothing: every process and every run must agree, which Python's own hash of strings does not.
    joined = b"".join([blake2b((prefix + cell_id).encode(), digest_size=8).digest() for cell_id in ids])
    return np.frombuffer(joined, np.uint64)


def _chunks(hashes: IO[bytes]) -> Iterator[NDArray[np.uint64]]:
    hashes.seek(0)
    while content := hashes.read(1 << 23):
        yield np.frombuffer(content, np.uint64)


def _repeated(hashes: IO[bytes], number: int, n_ranges: int) -> list[np.uint64]:
    """Give the hashes of one range that occur more than once."""
    width = (1 << 64) // n_ranges + 1
    low, high = np.uint64(number * width), np.uint64(min((number + 1) * width, 1 << 64) - 1)
    found = np.sort(np.concatenate([part[(part >= low) & (part <= high)] for part in _chunks(hashes)] or [_NONE]))
    return list(np.unique(found[1:][found[1:] == found[:-1]]))


_NONE = np.zeros(0, np.uint64)


def _positions(hashes: IO[bytes], suspect: np.uint64) -> Iterator[int]:
    start = 0
    for part in _chunks(hashes):
        yield from (start + np.flatnonzero(part == suspect)).tolist()
        start += len(part)


def _same_id(files: Sequence[tuple[CountFile, str]], positions: Iterator[int]) -> tuple[str, str, str] | None:
    starts = np.cumsum([0, *(len(file) for file, _ in files)])
    seen: dict[str, str] = {}
    for position in positions:
        number = int(np.searchsorted(starts, position, side="right")) - 1
        file, prefix = files[number]
        within: Any = position - int(starts[number])
        cell_id = prefix + file.cell_ids(within, within + 1)[0]
        if cell_id in seen:
            return cell_id, seen[cell_id], file.path
        seen[cell_id] = file.path
    return None
