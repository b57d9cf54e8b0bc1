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
from geneformer_ray.data.count_values import FRACTIONS, first_wrong, impossible_totals, row_sums, truths_in_text
from geneformer_ray.data.formats.array_files import UNREADABLE, is_zarr, reading
from geneformer_ray.data.formats.count_formats import COUNT_SUFFIXES, count_files_in, passed_over, reader_of
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
    "passed_over",
]

CELLS_PER_BLOCK = 2_000
CELLS_SAMPLED = 50  # at each of eight places
TEXTS_NAMED = 5  # of those in a column that mean nothing


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
        Each cell's counts over all genes of the experiment: ``n_counts`` where the file has it. Cells that did not pass
        have the sum of their stored counts where ``n_counts`` cannot be right.
    passed
        Whether ``filter_pass`` is 1 or true; all True where the file has no such column.
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
        The column with gene names. AnnData: by default ``ensembl_id``, ``gene_ids``, else the index, which ``index``
        asks for. 10x: ``gene_ids`` (default) or ``gene_symbols``. Loom: by default ``ensembl_id``, ``gene_ids``,
        ``Accession``, ``Gene``.
    allow_non_integer
        Accept counts that are not whole numbers.
    sorted_in
        The directory that :meth:`write_sorted` filled, for a file that needs sorting.

    Attributes
    ----------
    genes
        The names of the matrix's columns.
    features_left_out
        Name and type of each feature of a 10x file that is no gene (antibody tags, guides, peaks); empty elsewhere.
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
        self.needs_sorting, self.features_left_out = self._source.needs_sorting, self._source.features_left_out
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

    def gene_columns(self) -> dict[str, list[str]]:
        """Give the first 200 names of every column that could name the genes, by what ``gene_column`` calls it."""
        with self._reading():
            return self._source.gene_columns()

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
            If they are not raw counts (negative, not finite, or not whole), a cell that passed has an impossible
            ``n_counts``, or they cannot be read.
        RuntimeError
            If the file needs sorting, and was opened without ``sorted_in``.
        """
        self._check_range(start, stop)
        self.check_columns(obs_columns)
        matrix = self._rows(start, stop)
        self._check_values(matrix.data, matrix, start)
        passed = self._passed(start, stop)
        return CountBlock(
            self.cell_ids(start, stop),
            matrix,
            self._totals(matrix, passed, start, stop),
            passed,
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
            got = f"{self.path} with an obs column {name} " + ("without values" if kind == pa.null() else f"of {kind}")
            raise InputError("--input", got, "numbers in it, or no obs column of that name")
        values = self._values(name, start, stop).cast(pa.float64() if not pa.types.is_boolean(kind) else pa.int8())
        return np.asarray(values.cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)

    def _rows(self, start: int, stop: int) -> sparse.csr_array:
        if self._sorted is not None:
            return self._sorted.rows(start, stop)
        if self.needs_sorting:
            raise RuntimeError(f"{self.path} is ordered by gene: write_sorted its parts, and open it with sorted_in")
        with self._reading():
            return self._source.rows(start, stop)

    def _totals(
        self, matrix: sparse.csr_array, passed: NDArray[np.bool_], start: int, stop: int
    ) -> NDArray[np.float64]:
        sums = row_sums(matrix)
        if "n_counts" not in self.obs_names:
            return sums
        totals = self._numbers("n_counts", start, stop)
        impossible = impossible_totals(totals, sums, fractions_allowed=self.allow_non_integer)
        refused = np.flatnonzero(impossible & passed)
        if len(refused):
            first = int(refused[0])
            got = (
                f"{self.path} with the n_counts {totals[first]:.10g} for the cell {self._cell_id(start + first)}, "
                f"whose stored counts add up to {sums[first]:.10g} ({len(refused)} such of the {stop - start} cells "
                f"from {start} on)"
            )
            takes = (
                "each cell's total of counts over all genes, which is never below the sum over the stored ones: "
                "correct the obs column n_counts, or drop or rename it"
            )
            raise InputError("--input", got, takes)
        # What is left of them did not pass and is never encoded, but goes through the same arithmetic.
        return np.where(impossible, sums, totals)

    def _passed(self, start: int, stop: int) -> NDArray[np.bool_]:
        if "filter_pass" not in self.obs_names:
            return np.ones(stop - start, dtype=bool)
        if self._column("filter_pass", "--input").type != pa.string():
            return np.asarray(self._numbers("filter_pass", start, stop) == 1)
        passed, others = truths_in_text(self._values("filter_pass", start, stop))
        if others:
            named = ", ".join(map(repr, others[:TEXTS_NAMED])) + (", ..." if len(others) > TEXTS_NAMED else "")
            got = f"{self.path} with an obs column filter_pass that holds {named}"
            raise InputError("--input", got, "1/0 or true/false in it, or no obs column of that name")
        return passed

    def _check_values(self, values: NDArray[Any], matrix: sparse.csr_array | None = None, start: int = 0) -> None:
        wrong = first_wrong(values, fractions_allowed=self.allow_non_integer)
        if wrong is None:
            return
        example = f"{values[wrong.at]:.6g}"
        if matrix is not None:
            row = int(np.searchsorted(matrix.indptr, wrong.at, side="right")) - 1
            example += f" in cell {self._cell_id(start + row)}, gene {self.genes[matrix.indices[wrong.at]]}"
        with self._reading():
            others = [place for place in self._source.places() if place != self.counts]
        good = [place for place in others if self._looks_like_counts(place)]
        if good:
            looks = "looks" if len(good) == 1 else "look"
            takes = f"raw counts: {' and '.join(good)} {looks} like counts: --counts {good[0]}"
        else:
            # The flag lets fractions pass and nothing else, so it is no answer to the rest.
            flag = ", or --allow-non-integer for corrected counts" if wrong.what == FRACTIONS else ""
            rest = f"{', '.join(others)} of this file: no counts either" if others else "this file has no other matrix"
            takes = f"raw counts, whole numbers from 0 up{flag} ({rest})"
        raise InputError("--counts", f"{self.counts} of {self.path}, which holds {wrong.what} ({example})", takes)

    def _cell_id(self, cell: int) -> str:
        return self.cell_ids(cell, cell + 1)[0]

    def _looks_like_counts(self, place: str) -> bool:
        with suppress(*UNREADABLE):
            values = self._source.sample(place)
            # Above 1 somewhere, so that a layer of marks is not taken for one of counts.
            return first_wrong(values) is None and bool(values.max(initial=0) > 1)
        return False
