"""Matrices as files hold them, compressed or dense, read in slices and never believed blindly.

A damaged file must not crash the reader, nor give other cells than were asked for: row pointers and column indices are
checked for each slice before scipy, which trusts them, gets to see them.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from geneformer_ray.data.formats.array_files import array_in, attribute, is_array
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["CompressedMatrix", "DenseMatrix", "NotNumbersError", "not_counts", "sample_starts", "stored_matrix"]

DENSE_SLICE_BYTES = 32 << 20
SAMPLED_SLICES = 8
SAMPLED_ENTRIES = 20_000


class NotNumbersError(ValueError):
    """A matrix of something else: truth values, text. The file is whole; the choice of this matrix is wrong."""


class CompressedMatrix:
    """A sparse matrix, compressed by cell (CSR) or by gene (CSC).

    Parameters
    ----------
    group
        Holds ``data``, ``indices`` and ``indptr``.
    shape
        Cells and genes.
    by_cell
        Whether the pointers run over cells.
    """

    def __init__(self, group: Any, shape: tuple[int, int], *, by_cell: bool) -> None:
        self.shape, self.by_cell = shape, by_cell
        self._data, self._indices, self._indptr = (array_in(group, name) for name in ("data", "indices", "indptr"))
        _check_numbers(self._data.dtype)
        lines = shape[0] if by_cell else shape[1]
        if len(self._indptr.shape) != 1 or self._indptr.shape[0] != lines + 1:
            raise ValueError(f"indptr has the shape {self._indptr.shape} for {lines} {'cells' if by_cell else 'genes'}")
        if len(self._data.shape) != 1 or self._data.shape != self._indices.shape:
            raise ValueError(f"data and indices have the shapes {self._data.shape} and {self._indices.shape}")
        if self._indptr.dtype.kind not in "iu" or self._indices.dtype.kind not in "iu":
            raise ValueError("indptr and indices are not integers")
        first, last = int(self._indptr[0]), int(self._indptr[lines])
        # Exactly: a zarr store that has lost the last of indptr gives zeros there, and would seem to hold no counts.
        if first != 0 or last != self._data.shape[0]:
            raise ValueError(f"indptr runs from {first} to {last} over {self._data.shape[0]} entries")
        self.n_entries = last

    def rows(self, start: int, stop: int) -> sparse.csr_array:
        """Read the cells start .. stop-1, values as stored."""
        pointers = self._pointers(start, stop)
        first, last = int(pointers[0]), int(pointers[-1])
        indices, data = self._entries(first, last, self.shape[1])
        # Pointers of one block are small, and scipy wants them of the type of the indices.
        kind = np.int32 if last - first <= np.iinfo(np.int32).max else np.int64
        parts = (data, indices.astype(kind, copy=False), (pointers - first).astype(kind))
        return sparse.csr_array(parts, shape=(stop - start, self.shape[1]))

    def entries(self, first: int, last: int) -> tuple[NDArray[Any], NDArray[np.int32], NDArray[Any]]:
        """Read stored entries of a matrix by gene, as rows, columns and values."""
        pointers = self._pointers(0, self.shape[1])
        rows, data = self._entries(first, last, self.shape[0])
        columns = np.repeat(np.arange(self.shape[1], dtype=np.int32), np.diff(pointers.clip(first, last)))
        return rows, columns, data

    def sample(self) -> NDArray[Any]:
        """Read some values, spread over the matrix."""
        size = SAMPLED_ENTRIES // SAMPLED_SLICES
        return np.concatenate([self._data[start : start + size] for start in sample_starts(self.n_entries, size)])

    def missing_chunks(self) -> int:
        """Count chunks of a zarr array that are not there, which zarr reads as zeros without a word.

        Zarr may leave out a chunk of zeros on purpose. Among stored values and column indices there are none in
        practice, since what is stored is not zero, and genes differ.
        """
        arrays = [self._data, self._indices] if min(self.shape) > 1 else [self._data]
        return sum(
            array.nchunks - array.nchunks_initialized for array in arrays if hasattr(array, "nchunks_initialized")
        )

    def _pointers(self, start: int, stop: int) -> NDArray[np.int64]:
        pointers: NDArray[np.int64] = self._indptr[start : stop + 1].astype(np.int64)
        if len(pointers) != stop - start + 1 or (np.diff(pointers) < 0).any():
            raise ValueError(f"indptr does not ascend between {start} and {stop}")
        if pointers[0] < 0 or pointers[-1] > self.n_entries:
            raise ValueError(f"indptr leaves the {self.n_entries} entries between {start} and {stop}")
        return pointers

    def _entries(self, first: int, last: int, width: int) -> tuple[NDArray[Any], NDArray[Any]]:
        indices = _native(self._indices[first:last])
        # As unsigned numbers, negative ones are beyond every width: one pass instead of two.
        if len(indices) and indices.view(f"u{indices.itemsize}").max() >= width:
            raise ValueError(f"indices outside 0 .. {width - 1} among the entries {first} to {last}")
        return indices, _native(self._data[first:last])


class DenseMatrix:
    """A matrix with every zero written out.

    Parameters
    ----------
    array
        Of cells x genes.
    by_cell
        False for an array of genes x cells.
    """

    def __init__(self, array: Any, *, by_cell: bool = True) -> None:
        if len(array.shape) != 2:
            raise ValueError(f"the matrix has the shape {array.shape}, not two dimensions")
        _check_numbers(array.dtype)
        self._array, self._cells_first = array, by_cell
        self.shape = (
            (int(array.shape[0]), int(array.shape[1])) if by_cell else (int(array.shape[1]), int(array.shape[0]))
        )
        self.by_cell = True  # either way round, some cells can be read without the others
        chunks = getattr(array, "chunks", None)
        self._chunk = int(chunks[0 if by_cell else 1]) if chunks else 1

    def rows(self, start: int, stop: int) -> sparse.csr_array:
        """Read the cells start .. stop-1, values as stored."""
        lines = max(1, DENSE_SLICE_BYTES // max(1, self.shape[1] * self._array.dtype.itemsize))
        # Slices end where chunks do, or a compressed chunk would be unpacked once for each slice it is in.
        lines = max(lines - lines % self._chunk, min(lines, self._chunk))
        edges = [start, *range(start - start % lines + lines, stop, lines), stop]
        slices = [sparse.csr_array(self._slice(a, b)) for a, b in itertools.pairwise(edges)]
        return slices[0] if len(slices) == 1 else sparse.csr_array(sparse.vstack(slices, format="csr"))

    def sample(self) -> NDArray[Any]:
        """Read some values, spread over the matrix."""
        size = max(1, SAMPLED_ENTRIES // SAMPLED_SLICES // max(1, self.shape[1]))
        starts = sample_starts(self.shape[0], size)
        return np.concatenate([self._slice(start, min(start + size, self.shape[0])).ravel() for start in starts])

    def missing_chunks(self) -> int:
        """Count missing chunks, which here cannot be told from chunks of zeros."""
        return 0

    def _slice(self, start: int, stop: int) -> NDArray[Any]:
        values = self._array[start:stop] if self._cells_first else self._array[:, start:stop].T
        if values.shape[0] != stop - start:
            raise ValueError(f"the matrix ends before row {stop}")
        native = _native(values)
        return native.astype(np.float32) if native.dtype == np.float16 else native  # scipy has no half floats


def stored_matrix(element: Any) -> CompressedMatrix | DenseMatrix:
    """Open the matrix of an AnnData file, in any of the encodings that AnnData has written."""
    if is_array(element):
        return DenseMatrix(element)
    kind = attribute(element, "encoding-type") or f"{attribute(element, 'h5sparse_format')}_matrix"
    if kind not in ("csr_matrix", "csc_matrix"):
        raise ValueError(f"its matrix is a {kind}, not a csr_matrix, csc_matrix or array")
    shape = element.attrs["shape"] if "shape" in element.attrs else element.attrs["h5sparse_shape"]
    n_cells, n_genes = (int(size) for size in shape)
    if min(n_cells, n_genes) < 0:
        raise ValueError(f"its matrix has the shape {n_cells} x {n_genes}")
    return CompressedMatrix(element, (n_cells, n_genes), by_cell=kind == "csr_matrix")


def not_counts(error: NotNumbersError, counts: str, path: str, places: Sequence[str]) -> InputError:
    """Name the matrix that holds no numbers, and the other ones of its file."""
    others = ", ".join(place for place in places if place != counts)
    takes = (
        f"raw counts, integers or floats ({f'this file also holds {others}' if others else 'it has no other matrix'})"
    )
    return InputError("--counts", f"{counts} of {path}, which holds {error} and no counts", takes)


def sample_starts(length: int, size: int) -> list[int]:
    """Give where to read `size` at a time for a sample spread over `length`, at both ends too."""
    if length <= size * SAMPLED_SLICES:
        return list(range(0, length, size)) or [0]
    return [int(start) for start in np.linspace(0, length - size, SAMPLED_SLICES)]


def _check_numbers(dtype: Any) -> None:
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise NotNumbersError("truth values" if dtype.kind == "b" else f"values of the type {dtype}")


def _native(values: NDArray[Any]) -> NDArray[Any]:
    return values.astype(values.dtype.newbyteorder("="), copy=False)
