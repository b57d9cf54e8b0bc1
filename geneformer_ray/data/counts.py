"""Count matrices of any size, read in blocks of cells and checked to be raw counts.

h5ad files and zarr stores (CSR, CSC, dense; X, raw.X, layers), 10x HDF5 files and matrix directories, and loom files,
local or by URI. What is held in memory is one block, and what a file has once: the names of its genes.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from geneformer_ray.data import sorted_counts
from geneformer_ray.data.count_values import row_sums, what_is_wrong
from geneformer_ray.data.formats.array_files import UNREADABLE, is_zarr, reading
from geneformer_ray.data.formats.count_formats import COUNT_SUFFIXES, count_files_in, reader_of
from geneformer_ray.data.formats.matrix_directories import is_matrix_directory
from geneformer_ray.data.formats.obs_columns import UnsupportedColumnError
from geneformer_ray.data.formats.stored_matrix import sample_starts
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from scipy import sparse

    from geneformer_ray.data.formats.count_formats import CountSource
    from geneformer_ray.data.formats.obs_columns import StoredColumn

__all__ = [
    "CELLS_PER_BLOCK",
    "COUNT_SUFFIXES",
    "CountBlock",
    "CountFile",
    "count_files_in",
    "is_matrix_directory",
    "is_zarr",
]

CELLS_PER_BLOCK = 2_000
CELLS_SAMPLED = 50  # at each of eight places


@dataclass(frozen=True)
class CountBlock:
    """Some cells of a file.

    Parameters
    ----------
    cell_ids
        Their ids.
    counts
        Cells x genes, values as stored.
    totals
        Each cell's counts over all genes of the experiment: ``n_counts`` where the file has it.
    passed
        Whether ``filter_pass`` is 1; all True where the file has no such column.
    obs
        The chosen columns, of the types that :meth:`CountFile.column_types` gives.
    """

    cell_ids: list[str]
    counts: sparse.csr_array
    totals: NDArray[np.float64]
    passed: NDArray[np.bool_]
    obs: dict[str, pa.Array]


class CountFile:
    """A file of raw counts, to be closed, or used in a ``with`` statement.

    Parameters
    ----------
    path
        An h5ad, loom or 10x HDF5 file, a zarr store or a 10x matrix directory: a local path or a pyarrow URI.
    counts
        Where the counts lie: ``X``, ``raw.X`` or ``layers/NAME``.
    gene_column
        The column with gene names. AnnData: by default ``ensembl_id``, ``gene_ids``, else the index. 10x: ``gene_ids``
        (default) or ``gene_symbols``. Loom: by default ``ensembl_id``, ``gene_ids``, ``Accession``, ``Gene``.
    allow_non_integer
        Accept counts that are not whole numbers.
    sorted_in
        The directory that :meth:`write_sorted` filled, for a file that needs sorting.
    """

    def __init__(
        self,
        path: str,
        *,
        counts: str = "X",
        gene_column: str | None = None,
        allow_non_integer: bool = False,
        sorted_in: str | None = None,
    ) -> None:
        self.path, self.counts, self.allow_non_integer = path, counts, allow_non_integer
        reader = reader_of(path)
        self._kind = reader.kind(path)
        with self._reading():
            self._source: CountSource = reader(path, counts, gene_column)
        self.genes, self.obs_names = self._source.genes, self._source.obs_names
        self.needs_sorting = self._source.needs_sorting
        if not len(self) or not self.genes:
            self.close()
            got = f"{path} with {len(self)} cells and {len(self.genes)} genes"
            raise InputError("--input", got, "at least one of each")
        self._sorted: sorted_counts.SortedCounts | None = None
        if sorted_in is not None and self.needs_sorting:
            n_files = -(-self._source.n_entries // sorted_counts.ENTRIES_PER_FILE)
            shape = (len(self), len(self.genes))
            self._sorted = sorted_counts.SortedCounts(sorted_in, n_files, shape, CELLS_PER_BLOCK)

    def __len__(self) -> int:
        return self._source.n_cells

    def __enter__(self) -> CountFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._source.close()

    def check_columns(self, columns: Sequence[str], flag: str = "--obs-columns") -> None:
        """Check that the obs columns are there, and of kinds that a table of cells can carry."""
        for name in columns:
            if name not in self.obs_names:
                raise InputError(flag, name, f"an obs column of {self.path}: {', '.join(self.obs_names) or 'none'}")
            self._column(name, flag)

    def column_types(self, columns: Sequence[str]) -> dict[str, pa.DataType]:
        """Give the columns' types, which are the same for every block: they come from the file's metadata."""
        self.check_columns(columns)
        return {name: self._column(name).type for name in columns}

    def cell_ids(self, start: int, stop: int) -> list[str]:
        """Read the ids of the cells start .. stop-1."""
        self._check_range(start, stop)
        with self._reading():
            return self._source.cell_ids(start, stop)

    def block(self, start: int, stop: int, obs_columns: Sequence[str] = ()) -> CountBlock:
        """Read the cells start .. stop-1.

        Raises
        ------
        InputError
            If they are not raw counts (negative, not finite, or not whole), or cannot be read.
        RuntimeError
            If the file needs sorting, and was opened without ``sorted_in``.
        """
        self._check_range(start, stop)
        self.check_columns(obs_columns)
        matrix = self._rows(start, stop)
        self._check_values(matrix.data)
        return CountBlock(
            self.cell_ids(start, stop),
            matrix,
            self._totals(matrix, start, stop),
            self._passed(start, stop),
            {name: self._values(name, start, stop) for name in obs_columns},
        )

    def check_sample(self) -> None:
        """Refuse what is not counts before any long work, by a few hundred cells spread over the file."""
        with self._reading():
            self._source.check_whole()
            sample = self._source.sample(self.counts) if self.needs_sorting else None
        if sample is not None:
            self._check_values(sample)
            return
        for start in sample_starts(len(self), CELLS_SAMPLED):
            self.block(start, min(start + CELLS_SAMPLED, len(self)))

    def parts(self) -> list[dict[str, Any]]:
        """Cut the sorting of this file into pieces, for :meth:`write_sorted`, each bounded in entries.

        A matrix directory is one piece, which is streamed: text cannot be read from the middle.
        """
        n_entries = self._source.n_entries
        size = max(1, n_entries) if self._source.one_part else sorted_counts.ENTRIES_PER_FILE
        if not self.needs_sorting:
            return []
        starts = enumerate(range(0, n_entries, size))
        return [{"file": number, "first": at, "last": min(at + size, n_entries)} for number, at in starts]

    def write_sorted(self, part: dict[str, Any], directory: str) -> None:
        """Sort one piece into a directory (path or URI); done again, it replaces its files."""
        shape = (len(self), len(self.genes))
        with self._reading():
            for number, entries in enumerate(self._source.entries(part["first"], part["last"]), part["file"]):
                sorted_counts.write_entries(directory, number, entries, shape, CELLS_PER_BLOCK)

    def _reading(self) -> Any:
        return reading(self.path, self._kind)

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"cells {start} to {stop} of {len(self)}")

    def _column(self, name: str, flag: str = "--obs-columns") -> StoredColumn:
        with self._reading():
            try:
                column = self._source.column(name)
            except UnsupportedColumnError as error:
                takes = "columns of text, numbers, truth values or categories"
                raise InputError(flag, f"{name} of {self.path}, which is {error}", takes) from error
            if len(column) != len(self):
                got = f"{self.path} with {len(self)} cells and {len(column)} values of {name}"
                raise InputError("--input", got, "equal numbers")
            return column

    def _values(self, name: str, start: int, stop: int) -> pa.Array:
        column = self._column(name)
        with self._reading():
            return column.read(start, stop)

    def _numbers(self, name: str, start: int, stop: int) -> NDArray[np.float64]:
        """Read a column of numbers that means something to the encoding; missing ones are NaN."""
        kind = self._column(name, "--input").type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
            raise InputError("--input", f"{self.path} with an obs column {name} of {kind}", "numbers in it")
        values = self._values(name, start, stop).cast(pa.float64() if not pa.types.is_boolean(kind) else pa.int8())
        return np.asarray(values.cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)

    def _rows(self, start: int, stop: int) -> sparse.csr_array:
        if self._sorted is not None:
            return self._sorted.rows(start, stop)
        if self.needs_sorting:
            raise RuntimeError(f"{self.path} is ordered by gene: write_sorted its parts, and open it with sorted_in")
        with self._reading():
            return self._source.rows(start, stop)

    def _totals(self, matrix: sparse.csr_array, start: int, stop: int) -> NDArray[np.float64]:
        if "n_counts" not in self.obs_names:
            return row_sums(matrix)
        totals = self._numbers("n_counts", start, stop)
        good = np.isfinite(totals) & (totals > 0)
        if not good.all() and not (good | (np.isfinite(totals) & (row_sums(matrix) == 0))).all():
            got = f"an n_counts of {self.path} that is not finite, or not above 0"
            raise InputError("--input", got, "each cell's total of counts, or no obs column of that name")
        return totals

    def _passed(self, start: int, stop: int) -> NDArray[np.bool_]:
        if "filter_pass" not in self.obs_names:
            return np.ones(stop - start, dtype=bool)
        return np.asarray(self._numbers("filter_pass", start, stop) == 1)

    def _check_values(self, values: NDArray[Any]) -> None:
        wrong = what_is_wrong(values, fractions_allowed=self.allow_non_integer)
        if wrong:
            with self._reading():
                others = [place for place in self._source.places() if place != self.counts]
            good = [place for place in others if self._looks_like_counts(place)]
            takes = "raw counts: X, raw.X or layers/NAME, or --allow-non-integer for corrected counts"
            if good:
                looks = "looks" if len(good) == 1 else "look"
                takes = f"raw counts: {' and '.join(good)} {looks} like counts: --counts {good[0]}"
            elif others:
                takes += f" ({', '.join(others)} of this file: no counts either)"
            raise InputError("--counts", f"{self.counts} of {self.path}, which holds {wrong}", takes)

    def _looks_like_counts(self, place: str) -> bool:
        with suppress(*UNREADABLE):
            values = self._source.sample(place)
            # Above 1 somewhere, so that a layer of marks is not taken for one of counts.
            return not what_is_wrong(values) and bool(values.max(initial=0) > 1)
        return False
