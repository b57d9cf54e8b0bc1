"""Counts that a file orders by gene, sorted into blocks of cells: pieces of bounded size, one file each.

A file is Arrow's IPC format with one record batch for each block of cells, empty ones too, so that batch k is block k.
Parquet with a row group for each block would say the same, but its footer grows by a kilobyte for each and is parsed on
every opening: with 5,000 blocks (10 million cells) a block took 22 ms from Parquet and 0.7 ms from IPC, of each file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
from pyarrow import ipc
from scipy import sparse

from geneformer_ray.data import storage

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ENTRIES_PER_FILE", "Entries", "SortedCounts", "write_entries"]

# Some 300 MB while a piece is being sorted, whatever the size of the matrix.
ENTRIES_PER_FILE = 8_000_000

Entries: TypeAlias = "tuple[NDArray[Any], NDArray[np.int32], NDArray[Any]]"


def write_entries(directory: str, number: int, entries: Entries, shape: tuple[int, int], cells_per_block: int) -> None:
    """Sort entries (rows, columns, values) by block of cells and write them as file `number`, replacing it.

    Raises
    ------
    ValueError
        If an entry lies outside the matrix.
    """
    rows, columns, values = entries
    for where, size in ((rows, shape[0]), (columns, shape[1])):
        if len(where) and (where.min() < 0 or where.max() >= size):
            raise ValueError(f"entries outside the matrix of {shape[0]} cells and {shape[1]} genes")
    n_blocks = -(-shape[0] // cells_per_block)
    blocks = rows // cells_per_block
    # Keys of 16 bits are what numpy sorts by radix, ten times faster than by comparison.
    order = np.argsort(blocks.astype(np.uint16) if n_blocks <= 1 << 16 else blocks, kind="stable")
    edges = np.concatenate([[0], np.cumsum(np.bincount(blocks, minlength=n_blocks))])
    inside = (rows - blocks * cells_per_block).astype(np.int32)
    batch = pa.RecordBatch.from_arrays(
        [pa.array(inside[order]), pa.array(columns[order].astype(np.int32, copy=False)), pa.array(values[order])],
        names=["row", "column", "value"],
    )
    filesystem, at = storage.locate(_file(directory, number))
    filesystem.create_dir(storage.locate(directory)[1], recursive=True)
    options = ipc.IpcWriteOptions(compression="lz4")
    with filesystem.open_output_stream(at) as stream, ipc.new_file(stream, batch.schema, options=options) as writer:
        for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            writer.write_batch(batch.slice(start, stop - start))


class SortedCounts:
    """A sorted matrix, read by rows.

    Parameters
    ----------
    directory
        Where :func:`write_entries` put its files.
    n_files
        How many there must be.
    shape
        Cells and genes.
    cells_per_block
        What the files were cut at.
    """

    def __init__(self, directory: str, n_files: int, shape: tuple[int, int], cells_per_block: int) -> None:
        self._directory, self._n_files, self._shape, self._cells = directory, n_files, shape, cells_per_block

    def rows(self, start: int, stop: int) -> sparse.csr_array:
        """Read the cells start .. stop-1; entries of a cell are in the order in which the file had them.

        Raises
        ------
        RuntimeError
            If a piece of the matrix has not been sorted.
        """
        # Nothing in these first ones, so that a matrix without entries is one too.
        rows, columns = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
        values: list[NDArray[Any]] = []
        for number in range(self._n_files):
            path = _file(self._directory, number)
            filesystem, at = storage.locate(path)
            try:
                file = filesystem.open_input_file(at)
            except FileNotFoundError as error:
                raise RuntimeError(f"{path} is missing: write_sorted has not been called for every part") from error
            with file, ipc.open_file(file) as reader:
                for block in range(start // self._cells, -(-stop // self._cells)):
                    row, column, value = (part.to_numpy() for part in reader.get_batch(block).columns)
                    row = row + np.int64(block * self._cells - start)
                    inside = (row >= 0) & (row < stop - start)
                    keep = slice(None) if inside.all() else inside
                    rows.append(row[keep])
                    columns.append(column[keep])
                    values.append(value[keep])
        row = np.concatenate(rows)
        # By hand, as scipy would add up entries of the same place, and a file's entries are given as they are.
        order = np.argsort(row.astype(np.uint16) if stop - start <= 1 << 16 else row, kind="stable")
        indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=stop - start))]).astype(np.int32)
        data = np.concatenate(values) if values else np.zeros(0, np.float32)
        parts = (data[order], np.concatenate(columns)[order], indptr)
        return sparse.csr_array(parts, shape=(stop - start, self._shape[1]))


def _file(directory: str, number: int) -> str:
    return storage.join(directory, f"part-{number:06d}.arrow")
