"""Which cells train, choose and report, where each has a label in several columns, or in some of them only.

Roles belong to groups, and so to cells: a cell has the same role for every task, else what one task learns of a donor
would be reported on by another. Each task then has the classes that every role has cells for, of the cells labelled in
it; a cell whose class is dropped counts as unlabelled in that task, and a cell without any label takes no part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from geneformer_ray.data.digests import digest_of
from geneformer_ray.data.splits import ROLES, GroupSplit, fold_roles, group_roles, split_by_roles
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

__all__ = ["UNLABELLED", "TaskSplit", "split_tasks"]

# The class number of a cell that has no label for a task.
UNLABELLED = -1


@dataclass(frozen=True)
class TaskSplit:
    """A split of cells by group, with the labels of several tasks.

    Parameters
    ----------
    by_task
        Task -> its own split, of the cells that have a label in it.
    rows
        Role -> row numbers of the cells with a label in some task, in order.
    targets
        Role -> class numbers, shape (cells, tasks); :data:`UNLABELLED` where there is none.
    """

    by_task: dict[str, GroupSplit]
    rows: dict[str, NDArray[np.int64]]
    targets: dict[str, NDArray[np.int64]]

    @property
    def tasks(self) -> dict[str, list[str]]:
        """Task -> class names."""
        return {task: split.labels for task, split in self.by_task.items()}

    @property
    def digest(self) -> str:
        """A hash of which cells do what, and of their classes."""
        return digest_of(self.tasks, *(array for role in ROLES for array in (self.rows[role], self.targets[role])))


def split_tasks(
    rows: NDArray[np.integer],
    labels: Mapping[str, NDArray[Any]],
    groups: NDArray[Any],
    *,
    assigned: Mapping[str, tuple[str, ...]],
    min_cells: int,
    folds: int | None = None,
    held_out: Sequence[str] = (),
) -> list[TaskSplit]:
    """Split cells by group for several tasks: once, or once a fold.

    Parameters
    ----------
    rows
        The chosen cells' row numbers.
    labels
        Task -> the labels of *every* cell of the table, missing where it has none.
    groups, assigned, min_cells, folds, held_out
        As for :func:`geneformer_ray.data.splits.split_by_group` and ``folds_by_group``. Sizes are of cells that have
        a label in some task; `min_cells` is asked of each task's own.
    """
    some = np.zeros(len(rows), dtype=bool)
    for column in labels.values():
        some |= ~pd.isna(column[rows])
    some &= ~pd.isna(groups[rows])
    group_of = groups[rows[some]].astype(str)
    every = [group_roles(group_of, assigned)] if folds is None else fold_roles(group_of, folds, held_out)
    splits: dict[str, list[GroupSplit]] = {}
    for task, column in labels.items():
        try:
            splits[task] = split_by_roles(rows, column, groups, every, min_cells=min_cells)
        except InputError as error:
            raise InputError(error.field, f"{error.got}, for the label {task}", error.takes) from error
    return [_together(rows, {task: its[number] for task, its in splits.items()}) for number in range(len(every))]


def _together(order: NDArray[np.integer], by_task: dict[str, GroupSplit]) -> TaskSplit:
    rows, targets = {}, {}
    for role in ROLES:
        labelled = np.unique(np.concatenate([split.rows[role] for split in by_task.values()]))
        rows[role] = order[np.isin(order, labelled)].astype(np.int64)
        place = {int(row): number for number, row in enumerate(rows[role])}
        targets[role] = np.full((len(rows[role]), len(by_task)), UNLABELLED)
        for task, split in enumerate(by_task.values()):
            targets[role][[place[int(row)] for row in split.rows[role]], task] = split.targets[role]
    return TaskSplit(by_task, rows, targets)
