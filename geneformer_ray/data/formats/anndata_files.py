"""AnnData on disk: h5ad files and zarr stores, whose groups and attributes are the same.

AnnData's own readers take whole tables into memory and cost seconds of import in every worker; its on-disk format is
a published specification, and is read here element by element.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from geneformer_ray.data.formats.array_files import ArrayFile, group_in, is_array, is_zarr
from geneformer_ray.data.formats.obs_columns import INDEX, AnnotationTable, StoredColumn, first_names
from geneformer_ray.data.formats.stored_matrix import CompressedMatrix, NotNumbersError, not_counts, stored_matrix
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray
    from scipy import sparse

    from geneformer_ray.data.sorted_counts import Entries

__all__ = ["AnnDataFile"]

GENE_COLUMNS = ("ensembl_id", "gene_ids")


class AnnDataFile:
    """An h5ad file or a zarr store.

    Parameters
    ----------
    path
        Where it lies.
    counts
        ``X``, ``raw.X`` or ``layers/NAME``.
    gene_column
        The var column with gene names, or ``index``, or the name of var's index; by default ``ensembl_id``,
        ``gene_ids``, the index.
    """

    def __init__(self, path: str, counts: str, gene_column: str | None) -> None:
        self._file = ArrayFile(path)
        try:
            root = self._root = self._file.root
            self._obs = AnnotationTable(root, "obs")
            try:
                self._matrix = stored_matrix(root[_matrix_key(root, counts, path)])
            except NotNumbersError as error:
                raise not_counts(error, counts, path, _places(root)) from error
            var = self._var = AnnotationTable(*((group_in(root, "raw"), "var") if counts == "raw.X" else (root, "var")))
            self.n_cells, n_genes = self._matrix.shape
            if n_genes != len(var):
                raise InputError("--input", f"{path} with {n_genes} columns and {len(var)} genes", "equal numbers")
            if self.n_cells != len(self._obs):
                got = f"{path} with {self.n_cells} rows and {len(self._obs)} cells in obs"
                raise InputError("--input", got, "equal numbers")
            names = var.column(_gene_column(var, gene_column, path)).read(0, n_genes)
            self.genes = ["" if name is None else str(name) for name in names.to_pylist()]
        except BaseException:
            self.close()
            raise
        self.obs_names = self._obs.names
        self.features_left_out: list[tuple[str, str]] = []
        self.needs_sorting = not self._matrix.by_cell
        self.n_entries = self._matrix.n_entries if isinstance(self._matrix, CompressedMatrix) else 0
        self.one_part = False

    @staticmethod
    def kind(path: str) -> str:
        """Say what it is."""
        return "zarr store of AnnData" if is_zarr(path) else "h5ad file"

    def gene_columns(self) -> dict[str, list[str]]:
        """Read the first names of var's index and of its columns of text."""
        return first_names({INDEX: self._var.index} | {name: name for name in self._var.names}, self._var.column)

    def column(self, name: str) -> StoredColumn:
        """Give an obs column."""
        return self._obs.column(name)

    def cell_ids(self, start: int, stop: int) -> list[str]:
        """Read the ids of the cells start .. stop-1."""
        return [str(name) for name in self._obs.column(self._obs.index).read(start, stop).to_pylist()]

    def rows(self, start: int, stop: int) -> sparse.csr_array:
        """Read the cells start .. stop-1."""
        return self._matrix.rows(start, stop)

    def entries(self, first: int, last: int) -> Iterator[Entries]:
        """Read stored entries of a matrix by gene."""
        if isinstance(self._matrix, CompressedMatrix):
            yield self._matrix.entries(first, last)

    def places(self) -> list[str]:
        """List the matrices that the file holds."""
        return _places(self._root)

    def sample(self, place: str) -> NDArray[np.generic]:
        """Read some values of a matrix."""
        return stored_matrix(self._root[_key(place)]).sample()

    def check_whole(self) -> None:
        """Check what takes longer than opening: that no chunk of a zarr store is missing."""
        missing = self._matrix.missing_chunks()
        if missing:
            raise ValueError(f"{missing} chunks of its matrix are missing")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _key(counts: str) -> str:
    return {"X": "X", "raw.X": "raw/X"}.get(counts, counts)


def _holds(group: Any, name: str) -> bool:
    """Whether there is a matrix: AnnData writes an absent one as nothing, or as an array without a shape."""
    parent, _, rest = name.partition("/")
    if parent not in group:
        return False
    element = group[parent]
    if rest:
        return not is_array(element) and _holds(element, rest)
    return not is_array(element) or bool(element.shape)


def _places(root: Any) -> list[str]:
    layers = root["layers"].keys() if "layers" in root and not is_array(root["layers"]) else ()
    found = ["X", "raw.X", *(f"layers/{name}" for name in sorted(layers))]
    return [place for place in found if _holds(root, _key(place))]


def _matrix_key(root: Any, counts: str, path: str) -> str:
    if counts not in ("X", "raw.X") and not counts.startswith("layers/"):
        raise InputError("--counts", counts, "X, raw.X or layers/NAME")
    there = _places(root)
    if counts not in there:
        raise InputError("--counts", counts, f"one that {path} holds: {', '.join(there) or 'none'}")
    return _key(counts)


def _gene_column(var: AnnotationTable, gene_column: str | None, path: str) -> str:
    if gene_column is None:
        return next((column for column in GENE_COLUMNS if column in var.names), var.index)
    if gene_column in (*var.names, var.index):
        return gene_column
    # After the columns: one of them may be called so.
    if gene_column == INDEX:
        return var.index
    there = dict.fromkeys([*var.names, INDEX])
    raise InputError("--gene-column", gene_column, f"a var column of {path}: {', '.join(there)}")
