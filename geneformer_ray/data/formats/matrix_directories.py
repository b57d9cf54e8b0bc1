"""10x matrix directories: ``matrix.mtx``, ``barcodes.tsv`` and ``features.tsv`` or ``genes.tsv``, each maybe gzipped.

Text cannot be read from the middle, so everything here streams from the beginning: the matrix once, when it is sorted,
and the barcodes as far as they are needed.
"""

from __future__ import annotations

import io
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pyarrow import csv

from geneformer_ray.data import sorted_counts, storage
from geneformer_ray.data.formats.tenx_files import TenxFeatures
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from scipy import sparse

    from geneformer_ray.data.formats.obs_columns import StoredColumn
    from geneformer_ray.data.sorted_counts import Entries

__all__ = ["MatrixDirectory", "is_matrix_directory"]

BYTES_PER_READ = 16 << 20
LINES_SAMPLED = 20_000
COMMENT_LINES_AT_MOST = 10_000
FEATURE_COLUMNS = ("id", "name", "feature_type")


def is_matrix_directory(path: str) -> bool:
    """Whether `path` is a directory with a ``matrix.mtx`` or ``matrix.mtx.gz``."""
    return storage.is_directory(path) and _find(path, "matrix.mtx") is not None


class MatrixDirectory:
    """A 10x matrix directory.

    Parameters
    ----------
    path
        The directory.
    counts
        ``X`` only.
    gene_column
        ``gene_ids`` (default) or ``gene_symbols``.
    """

    needs_sorting = True
    one_part = True

    def __init__(self, path: str, counts: str, gene_column: str | None) -> None:
        if counts != "X":
            raise InputError("--counts", counts, f"X, the one matrix that {path} holds")
        self._path = path
        self._matrix, self._barcodes = _required(path, "matrix.mtx"), _required(path, "barcodes.tsv")
        self._read_header()
        rows = [line.split("\t") for line in _lines(_required(path, "features.tsv", "genes.tsv"))]
        n_features = self._shape[0]
        if len(rows) != n_features:
            got = f"{path} with {n_features} rows in its matrix and {len(rows)} features"
            raise InputError("--input", got, "equal numbers: 10x matrices have a row for each gene")
        width = min(map(len, rows), default=1)
        columns = {name: [row[number] for row in rows] for number, name in enumerate(FEATURE_COLUMNS[:width])}
        features = self._features = TenxFeatures(columns, gene_column, path)
        self.genes, self.features_left_out = features.genes, features.left_out
        self.n_cells = self._shape[1]
        self.obs_names: list[str] = []
        self._ids: Iterator[str] = iter(())
        self._next = -1

    @staticmethod
    def kind(path: str) -> str:
        """Say what it is."""
        return "10x matrix directory"

    def _read_header(self) -> None:
        lines = _lines(self._matrix)
        banner = next(lines, "").lower().split()
        if len(banner) != 5 or banner[:2] != ["%%matrixmarket", "matrix"]:
            raise ValueError("matrix.mtx does not begin with a %%MatrixMarket line")
        layout, field, symmetry = banner[2:]
        if layout != "coordinate" or field not in ("integer", "real") or symmetry != "general":
            got = f"{self._path} with a {layout} {field} {symmetry} matrix"
            raise InputError("--input", got, "a coordinate matrix, integer or real, general")
        self._value_type = pa.int64() if field == "integer" else pa.float64()
        comments = itertools.islice(
            itertools.takewhile(lambda line: line[:1] in ("%", ""), lines), COMMENT_LINES_AT_MOST
        )
        # takewhile eats the line that ends it, so the sizes are read by counting.
        self._header_lines = 2 + sum(1 for _ in comments)
        head = itertools.islice(_lines(self._matrix), self._header_lines - 1, self._header_lines + 1)
        sizes = [int(size) for size in next(head, "").split()]
        if len(sizes) != 3 or min(sizes) < 0:
            raise ValueError("matrix.mtx has no line of its three sizes")
        self._shape, self.n_entries = (sizes[0], sizes[1]), sizes[2]
        self._delimiter = "\t" if "\t" in next(head, "") else " "

    def gene_columns(self) -> dict[str, list[str]]:
        """Give the first names of the features' columns."""
        return self._features.first_names()

    def column(self, name: str) -> StoredColumn:
        """Give an obs column: there is none."""
        raise KeyError(name)

    def cell_ids(self, start: int, stop: int) -> list[str]:
        """Read the barcodes start .. stop-1: quick when called in order, from the beginning when going back."""
        if self._next < 0 or start < self._next:
            self._ids, self._next = _lines(self._barcodes), 0
        found = list(itertools.islice(self._ids, start - self._next, stop - self._next))
        if len(found) != stop - start or (stop == self.n_cells and next(self._ids, None) is not None):
            self._next = -1
            got = f"{self._path} with {self.n_cells} columns in its matrix and another number of barcodes"
            raise InputError("--input", got, "equal numbers")
        self._next = -1 if stop == self.n_cells else stop
        # Without the further columns that some tools append.
        return [line.split("\t", 1)[0] for line in found]

    def rows(self, start: int, stop: int) -> sparse.csr_array:
        """Give nothing: text has to be sorted first."""
        raise NotImplementedError

    def entries(self, first: int, last: int) -> Iterator[Entries]:
        """Read all entries in pieces of ``ENTRIES_PER_FILE``, genes only."""
        place = np.full(self._shape[0], -1, np.int32)
        place[self._features.places] = np.arange(len(self.genes), dtype=np.int32)
        held: list[pa.RecordBatch] = []
        n_held = n_read = 0
        for batch in self._batches():
            n_read += len(batch)
            while n_held + len(batch) >= sorted_counts.ENTRIES_PER_FILE:
                room = sorted_counts.ENTRIES_PER_FILE - n_held
                yield self._piece([*held, batch.slice(0, room)], place)
                held, n_held, batch = [], 0, batch.slice(room)
            if len(batch):
                held, n_held = [*held, batch], n_held + len(batch)
        if held:
            yield self._piece(held, place)
        if n_read != self.n_entries:
            raise ValueError(f"matrix.mtx has {n_read} entries and says {self.n_entries}")

    def places(self) -> list[str]:
        """List the matrices that the directory holds."""
        return ["X"]

    def sample(self, place: str) -> NDArray[Any]:
        """Read the first values: those further on cannot be had without reading all before them."""
        batch = next(self._batches(1 << 20), None)
        return np.zeros(0) if batch is None else batch.column(2)[:LINES_SAMPLED].to_numpy()

    def check_whole(self) -> None:
        """Check what takes longer than opening: that there are as many barcodes as columns."""
        found = sum(1 for _ in _lines(self._barcodes))
        if found != self.n_cells:
            got = f"{self._path} with {self.n_cells} columns in its matrix and {found} barcodes"
            raise InputError("--input", got, "equal numbers")

    def close(self) -> None:
        """Close the stream of barcodes."""
        self._ids, self._next = iter(()), -1

    def _batches(self, block_size: int = BYTES_PER_READ) -> Iterator[pa.RecordBatch]:
        if not self.n_entries:
            return
        types = {"row": pa.int64(), "column": pa.int64(), "value": self._value_type}
        read = csv.ReadOptions(column_names=list(types), skip_rows=self._header_lines, block_size=block_size)
        parse = csv.ParseOptions(delimiter=self._delimiter, quote_char=False)
        convert = csv.ConvertOptions(column_types=types, null_values=[])
        with _stream(self._matrix) as stream, csv.open_csv(stream, read, parse, convert) as reader:
            yield from reader

    def _piece(self, batches: list[pa.RecordBatch], place: NDArray[np.int32]) -> Entries:
        table = pa.Table.from_batches(batches)
        features, cells, values = (column.to_numpy() for column in table.columns)
        if len(features) and (features.min() < 1 or features.max() > self._shape[0]):
            raise ValueError(f"matrix.mtx has entries outside its {self._shape[0]} rows")
        columns = place[features - 1]
        kept = slice(None) if len(self.genes) == self._shape[0] else columns >= 0
        return cells[kept] - 1, columns[kept], values[kept]


def _find(path: str, *names: str) -> str | None:
    candidates = (storage.join(path, name + ending) for name in names for ending in ("", ".gz"))
    return next((candidate for candidate in candidates if storage.exists(candidate)), None)


def _required(path: str, *names: str) -> str:
    found = _find(path, *names)
    if found is None:
        raise InputError("--input", f"{path} without {' or '.join(names)}", "a matrix directory with all three files")
    return found


def _stream(path: str) -> pa.NativeFile:
    filesystem, inside = storage.locate(path)
    return filesystem.open_input_stream(inside, compression="gzip" if path.endswith(".gz") else None)


def _lines(path: str) -> Iterator[str]:
    with io.TextIOWrapper(io.BufferedReader(_stream(path), 1 << 20), encoding="utf-8") as text:
        for line in text:
            yield line.rstrip("\r\n")
