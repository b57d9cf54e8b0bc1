"""Genes perturbed together against the same genes perturbed alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from geneformer_ray.compute.bootstrap import bootstrap_mean_interval, resampling_units
from geneformer_ray.compute.paired_rows import codes_in, find_rows
from geneformer_ray.compute.rank_tests import benjamini_hochberg, mean_per_gene, signed_rank_per_gene
from geneformer_ray.compute.shift_rows import read_measured_rows
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pyarrow as pa
    import pyarrow.dataset as ds
    from numpy.typing import NDArray

    from geneformer_ray.compute.shift_rows import ShiftRows

__all__ = ["combination_table"]


def combination_table(
    shifts: pa.Table | ds.Dataset,
    against: pa.Table | ds.Dataset,
    *,
    state: str | None = None,
    symbols: Mapping[str, str] | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    groups: Mapping[str, str] | None = None,
    fdr_level: float = 0.05,
    measure: str = "shift",
) -> pd.DataFrame:
    """Compare the joint effect of genes with the sum of their single effects, cell by cell.

    Shifts add up as they are. Of similarities it is the losses that add up, 1 - similarity, as upstream intends:
    `sum_of_singles` = 1 - ((1 - a) + (1 - b)). A `joint_minus_sum` of zero means that the genes act independently.

    Parameters
    ----------
    shifts
        The `cell_shifts` table of a screen of several genes an event. Events of one gene are left aside.
    against
        The same of a screen of single genes in the same cells. Events of several genes are left aside.
    state
        The state whose shifts are compared; None for the similarities of screens without states.
    symbols
        Symbol of each vocabulary key. A key without one stands for itself.
    bootstrap, seed
        Replicates behind `ci_low` and `ci_high`, and their seed; 0 replicates leave both NaN.
    groups
        Group of each cell: the interval then resamples groups instead of cells. The test takes cells as independent.
    fdr_level
        `significant` is "`fdr` is below this".
    measure
        What is read of screens with states: `shift`, or of decomposed ones `shift_gene` or `shift_rank`.

    Returns
    -------
    One row an event of several genes. Columns: `gene` (their keys, sorted, joined with "+"), `symbol`; where every
    event has two genes, `single_1` and `single_2` in the order of the name; `sum_of_singles`, `joint`,
    `joint_minus_sum` (means over the cells that have the joint value and every single one), `ci_low`, `ci_high` (95 %
    percentile bootstrap interval of `joint_minus_sum`), `p`, `fdr` (signed-rank test of joint - sum in each cell,
    Benjamini-Hochberg), `cells`, `cells_left_out` (those that lack a single value), `significant`. Significant rows
    come first, then by `joint_minus_sum`: of shifts the highest first, of similarities the lowest.

    Raises
    ------
    InputError
        A table is broken, has no such rows, no event of several genes, or no cell has an event's single values.
    """
    rows = read_measured_rows(shifts, state, symbols, measure=measure)
    alone = read_measured_rows(against, state, symbols, "against", measure)
    size_G = np.array([len(genes) for genes in rows.members])
    if size_G.max() < 2:
        raise InputError("shifts", f"single genes such as {rows.genes[0]}", "a screen of several genes an event")
    row_R = np.flatnonzero(size_G[rows.gene_N] > 1)
    event_R, cell_R, joint_R = rows.gene_N[row_R], rows.cell_N[row_R], rows.value_N[row_R]
    single_M, row_M = _single_values(rows, alone, size_G, row_R)
    loss = state is None
    effect_M = 1 - single_M if loss else single_M
    sum_R = np.asarray(np.bincount(row_M, weights=effect_M, minlength=row_R.size), dtype=np.float64)
    whole_R = ~np.isnan(sum_R)
    if not whole_R.any():
        example = rows.genes[event_R[0]]
        got = f"no cell with every single gene of an event, such as {example}"
        raise InputError("against", got, "a screen of those genes alone, in the same cells")
    expected_R = 1 - sum_R if loss else sum_R

    n_events = len(rows.genes)
    event, cell = event_R[whole_R], cell_R[whole_R]
    excess = (joint_R - expected_R)[whole_R]
    unit = resampling_units(rows.cells, groups)[cell]
    p_G = signed_rank_per_gene(excess, event, n_events)
    table = pd.DataFrame({"gene": list(rows.genes), "symbol": list(rows.symbols)})
    if set(size_G[size_G > 1].tolist()) == {2}:
        for number in (0, 1):
            table[f"single_{number + 1}"] = mean_per_gene(single_M[number::2][whole_R], event, n_events)
    table["sum_of_singles"] = mean_per_gene(expected_R[whole_R], event, n_events)
    table["joint"] = mean_per_gene(joint_R[whole_R], event, n_events)
    table["joint_minus_sum"] = mean_per_gene(excess, event, n_events)
    table["ci_low"], table["ci_high"] = bootstrap_mean_interval(excess, event, unit, n_events, bootstrap, seed)
    table["p"], table["fdr"] = p_G, benjamini_hochberg(p_G)
    table["cells"] = np.bincount(event, minlength=n_events)
    table["cells_left_out"] = np.bincount(event_R, minlength=n_events) - table["cells"]
    table["significant"] = table["fdr"] < fdr_level
    table = table[size_G > 1]
    order = ["significant", "joint_minus_sum", "fdr", "gene"]
    return table.sort_values(order, ascending=[False, loss, True, True]).reset_index(drop=True)


def _single_values(
    rows: ShiftRows, alone: ShiftRows, size_G: NDArray[np.int64], row_R: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Give the single value of every gene of every joint row, NaN where there is none, and the row's number.

    Both of shape (M,): the genes of a row side by side, in the order of its name.
    """
    members = [gene for genes in rows.members for gene in genes]
    single = np.array([code for code, genes in enumerate(alone.members) if len(genes) == 1], dtype=np.int64)
    known = codes_in(members, [alone.members[code][0] for code in single])
    # A gene that is not among them has the code -1, which finds the -1 at the end.
    single_of_member = np.append(single, -1)[known]
    start_G = np.cumsum(size_G) - size_G
    size_R = size_G[rows.gene_N[row_R]]
    row_M = np.repeat(np.arange(row_R.size), size_R)
    place_M = np.arange(row_M.size) - np.repeat(np.cumsum(size_R) - size_R, size_R)
    single_M = single_of_member[start_G[rows.gene_N[row_R]][row_M] + place_M]
    cell_M = codes_in(rows.cells, alone.cells)[rows.cell_N[row_R]][row_M]
    found_M = find_rows(alone, single_M, cell_M)
    return np.where(found_M >= 0, alone.value_N[found_M], np.nan), row_M
