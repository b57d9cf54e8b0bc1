"""The picture of a pretraining: its loss by epoch, and how many hidden genes are named beside a frequency baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter

from geneformer_ray.errors import InputError
from geneformer_ray.manage.figure_style import BLUE, GREY, SKY, TICK, dress, legend_above, new_figure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure

__all__ = ["pretraining_figure"]

# What names hidden genes: what its scores begin with, how it is called, its colour.
NAMED_BY = (
    ("baseline", "frequency baseline", GREY),
    ("before_masked", "model before", SKY),
    ("masked", "model after", BLUE),
)


def pretraining_figure(history: Sequence[Mapping[str, float]], scores: Mapping[str, float]) -> Figure:
    """Draw the loss of training and of held-out cells by epoch, and the shares of hidden genes that are named.

    Parameters
    ----------
    history
        An entry an epoch: ``step``, ``train_loss``, ``validation_loss`` (nats).
    scores
        ``masked_accuracy``, ``masked_top10_accuracy``, the same of the ``baseline`` and, where the training began with
        a model, of that one: ``before_masked_accuracy``, ``before_masked_top10_accuracy``.
    """
    if not history:
        raise InputError("history", "no epoch", "one or more")
    figure, (loss, named) = new_figure(10.4, 4.2, columns=2)
    epochs = [entry["step"] for entry in history]
    for name, label, marker, colour in (
        ("train_loss", "training cells", "o", SKY),
        ("validation_loss", "held-out cells", "^", BLUE),
    ):
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.8, "label": label}
        loss.plot(epochs, [entry[name] for entry in history], **style)
    dress(loss, "Loss at masked genes", "epoch", "cross entropy (nats)")
    loss.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_above(loss, None)
    shown = [each for each in NAMED_BY if f"{each[0]}_accuracy" in scores]
    width = 0.8 / len(shown)
    for number, (front, label, colour) in enumerate(shown):
        places = np.arange(2) + (number - (len(shown) - 1) / 2) * width
        bars = named.bar(
            places,
            [scores[f"{front}_accuracy"], scores[f"{front}_top10_accuracy"]],
            width=0.92 * width, color=colour, label=label,
        )  # fmt: skip
        named.bar_label(bars, fmt=lambda share: f"{share:.2%}", fontsize=TICK)
    dress(named, "Hidden genes of held-out cells", "", "named")
    named.set_xticks([0, 1], ["named first", "among the ten named first"], fontsize=TICK)
    named.yaxis.set_major_formatter(PercentFormatter(1.0))
    legend_above(named, None)
    return figure
