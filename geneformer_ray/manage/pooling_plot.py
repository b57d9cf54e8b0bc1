"""The figure of the pooling study: scores with every seed, and paired differences with their intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.lines import Line2D

from geneformer_ray.manage.figure_style import GREY, INK, LABEL, NOTE, POOLING_COLOURS, dress, new_figure
from geneformer_ray.manage.pooling_study import BASELINE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from geneformer_ray.manage.pooling_study import Findings

__all__ = ["pooling_study_figure"]

METRICS = {"macro_f1": "macro F1", "accuracy": "accuracy"}
MINUS = "\N{MINUS SIGN}"


def pooling_study_figure(findings: Findings) -> Figure:
    """Draw macro F1 and accuracy by pooling, and paired differences of macro F1, all on the reporting cells.

    Dots are trials (seeds, and folds), diamonds their mean, bars the 95 % interval over cells; the dashed line is
    the baseline.
    """
    figure, (first, second, third) = new_figure(12.5, 4.2, columns=3)
    for axes, metric in ((first, "macro_f1"), (second, "accuracy")):
        _scores(axes, findings, metric)
    _differences(third, findings)
    figure.legend(
        handles=[
            Line2D([], [], linestyle="", marker="o", color=GREY, markersize=4, label=_one_trial(findings)),
            Line2D([], [], marker="D", color=INK, markersize=6, label="mean, 95 % interval over cells"),
            Line2D([], [], color=GREY, linestyle="--", label="baseline: PCA + logistic regression"),
        ],
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=LABEL,
        labelcolor=INK,
    )
    return figure


def _one_trial(findings: Findings) -> str:
    return "one seed" if findings.trials["fold"].isna().all() else "one seed and fold"


def _scores(axes: Axes, findings: Findings, metric: str) -> None:
    scores = findings.scores[(findings.scores["metric"] == metric) & (findings.scores["role"] == "reporting")]
    trials = findings.trials[findings.trials["role"] == "reporting"]
    for place, row in enumerate(scores.to_dict("records")):
        colour = POOLING_COLOURS[row["pooling"]]
        values = trials.loc[trials["pooling"] == row["pooling"], metric].to_numpy(dtype=float)
        beside = place - 0.16 + _beside(values, 0.12)
        axes.scatter(beside, values, s=16, color=colour, alpha=0.7, linewidths=0, zorder=3)
        axes.vlines(place + 0.14, row["ci_low"], row["ci_high"], color=colour, linewidth=1.8)
        axes.scatter([place + 0.14], [row["mean"]], s=46, marker="D", color=colour, zorder=3)
        # Right of its mark, where no dot of a trial lies.
        axes.annotate(
            f"{row['mean']:.3f}", (place + 0.14, row["mean"]), xytext=(7, 0), textcoords="offset points",
            fontsize=NOTE, color=INK, va="center",
        )  # fmt: skip
    axes.axhline(scores["baseline"].iloc[0], color=GREY, linestyle="--", linewidth=1.2, zorder=1)
    axes.set_xticks(range(len(scores)), scores["pooling"].tolist(), parse_math=False)
    axes.set_xlim(-0.6, len(scores) - 0.3)
    dress(axes, METRICS[metric].capitalize().replace("f1", "F1"), "", "reporting cells")
    axes.grid(visible=False, axis="x")
    axes.tick_params(axis="x", length=0, labelsize=LABEL)


def _differences(axes: Axes, findings: Findings) -> None:
    table = findings.differences[findings.differences["metric"] == "macro_f1"]
    trials = findings.trials[findings.trials["role"] == "reporting"]
    names = []
    for place, row in enumerate(table.to_dict("records")):
        colour = INK if row["told_apart"] else GREY
        if row["other"] != BASELINE:
            by_trial = trials.pivot(index=["seed", "fold"], columns="pooling", values="macro_f1")
            values = (by_trial[row["pooling"]] - by_trial[row["other"]]).to_numpy(dtype=float)
            axes.scatter(values, place - 0.2 + _beside(values, 0.1), s=16, color=colour, alpha=0.6, linewidths=0)
        axes.hlines(place + 0.08, row["ci_low"], row["ci_high"], color=colour, linewidth=1.8)
        axes.scatter([row["mean"]], [place + 0.08], s=46, marker="D", color=colour, zorder=3)
        names.append(f"{row['pooling']} {MINUS} {row['other']}")
    axes.axvline(0, color=GREY, linewidth=1.0, zorder=1)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.6)
    axes.locator_params(axis="x", nbins=5)  # more numbers would run into each other
    dress(axes, "Paired differences", "difference in macro F1 (black: told apart)", "")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def _beside(values: np.ndarray, width: float) -> np.ndarray:
    """Spread dots over a width in their order, so that equal values do not hide each other."""
    return np.linspace(-width, width, len(values)) if len(values) > 1 else np.zeros(len(values))
