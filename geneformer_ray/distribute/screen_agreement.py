"""How far a verified screen's estimates agree with what was measured exactly, and what both cost."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from geneformer_ray.compute.verification import ControlCells, control_genes_statement, warning_of
from geneformer_ray.compute.verified_shifts import exact_values, rows_of, single_genes
from geneformer_ray.data.shards import read_shard
from geneformer_ray.distribute.screen_merge import merge_items, read_exact
from geneformer_ray.distribute.screen_tables import CELL_SHIFTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from geneformer_ray.distribute.screen import Screen
    from geneformer_ray.distribute.screen_totals import ScreenTotals

__all__ = ["control_cells", "cost_statement", "verification_statement"]


def control_cells(estimates: Screen, exact: Screen, goal: str, measures: Sequence[str]) -> dict[str, ControlCells]:
    """Read what was estimated and what was measured of the control cells; measures without a cell are left out.

    Parameters
    ----------
    estimates, exact
        The screens, both done.
    goal, measures
        The state, and the measures, of the values that are compared.
    """
    parts = []
    for item in merge_items(estimates.items, {exact.output: exact.items}, {}):
        measured = read_exact(item["exact"])
        if measured is not None:
            table = read_shard(estimates.output, CELL_SHIFTS, item["item"])
            table = table.filter(pc.is_in(table["cell_id"], value_set=measured["cell_id"].unique()))
            parts.append(table.append_column("measured", pa.array(exact_values(table, measured))))
    if not parts:
        return {}
    both = pa.concat_tables(parts).combine_chunks()
    found = {}
    for measure in measures:
        rows = both.filter(pc.and_(rows_of(both, measure, goal), pc.is_finite(both["measured"])))
        if rows.num_rows:
            codes = [pc.dictionary_encode(rows["cell_id"].combine_chunks()), pc.dictionary_encode(single_genes(rows))]
            cell_N, gene_N = (one.indices.to_numpy() for one in codes)
            exact_N, estimate_N = rows["measured"].to_numpy(), rows["value"].to_numpy()
            found[measure] = ControlCells(cell_N, gene_N, exact_N, estimate_N)
    return found


def verification_statement(
    control: Mapping[str, ControlCells], of_genes: Iterable[Mapping[str, Sequence[float]]], top: int
) -> dict[str, Any]:
    """Say how far estimates agree.

    Parameters
    ----------
    control
        Measure -> the control cells' values.
    of_genes
        What :func:`control_genes_statement` takes.
    top
        How many genes are recalled.

    Returns
    -------
    dict
        ``per_cell`` and ``aggregated`` of the shifts; of what they are made of the same under its name;
        ``control_genes``; and a ``warning`` where first order is not to be trusted. Nothing of what nothing was
        estimated of.
    """
    stated: dict[str, Any] = {}
    for measure, cells in control.items():
        statement = cells.statement(top)
        stated |= statement if measure == "shift" else {measure: statement}
    genes = control_genes_statement(of_genes)
    if genes["genes"]:
        stated["control_genes"] = genes
    warning = warning_of(control, top)
    return stated | ({"warning": warning} if warning else {})


def cost_statement(first: ScreenTotals, exact: Iterable[ScreenTotals], times: int) -> dict[str, float | None]:
    """Say what all stages cost in forward passes, and what part that is of the exact screen's.

    Parameters
    ----------
    first, exact
        What the estimates and the exact screens came to.
    times
        How many times each event is measured.
    """
    passes = math.fsum(part["passes"] for part in first.figures)
    passes += sum(times * (one.counts["events"] + one.cells) for one in exact)
    all_exact = sum(part["exact_passes"] for part in first.figures)
    share = round(passes / all_exact, 4) if all_exact else None
    return {"passes": round(passes, 1), "exact_passes": all_exact, "share_of_exact": share}
