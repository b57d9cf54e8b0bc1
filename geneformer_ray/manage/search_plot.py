"""The picture of a hyper-parameter search: what each searched value scored."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from geneformer_ray.manage.figure_style import (
    BLUE,
    GREY,
    INK,
    PALE,
    TICK,
    VERMILLION,
    dress,
    new_figure,
    require,
    shortened,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["search_plot"]

COLUMNS = 3
FEW_DECADES = 100
WIDEST_STEP = 0.12  # of the way to the next choice, between trials that chose the same


def search_plot(table: pd.DataFrame, names: Sequence[str], metric: str, *, log: Collection[str] = ()) -> Figure:
    """Draw each searched value against the best score of its trial, stopped trials paler than those trained to the end.

    Parameters
    ----------
    table
        A row a trial: ``trial``, ``score``, ``stopped_early``, and a column a searched value.
    names
        The searched values.
    metric
        What the score is.
    log
        The values that were drawn by their exponents.
    """
    require(table, "trial", "score", "stopped_early", *names)
    columns = min(COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    figure, panels = new_figure(max(5.2, 3.9 * columns), 3.5 * rows + 0.6, rows=rows, columns=columns)
    for axes, name in zip(panels, names, strict=False):
        _panel(axes, table, name, log=name in log)
        dress(axes, name, "", metric if axes in panels[::columns] else "")
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    style: dict[str, Any] = {"linestyle": "", "markersize": 8}
    handles = [
        Line2D([], [], marker="o", color=BLUE, label="trained to the end", **style),
        Line2D([], [], marker="o", color=PALE[BLUE], label="stopped early", **style),
        Line2D([], [], marker="D", color=GREY, label="the flags as given", **style),
        Line2D([], [], marker="o", markerfacecolor="none", markeredgecolor=VERMILLION, markeredgewidth=2,
               label="best", **{**style, "markersize": 13}),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper left", ncols=4, frameon=False, fontsize=TICK, labelcolor=INK)
    return figure


def _panel(axes: Axes, table: pd.DataFrame, name: str, *, log: bool) -> None:
    known = table[table[name].notna()]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in known[name])
    x = known[name].astype(float).to_numpy() if numbers else _places(axes, known[name])
    if log and numbers:
        axes.set_xscale("log")
        # Within two decades, the decades alone would be a tick or two.
        subs = (1.0,) if x.max() > FEW_DECADES * x.min() else (1.0, 2.0, 5.0)
        axes.xaxis.set_major_locator(LogLocator(subs=subs))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    elif numbers and all(float(value).is_integer() for value in known[name]):
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    best = table["score"].idxmax()
    for place, (row, trial) in zip(x, known.iterrows(), strict=True):
        marker, size = ("D", 52) if trial["trial"] == 0 else ("o", 48)
        colour = PALE[BLUE] if trial["stopped_early"] else BLUE
        axes.scatter(place, trial["score"], s=size, marker=marker, color=colour, edgecolors="white", zorder=3)
        if row == best:
            axes.scatter(place, trial["score"], s=190, facecolors="none", edgecolors=VERMILLION, linewidths=2, zorder=4)


def _places(axes: Axes, values: pd.Series[Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Put choices beside each other, and trials of one choice a little apart."""
    texts = values.map(lambda value: ",".join(map(str, value)) if isinstance(value, tuple) else str(value))
    choices = sorted(set(texts))
    axes.set_xticks(range(len(choices)), [shortened(choice, 14) for choice in choices], parse_math=False)
    axes.set_xlim(-0.5, len(choices) - 0.5)
    counts = texts.groupby(texts).cumcount() - (texts.map(texts.value_counts()) - 1) / 2
    step = min(WIDEST_STEP, 0.7 / max(1, int(texts.value_counts().max())))
    return (texts.map(choices.index) + step * counts).to_numpy(dtype=np.float64)
