"""The one look of all figures: colours, sizes, and how axes are dressed.

Everything is set on the artists themselves, never through matplotlib's global settings: a reader's
`matplotlibrc` does not change a report, and threads may draw at once. Names come from data, so none of them
is read as TeX mathematics.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
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
    "require",
    "shortened",
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


def shortened(name: object, at_most: int = 26) -> str:
    """Make a name fit a figure: the middle of a long one is left out, for names of gene sets differ at their ends.

    Characters that the font has no sign for, and line breaks, are replaced; tables hold the name as it is.
    """
    text = " ".join(str(name).split())
    drawn = "".join(sign if ord(sign) in _signs() else "\N{REPLACEMENT CHARACTER}" for sign in text)
    if len(drawn) <= at_most:
        return drawn
    behind = (at_most - 1) // 2
    return f"{drawn[: at_most - 1 - behind]}\N{HORIZONTAL ELLIPSIS}{drawn[-behind:]}"


@cache
def _signs() -> frozenset[int]:
    """Give the code points that the font of all figures can draw."""
    return frozenset(font_manager.get_font(font_manager.findfont(font_manager.FontProperties())).get_charmap())


def require(table: pd.DataFrame, *columns: str) -> None:
    """Check that a table has rows, and these columns."""
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise InputError("table", f"no column {', '.join(missing)}", f"the columns {', '.join(columns)}")
    if table.empty:
        raise InputError("table", "no rows", "one row or more")
