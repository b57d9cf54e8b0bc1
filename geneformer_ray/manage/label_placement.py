"""Names beside points of a scatter plot, placed so that they do not cover one another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
from matplotlib.transforms import Bbox

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from numpy.typing import NDArray

__all__ = ["place_labels"]

DISTANCES = (7, 13, 20, 30, 42, 56, 72)  # points
ANGLES = np.deg2rad(np.arange(0, 360, 30))
GAP = 2.0  # pixels around a name
# What a position costs, in points of distance from its own gene.
COST_OF_OVERLAP, COST_OF_COVERED_POINT = 10_000.0, 6.0
# A name that touches another named point would seem to be that point's.
COST_OF_AMBIGUITY, AMBIGUOUS = 200.0, 6.0  # points; pixels


def place_labels(
    axes: Axes,
    xy_N2: NDArray[np.float64],
    chosen: Sequence[int] | NDArray[np.intp],
    names: Sequence[str] | NDArray[np.object_],
    *,
    fontsize: float,
    colour: str,
) -> list[Annotation]:
    """Name some points, each with a thin line to its point.

    One name after the other takes the cheapest of the positions around its point: near, inside the axes,
    clear of the names before it, and over few points. Call it last: it fixes the figure's layout, on which
    the positions depend.

    Parameters
    ----------
    axes
        Axes of a figure with an Agg canvas.
    xy_N2
        All points of the plot, data coordinates, shape (N, 2).
    chosen
        Rows of the points to name, the most important first.
    names
        Their names, written as they are, without math mode.
    fontsize, colour
        Of the names.

    Returns
    -------
    The annotations, in the order of `chosen`.
    """
    figure = cast("Figure", axes.get_figure(root=True))
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    canvas: Any = figure.canvas
    renderer = canvas.get_renderer()
    pixels_per_point = figure.dpi / 72
    point_N2 = axes.transData.transform(xy_N2) if len(xy_N2) else np.empty((0, 2))
    frame = axes.get_window_extent(renderer)
    named_M2 = point_N2[np.asarray(chosen, dtype=int)]
    placed: list[Bbox] = []
    annotations = []
    for row, name in zip(chosen, names, strict=True):
        annotation = axes.annotate(
            str(name),
            (float(xy_N2[row, 0]), float(xy_N2[row, 1])),
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=fontsize,
            color=colour,
            parse_math=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6, "shrinkA": 0},
        )
        extent = annotation.get_window_extent(renderer)
        half = np.array([extent.width, extent.height]) / 2
        best_cost, best_offset, best_box = np.inf, np.zeros(2), extent
        for distance in DISTANCES:
            for angle in ANGLES:
                direction = np.array([np.cos(angle), np.sin(angle)])
                # From the point to the name's nearest edge, so that long names are not nearer than short
                # ones.
                offset = direction * (distance * pixels_per_point + half)
                low, high = point_N2[row] + offset - half - GAP, point_N2[row] + offset + half + GAP
                box = Bbox([low, high])
                clashes = sum(box.overlaps(other) for other in placed)
                outside = not (frame.contains(*low) and frame.contains(*high))
                covered = int(((point_N2 > low) & (point_N2 < high)).all(axis=1).sum())
                near = (named_M2 > low - AMBIGUOUS) & (named_M2 < high + AMBIGUOUS)
                ambiguous = int((near.all(axis=1) & (named_M2 != point_N2[row]).any(axis=1)).sum())
                cost = distance + COST_OF_OVERLAP * (clashes + outside)
                cost += COST_OF_COVERED_POINT * covered + COST_OF_AMBIGUITY * ambiguous
                if cost < best_cost:
                    best_cost, best_offset, best_box = cost, offset, box
        annotation.set_position(tuple(best_offset / pixels_per_point))
        placed.append(best_box)
        annotations.append(annotation)
    return annotations
