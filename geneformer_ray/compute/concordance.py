"""Two opposite perturbations of the same genes, which should shift cells in opposite directions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import stats

from geneformer_ray.compute.paired_rows import pair_rows
from geneformer_ray.compute.rank_tests import mean_per_gene
from geneformer_ray.compute.shift_rows import read_measured_rows
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pyarrow as pa
    import pyarrow.dataset as ds

__all__ = ["concordance_table", "rank_correlation"]


def concordance_table(
    shifts: pa.Table | ds.Dataset,
    against: pa.Table | ds.Dataset,
    *,
    state: str,
    names: tuple[str, str] = ("delete", "overexpress"),
    symbols: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """Set each gene's shifts in two screens of opposite perturbations side by side.

    Both means are over the cells that both screens have the gene in, so that they do not differ by their cells: a gene
    can be overexpressed in cells that lack it, and deleted only in those that hold it.

    Parameters
    ----------
    shifts, against
        The `cell_shifts` tables of the two screens.
    state
        The state whose shifts are compared.
    names
        What the two screens do to a gene.
    symbols
        Symbol of each vocabulary key. A key without one stands for itself.

    Returns
    -------
    One row a gene that both screens have in some cell. Columns: `gene`, `symbol`, `shift_A`, `shift_B` (means),
    `sign_A`, `sign_B` (-1, 0, 1) with A and B for the names, `concordant` (the signs are opposite), `cells`. Concordant
    genes come first, then by the smaller of the two sizes, largest first.

    Raises
    ------
    InputError
        A table is broken, has no such rows, or shares no gene and cell with the other.
    """
    rows = read_measured_rows(shifts, state, symbols)
    others = read_measured_rows(against, state, symbols, "against")
    pairs = pair_rows(rows, others)
    if not pairs.gene_P.size:
        got = f"perturbations such as {others.genes[0]}, none of which shares a cell with one of shifts"
        raise InputError("against", got, f"the same genes in the same cells, such as {rows.genes[0]}")
    n_genes = len(rows.genes)
    first, second = names
    table = pd.DataFrame({"gene": list(rows.genes), "symbol": list(rows.symbols)})
    for name, value_P in ((first, pairs.value_P), (second, pairs.other_P)):
        table[f"shift_{name}"] = mean_per_gene(value_P, pairs.gene_P, n_genes)
    table["cells"] = np.bincount(pairs.gene_P, minlength=n_genes)
    table = table[table["cells"] > 0]
    for name in names:
        table[f"sign_{name}"] = np.sign(table[f"shift_{name}"]).astype(np.int64)
    table["concordant"] = table[f"sign_{first}"] * table[f"sign_{second}"] < 0
    columns = ["gene", "symbol", *(f"{what}_{name}" for what in ("shift", "sign") for name in names)]
    weaker = np.minimum(table[f"shift_{first}"].abs(), table[f"shift_{second}"].abs())
    order = np.lexsort((table["gene"], -weaker, ~table["concordant"]))
    return table[[*columns, "concordant", "cells"]].iloc[order].reset_index(drop=True)


def rank_correlation(first_G: pd.Series[float], second_G: pd.Series[float]) -> float | None:
    """Give Spearman's rank correlation; None where either side does not vary."""
    if first_G.nunique() < 2 or second_G.nunique() < 2:
        return None
    return float(stats.spearmanr(first_G, second_G).statistic)
