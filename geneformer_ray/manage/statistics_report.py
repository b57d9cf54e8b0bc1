"""The pictures of each statistical test: which number is drawn, what it is called, and the cells behind it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from geneformer_ray.compute.event_names import join_genes
from geneformer_ray.compute.shift_rows import read_measured_rows
from geneformer_ray.manage.affected_genes_plot import PERTURBED
from geneformer_ray.manage.screen_report import write_screen_report
from geneformer_ray.manage.shift_plots import Measure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pyarrow.dataset as ds

    from geneformer_ray.compute.screen_output import ScreenOutput

__all__ = ["write_statistics_report"]

SUMMARY = "gene_shifts_summary"
JOINER = "+"  # as in the names of the tables
BY_FDR = "false discovery rate by Benjamini and Hochberg."
LEADS = {
    "goal_shift": "Each perturbed gene's shifts towards the goal state, compared with the pool of all genes' shifts: "
    f"two-sided rank-sum test, {BY_FDR}",
    "vs_null": "Each gene's values, compared with those of the same gene in the null screen: two-sided rank-sum test, "
    f"{BY_FDR}",
    "mixture": "Two normal components, fitted to the genes' mean impact, tell genes with impact from those without.",
    "aggregate": "The values of each cell, and what they come to for each gene or set of genes.",
    "gene_shifts": "How far each gene of a cell changes when another is perturbed: the cosine similarity of its "
    "embedding before and after, averaged over cells.",
    "combination": "The effect of perturbing genes together, less the sum of the effects of each alone, in the same "
    f"cells: signed-rank test, {BY_FDR}",
    "concordance": "Genes whose deletion and overexpression move cells in opposite directions.",
}
SCREEN_FACTS = (
    "perturbation", "genes", "gene_sets", "anchor", "combine", "rank_shift", "embedding", "layer", "comparison",
    "state_column", "start", "goal", "alternatives", "filter", "max_cells", "precision", "seed", "cells", "model",
    "vocabulary",
)  # fmt: skip
SIGNS_OF_A_FACT = 160


def write_statistics_report(
    output: str,
    *,
    test: str,
    table: pd.DataFrame,
    screen: ScreenOutput,
    state: str | None,
    options: Mapping[str, Any],
    groups: Mapping[str, str] | None = None,
    group: str = "group",
) -> dict[str, str]:
    """Write ``OUTPUT/report.html`` and ``OUTPUT/figures`` for the ranked table of a test.

    Parameters
    ----------
    output
        The statistics' output.
    test, table
        The test's name, and its ranked table.
    screen, state
        What was tested; no state where it holds similarities.
    options
        The flags of the statistics: what a reader needs to make the table again.
    groups, group
        Group of each cell, and what a group is: "donor".

    Returns
    -------
    ``report`` and the stem of each picture -> its path.
    """
    facts = {f"statistics: {name}": _text(value) for name, value in options.items() if _is_set(value)}
    facts |= {f"screen: {name}": _text(screen.plan[name]) for name in SCREEN_FACTS if _is_set(screen.plan.get(name))}
    told: dict[str, Any] = {"title": f"Screen statistics: {test}", "lead": LEADS[test], "facts": facts}
    told["symbols"] = screen.vocabulary.symbols
    if test == "gene_shifts":
        told |= {"measure": Measure.effect_of("mean"), "pairs": table.rename(columns={"cells": "count"})}
        return write_screen_report(output, table=_by_perturbed(table), **told)
    measure = _measure(test, table, state)
    strongest = table["gene"].to_numpy()[measure.strongest(table, PERTURBED)].tolist()
    return write_screen_report(
        output,
        table=table,
        measure=measure,
        values=_cell_values(screen.table("cell_shifts"), state, strongest, groups),
        of_cells=_of_cells(state),
        group=group,
        pairs=_pairs(screen.table(SUMMARY), strongest) if screen.plan.get(SUMMARY) else None,
        **told,
    )


def _of_cells(state: str | None) -> Measure:
    return Measure.effect_of("similarity") if state is None else Measure.shift_to(state)


def _measure(test: str, table: pd.DataFrame, state: str | None) -> Measure:
    """Say which column of a test's table is drawn."""
    plain = _of_cells(state)
    what = "mean cosine similarity" if state is None else plain.label
    if test == "vs_null":
        return Measure("difference", f"{what}, less the null's", "above the null", "below the null", "fdr")
    if test == "combination":
        return Measure("joint_minus_sum", "joint effect less the sum of the single ones", "more", "less", "fdr")
    if test == "concordance":
        first = next(name for name in table.columns if name.startswith("shift_"))
        return replace(plain, column=first, label=f"{plain.label}, {first.removeprefix('shift_')}", fdr="")
    if test == "aggregate":
        return replace(plain, column="mean", fdr="")
    return plain if plain.fdr in table.columns else replace(plain, fdr="")


def _cell_values(
    shifts: ds.Dataset, state: str | None, genes: Sequence[str], groups: Mapping[str, str] | None
) -> pd.DataFrame:
    """Read the value of each cell for some genes."""
    rows = read_measured_rows(shifts, state, None)
    names = np.array(rows.genes, dtype=object)
    keep = np.isin(rows.gene_N, np.flatnonzero(np.isin(names, list(genes))))
    values = pd.DataFrame({"gene": names[rows.gene_N[keep]], "value": rows.value_N[keep]})
    if groups is not None:
        values["group"] = [groups[rows.cells[cell]] for cell in rows.cell_N[keep].tolist()]
    return values


def _pairs(summary: ds.Dataset, perturbed: Sequence[str]) -> pd.DataFrame | None:
    """Read the pairs of some perturbed genes; of a whole screen there may be hundreds of millions."""
    parts: list[pd.DataFrame] = []
    for batch in summary.to_batches(columns=["genes", "affected", "mean", "count"]):
        names = join_genes(batch.column("genes"), JOINER)
        part = batch.filter(pc.is_in(names, pa.array(perturbed, pa.string())))
        frame = part.select(["affected", "mean", "count"]).to_pandas()
        parts.append(frame.assign(perturbed=join_genes(part.column("genes"), JOINER).to_pylist()))
    return pd.concat(parts, ignore_index=True) if parts else None


def _by_perturbed(pairs: pd.DataFrame) -> pd.DataFrame:
    """Average pairs over affected genes, each as often as cells hold it: a row a perturbed gene, most changed first."""
    weighted = pairs.assign(weighted=pairs["mean"] * pairs["cells"])
    sums = weighted.groupby("perturbed", sort=True, observed=True).agg(
        symbol=("perturbed_symbol", "first"), total=("weighted", "sum"), held=("cells", "sum"), cells=("cells", "max")
    )
    table = sums.assign(mean=sums["total"] / sums["held"]).rename_axis("gene").reset_index()
    ordered: pd.DataFrame = table[["gene", "symbol", "mean", "cells"]].sort_values(["mean", "gene"], ignore_index=True)
    return ordered


def _is_set(value: object) -> bool:
    return value is not None and value is not False and value not in ("", (), [], {})


def _text(value: Any) -> str:
    if isinstance(value, dict):
        text = "; ".join(f"{key}={_text(one)}" for key, one in value.items())
    else:
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if len(text) <= SIGNS_OF_A_FACT else f"{text[:SIGNS_OF_A_FACT]}\N{HORIZONTAL ELLIPSIS}"
