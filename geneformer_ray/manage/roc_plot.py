"""The picture of a cross-validated classifier: its mean ROC curve with the folds', beside the baseline's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from geneformer_ray.compute.gene_scores import mean_over_folds, spread_over_folds
from geneformer_ray.errors import InputError
from geneformer_ray.manage.figure_style import BLUE, GREY, INK, PALE, TICK, VERMILLION, dress, new_figure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["roc_figure"]


def roc_figure(
    folds: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]] = (), title: str = "Gene classes"
) -> Figure:
    """Draw the folds' ROC curves, their mean with a band of one standard deviation, and the baseline's mean.

    Parameters
    ----------
    folds, baseline
        Scores as :func:`geneformer_ray.compute.gene_scores.score_genes` gives them, one a fold (and seed). Curves are
        averaged at equal false positive rates, areas over folds.
    title
        Heading.

    Raises
    ------
    InputError
        No fold has a curve.
    """
    mean = mean_over_folds(folds)
    if mean is None:
        raise InputError("folds", "none with a ROC curve", "one fold or more with genes of two classes")
    figure, (axes,) = new_figure(6.6, 6.0)
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1.2)
    for one in folds:
        if one["roc"] is not None:
            axes.plot(
                one["roc"]["false_positive_rate"], one["roc"]["true_positive_rate"], color=PALE[BLUE], linewidth=0.9
            )
    x, y = mean.curve.false_positives, mean.curve.true_positives
    if mean.deviation is not None:
        low, high = np.maximum(y - mean.deviation, 0), np.minimum(y + mean.deviation, 1)
        axes.fill_between(x, low, high, color=BLUE, alpha=0.15, linewidth=0)
    handles: list[Any] = []
    beside = mean_over_folds(baseline) if baseline else None
    axes.plot(x, y, color=BLUE, linewidth=2.2)
    handles.append(Line2D([], [], color=BLUE, linewidth=2.2, label=f"model, {_area(folds)}"))
    if mean.deviation is not None:
        handles.append(Patch(color=BLUE, alpha=0.15, linewidth=0, label="± 1 standard deviation"))
        handles.append(Line2D([], [], color=PALE[BLUE], linewidth=0.9, label="one fold"))
    if beside is not None:
        axes.plot(
            beside.curve.false_positives, beside.curve.true_positives, color=VERMILLION, linestyle="--", linewidth=1.8
        )
        label = f"baseline, {_area(baseline)}"
        handles.append(Line2D([], [], color=VERMILLION, linestyle="--", linewidth=1.8, label=label))
    handles.append(Line2D([], [], color=GREY, linestyle=":", label="chance"))
    _dress(axes, title, handles)
    return figure


def _area(scores: Sequence[dict[str, Any]]) -> str:
    spread = spread_over_folds(scores)
    deviation = "" if spread["auc_std"] is None else f" ± {spread['auc_std']:.3f}"
    return f"AUC {spread['auc']:.3f}{deviation}"


def _dress(axes: Axes, title: str, handles: list[Any]) -> None:
    dress(axes, title, "false positive rate", "true positive rate")
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(-0.01, 1.02)
    axes.set_aspect("equal")
    # Below the diagonal, where no curve that is better than chance goes.
    legend = axes.legend(
        handles=handles, loc="lower right", frameon=True, framealpha=0.9, edgecolor="none", fontsize=TICK,
        labelcolor=INK,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)
