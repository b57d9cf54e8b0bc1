"""Rows of estimates and of exact values: sums of them by gene, and the ones in the place of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from geneformer_ray.compute.shift_tables import EXACT
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["GeneSums", "exact_values", "put_in_place", "rows_of", "single_genes"]


def single_genes(table: pa.Table) -> pa.Array:
    """Name the gene of each row's event; estimates are of events of one gene each."""
    lists = table["genes"].combine_chunks()
    if pc.any(pc.not_equal(pc.list_value_length(lists), 1)).as_py():
        raise InputError("genes", "an event of several genes", "one gene in each event")
    return lists.flatten()


def rows_of(table: pa.Table, measure: str, state: str) -> pa.Array:
    """Mark the rows of one measure towards one state."""
    return pc.and_(pc.equal(table["measure"], measure), pc.equal(table["state"], state)).combine_chunks()


class GeneSums:
    """Sums of values by gene, table by table: all that is kept is two numbers a gene.

    Parameters
    ----------
    genes
        Names of the genes that there can be.
    """

    def __init__(self, genes: Sequence[str]) -> None:
        self._genes = pa.array(genes, pa.string())
        self.rows_G = np.zeros(len(genes), dtype=np.int64)
        self.sums_G = np.zeros(len(genes))

    def add(self, table: pa.Table) -> None:
        """Add the rows of a table of cell shifts, each an event of one gene."""
        code_N = pc.index_in(single_genes(table), value_set=self._genes).to_numpy(zero_copy_only=False)
        value_N = table["value"].to_numpy().astype(np.float64)
        self.rows_G += np.bincount(code_N, minlength=len(self.rows_G))
        self.sums_G += np.bincount(code_N, weights=value_N, minlength=len(self.sums_G))

    def means(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Give the places of the genes that have values, and their means."""
        there = np.flatnonzero(self.rows_G)
        return there, self.sums_G[there] / self.rows_G[there]


def exact_values(estimates: pa.Table, exact: pa.Table) -> NDArray[np.float32]:
    """Find the exact value of each row of estimates, shape (rows,); not a number where none was measured.

    Parameters
    ----------
    estimates, exact
        Rows of cell shifts, each an event of one gene: cell, gene, measure and state say which belong together.
    """
    values_N = np.full(estimates.num_rows, np.nan, dtype=np.float32)
    if not exact.num_rows or not estimates.num_rows:
        return values_N
    wanted_N, there_X = np.zeros(estimates.num_rows, np.int64), np.zeros(exact.num_rows, np.int64)
    known_N = np.ones(estimates.num_rows, dtype=bool)
    for of_estimates, of_exact in zip(_keys(estimates), _keys(exact), strict=True):
        names = of_exact.unique()
        code_N = pc.fill_null(pc.index_in(of_estimates, value_set=names), -1).to_numpy(zero_copy_only=False)
        known_N &= code_N >= 0
        wanted_N = wanted_N * len(names) + np.maximum(code_N, 0)
        there_X = there_X * len(names) + pc.index_in(of_exact, value_set=names).to_numpy(zero_copy_only=False)
    order_X = np.argsort(there_X)
    there_X = there_X[order_X]
    if (there_X[1:] == there_X[:-1]).any():
        raise InputError("exact", "an event's exact value twice", "one exact value of each")
    at_N = np.minimum(np.searchsorted(there_X, wanted_N), len(there_X) - 1)
    known_N &= there_X[at_N] == wanted_N
    values_N[known_N] = exact["value"].to_numpy()[order_X[at_N[known_N]]]
    return values_N


def put_in_place(estimates: pa.Table, exact_N: NDArray[np.float32]) -> pa.Table:
    """Give the rows of estimates with exact values where they are known, and marked as what they are."""
    known_N = ~np.isnan(exact_N)
    columns = {
        "value": pa.array(np.where(known_N, exact_N, estimates["value"].to_numpy())),
        EXACT: pa.array(known_N | estimates[EXACT].to_numpy(zero_copy_only=False)),
    }
    for name, column in columns.items():
        estimates = estimates.set_column(estimates.column_names.index(name), name, column)
    return estimates


def _keys(table: pa.Table) -> tuple[pa.Array, ...]:
    return (
        table["cell_id"].combine_chunks(),
        single_genes(table),
        table["measure"].combine_chunks(),
        table["state"].combine_chunks(),
    )
