"""Scores of one label or of several as MLflow has them: flat metrics of names that it admits, and figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from geneformer_ray.manage import plots
from geneformer_ray.manage.calibration_plot import reliability_diagram

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

    from matplotlib.figure import Figure

__all__ = ["class_metrics", "curve_metrics", "flat_metrics", "score_figures"]

Scores = dict[str, dict[str, Any]]
# Of several tasks together.
MEANS = ("macro_f1", "accuracy", "expected_calibration_error")
LONGEST_NAME = 200  # of a metric; MLflow takes 250 characters


def flat_metrics(scores: Scores) -> dict[str, float]:
    """Give scores as MLflow's flat metrics: each role's own, and those of every class.

    Of several tasks, a metric without a task's name is the mean over tasks.

    Parameters
    ----------
    scores
        Role -> what :func:`geneformer_ray.manage.task_predictions.scores_of` gives.
    """
    flat: dict[str, float] = {}
    for role, values in scores.items():
        if "tasks" in values:
            flat |= {f"{role}_{name}": values[name] for name in MEANS}
        for task, one in _parts(values):
            end = f"_{task}" if task else ""
            flat[f"{role}_macro_f1{end}"] = one["macro_f1"]
            flat[f"{role}_accuracy{end}"] = one["accuracy"]
            for name in ("expected_calibration_error", "brier_score"):
                flat[f"{role}_{name}{end}"] = one["calibration"][name]
        # At the end: no class may take the name of a task's metric.
        for task, one in _parts(values):
            names = ("precision", "recall", "f1", "cells")
            flat |= class_metrics(role, one["per_class"], names, task=task, beside=flat)
    return flat


def class_metrics(
    role: str,
    per_class: Mapping[str, Mapping[str, Any]],
    names: Sequence[str],
    *,
    task: str = "",
    beside: Container[str] = (),
) -> dict[str, float]:
    """Give scores of classes as flat metrics, ``ROLE_NAME_CLASS``; those that are None have none.

    Parameters
    ----------
    role, task
        What the metrics' names hold beside: the task's as MLflow admits it.
    per_class
        Class name -> its scores.
    names
        Which of the scores; among them ``f1``, which every class has.
    beside
        Names of metrics that no class may take.
    """
    flat: dict[str, float] = {}
    for number, (label, its) in enumerate(per_class.items()):
        safe = _admitted(f"{task}_{label}" if task else label)
        if f"{role}_f1_{safe}" in flat or f"{role}_f1_{safe}" in beside:  # CD4+ and CD4* would be one metric
            safe = f"{safe}_{number}"
        flat |= {f"{role}_{name}_{safe}": its[name] for name in names if its[name] is not None}
    return flat


def curve_metrics(history: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Give a history with entries of names that MLflow admits: those of several tasks hold names of columns."""
    return [dict(zip(_distinct(entry), entry.values(), strict=True)) for entry in history]


def score_figures(scores: Scores, title: str) -> dict[str, Figure]:
    """Draw confusion matrix and reliability of each role, and of each task: file name -> figure."""
    figures = {}
    for role, values in scores.items():
        for task, one in _parts(values):
            heading = f"{title}{', ' if task else ''}{task}: {role} cells"
            end = f"{role}_{task}" if task else role
            figures[f"confusion_matrix_{end}.png"] = plots.confusion_matrix(
                one["confusion_matrix"], list(one["per_class"]), heading
            )
            figures[f"calibration_{end}.png"] = reliability_diagram(one["calibration"], heading)
    return figures


def _parts(values: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give the scores of each task with its name as MLflow admits it, or those of one label with none."""
    if "tasks" not in values:
        return iter([("", values)])
    return zip(_distinct(values["tasks"]), values["tasks"].values(), strict=True)


def _distinct(names: Iterable[str]) -> list[str]:
    """Give names that MLflow admits, no two the same."""
    found: list[str] = []
    for number, name in enumerate(names):
        safe = _admitted(name)
        found.append(f"{safe}_{number}" if safe in found else safe)
    return found


def _admitted(name: str) -> str:
    return "".join(c if c.isalnum() or c in "_-. " else "_" for c in name)[:LONGEST_NAME]
