"""Is a hit the gene or its rank: each gene's own effect against the shift of the ranks behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from geneformer_ray.compute.shift_rows import mean_column
from geneformer_ray.manage.figure_style import (
    BLUE,
    FAINT,
    GREEN,
    GREY,
    INK,
    NOTE,
    PALE,
    PURPLE,
    TICK,
    VERMILLION,
    dress,
    legend_above,
    new_figure,
    require,
    shortened,
)
from geneformer_ray.manage.label_placement import place_labels
from geneformer_ray.manage.shift_plots import Measure
from geneformer_ray.manage.stretched_axis import DWARFED, MOST, stretch

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

__all__ = ["gene_against_rank"]

# Kinds of hits as `rank_share` names them: what a reader is told, colour, size.
KINDS = {
    "none": ("no hit", FAINT, 12),
    "hidden": ("hidden", PURPLE, 20),
    "rank": ("rank", VERMILLION, 30),
    "both": ("both", GREEN, 30),
    "gene": ("gene", BLUE, 30),
}
TICKS = 7  # more of them stand askew, or they would run into one another


def gene_against_rank(table: pd.DataFrame, state: str, *, top: int = 12, bars: int = 15) -> Figure:
    """Draw each gene's effect against its rank shift, and what the strongest hits are made of.

    Parameters
    ----------
    table
        What `goal_shift_table` makes of a decomposed screen; rows without both parts are left out.
    state
        The goal.
    top, bars
        How many genes are named on the left, and drawn on the right: significant ones first, then by size of shift.

    Raises
    ------
    InputError
        A column is missing, or the table is empty.
    """
    columns = [mean_column(measure, state) for measure in ("shift_gene", "shift_rank")]
    require(table, "symbol", "significant", "hit", "rank_share", mean_column("shift", state), *columns)
    table = table.dropna(subset=columns).reset_index(drop=True)
    require(table, "symbol")
    figure, (points, parts) = new_figure(12.2, 6.2, columns=2)
    strongest = Measure.shift_to(state).strongest(table, max(top, bars))
    _bars(parts, table.iloc[strongest[:bars]], state)
    _points(points, table, state, strongest[:top])
    return figure


def _points(axes: Axes, table: pd.DataFrame, state: str, named: NDArray[np.intp]) -> None:
    gene, rank = (table[mean_column(f"shift_{part}", state)].to_numpy(dtype=float) for part in ("gene", "rank"))
    goal = shortened(state)
    dress(axes, "Gene or rank?", f"shift by the gene alone, to {goal}", f"shift by rank alone, to {goal}")
    handles = []
    for kind, (name, colour, size) in KINDS.items():
        chosen = (table["hit"] == kind).to_numpy()
        if chosen.any():
            label = f"{name} ({np.count_nonzero(chosen):,})"
            dots = axes.scatter(gene[chosen], rank[chosen], s=size, color=colour, linewidths=0, alpha=0.85, label=label)
            handles += [dots] if kind != "none" or len(table) == np.count_nonzero(chosen) else []
    edge = _same_scale(axes, gene, rank)
    # Below the two lines the gene's own effect is the larger part; where gene and rank cancel lies on the falling one.
    line = np.array([-edge, 0.0, edge])
    axes.fill_between(line, -np.abs(line), np.abs(line), color=PALE[BLUE], alpha=0.22, linewidth=0, zorder=0)
    for sign in (1, -1):
        axes.plot(line, sign * line, color=GREY, linewidth=0.8, linestyle="--", zorder=1)
    axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
    axes.axvline(0, color=GREY, linewidth=0.8, zorder=1)
    for x, y, ha, va, text in (
        (0.985, 0.515, "right", "bottom", "mostly the gene"),
        (0.515, 0.985, "left", "top", "mostly its rank"),
        (0.985, 0.985, "right", "top", "both\ntowards"),
        (0.015, 0.015, "left", "bottom", "both\naway"),
        (0.985, 0.015, "right", "bottom", "they\ncancel"),
        (0.015, 0.985, "left", "top", "they\ncancel"),
    ):
        axes.text(x, y, text, transform=axes.transAxes, ha=ha, va=va, fontsize=NOTE, color=GREY, style="italic")
    legend_above(axes, handles)
    names = [shortened(name) for name in table["symbol"].to_numpy()[named]]
    taken_N2 = np.concatenate([np.column_stack([gene, rank]), _under_texts(axes)])
    place_labels(axes, taken_N2, named, names, fontsize=NOTE, colour=INK)


def _under_texts(axes: Axes) -> NDArray[np.float64]:
    """Give points under the words in the axes, data coordinates, shape (points, 2): names keep clear of points."""
    axes.get_figure(root=True).draw_without_rendering()  # type: ignore[union-attr]
    corners = [np.asarray(text.get_window_extent().get_points()) for text in axes.texts]
    grids = [np.meshgrid(*np.linspace(low, high, 8).T) for low, high in corners]
    pixels_N2 = np.concatenate([np.column_stack([x.ravel(), y.ravel()]) for x, y in grids])
    return np.asarray(axes.transData.inverted().transform(pixels_N2))


def _same_scale(axes: Axes, gene: NDArray[np.float64], rank: NDArray[np.float64]) -> float:
    """Give both axes one scale, so that the lines of equal parts are diagonals; give where it ends.

    Where one part dwarfs the other, or a few genes dwarf all, both axes are stretched around zero, by the same.
    """
    both = np.concatenate([gene, rank])
    largest = float(np.abs(both).max())
    edge = 1.12 * largest if largest > 0 else 1.0
    spread = [float(np.quantile(np.abs(part), MOST)) for part in (gene, rank)]
    linear = min((size for size in spread if size > 0), default=0.0)
    if 0 < linear * DWARFED < largest:
        transform = stretch(axes.xaxis, linear, both)
        stretch(axes.yaxis, linear, both)
        edge = float(transform.inverted().transform([1.1 * transform.transform([largest])[0]])[0])
        if len(axes.get_xticks()) > TICKS:
            axes.tick_params(axis="x", labelrotation=45)
    else:
        axes.ticklabel_format(style="sci", scilimits=(-3, 3))
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_offset_text().set_fontsize(NOTE)
    axes.set_xlim(-edge, edge)
    axes.set_ylim(-edge, edge)
    return edge


def _bars(axes: Axes, table: pd.DataFrame, state: str) -> None:
    """Draw both parts of each gene's shift end to end, or either side of zero where they differ in sign."""
    shift = mean_column("shift", state)
    table = table.sort_values(shift, ascending=False, kind="stable")
    for place, row in enumerate(table.to_dict("records")):
        gene, rank = (float(row[mean_column(f"shift_{part}", state)]) for part in ("gene", "rank"))
        axes.barh(place, gene, 0.72, color=BLUE)
        axes.barh(place, rank, 0.72, left=gene if gene * rank > 0 else 0.0, color=VERMILLION)
        axes.plot(float(row[shift]), place, "D", color=INK, markersize=4)
        end = max(gene, rank, gene + rank, 0.0)
        share = float(row["rank_share"])
        if np.isfinite(share):
            axes.annotate(
                f"{share:.0%}", (end, place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=NOTE,
                color=GREY,
            )  # fmt: skip
    names = [shortened(name) for name in table["symbol"]]
    axes.set_yticks(range(len(table)), names, parse_math=False)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.margins(x=0.14)
    axes.set_ylim(max(len(table) - 0.4, 2.6), -0.6)  # downwards; a single bar is no thicker than one of a few
    dress(axes, "What the strongest hits are made of", f"mean shift to {shortened(state)} (cosine)", "")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0, labelsize=TICK)
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-3, 3))
    axes.xaxis.get_offset_text().set_fontsize(NOTE)
    handles = [
        Patch(color=BLUE, label="gene"),
        Patch(color=VERMILLION, label="rank"),
        Line2D([], [], color=INK, marker="D", markersize=4, linestyle="", label="sum"),
        Line2D([], [], linestyle="", label="beside: rank's share"),
    ]
    legend_above(axes, handles)
