"""Which cells train, choose and report, where each has a label in several columns, or in some of them only.

Roles belong to groups, and so to cells: a cell has the same role for every task, else what one task learns of a donor
would be reported on by another. Each task then has the classes that every role has cells for, of the cells labelled in
it; a cell whose class is dropped counts as unlabelled in that task, and a cell without any label takes no part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd

from geneformer_ray.data.digests import digest_of
from geneformer_ray.data.splits import NO_LABEL, ROLES, GroupSplit, fold_roles, group_roles, split_by_roles
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

__all__ = ["UNLABELLED", "LabelSplit", "Task", "TaskSplit", "class_name", "split_tasks", "tasks_of"]

# The class number of a cell that has no label for a task.
UNLABELLED = -1


def class_name(task: str | None, label: str) -> str:
    """Name a class among those of all tasks, or as it is where there is but one."""
    return label if task is None else f"{task}: {label}"


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
    left_out
        Cells that take no part, for they have no group or no label in any task.
    """

    by_task: dict[str, GroupSplit]
    rows: dict[str, NDArray[np.int64]]
    targets: dict[str, NDArray[np.int64]]
    left_out: int

    @property
    def tasks(self) -> dict[str, list[str]]:
        """Task -> class names."""
        return {task: split.labels for task, split in self.by_task.items()}

    @property
    def labels(self) -> list[str]:
        """The classes of all tasks, in the order of the logits."""
        return [class_name(task, label) for task, labels in self.tasks.items() for label in labels]

    @property
    def groups(self) -> dict[str, str]:
        """Group -> role."""
        return {group: role for split in self.by_task.values() for group, role in split.groups.items()}

    @property
    def dropped(self) -> dict[str, int]:
        """What is left out -> how many cells: of all tasks, then the labels that a task has too few cells for."""
        everywhere = {NO_LABEL: self.left_out} if self.left_out else {}
        each = self.by_task.items()
        return everywhere | {class_name(task, label): n for task, its in each for label, n in its.dropped.items()}

    @property
    def digest(self) -> str:
        """A hash of which cells do what, and of their classes."""
        return digest_of(self.tasks, *(array for role in ROLES for array in (self.rows[role], self.targets[role])))

    def manifest(self, cell_ids: NDArray[Any]) -> dict[str, Any]:
        """Give what a reader needs to make the same split, as a split of one label does; classes with their task."""
        each = [(task, split.manifest(cell_ids)) for task, split in self.by_task.items()]

        def together(what: str, of: str) -> dict[str, int]:
            found = ((task, its[what].get(of, {})) for task, its in each)
            return {class_name(task, label): count for task, counts in found for label, count in counts.items()}

        return {
            "groups": self.groups,
            "labels": self.labels,
            "tasks": self.tasks,
            "dropped_labels": self.dropped,
            "cells_per_label": {role: together("cells_per_label", role) for role in ROLES},
            "cells_per_group": {group: together("cells_per_group", group) for group in self.groups},
            "balance": self.balance(),
            "cells": {role: [str(cell_ids[row]) for row in self.rows[role]] for role in ROLES},
        }

    def balance(self) -> list[str]:
        """Say what is uneven about the classes of each task."""
        return [class_name(task, found) for task, split in self.by_task.items() for found in split.balance()]


# What a training of labels splits its cells into, by one column or by several.
LabelSplit: TypeAlias = GroupSplit | TaskSplit


@dataclass(frozen=True)
class Task:
    """One column of labels of a split.

    Parameters
    ----------
    name
        The column; None where it is the only one.
    labels
        Class names.
    targets
        Role -> class number of each of the split's rows, :data:`UNLABELLED` where there is none; shape (cells,).
    """

    name: str | None
    labels: list[str]
    targets: dict[str, NDArray[np.int64]]


def tasks_of(split: LabelSplit) -> list[Task]:
    """Give the columns of a split, in the order of the logits."""
    if isinstance(split, GroupSplit):
        return [Task(None, split.labels, split.targets)]
    return [
        Task(name, labels, {role: targets_NT[:, number] for role, targets_NT in split.targets.items()})
        for number, (name, labels) in enumerate(split.tasks.items())
    ]


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
        Task -> the labels of *every* cell of the table; missing, or an empty text, where it has none.
    groups, assigned, min_cells, folds, held_out
        As for :func:`geneformer_ray.data.splits.split_by_group` and ``folds_by_group``. Sizes are of cells that have
        a label in some task; `min_cells` is asked of each task's own.
    """
    labels = {task: _without_empty(column) for task, column in labels.items()}
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
    kept = {task: its[0].labels for task, its in splits.items()}
    names = [class_name(task, label) for task, its in kept.items() for label in its]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError("--label", f"two classes that read {twice!r}", "columns and labels that cannot be taken so")
    known = np.zeros(len(rows), dtype=bool)
    for task, column in labels.items():
        known |= some & np.isin(column[rows].astype(str), kept[task]) & ~pd.isna(column[rows])
    left_out = int((~known).sum())
    return [
        _together(rows, {task: its[number] for task, its in splits.items()}, left_out) for number in range(len(every))
    ]


def _without_empty(column: NDArray[Any]) -> NDArray[Any]:
    """Make an empty text a missing one: so tables without missing values leave a label out."""
    if column.dtype != object:
        return column
    return np.array([None if isinstance(one, str) and not one.strip() else one for one in column], dtype=object)


def _together(order: NDArray[np.integer], by_task: dict[str, GroupSplit], left_out: int) -> TaskSplit:
    rows, targets = {}, {}
    for role in ROLES:
        labelled = np.unique(np.concatenate([split.rows[role] for split in by_task.values()]))
        rows[role] = order[np.isin(order, labelled)].astype(np.int64)
        place = {int(row): number for number, row in enumerate(rows[role])}
        targets[role] = np.full((len(rows[role]), len(by_task)), UNLABELLED)
        for task, split in enumerate(by_task.values()):
            targets[role][[place[int(row)] for row in split.rows[role]], task] = split.targets[role]
    return TaskSplit(by_task, rows, targets, left_out)
