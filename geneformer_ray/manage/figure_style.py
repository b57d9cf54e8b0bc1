"""The one look of all figures: colours, sizes, and how axes are dressed.

Everything is set on the artists themselves, never through matplotlib's global settings: a reader's
`matplotlibrc` does not change a report, and threads may draw at once. Names come from data, so none of them
is read as TeX mathematics.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "BLUE",
    "CYCLE",
    "FAINT",
    "GREEN",
    "GREY",
    "INK",
    "LABEL",
    "LIGHT",
    "MARKERS",
    "NOTE",
    "OLIVE",
    "ORANGE",
    "PALE",
    "POOLING_COLOURS",
    "PURPLE",
    "SKY",
    "TICK",
    "TITLE",
    "VERMILLION",
    "dress",
    "legend_above",
    "legend_beside",
    "new_figure",
]

# Okabe and Ito's palette, told apart with the common colour vision deficiencies; its yellow, darkened for
# white paper.
BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, OLIVE = "#E69F00", "#56B4E9", "#A6940A"
CYCLE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, OLIVE)
# Beyond seven categories colours repeat with another marker, so that no two categories look alike.
MARKERS = ("o", "^", "s", "D", "P", "X")
POOLING_COLOURS = {"first_gene": BLUE, "cls": VERMILLION, "mean": GREEN}
PALE = {BLUE: "#9CC9E5", VERMILLION: "#F2BF99"}
INK, GREY, FAINT, LIGHT = "#222222", "#767676", "#B5B5B5", "#D9D9D9"
TITLE, LABEL, TICK, NOTE = 13, 11, 10, 9


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Make a figure of some inches with its axes; the layout keeps every label inside."""
    engine = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(width, height), layout=engine, facecolor="white")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _title(axes: Axes, title: str, pad: float) -> None:
    axes.set_title(title, loc="left", fontsize=TITLE, fontweight="bold", color=INK, pad=pad, parse_math=False)


def dress(axes: Axes, title: str, x: str, y: str) -> None:
    """Give axes the one look of all figures."""
    _title(axes, title, pad=10)
    axes.set_xlabel(x, fontsize=LABEL, color=INK, parse_math=False)
    axes.set_ylabel(y, fontsize=LABEL, color=INK, parse_math=False)
    axes.tick_params(labelsize=TICK, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.grid(visible=True, color=LIGHT, linewidth=0.6, alpha=0.7)
    axes.set_axisbelow(True)


def legend_beside(axes: Axes, handles: list[Any]) -> None:
    """Put the legend to the right of the axes, one entry a line: for many categories."""
    legend = axes.legend(
        handles=handles,
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        fontsize=TICK,
        labelcolor=INK,
        handletextpad=0.3,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def legend_above(axes: Axes, handles: list[Any] | None) -> None:
    """Put the legend in one row between title and axes, where it covers no data."""
    options: dict[str, Any] = {} if handles is None else {"handles": handles}
    count = len(handles if handles is not None else axes.get_legend_handles_labels()[0])
    legend = axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=max(count, 1),
        frameon=False,
        fontsize=TICK,
        labelcolor=INK,
        handlelength=1.4,
        columnspacing=1.4,
        **options,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    _title(axes, axes.get_title(loc="left"), pad=34)
