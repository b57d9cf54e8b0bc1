"""The pictures of each statistical test: which number is drawn, what it is called, and the cells behind it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from geneformer_ray.compute.event_names import join_genes
from geneformer_ray.compute.exact_values import exact_sentence
from geneformer_ray.compute.rank_share import rank_of_top, rank_sentence
from geneformer_ray.compute.shift_rows import read_measured_rows
from geneformer_ray.manage.affected_genes_plot import PERTURBED
from geneformer_ray.manage.rank_shift_plot import gene_against_rank
from geneformer_ray.manage.report import KeyFigure, Picture, Section
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
    "state_column", "start", "goal", "alternatives", "ranks", "decompose", "method", "tolerance", "most_cost",
    "held_out", "top", "controls", "control_cells", "filter", "max_cells", "precision", "seed", "cells", "model",
    "vocabulary",
)  # fmt: skip
ALONE = "the shifts are those that genes make alone."
MEASURED = {
    "shift": "",
    "shift_gene": f"With all ranks held: {ALONE}",
    "shift_rank": "The shifts are those that the ranks make: what a deletion does beyond its gene's own effect.",
}
HOW_TO_READ = (
    "A deletion takes a gene away, and moves every gene behind it up by one rank. To the right and left: what the gene "
    "does alone, with all ranks held. Up and down: what the new ranks do, whichever gene it was. In the blue part the "
    "gene's own effect is the larger one."
)
KINDS = (
    "gene: a hit that stays significant with ranks held, in the same direction, and is at least half the gene's own "
    "effect. both: the same, but more than half of it is rank. rank: a hit that is not significant with ranks held, or "
    "moves cells the other way. hidden: no hit, but significant with ranks held. Grey: neither."
)
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
    measure: str = "shift",
    exact: float | None = None,
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
    measure
        Which shifts were tested: `shift`, or one of its parts.
    exact
        The share of the tested values that are exact, where the screen says which are.

    Returns
    -------
    ``report`` and the stem of each picture -> its path.
    """
    facts = {f"statistics: {name}": _text(value) for name, value in options.items() if _is_set(value)}
    facts |= {f"screen: {name}": _text(screen.plan[name]) for name in SCREEN_FACTS if _is_set(screen.plan.get(name))}
    of_rank = rank_of_top(table, state) if state is not None and "rank_share" in table else None
    held = f"All ranks were held: {ALONE}" if screen.plan.get("ranks") == "hold" else MEASURED[measure]
    estimated = exact_sentence(exact, table) if exact is not None else ""
    lead = "\n\n".join(filter(None, (LEADS[test], held, rank_sentence(of_rank) if of_rank else "", estimated)))
    told: dict[str, Any] = {"title": f"Screen statistics: {test}", "lead": lead, "facts": facts}
    told["symbols"] = screen.vocabulary.symbols
    if test == "gene_shifts":
        told |= {"measure": Measure.effect_of("mean"), "pairs": table.rename(columns={"cells": "count"})}
        return write_screen_report(output, table=_by_perturbed(table), **told)
    drawn = _measure(test, table, state, measure)
    strongest = table["gene"].to_numpy()[drawn.strongest(table, PERTURBED)].tolist()
    return write_screen_report(
        output,
        table=table,
        measure=drawn,
        values=_cell_values(screen.table("cell_shifts"), state, strongest, groups, measure),
        of_cells=_of_cells(state, measure),
        group=group,
        pairs=_pairs(screen.table(SUMMARY), strongest) if screen.plan.get(SUMMARY) else None,
        figures=_key_figures(of_rank, exact),
        parts=[_gene_or_rank(table, state, of_rank)] if of_rank and state is not None else [],
        **told,
    )


def _key_figures(of_rank: dict[str, Any] | None, exact: float | None) -> list[KeyFigure]:
    figures = []
    if of_rank and of_rank["rank_share"] is not None:
        which = f"median of the {of_rank['genes']} strongest {'hits' if of_rank['hits'] else 'genes'}"
        figures.append(KeyFigure("Rank shift", f"{of_rank['rank_share']:.0%}", which))
    if exact is not None:
        figures.append(KeyFigure("Exact values", f"{exact:.1%}", "" if exact == 1 else "the others are estimates"))
    return figures


def _gene_or_rank(table: pd.DataFrame, state: str, of_rank: dict[str, Any]) -> Section:
    title = "Gene or rank"
    if of_rank["rank_share"] is None:
        return Section(title, rank_sentence(of_rank))
    alt = f"Left: each gene's own shift to {state} against its rank shift. Right: both parts of the strongest hits"
    picture = Picture(gene_against_rank(table, state), alt, KINDS)
    return Section(title, f"{rank_sentence(of_rank)}\n\n{HOW_TO_READ}", figure=picture)


def _of_cells(state: str | None, measure: str) -> Measure:
    return Measure.effect_of("similarity") if state is None else Measure.shift_to(state, measure)


def _measure(test: str, table: pd.DataFrame, state: str | None, measure: str) -> Measure:
    """Say which column of a test's table is drawn."""
    plain = _of_cells(state, measure)
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
    shifts: ds.Dataset, state: str | None, genes: Sequence[str], groups: Mapping[str, str] | None, measure: str
) -> pd.DataFrame:
    """Read the value of each cell for some genes."""
    rows = read_measured_rows(shifts, state, measure=measure)
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
