"""From cell shifts to a ranked table of genes.

Everything here works on whole columns: genes, cells and states become integer codes while the table is read,
and sums over genes are `bincount` or sparse products. There is no Python loop over genes, so a screen of
every gene in thousands of cells takes seconds where a rank-sum per gene against a pool of millions of values
would sort that pool once a gene.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import pandas as pd
from scipy import stats

from geneformer_ray.compute.bootstrap import bootstrap_effect_interval
from geneformer_ray.compute.shift_rows import read_shift_rows, states_of
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pyarrow as pa
    import pyarrow.dataset as ds
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]
    CodeArray = NDArray[np.int64]

__all__ = [
    "benjamini_hochberg",
    "goal_shift_table",
    "rank_sum_against_pool",
]


def goal_shift_table(
    shifts: pa.Table | ds.Dataset,
    *,
    goal: str,
    start: str | None,
    alternatives: Sequence[str] = (),
    symbols: Mapping[str, str] | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    groups: Mapping[str, str] | None = None,
    fdr_level: float = 0.05,
) -> pd.DataFrame:
    """Rank the perturbed genes by how far they move cells towards the goal state.

    For each state, a gene's values are compared with the pool of all genes' values by the two-sided Wilcoxon
    rank-sum test (`rank_sum_against_pool`), and the p-values of all genes are adjusted together
    (`benjamini_hochberg`).

    `effect` is Glass's delta with the pool as the reference: (the gene's mean shift to goal - the pool's
    mean) / the pool's standard deviation. It has no unit, so screens of models with wide and narrow embedding
    spaces compare; it asks what the test asks, whether this gene moves cells differently from a gene at
    large; and it needs no standard deviation of the gene's own, which for a gene seen in two cells is noise.

    Parameters
    ----------
    shifts
        The `cell_shifts` table of a screen with states: `cell_id` string, `genes` list of strings, `measure`
        string, `state` string, `value` float (difference of cosine similarities, no unit). Rows whose measure
        is not `shift` are left aside. At most one row for the same cell, genes and state; the order of rows
        does not matter, nor that of the genes within an event.
    goal, start, alternatives
        Names of the states. `start` may be None for a screen that did not record it.
    symbols
        Symbol of each vocabulary key. A key without one stands for itself.
    bootstrap
        Replicates behind `ci_low` and `ci_high` (see `bootstrap_effect_interval`); 0 leaves both NaN.
    seed
        Seed of the bootstrap, not negative.
    groups
        Group (library, donor) of each cell. With it, whole groups are resampled instead of cells: cells of
        one donor are not independent, and resampling them as if they were gives intervals that are too
        narrow.
    fdr_level
        `significant` is "the goal's FDR is below this".

    Returns
    -------
    One row a gene that has values for the goal. Columns: `gene` (for events of several genes: their keys,
    sorted, joined with "+"), `symbol`, then `shift_to_STATE` (mean), `p_STATE`, `fdr_STATE` for goal, start
    and each alternative, then `effect`, `ci_low`, `ci_high` (95 % percentile interval), `cells` (with a value
    for the goal), `significant`. Significant rows come first, then by shift to goal, highest first, then by
    FDR.

    Raises
    ------
    InputError
        A state has no rows or is named twice, a column or a group is missing, a value is not a finite number,
        or the same cell, genes and state occur twice.

    Notes
    -----
    Means, p and FDR follow upstream's `goal_state_shift` (InSilicoPerturberStats), with the gene's own values
    inside the pool. Upstream draws 100,000 values from a larger pool, in an order that depends on the file
    system; here the pool is always whole.
    """
    if bootstrap < 0:
        raise InputError("bootstrap", bootstrap, "0 or more replicates")
    if not 0 < fdr_level < 1:
        raise InputError("fdr_level", fdr_level, "a number between 0 and 1")
    named = [
        ("goal", goal),
        *([] if start is None else [("start", start)]),
        *(("alternatives", a) for a in alternatives),
    ]
    states = [state for _, state in named]
    for index, (field, state) in enumerate(named):
        if state in states[:index]:
            raise InputError(field, repr(state), "each state once among goal, start and alternatives")
    data = read_shift_rows(shifts, measure="shift", states=states, symbols=symbols)
    rows_per_state = np.bincount(data.state_N, minlength=len(states))
    for (field, state), rows in zip(named, rows_per_state, strict=True):
        if rows == 0:
            known = ", ".join(states_of(shifts)) or "none: no row has the measure 'shift'"
            raise InputError(field, repr(state), f"a state of the table ({known})")

    n_genes = len(data.genes)
    columns: dict[str, object] = {"gene": list(data.genes), "symbol": list(data.symbols)}
    for code, state in enumerate(states):
        of_state = data.state_N == code
        value, gene = data.value_N[of_state], data.gene_N[of_state]
        p_G = rank_sum_against_pool(value, gene, n_genes)
        columns[f"shift_to_{state}"] = _mean_per_gene(value, gene, n_genes)
        columns[f"p_{state}"] = p_G
        columns[f"fdr_{state}"] = benjamini_hochberg(p_G)

    of_goal = data.state_N == 0
    value, gene, cell = data.value_N[of_goal], data.gene_N[of_goal], data.cell_N[of_goal]
    spread = float(value.std())
    mean_G = cast("FloatArray", columns[f"shift_to_{goal}"])
    columns["effect"] = (mean_G - value.mean()) / spread if spread > 0 else np.full(n_genes, np.nan)
    unit = cell if groups is None else _group_codes(data.cells, groups)[cell]
    columns["ci_low"], columns["ci_high"] = bootstrap_effect_interval(value, gene, unit, n_genes, bootstrap, seed)
    columns["cells"] = np.bincount(gene, minlength=n_genes)
    # A NaN compares as False: a gene without a test is not significant.
    columns["significant"] = cast("FloatArray", columns[f"fdr_{goal}"]) < fdr_level

    table = pd.DataFrame(columns)
    table = table[table["cells"] > 0]
    # The gene comes last so that equal rows have one order, whatever the order of the input.
    order = ["significant", f"shift_to_{goal}", f"fdr_{goal}", "gene"]
    return table.sort_values(order, ascending=[False, False, True, True]).reset_index(drop=True)


def rank_sum_against_pool(value_N: FloatArray, gene_N: CodeArray, n_genes: int) -> FloatArray:
    """Test each gene's values against the pool of all values, for all genes with one sort.

    Parameters
    ----------
    value_N
        Values, shape (N,).
    gene_N
        Code of the gene of each value, shape (N,), from 0 to n_genes - 1.
    n_genes
        Number of genes, G.

    Returns
    -------
    p-values, shape (G,): what `scipy.stats.ranksums(value_N, values of the gene)` gives, i.e. the two-sided
    normal approximation with average ranks and without a correction for ties or continuity. NaN for a gene
    without values.

    Notes
    -----
    With n values in the pool and m of the gene, a value's average rank among all n + m is its average rank in
    the pool minus 1/2, plus its average rank among the m; the latter sum to m(m + 1)/2, whatever the ties. So
    the Mann-Whitney statistic U is the sum of (rank in the pool - 1/2) over the gene's values, its mean is
    nm/2 and its variance nm(n + m + 1)/12.
    """
    n = value_N.size
    rank_N = np.asarray(stats.rankdata(value_N), dtype=np.float64)
    m_G = np.bincount(gene_N, minlength=n_genes).astype(np.float64)
    u_G = np.bincount(gene_N, weights=rank_N - 0.5, minlength=n_genes)
    with np.errstate(invalid="ignore", divide="ignore"):
        z_G = (u_G - n * m_G / 2) / np.sqrt(n * m_G * (n + m_G + 1) / 12)
    return np.asarray(2 * stats.norm.sf(np.abs(z_G)), dtype=np.float64)


def benjamini_hochberg(p_G: FloatArray) -> FloatArray:
    """Adjust p-values for the false discovery rate (Benjamini and Hochberg 1995); NaN stays NaN."""
    fdr_G = np.full(p_G.shape, np.nan)
    tested = ~np.isnan(p_G)
    if tested.any():
        fdr_G[tested] = stats.false_discovery_control(p_G[tested], method="bh")
    return fdr_G


def _mean_per_gene(value_N: FloatArray, gene_N: CodeArray, n_genes: int) -> FloatArray:
    with np.errstate(invalid="ignore"):
        return np.asarray(
            np.bincount(gene_N, weights=value_N, minlength=n_genes) / np.bincount(gene_N, minlength=n_genes)
        )


def _group_codes(cells: tuple[str, ...], groups: Mapping[str, str]) -> CodeArray:
    """Code of each cell's group, in the groups' sorted order."""
    missing = [cell for cell in cells if cell not in groups]
    if missing:
        got = f"no group for {len(missing)} cells, such as {missing[0]}"
        raise InputError("groups", got, "a group for every cell")
    codes, _ = pd.factorize(pd.Series([groups[cell] for cell in cells], dtype=object), sort=True)
    return codes.astype(np.int64)
