"""A screen against a null screen of the same genes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from geneformer_ray.compute.bootstrap import bootstrap_mean_interval, resampling_units
from geneformer_ray.compute.paired_rows import codes_in, pair_rows
from geneformer_ray.compute.rank_tests import (
    benjamini_hochberg,
    mean_per_gene,
    rank_sum_per_gene,
    signed_rank_per_gene,
)
from geneformer_ray.compute.shift_rows import read_measured_rows
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pyarrow as pa
    import pyarrow.dataset as ds

__all__ = ["vs_null_table"]


def vs_null_table(
    shifts: pa.Table | ds.Dataset,
    null: pa.Table | ds.Dataset,
    *,
    state: str | None = None,
    symbols: Mapping[str, str] | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    groups: Mapping[str, str] | None = None,
    fdr_level: float = 0.05,
    measure: str = "shift",
) -> pd.DataFrame:
    """Compare each gene's values with the same gene's values in a null screen.

    Two questions are answered. As upstream's ``vs_null`` asks it: do the two sets of values differ, whichever cells
    they are of (rank-sum test). And where the screens share cells: does the difference within a cell lie around zero
    (signed-rank test of the cells that have both, with a bootstrap interval of its mean)?

    Parameters
    ----------
    shifts, null
        The `cell_shifts` tables of the two screens.
    state
        The state whose shifts are compared; None for the similarities of screens without states.
    symbols
        Symbol of each vocabulary key. A key without one stands for itself.
    bootstrap, seed
        Replicates behind `ci_low` and `ci_high`, and their seed; 0 replicates leave both NaN.
    groups
        Group of each cell: the interval then resamples groups instead of cells. The tests take cells as independent.
    fdr_level
        `significant` is "`fdr` is below this".
    measure
        What is read of screens with states: `shift`, or of decomposed ones `shift_gene` or `shift_rank`.

    Returns
    -------
    One row a gene of `shifts`. Columns: `gene`, `symbol`, `mean`, `null_mean`, `difference` (mean - null_mean), `p`,
    `fdr` (rank-sum test, Benjamini-Hochberg), `cells`, `null_cells`; then of the cells that have both:
    `paired_difference` (mean), `ci_low`, `ci_high`, `paired_p`, `paired_fdr`, `paired_cells`; then `significant`.
    A gene that the null screen lacks has no test. Significant rows come first, then by difference, highest first,
    then by FDR: upstream's order.

    Raises
    ------
    InputError
        A table is broken, has no such rows, or shares no gene with the other.
    """
    rows = read_measured_rows(shifts, state, symbols, measure=measure)
    others = read_measured_rows(null, state, symbols, "null", measure)
    n_genes = len(rows.genes)
    gene_of_other = codes_in(others.genes, rows.genes)[others.gene_N]
    shared = gene_of_other >= 0
    if not shared.any():
        got = f"perturbations such as {others.genes[0]}, none of which is in shifts"
        raise InputError("null", got, f"the same ones as in shifts, such as {rows.genes[0]}")
    null_gene, null_value = gene_of_other[shared], others.value_N[shared]
    p_G = rank_sum_per_gene(rows.value_N, rows.gene_N, null_value, null_gene, n_genes)
    pairs = pair_rows(rows, others)
    difference_P = pairs.value_P - pairs.other_P
    unit_P = resampling_units(rows.cells, groups)[pairs.cell_P]
    interval = bootstrap_mean_interval(difference_P, pairs.gene_P, unit_P, n_genes, bootstrap, seed)
    paired_p_G = signed_rank_per_gene(difference_P, pairs.gene_P, n_genes)
    table = pd.DataFrame({"gene": list(rows.genes), "symbol": list(rows.symbols)})
    table["mean"] = mean_per_gene(rows.value_N, rows.gene_N, n_genes)
    table["null_mean"] = mean_per_gene(null_value, null_gene, n_genes)
    table["difference"] = table["mean"] - table["null_mean"]
    table["p"], table["fdr"] = p_G, benjamini_hochberg(p_G)
    table["cells"] = np.bincount(rows.gene_N, minlength=n_genes)
    table["null_cells"] = np.bincount(null_gene, minlength=n_genes)
    table["paired_difference"] = mean_per_gene(difference_P, pairs.gene_P, n_genes)
    table["ci_low"], table["ci_high"] = interval
    table["paired_p"], table["paired_fdr"] = paired_p_G, benjamini_hochberg(paired_p_G)
    table["paired_cells"] = np.bincount(pairs.gene_P, minlength=n_genes)
    table["significant"] = table["fdr"] < fdr_level
    order = ["significant", "difference", "fdr", "gene"]
    return table.sort_values(order, ascending=[False, False, True, True]).reset_index(drop=True)
