"""Cell ids over any number of files: whether one occurs twice, in memory that does not grow with them."""

from __future__ import annotations

import tempfile
from hashlib import blake2b
from typing import IO, TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from geneformer_ray.data.counts import CountFile

__all__ = ["hash_ids", "repeated_ids"]

IDS_PER_READ = 1 << 16
HASHES_HELD = 4_000_000


def repeated_ids(
    files: Sequence[tuple[str, str]], open_file: Callable[[str], CountFile]
) -> tuple[str, str, str] | None:
    """Find a cell id that occurs twice.

    The ids are read once. Their hashes, 8 bytes each, go to a temporary file, which is then searched range by range of
    hashes. Equal hashes are a suspicion only: the ids themselves decide.

    Parameters
    ----------
    files
        Paths, each with the prefix of its ids.
    open_file
        Opens one: they may be more than a process can hold open.

    Returns
    -------
    tuple of str or None
        The id with its prefix, and the paths of the first and of the second file that hold it (which may be one file).
    """
    starts = [0]
    with tempfile.TemporaryFile() as hashes:
        for path, prefix in files:
            with open_file(path) as file:
                for start in range(0, len(file), IDS_PER_READ):
                    ids = file.cell_ids(start, min(start + IDS_PER_READ, len(file)))
                    hashes.write(hash_ids(ids, prefix).tobytes())
                starts.append(starts[-1] + len(file))
        # Hashes are spread evenly: three quarters as many as may be held leave room for chance.
        n_ranges = max(1, -(-starts[-1] * 4 // (HASHES_HELD * 3)))
        for number in range(n_ranges):
            for suspect in _repeated(hashes, number, n_ranges):
                places = [
                    (*files[i], position - starts[i])
                    for position in _positions(hashes, suspect)
                    for i in [int(np.searchsorted(starts, position, side="right")) - 1]
                ]
                found = _same_id(places, open_file)
                if found:
                    return found
    return None


def hash_ids(ids: Iterable[str], prefix: str = "") -> NDArray[np.uint64]:
    """Hash ids, each with a prefix: uint64 of shape (ids,), the same in every process."""
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


def _same_id(
    places: Sequence[tuple[str, str, int]], open_file: Callable[[str], CountFile]
) -> tuple[str, str, str] | None:
    """Find two equal ids among cells whose hashes are equal, given as path, prefix and number."""
    seen: dict[str, str] = {}
    for path, prefix, number in places:
        with open_file(path) as file:
            cell_id = prefix + file.cell_ids(number, number + 1)[0]
        if cell_id in seen:
            return cell_id, seen[cell_id], path
        seen[cell_id] = path
    return None
