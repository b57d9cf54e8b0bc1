"""The report of a screen's statistics: pictures as PNG files, and one self-contained HTML page with all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from geneformer_ray.data import storage
from geneformer_ray.manage.affected_genes_plot import CELLS_OF_A_PAIR, affected_heat_map
from geneformer_ray.manage.report import KeyFigure, Picture, Section, Table, write_report
from geneformer_ray.manage.shift_plots import ranked_bars, volcano
from geneformer_ray.manage.violin_plot import GENES, violin_by_group

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from geneformer_ray.manage.shift_plots import Measure

__all__ = ["write_screen_report"]

ROWS_SHOWN = 50
NOT_A_FINDING = (
    "A shift is what a model predicts, not a finding: it depends on the cells, the model and the layer that is read. "
    "Look for genes on which donors and models agree, then test them in the laboratory."
)


def write_screen_report(
    output: str,
    *,
    title: str,
    lead: str,
    table: pd.DataFrame,
    measure: Measure,
    facts: Mapping[str, str],
    values: pd.DataFrame | None = None,
    of_cells: Measure | None = None,
    group: str = "group",
    pairs: pd.DataFrame | None = None,
    symbols: Mapping[str, str] | None = None,
    figures: Sequence[KeyFigure] = (),
    parts: Sequence[Section] = (),
) -> dict[str, str]:
    """Write ``OUTPUT/report.html``, and its pictures in ``OUTPUT/figures``.

    Parameters
    ----------
    output
        The statistics' output: a path or URI.
    title, lead
        Heading of the page, and what was compared, in a sentence or two.
    table
        A row for each perturbed gene: `gene`, `symbol`, the measure's columns; where there, `cells` and `significant`.
    measure
        What genes are ranked by. Where it has false discovery rates, there is a volcano.
    facts
        How the table was made, name -> value: what a reader needs to make it again.
    values
        `gene`, `value` as in the table of cell shifts and, where cells have groups, `group`: for the violins. Genes
        other than the strongest are passed over; `measure.strongest` tells which those are.
    of_cells
        What a cell's value is, where it is another number than a gene's: `measure` by default.
    group
        What a group is: "donor".
    pairs
        `perturbed`, `affected`, `mean` (cosine similarity), `count` (cells): for the heat map.
    symbols
        Gene -> symbol, of affected genes too.
    figures, parts
        Key figures and sections of one kind of screen; these come behind the ranked genes.

    Returns
    -------
    ``report`` and the stem of each picture -> its path. There is no picture of what there is no number of.
    """
    symbols = {**(symbols or {}), **dict(zip(table["gene"], table["symbol"], strict=True))}
    strongest = table["gene"].to_numpy()[measure.strongest(table, len(table))].tolist()
    sections = [
        _volcano(table, measure),
        _ranked(table, measure),
        *parts,
        _spread(values, strongest, of_cells or measure, symbols, group),
        _affected(pairs, strongest, symbols),
        _rows(table),
        _how(facts),
    ]
    written = write_report(
        storage.join(output, "report.html"),
        title=title,
        lead=lead,
        summary=[*_key_figures(table, measure), *figures],
        sections=[section for section in sections if section is not None],
        pictures=storage.join(output, "figures"),
    )
    return {path.rsplit("/", 1)[-1].rsplit(".", 1)[0]: path for path in written}


def _key_figures(table: pd.DataFrame, measure: Measure) -> list[KeyFigure]:
    figures = [KeyFigure("Perturbed genes", f"{len(table):,}")]
    if "significant" in table:
        figures.append(KeyFigure("Significant", f"{int(table['significant'].sum()):,}", "by false discovery rate"))
    for row in measure.strongest(table, 1).tolist():
        value = float(measure.values(table)[row])
        figures.append(KeyFigure("Strongest", str(table["symbol"].iloc[row]), f"{measure.label}: {value:.3g}"))
    return figures


def _volcano(table: pd.DataFrame, measure: Measure) -> Section | None:
    title = "Volcano plot"
    if not measure.fdr:
        return None
    if table[[measure.column, measure.fdr]].dropna().empty:
        return Section(title, "No gene has a false discovery rate: there were too few values to test.")
    alt = f"Scatter plot of {measure.label} against the false discovery rate, one point a perturbed gene"
    return Section(title, figure=Picture(volcano(table, measure), alt, "The strongest genes are named."))


def _ranked(table: pd.DataFrame, measure: Measure) -> Section | None:
    if not np.isfinite(measure.values(table)).any():
        return Section("Ranked genes", "No gene has a value.")
    alt = f"Bars of {measure.label}, the strongest genes in each direction"
    return Section("Ranked genes", figure=Picture(ranked_bars(table, measure), alt), note=NOT_A_FINDING)


def _spread(
    values: pd.DataFrame | None, strongest: list[str], measure: Measure, symbols: Mapping[str, str], group: str
) -> Section | None:
    if values is None or values[values["gene"].isin(strongest)].dropna().empty:
        return None
    if measure.similarity:
        values = values.assign(value=1 - values["value"])
    by = f", by {group}" if "group" in values else ""
    label = measure.label.replace("mean ", "")
    figure = violin_by_group(values, strongest, label, symbols=symbols, group=group)
    caption = (
        f"The {GENES} strongest genes at most, each on its own scale. In brackets: cells; where they are few, each is "
        "a point. The line is the median."
    )
    return Section("Spread over cells", figure=Picture(figure, f"Violins of {label} over cells{by}", caption))


def _affected(pairs: pd.DataFrame | None, strongest: list[str], symbols: Mapping[str, str]) -> Section | None:
    if pairs is None or pairs["mean"].dropna().empty:
        return None
    return Section(
        "Affected genes",
        "How far the other genes of a cell change when one is perturbed, at the layer that was read.",
        figure=Picture(
            affected_heat_map(pairs, strongest, symbols=symbols),
            "Heat map of 1 minus mean cosine similarity, perturbed by affected genes",
            f"Columns: the genes that change most over all rows. Grey: fewer than {CELLS_OF_A_PAIR} cells hold both.",
        ),
    )


def _rows(table: pd.DataFrame) -> Section:
    shown = table.head(ROWS_SHOWN)
    same = (table["gene"].astype(str) == table["symbol"].astype(str)).all()
    shown = shown[["symbol", *([] if same else ["gene"]), *shown.columns.drop(["gene", "symbol"])]]
    which = "All" if len(shown) == len(table) else f"The first {ROWS_SHOWN} of"
    caption = f"{which} {len(table):,} rows; statistics.csv beside this page holds every digit."
    return Section("Table", table=Table(shown, caption))


def _how(facts: Mapping[str, str]) -> Section:
    frame = pd.DataFrame({"what": list(facts), "value": [str(value) for value in facts.values()]})
    return Section("How it was made", table=Table(frame, "What determines the numbers above"))
