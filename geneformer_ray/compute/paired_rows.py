"""Rows of two screens side by side: the same gene in the same cell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from geneformer_ray.compute.shift_rows import ShiftRows

__all__ = ["PairedRows", "codes_in", "find_rows", "pair_rows"]


@dataclass(frozen=True)
class PairedRows:
    """P pairs of values of the same gene and cell, in the order of the first screen's rows.

    Parameters
    ----------
    gene_P, cell_P
        Codes of the first screen's genes and cells, shape (P,).
    value_P, other_P
        The first screen's values and the other's, shape (P,).
    """

    gene_P: NDArray[np.int64]
    cell_P: NDArray[np.int64]
    value_P: NDArray[np.float64]
    other_P: NDArray[np.float64]


def codes_in(names: Sequence[str], known: Sequence[str]) -> NDArray[np.int64]:
    """Give the code that each name has among the known ones, -1 for one that is not among them."""
    index = pd.Index(np.array(known, dtype=object))
    return np.asarray(index.get_indexer(pd.Index(np.array(names, dtype=object))), dtype=np.int64)


def find_rows(rows: ShiftRows, gene_M: NDArray[np.int64], cell_M: NDArray[np.int64]) -> NDArray[np.int64]:
    """Find the row of each gene and cell, given by their codes; -1 where there is none or a code is -1, shape (M,).

    The rows are of one state, so they lie in the order of gene and cell.
    """
    if not rows.value_N.size:
        return np.full(gene_M.size, -1)
    key_N = rows.gene_N * len(rows.cells) + rows.cell_N
    key_M = gene_M * len(rows.cells) + cell_M
    row_M = np.minimum(np.searchsorted(key_N, key_M), key_N.size - 1)
    return np.where((gene_M >= 0) & (cell_M >= 0) & (key_N[row_M] == key_M), row_M, -1)


def pair_rows(rows: ShiftRows, other: ShiftRows) -> PairedRows:
    """Pair the rows of two screens, each of one state, by gene and cell; rows without a partner are left out."""
    gene_N = codes_in(rows.genes, other.genes)[rows.gene_N]
    cell_N = codes_in(rows.cells, other.cells)[rows.cell_N]
    partner_N = find_rows(other, gene_N, cell_N)
    paired = partner_N >= 0
    return PairedRows(rows.gene_N[paired], rows.cell_N[paired], rows.value_N[paired], other.value_N[partner_N[paired]])
