"""A trial's predictions as they are judged: task by task, of the cells that have a label for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from geneformer_ray.compute.scores import score
from geneformer_ray.compute.task_scores import logits_by_task, mean_scores
from geneformer_ray.data.digests import digest_of
from geneformer_ray.data.task_splits import UNLABELLED
from geneformer_ray.manage.misclassified_cells import misclassified_cells
from geneformer_ray.manage.trials import read_predictions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

__all__ = ["TaskPredictions", "digest_of_test", "mistakes_in", "predictions_of", "scores_of", "together"]


@dataclass(frozen=True)
class TaskPredictions:
    """What a trial predicts of one role's cells in one task.

    Parameters
    ----------
    task
        The label column; None where it is the only one.
    labels
        Class names.
    cell_ids, targets, logits
        Of the cells that have a label: shape (cells,), (cells,) and (cells, classes).
    places
        Which of the role's cells these are, shape (cells,).
    """

    task: str | None
    labels: Sequence[str]
    cell_ids: Sequence[str]
    targets: NDArray[np.int64]
    logits: NDArray[np.floating]
    places: NDArray[np.int64]


def predictions_of(
    directory: str, role: str, labels: Sequence[str], tasks: Mapping[str, Sequence[str]] | None
) -> list[TaskPredictions]:
    """Read what a trial predicted.

    Parameters
    ----------
    directory, role
        As for :func:`geneformer_ray.manage.trials.read_predictions`.
    labels
        Class names, in the order of the logits.
    tasks
        Task -> class names; None where there is but one label column.
    """
    cell_ids, targets, logits = read_predictions(directory, role)
    if tasks is None:
        return [TaskPredictions(None, labels, cell_ids, targets, logits, np.arange(len(cell_ids)))]
    found = []
    for number, (task, its) in enumerate(logits_by_task(logits, tasks).items()):
        places = np.flatnonzero(targets[:, number] != UNLABELLED)
        ids = [cell_ids[place] for place in places]
        found.append(TaskPredictions(task, tasks[task], ids, targets[places, number], its[places], places))
    return found


def scores_of(predictions: Sequence[TaskPredictions]) -> dict[str, Any]:
    """Score one label as :func:`geneformer_ray.compute.scores.score` does; several: their means, and each of them."""
    return together({its.task: score(its.targets, its.logits, its.labels) for its in predictions})


def together(by_task: Mapping[str | None, dict[str, Any]]) -> dict[str, Any]:
    """Give the scores of one label as they are; of several tasks their means, and each of them."""
    if None in by_task:
        return by_task[None]
    return mean_scores({str(task): its for task, its in by_task.items()})


def mistakes_in(predictions: Sequence[TaskPredictions], groups: NDArray[Any]) -> pd.DataFrame:
    """List misclassified cells; of several tasks one after another, each named in a first column.

    Parameters
    ----------
    predictions
        Of a role.
    groups
        Donor or library of each of the role's cells, shape (cells,).
    """
    tables = []
    for its in predictions:
        table = misclassified_cells(its.cell_ids, its.targets, its.logits, its.labels, groups[its.places])
        if its.task is not None:
            table.insert(0, "task", its.task)
        tables.append(table)
    return tables[0] if len(tables) == 1 else pd.concat(tables, ignore_index=True)


def digest_of_test(predictions: Sequence[TaskPredictions]) -> str:
    """Hash which cells figures were measured on, and what they truly are; in any order."""
    return digest_of(
        sorted(
            [cell_id, *([] if its.task is None else [its.task]), its.labels[target]]
            for its in predictions
            for cell_id, target in zip(its.cell_ids, its.targets, strict=True)
        )
    )
