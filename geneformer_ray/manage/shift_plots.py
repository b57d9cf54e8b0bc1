"""One number a perturbed gene: the volcano, and the strongest genes as bars."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.patches import Patch

from geneformer_ray.compute.shift_rows import mean_column
from geneformer_ray.manage.figure_style import (
    BLUE,
    FAINT,
    GREY,
    INK,
    LIGHT,
    NOTE,
    PALE,
    VERMILLION,
    dress,
    legend_above,
    new_figure,
    require,
    shortened,
)
from geneformer_ray.manage.label_placement import place_labels
from geneformer_ray.manage.stretched_axis import DWARFED, MOST, stretch

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.scale import AsinhTransform
    from numpy.typing import NDArray

__all__ = ["Measure", "ranked_bars", "volcano"]

LOG_FDR = "\N{MINUS SIGN}log\N{SUBSCRIPT ONE}\N{SUBSCRIPT ZERO} FDR"
SHORT = 12  # signs
MEANS = {
    "shift": "mean shift to",
    "shift_gene": "mean shift by the gene alone to",
    "shift_rank": "mean shift by rank alone to",
}
ONE_MINUS = "1 \N{MINUS SIGN} "


@dataclass(frozen=True)
class Measure:
    """What a table says of each perturbed gene, and how to read it.

    Parameters
    ----------
    column
        Where it stands.
    label
        What it is, for an axis: "mean shift to beta (cosine)".
    above, below
        What values above and below zero are: "towards beta", "away from beta".
    fdr
        The column of false discovery rates; empty where there was no test.
    similarity
        The column holds cosine similarities. They lie so near 1 that no picture of them shows a difference: 1 - them is
        drawn, and `label` says so.
    """

    column: str
    label: str
    above: str = "above 0"
    below: str = "below 0"
    fdr: str = ""
    similarity: bool = False

    @classmethod
    def shift_to(cls, state: str, measure: str = "shift") -> Measure:
        """Give the columns of `goal_shift_table` for a state, of the full shift or of one of its parts."""
        name = shortened(state)
        # The axis says which state it is; twice more would not fit into a legend.
        it = name if len(name) <= SHORT else "it"
        label = f"{MEANS[measure]} {name} (cosine)"
        return cls(mean_column(measure, state), label, f"towards {it}", f"away from {it}", f"fdr_{state}")

    @classmethod
    def effect_of(cls, column: str, fdr: str = "") -> Measure:
        """Give a column of mean cosine similarities between cells before and after the perturbation."""
        label = f"{ONE_MINUS}mean cosine similarity"
        return cls(column, label, "changes the cell", "below 0", fdr, similarity=True)

    def values(self, table: pd.DataFrame) -> NDArray[np.float64]:
        """Give what is drawn, shape (rows,)."""
        values = table[self.column].to_numpy(dtype=float)
        return 1 - values if self.similarity else values

    def strongest(self, table: pd.DataFrame, count: int) -> NDArray[np.intp]:
        """Give the rows to name: significant ones first, then by the size of their value; rows without one are none."""
        values = self.values(table)
        first = table["significant"] if "significant" in table else np.zeros(len(values))
        order = np.lexsort((-np.abs(values), ~np.asarray(first, dtype=bool)))
        return order[np.isfinite(values[order])][:count]


def volcano(table: pd.DataFrame, measure: Measure, top: int = 12) -> Figure:
    """Draw each gene's value against its false discovery rate, and name the strongest genes.

    Parameters
    ----------
    table
        `symbol`, `significant` and the measure's columns; rows without a value or an FDR are left out.
    measure
        What is drawn; it has an FDR.
    top
        How many genes to name: significant ones first, then by the size of their value.

    Raises
    ------
    InputError
        A column is missing, or the table is empty.
    """
    require(table, "symbol", measure.column, measure.fdr, "significant")
    table = table.dropna(subset=[measure.column, measure.fdr])
    x = measure.values(table)
    # An FDR that underflowed to 0 has no logarithm; it is drawn at the smallest one a float64 can hold.
    y = -np.log10(np.maximum(table[measure.fdr].to_numpy(dtype=float), np.finfo(float).tiny))
    y += 0.0  # no minus zero
    significant = table["significant"].to_numpy(dtype=bool)
    figure, (axes,) = new_figure(8.2, 5.4)
    groups = [("not significant", ~significant, FAINT, 12), (measure.above, significant & (x >= 0), BLUE, 26)]
    if not measure.similarity:
        groups.insert(1, (measure.below, significant & (x < 0), VERMILLION, 26))
    for name, chosen, colour, size in groups:
        label = f"{name} ({np.count_nonzero(chosen):,})"
        axes.scatter(x[chosen], y[chosen], s=size, color=colour, linewidths=0, alpha=0.8, label=label)
    axes.axvline(0, color=GREY, linewidth=0.8, zorder=0)
    dress(axes, "Shift of cells by perturbed gene", measure.label, LOG_FDR)
    axes.margins(x=0.12)
    height = max(float(y.max(initial=0.0)), 0.1)
    axes.set_ylim(-0.04 * height, 1.15 * height)
    _few_digits(axes)
    _spread_out(axes.xaxis, x)
    if stretched := _spread_out(axes.yaxis, y):
        height = float(stretched.transform([height])[0])
        axes.set_ylim(*stretched.inverted().transform([-0.04 * height, 1.1 * height]))
    legend_above(axes, None)
    strongest = measure.strongest(table, top)
    names = [shortened(name) for name in table["symbol"].to_numpy()[strongest]]
    place_labels(axes, np.column_stack([x, y]), strongest, names, fontsize=NOTE, colour=INK)
    return figure


def ranked_bars(table: pd.DataFrame, measure: Measure, top: int = 15) -> Figure:
    """Draw the genes with the highest values above zero, and with the lowest below it.

    Parameters
    ----------
    table
        `symbol` and the measure's column; where there, `cells` stands beside each bar, and bars of genes that are not
        `significant` are pale.
    measure
        What is drawn.
    top
        How many genes in each direction; twice as many where all values are on one side.

    Raises
    ------
    InputError
        A column is missing, or the table is empty.
    """
    require(table, "symbol", measure.column)
    ranked = table.assign(value=measure.values(table)).dropna(subset=["value"])
    ranked = ranked.sort_values("value", ascending=False, kind="stable")
    above, below = ranked[ranked["value"] >= 0], ranked[ranked["value"] < 0]
    room = top if len(above) and len(below) else 2 * top
    directions = [(above.head(room), measure.above, BLUE), (below.tail(room), measure.below, VERMILLION)]
    directions = [direction for direction in directions if len(direction[0])]
    longest = max((len(shortened(name)) for part, _, _ in directions for name in part["symbol"]), default=0)
    figure, (axes,) = new_figure(6.6 + 0.085 * longest, 2.0 + 0.27 * (sum(len(part) for part, _, _ in directions) + 1))
    place = 0
    ticks: list[tuple[int, str]] = []
    for part, _, colour in directions:
        tested = part["significant"] if "significant" in part else np.ones(len(part), dtype=bool)
        for symbol, value, significant in zip(part["symbol"], part["value"], tested, strict=True):
            axes.barh(place, value, 0.72, color=colour if significant else PALE[colour])
            ticks.append((place, shortened(symbol)))
            place += 1
        if "cells" in part:
            for at, (value, cells) in enumerate(zip(part["value"], part["cells"], strict=True), place - len(part)):
                _write_beside(axes, f"{cells:,}", value, at)
        place += 1  # a gap between the directions
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], parse_math=False)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.margins(x=0.1)
    axes.set_ylim(max(place - 1.4, 2.6), -0.6)  # downwards; a single bar is no thicker than one of a few
    beside = "; beside each bar: cells" if "cells" in table else ""
    dress(axes, "Strongest effects by perturbed gene", f"{measure.label}{beside}", "")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    _few_digits(axes)
    handles = [Patch(color=colour, label=name) for _, name, colour in directions]
    if "significant" in ranked and not ranked["significant"].all():
        handles.append(Patch(color=LIGHT, label="pale: not significant"))
    if len(handles) > 1:
        legend_above(axes, handles)
    return figure


def _write_beside(axes: Axes, text: str, value: float, place: float) -> None:
    """Write beyond a bar's end, so that the number is never on the bar."""
    axes.annotate(
        text,
        (value, place),
        xytext=(4 if value > 0 else -4, 0),
        textcoords="offset points",
        ha="left" if value > 0 else "right",
        va="center",
        fontsize=NOTE,
        color=GREY,
    )


def _spread_out(axis: Axis, values: NDArray[np.float64]) -> AsinhTransform | None:
    """Where a few values dwarf all others, stretch an axis around zero: linear there, logarithmic further out."""
    size = np.abs(values)
    most, largest = (float(np.quantile(size, MOST)), float(size.max())) if size.size else (0.0, 0.0)
    if not 0 < most * DWARFED < largest:
        return None
    return stretch(axis, most, values)


def _few_digits(axes: Axes) -> None:
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-3, 3))
    axes.xaxis.get_offset_text().set_fontsize(NOTE)
