"""The picture of a training: loss and macro F1 as they went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import MaxNLocator

from geneformer_ray.errors import InputError
from geneformer_ray.manage.figure_style import CYCLE, MARKERS, POOLING_COLOURS, dress, legend_above, new_figure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

__all__ = ["TrainingCurve", "training_curves"]


@dataclass(frozen=True)
class TrainingCurve:
    """What one fine-tuning run logged.

    Parameters
    ----------
    name
        The run's name in the legend: its pooling.
    steps, losses
        Optimiser steps and the training loss (cross entropy, nats) logged at each.
    epochs, macro_f1
        Epochs and the validation macro F1 (0 to 1) after each.
    """

    name: str
    steps: Sequence[float]
    losses: Sequence[float]
    epochs: Sequence[float]
    macro_f1: Sequence[float]


def training_curves(curves: Sequence[TrainingCurve]) -> Figure:
    """Draw training loss by step and validation macro F1 by epoch, one line a run.

    Raises
    ------
    InputError
        There is no curve.
    """
    if not curves:
        raise InputError("curves", "none", "one curve or more")
    figure, (loss, score) = new_figure(10.4, 4.2, columns=2)
    for index, curve in enumerate(curves):
        colour = POOLING_COLOURS.get(curve.name, CYCLE[(index + 3) % len(CYCLE)])
        style: dict[str, Any] = {"color": colour, "linewidth": 1.8, "label": curve.name}
        loss.plot(curve.steps, curve.losses, **style)
        score.plot(curve.epochs, curve.macro_f1, marker=MARKERS[index % len(MARKERS)], markersize=5, **style)
    dress(loss, "Training loss", "step", "cross entropy (nats)")
    dress(score, "Validation macro F1", "epoch", "macro F1")
    loss.set_ylim(bottom=0)
    score.set_ylim(0, 1.03)
    score.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_above(loss, None)
    legend_above(score, None)
    return figure
