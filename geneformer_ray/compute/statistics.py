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

from geneformer_ray.compute.bootstrap import bootstrap_effect_interval, group_codes, resampling_units
from geneformer_ray.compute.rank_share import rank_parts
from geneformer_ray.compute.rank_tests import benjamini_hochberg, mean_per_gene, rank_sum_against_pool
from geneformer_ray.compute.shift_rows import check_measure, mean_column, read_shift_rows, states_of
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pyarrow as pa
    import pyarrow.dataset as ds
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]
    CodeArray = NDArray[np.int64]

__all__ = ["goal_shift_table", "sign_consistency"]


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
    measure: str = "shift",
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
        string, `state` string, `value` float (difference of cosine similarities, no unit). Rows of other measures
        are left aside. At most one row for the same cell, genes and state; the order of rows
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
    measure
        What is ranked: `shift`, or of a decomposed screen `shift_gene` (the gene's effect with all ranks held) or
        `shift_rank`. The columns of means are named for it: `shift_gene_to_STATE`.

    Returns
    -------
    One row a gene that has values for the goal. Columns: `gene` (for events of several genes: their keys,
    sorted, joined with "+"), `symbol`, then `shift_to_STATE` (mean), `p_STATE`, `fdr_STATE` for goal, start
    and each alternative, then `effect`, `ci_low`, `ci_high` (95 % percentile interval), `cells` (with a value
    for the goal), `significant`, and with groups `sign_consistency` and `groups` (see :func:`sign_consistency`).
    The shifts of a decomposed screen have more columns behind these, which are the same as without them: gene effect
    and rank shift towards the goal (see :func:`geneformer_ray.compute.rank_share.rank_parts`). Those of a screen that
    says which values are exact have `exact_share` last: the share of the gene's values for the goal that are.
    Significant rows come first, then by shift to goal, highest first, then by FDR.

    Raises
    ------
    InputError
        A state has no rows or is named twice, a column or a group is missing, a value is not a finite number,
        or the same cell, genes and state occur twice; or the table lacks the measure.

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
    data = read_shift_rows(shifts, measure=measure, states=states, symbols=symbols)
    rows_per_state = np.bincount(data.state_N, minlength=len(states))
    for (field, state), rows in zip(named, rows_per_state, strict=True):
        if rows == 0:
            check_measure(shifts, measure)
            known = ", ".join(states_of(shifts, measure)) or f"none: no row has the measure {measure!r}"
            raise InputError(field, repr(state), f"a state of the table ({known})")

    n_genes = len(data.genes)
    columns: dict[str, object] = {"gene": list(data.genes), "symbol": list(data.symbols)}
    for code, state in enumerate(states):
        of_state = data.state_N == code
        value, gene = data.value_N[of_state], data.gene_N[of_state]
        p_G = rank_sum_against_pool(value, gene, n_genes)
        columns[mean_column(measure, state)] = mean_per_gene(value, gene, n_genes)
        columns[f"p_{state}"] = p_G
        columns[f"fdr_{state}"] = benjamini_hochberg(p_G)

    of_goal = data.state_N == 0
    value, gene, cell = data.value_N[of_goal], data.gene_N[of_goal], data.cell_N[of_goal]
    spread = float(value.std())
    mean_G = cast("FloatArray", columns[mean_column(measure, goal)])
    columns["effect"] = (mean_G - value.mean()) / spread if spread > 0 else np.full(n_genes, np.nan)
    unit = resampling_units(data.cells, groups)[cell]
    columns["ci_low"], columns["ci_high"] = bootstrap_effect_interval(value, gene, unit, n_genes, bootstrap, seed)
    columns["cells"] = np.bincount(gene, minlength=n_genes)
    # A NaN compares as False: a gene without a test is not significant.
    columns["significant"] = cast("FloatArray", columns[f"fdr_{goal}"]) < fdr_level
    if groups is not None:
        group = group_codes(data.cells, groups)[cell]
        columns["sign_consistency"], columns["groups"] = sign_consistency(value, gene, group, n_genes)
    if measure == "shift":
        columns |= rank_parts(shifts, data, goal, cast("NDArray[np.bool_]", columns["significant"]), fdr_level)
    if data.exact_N is not None:
        columns["exact_share"] = mean_per_gene(data.exact_N[of_goal].astype(np.float64), gene, n_genes)

    table = pd.DataFrame(columns)
    table = table[table["cells"] > 0]
    # The gene comes last so that equal rows have one order, whatever the order of the input.
    order = ["significant", mean_column(measure, goal), f"fdr_{goal}", "gene"]
    return table.sort_values(order, ascending=[False, False, True, True]).reset_index(drop=True)


def sign_consistency(
    value_N: FloatArray, gene_N: CodeArray, group_N: CodeArray, n_genes: int
) -> tuple[FloatArray, CodeArray]:
    """Say in which share of the groups each gene's mean has the sign that it has over all cells.

    Parameters
    ----------
    value_N, gene_N, group_N
        Values, and the codes of their gene and group, each of shape (N,).
    n_genes
        Number of genes, G.

    Returns
    -------
    The share, shape (G,), NaN where the mean over all cells is zero or there are no values; and the number of groups
    that have values of the gene, shape (G,).
    """
    n_groups = int(group_N.max()) + 1 if group_N.size else 0
    pair_N = gene_N * n_groups + group_N
    pair_P, code_N = np.unique(pair_N, return_inverse=True)  # the pairs that occur: groups may be many
    gene_P = pair_P // max(n_groups, 1)
    groups_G = np.bincount(gene_P, minlength=n_genes)
    sign_G = np.sign(mean_per_gene(value_N, gene_N, n_genes))
    alike_P = np.sign(mean_per_gene(value_N, code_N, pair_P.size)) == sign_G[gene_P]
    with np.errstate(invalid="ignore"):
        share_G = np.bincount(gene_P, weights=alike_P, minlength=n_genes) / groups_G
    return np.where(sign_G == 0, np.nan, share_G), groups_G
