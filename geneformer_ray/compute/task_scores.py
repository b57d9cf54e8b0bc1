"""How good predictions of several tasks are: each task on the cells that have a label for it, and the means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from geneformer_ray.compute.scores import score
from geneformer_ray.data.task_splits import UNLABELLED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

__all__ = ["logits_by_task", "mean_scores", "score_tasks"]


def logits_by_task(
    logits_NC: NDArray[np.floating], tasks: Mapping[str, Sequence[str]]
) -> dict[str, NDArray[np.floating]]:
    """Take apart logits that lie side by side: task -> shape (cells, the task's classes)."""
    ends = np.cumsum([len(labels) for labels in tasks.values()])
    return dict(zip(tasks, np.split(logits_NC, ends[:-1], axis=1), strict=True))


def score_tasks(
    targets_NT: NDArray[np.int64], logits_NC: NDArray[np.floating], tasks: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Any]]:
    """Score each task on the cells that have a label for it.

    Parameters
    ----------
    targets_NT
        Class numbers, :data:`UNLABELLED` where a cell has none; shape (cells, tasks).
    logits_NC
        Of all tasks side by side, shape (cells, classes of all tasks).
    tasks
        Task -> class names.

    Returns
    -------
    dict
        Task -> what :func:`geneformer_ray.compute.scores.score` gives.
    """
    scores = {}
    for (name, logits), targets in zip(logits_by_task(logits_NC, tasks).items(), targets_NT.T, strict=True):
        labelled = targets != UNLABELLED
        scores[name] = score(targets[labelled], logits[labelled], tasks[name])
    return scores


def mean_scores(by_task: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Give the means of the tasks' scores, each task counting the same, with the tasks' own beside them.

    Epoch and champion are chosen by the mean macro F1.

    Parameters
    ----------
    by_task
        Task -> what :func:`geneformer_ray.compute.scores.score` gives.

    Returns
    -------
    dict
        ``macro_f1``, ``accuracy``, ``expected_calibration_error``, ``tasks``.
    """
    calibrations = [one["calibration"] for one in by_task.values()]
    return {
        **{name: float(np.mean([one[name] for one in by_task.values()])) for name in ("macro_f1", "accuracy")},
        "expected_calibration_error": float(np.mean([one["expected_calibration_error"] for one in calibrations])),
        "tasks": dict(by_task),
    }
