"""Loom files: a dense matrix of genes x cells, with attributes of rows (genes) and columns (cells).

They are opened for reading only; upstream adds an attribute to the user's file and later removes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from geneformer_ray.data.formats.array_files import ArrayFile, array_in, group_in, is_array
from geneformer_ray.data.formats.obs_columns import StoredColumn, first_names
from geneformer_ray.data.formats.stored_matrix import DenseMatrix, NotNumbersError, not_counts
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray
    from scipy import sparse

    from geneformer_ray.data.sorted_counts import Entries

__all__ = ["LoomFile"]

GENE_NAMES = ("ensembl_id", "gene_ids", "Accession", "Gene")
CELL_IDS = ("CellID", "obs_names", "cell_id")


class LoomFile:
    """A loom file.

    Parameters
    ----------
    path
        Where it lies.
    counts
        ``X``, the main matrix, or ``layers/NAME``.
    gene_column
        The row attribute with gene names; by default the first there is of ``ensembl_id``, ``gene_ids``,
        ``Accession``, ``Gene``.
    """

    needs_sorting = False
    one_part = False
    n_entries = 0

    def __init__(self, path: str, counts: str, gene_column: str | None) -> None:
        self._file = ArrayFile(path)
        try:
            root = self._root = self._file.root
            there = _places(root)
            if counts not in there:
                raise InputError("--counts", counts, f"one that {path} holds: {', '.join(there) or 'none'}")
            try:
                self._matrix = DenseMatrix(array_in(root, there[counts]), by_cell=False)
            except NotNumbersError as error:
                raise not_counts(error, counts, path, list(there)) from error
            self.n_cells, n_genes = self._matrix.shape
            rows = self._rows = group_in(root, "row_attrs")
            names = StoredColumn(_gene_names(rows, gene_column, n_genes, path))
            self.genes = [str(name) for name in names.read(0, n_genes).to_pylist()]
            self._cells = group_in(root, "col_attrs")
            self.obs_names = [name for name in self._cells if _is_column(self._cells[name])]
            self._columns: dict[str, StoredColumn] = {}
            self.features_left_out: list[tuple[str, str]] = []
            for name in self.obs_names:
                if self._cells[name].shape[0] != self.n_cells:
                    got = f"{path} with {self.n_cells} cells and {self._cells[name].shape[0]} values of {name}"
                    raise InputError("--input", got, "equal numbers")
        except BaseException:
            self.close()
            raise

    @staticmethod
    def kind(path: str) -> str:
        """Say what it is."""
        return "loom file"

    def gene_columns(self) -> dict[str, list[str]]:
        """Read the first names of the row attributes of text."""
        there = {name: name for name in self._rows if _is_column(self._rows[name])}
        return first_names(there, lambda name: StoredColumn(self._rows[name]))

    def column(self, name: str) -> StoredColumn:
        """Give a column attribute."""
        if name not in self._columns:
            self._columns[name] = StoredColumn(self._cells[name])
        return self._columns[name]

    def cell_ids(self, start: int, stop: int) -> list[str]:
        """Read the ids of the cells start .. stop-1: their numbers where the file holds none."""
        name = next((name for name in CELL_IDS if name in self.obs_names), None)
        ids = range(start, stop) if name is None else self.column(name).read(start, stop).to_pylist()
        return [str(cell_id) for cell_id in ids]

    def rows(self, start: int, stop: int) -> sparse.csr_array:
        """Read the cells start .. stop-1."""
        return self._matrix.rows(start, stop)

    def entries(self, first: int, last: int) -> Iterator[Entries]:
        """Give nothing: dense files need no sorting."""
        return iter(())

    def places(self) -> list[str]:
        """List the matrices that the file holds."""
        return list(_places(self._root))

    def sample(self, place: str) -> NDArray[np.generic]:
        """Read some values of a matrix."""
        return DenseMatrix(self._root[_places(self._root)[place]], by_cell=False).sample()

    def check_whole(self) -> None:
        """Check nothing more than opening did."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _places(root: Any) -> dict[str, str]:
    layers = sorted(root["layers"]) if "layers" in root and not is_array(root["layers"]) else []
    main = {"X": "matrix"} if "matrix" in root and is_array(root["matrix"]) else {}
    return main | {f"layers/{name}": f"layers/{name}" for name in layers if is_array(root["layers"][name])}


def _is_column(element: Any) -> bool:
    return is_array(element) and element.shape is not None and len(element.shape) == 1


def _gene_names(rows: Any, gene_column: str | None, n_genes: int, path: str) -> Any:
    there = [name for name in rows if _is_column(rows[name])]
    wanted = GENE_NAMES if gene_column is None else (gene_column,)
    found = next((name for name in wanted if name in there), None)
    if found is None:
        got = gene_column or f"none, and {path} has none of {', '.join(GENE_NAMES)}"
        raise InputError("--gene-column", got, f"a row attribute of {path}: {', '.join(there) or 'none'}")
    if rows[found].shape[0] != n_genes:
        raise InputError("--input", f"{path} with {n_genes} genes and {rows[found].shape[0]} names", "equal numbers")
    return rows[found]
