"""Count matrices: h5ad files read in blocks of cells, checked to be raw counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from anndata.io import read_elem, sparse_dataset
from scipy import sparse

from geneformer_ray.data import storage
from geneformer_ray.errors import InputError, NotThereYetError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from numpy.typing import NDArray

__all__ = ["CountBlock", "CountFile"]

GENE_COLUMNS = ("ensembl_id", "gene_ids")


@dataclass(frozen=True)
class CountBlock:
    """Some cells of a file: ids, counts (cells x genes), totals over all genes, and the chosen obs columns."""

    cell_ids: list[str]
    counts: sparse.csr_array
    totals: NDArray[np.float64]
    obs: pd.DataFrame


class CountFile:
    """An h5ad file of raw counts.

    Parameters
    ----------
    path
        The file.
    counts
        Where the counts lie: ``X``, ``raw.X`` or ``layers/NAME``.
    gene_column
        The var column with gene names; by default ``ensembl_id``, ``gene_ids``, else the index.
    allow_non_integer
        Accept counts that are not whole numbers.
    """

    def __init__(
        self, path: str, *, counts: str = "X", gene_column: str | None = None, allow_non_integer: bool = False
    ) -> None:
        if not storage.exists(path):
            raise InputError("--input", path, "a file that exists")
        if not path.endswith(".h5ad"):
            raise NotThereYetError.flag("--input", path, ".h5ad files so far")
        if storage.is_uri(path):
            raise NotThereYetError.flag("--input", path, "local .h5ad files so far")
        self.path = path
        self.counts = counts
        self.allow_non_integer = allow_non_integer
        try:
            with h5py.File(path, "r") as file:
                self._matrix_key = _matrix_key(file, counts, path)
                self.obs: pd.DataFrame = read_elem(file["obs"])
                var: pd.DataFrame = read_elem(file["raw/var" if counts == "raw.X" else "var"])
                self._check_layout(file[self._matrix_key], len(var))
        except (OSError, KeyError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError("--input", path, f"a readable h5ad file ({error})") from error
        if len(self.obs) == 0 or len(var) == 0:
            raise InputError(
                "--input", f"{path} with {len(self.obs)} cells and {len(var)} genes", "at least one of each"
            )
        self.genes = _gene_names(var, gene_column, path)
        self.cell_ids = [str(name) for name in self.obs.index]
        if len(set(self.cell_ids)) < len(self.cell_ids):
            repeated = self.obs.index[self.obs.index.duplicated()][0]
            raise InputError("--input", f"{path} with the cell id {repeated} twice", "files with unique cell ids")

    def __len__(self) -> int:
        return len(self.cell_ids)

    def check_columns(self, columns: Sequence[str], flag: str = "--obs-columns") -> None:
        """Check that the obs columns are there."""
        for column in columns:
            if column not in self.obs.columns:
                raise InputError(flag, column, f"an obs column of {self.path}: {', '.join(self.obs.columns) or 'none'}")

    def block(self, start: int, stop: int, obs_columns: Sequence[str] = ()) -> CountBlock:
        """Read the cells start .. stop-1.

        Raises
        ------
        InputError
            If they are not raw counts: negative, not finite, or not whole.
        """
        with h5py.File(self.path, "r") as file:
            element = file[self._matrix_key]
            rows: Any = (
                element[start:stop] if isinstance(element, h5py.Dataset) else sparse_dataset(element)[start:stop]
            )
        matrix = sparse.csr_array(rows)
        self._check_counts(matrix)
        computed = np.asarray(matrix.sum(axis=1, dtype=np.float64)).ravel()
        totals = computed
        if "n_counts" in self.obs:
            totals = self.obs["n_counts"].to_numpy(np.float64)[start:stop]
            if not (np.isfinite(totals) & ((totals > 0) | (computed == 0))).all():
                got = f"an n_counts of {self.path} that is not finite, or not above 0"
                raise InputError("--input", got, "each cell's total of counts, or no obs column of that name")
        return CountBlock(self.cell_ids[start:stop], matrix, totals, self.obs.iloc[start:stop][list(obs_columns)])

    def _check_layout(self, element: h5py.Group | h5py.Dataset, n_genes: int) -> None:
        if isinstance(element, h5py.Group) and element.attrs.get("encoding-type") != "csr_matrix":
            kind = element.attrs.get("encoding-type")
            raise NotThereYetError.flag("--input", f"{self.path} with a {kind}", "CSR and dense matrices so far")
        shape = element.attrs["shape"] if isinstance(element, h5py.Group) else element.shape
        if int(shape[1]) != n_genes:
            raise InputError("--input", f"{self.path} with {shape[1]} columns and {n_genes} genes", "equal numbers")

    def _check_counts(self, matrix: sparse.csr_array) -> None:
        data = matrix.data
        if not np.isfinite(data).all():
            raise InputError("--counts", f"values that are not finite in {self.counts} of {self.path}", "raw counts")
        if (data < 0).any():
            raise InputError("--counts", f"negative values in {self.counts} of {self.path}", "raw counts")
        if not self.allow_non_integer and not np.equal(np.floor(data), data).all():
            raise InputError(
                "--counts",
                f"{self.counts} of {self.path}, which holds fractions",
                "raw counts: X, raw.X or layers/NAME, or --allow-non-integer for corrected counts",
            )


def _matrix_key(file: h5py.File, counts: str, path: str) -> str:
    key = {"X": "X", "raw.X": "raw/X"}.get(counts, counts)
    if key not in ("X", "raw/X") and not key.startswith("layers/"):
        raise InputError("--counts", counts, "X, raw.X or layers/NAME")
    if key not in file:
        layers = [f"layers/{name}" for name in file.get("layers", {})]
        there = [name for name, where in (("X", "X"), ("raw.X", "raw/X")) if where in file] + layers
        raise InputError("--counts", counts, f"one that {path} holds: {', '.join(there) or 'none'}")
    return key


def _gene_names(var: pd.DataFrame, gene_column: str | None, path: str) -> list[str]:
    if gene_column is not None:
        if gene_column not in var.columns:
            there = ", ".join(map(str, var.columns)) or "none"
            raise InputError("--gene-column", gene_column, f"a var column of {path}: {there}")
        return [str(name) for name in var[gene_column]]
    for column in GENE_COLUMNS:
        if column in var.columns:
            return [str(name) for name in var[column]]
    return [str(name) for name in var.index]
