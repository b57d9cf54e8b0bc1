"""The picture of calibration: how often predictions of some confidence are right."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from geneformer_ray.errors import InputError
from geneformer_ray.manage.figure_style import BLUE, GREY, VERMILLION, dress, legend_above, new_figure

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.figure import Figure

__all__ = ["reliability_diagram"]


def reliability_diagram(calibration: Mapping[str, Any], title: str = "Calibration") -> Figure:
    """Draw accuracy by confidence, and how many cells are of each confidence.

    Parameters
    ----------
    calibration
        As :func:`geneformer_ray.compute.scores.calibration` gives it.
    title
        Heading.

    Raises
    ------
    InputError
        There are no cells.
    """
    bins = [one for one in calibration["bins"] if one["cells"]]
    if not bins:
        raise InputError("calibration", "no cells", "one cell or more")
    figure, (reliability, counts) = new_figure(10.4, 4.6, columns=2)
    for one in bins:
        width = one["high"] - one["low"]
        middle = one["low"] + width / 2
        reliability.bar(middle, one["accuracy"], width * 0.94, color=BLUE)
        # The gap that the error adds up: from what was claimed to what was right.
        reliability.plot([one["confidence"]] * 2, [one["accuracy"], one["confidence"]], color=VERMILLION, linewidth=1.8)
        reliability.plot(one["confidence"], one["confidence"], "o", color=VERMILLION, markersize=3.5)
        counts.bar(middle, one["cells"], width * 0.94, color=BLUE)
    reliability.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1.2)
    dress(reliability, title, "confidence (probability of the predicted type)", "share of cells predicted right")
    reliability.set_ylim(0, 1.03)
    dress(counts, "Cells by confidence", "confidence", "cells")
    for axes in (reliability, counts):
        axes.set_xlim(0, 1)
        axes.grid(visible=False, axis="x")
    error, brier = calibration["expected_calibration_error"], calibration["brier_score"]
    figures = f"calibration error {error:.3f} ({len(calibration['bins'])} bins), Brier score {brier:.3f}"
    legend_above(counts, [Line2D([], [], linestyle="", label=figures)])
    counts.yaxis.set_major_locator(MaxNLocator(integer=True))
    handles = [
        Patch(color=BLUE, label="accuracy"),
        Line2D([], [], color=VERMILLION, marker="o", markersize=3.5, label="gap to confidence"),
        Line2D([], [], color=GREY, linestyle="--", label="perfect"),
    ]
    legend_above(reliability, handles)
    return figure
