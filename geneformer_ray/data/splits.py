"""Which cells train, choose and report: whole groups (donors, libraries), never cells of one group on both sides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from geneformer_ray.data.digests import digest_of
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

__all__ = [
    "NO_LABEL",
    "ROLES",
    "GroupSplit",
    "fold_roles",
    "folds_by_group",
    "group_roles",
    "split_by_group",
    "split_by_roles",
]

ROLES = ("train", "choose", "report")
# Of the cells, when the groups are dealt out by size.
SHARES = {"train": 0.6, "choose": 0.2, "report": 0.2}
# A class whose share of a role's cells is this many times larger or smaller than of all cells is worth a word.
UNEVEN = 3.0
# How cells without a label or a group are listed among the dropped ones.
NO_LABEL = "(no label or group)"


@dataclass(frozen=True)
class GroupSplit:
    """A split of cells by group.

    Parameters
    ----------
    labels
        The class names, sorted: the same in every process.
    rows
        Role -> row numbers, in order.
    targets
        Role -> class number of each of those rows.
    groups
        Group -> role.
    dropped
        Labels with too few cells in some role, and cells without label or group -> how many cells.
    sources
        Group with a role -> its cells of each class, shape (classes,).
    """

    labels: list[str]
    rows: dict[str, NDArray[np.int64]]
    targets: dict[str, NDArray[np.int64]]
    groups: dict[str, str]
    dropped: dict[str, int]
    sources: dict[str, NDArray[np.int64]] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """A hash of which cells do what, and of their classes."""
        arrays = [array for role in ROLES for array in (self.rows[role], self.targets[role])]
        return digest_of(self.labels, *arrays)

    def manifest(self, cell_ids: NDArray[Any]) -> dict[str, Any]:
        """Give what a reader needs to make the same split: groups, labels, and the cells of each role."""
        counts = {
            role: {label: int((self.targets[role] == number).sum()) for number, label in enumerate(self.labels)}
            for role in ROLES
        }
        return {
            "groups": self.groups,
            "labels": self.labels,
            "dropped_labels": self.dropped,
            "cells_per_label": counts,
            "cells_per_group": {
                group: dict(zip(self.labels, counts.tolist(), strict=True)) for group, counts in self.sources.items()
            },
            "balance": self.balance(),
            "cells": {role: [str(cell_ids[row]) for row in self.rows[role]] for role in ROLES},
        }

    def balance(self) -> list[str]:
        """Say what is uneven about the classes: whole groups decide where cells go, so that nothing evens them out.

        Returns
        -------
        One line a finding: classes whose share of a role's cells is more than three times larger or smaller than of
        all cells, and classes that training knows from a single group, so that it cannot tell the class from the group.
        """
        classes = len(self.labels)
        counts = {role: np.bincount(self.targets[role], minlength=classes) for role in ROLES}
        whole = np.sum(list(counts.values()), axis=0)
        found = []
        for role in ROLES:
            for number, label in enumerate(self.labels):
                share, overall = counts[role][number] / counts[role].sum(), whole[number] / whole.sum()
                if not overall / UNEVEN <= share <= overall * UNEVEN:
                    found.append(f"{label} is {share:.1%} of the cells to {role}, {overall:.1%} of all")
        training = {group: its for group, its in self.sources.items() if self.groups[group] == "train" and its.any()}
        if len(training) == 1:
            found.append(f"every cell to train comes from one group, {next(iter(training))}")
        for number, label in enumerate(self.labels):
            holders = [group for group, its in training.items() if its[number]]
            if len(training) > 1 and len(holders) == 1:
                found.append(f"every {label} cell to train comes from one group, {holders[0]}")
        return found


def split_by_group(
    rows: NDArray[np.integer],
    labels: NDArray[Any],
    groups: NDArray[Any],
    *,
    assigned: Mapping[str, tuple[str, ...]],
    min_cells: int,
) -> GroupSplit:
    """Split cells by group into training, choosing and reporting cells.

    Parameters
    ----------
    rows
        The chosen cells' row numbers.
    labels, groups
        Of *every* cell of the table, shape (cells,).
    assigned
        Role -> its groups. Empty: groups are dealt out by size, the largest first, to reach 60, 20 and 20 % of cells.
    min_cells
        Labels with fewer cells than this in some role are dropped, and listed.

    Raises
    ------
    InputError
        If a group is unknown or in two roles, a role is empty, or fewer than two labels are left.
    """
    table = _Table.of(rows, labels, groups)
    return table.split([group_roles(table.groups, assigned)], min_cells)[0]


def folds_by_group(
    rows: NDArray[np.integer],
    labels: NDArray[Any],
    groups: NDArray[Any],
    *,
    folds: int,
    min_cells: int,
    held_out: Sequence[str] = (),
) -> list[GroupSplit]:
    """Cross-validate over groups: one split a fold, all with the same classes.

    Groups are dealt into folds by size, the largest first, each to the fold with the fewest cells. With `held_out`,
    those groups are every fold's reporting cells, and each other group chooses in exactly one fold and trains in the
    rest. Without, each group reports in exactly one fold, and chooses in the one before it.

    Parameters
    ----------
    rows, labels, groups
        As for :func:`split_by_group`.
    folds
        How many splits: at least 3, with `held_out` 2.
    min_cells
        Labels with fewer cells than this in some role of some fold are dropped from all, and listed.
    held_out
        Groups that report, whatever the fold: a fixed test.

    Raises
    ------
    InputError
        If there are fewer groups than folds, a held-out group is unknown, or fewer than two labels are left.
    """
    table = _Table.of(rows, labels, groups)
    return table.split(fold_roles(table.groups, folds, held_out), min_cells)


def split_by_roles(
    rows: NDArray[np.integer],
    labels: NDArray[Any],
    groups: NDArray[Any],
    every_role: Sequence[Mapping[str, str]],
    *,
    min_cells: int,
) -> list[GroupSplit]:
    """Split cells by roles that are settled: group -> role, of groups that need not have labelled cells."""
    table = _Table.of(rows, labels, groups)
    there = set(table.groups.tolist())
    return table.split([{g: r for g, r in roles.items() if g in there} for roles in every_role], min_cells)


def fold_roles(group_of: NDArray[np.str_], folds: int, held_out: Sequence[str] = ()) -> list[dict[str, str]]:
    """Deal groups into folds: group -> role, once a fold; see :func:`folds_by_group`."""
    names, sizes = np.unique(group_of, return_counts=True)
    for group in held_out:
        if group not in names:
            raise InputError("--report-groups", repr(group), f"groups that cells have: {', '.join(names)}")
    free = ~np.isin(names, np.array(held_out, dtype=str))
    names, sizes = names[free], sizes[free]
    fewest = 2 if held_out else 3
    if folds < fewest:
        raise InputError("--folds", folds, f"{fewest} or more: every fold needs other groups to train than to choose")
    if folds > len(names):
        beside = " beside those of --report-groups" if held_out else ""
        raise InputError("--folds", folds, f"at most {len(names)}, the number of groups{beside}")
    fold_of: dict[str, int] = {}
    filled = np.zeros(folds, dtype=np.int64)
    for position in np.lexsort((names, -sizes)):
        fold = int(filled.argmin())
        fold_of[str(names[position])] = fold
        filled[fold] += int(sizes[position])
    every_role = []
    for fold in range(folds):
        chooses = fold if held_out else (fold + 1) % folds
        roles = {group: "choose" if its == chooses else "train" for group, its in fold_of.items()}
        reporting = held_out or [group for group, its in fold_of.items() if its == fold]
        every_role.append(roles | {str(group): "report" for group in reporting})
    return every_role


@dataclass(frozen=True)
class _Table:
    """The chosen cells that have a label and a group: row numbers, labels, groups; and how many have not."""

    rows: NDArray[np.int64]
    labels: NDArray[np.str_]
    groups: NDArray[np.str_]
    unlabelled: int

    @classmethod
    def of(cls, rows: NDArray[np.integer], labels: NDArray[Any], groups: NDArray[Any]) -> _Table:
        missing = pd.isna(labels[rows]) | pd.isna(groups[rows])
        kept: NDArray[np.int64] = rows[~missing].astype(np.int64)
        return cls(kept, labels[kept].astype(str), groups[kept].astype(str), int(missing.sum()))

    def split(self, every_role: list[dict[str, str]], min_cells: int) -> list[GroupSplit]:
        """Split by each assignment of groups to roles, with the classes that all of them have cells for."""
        names, number = np.unique(self.labels, return_inverse=True)
        groups, group_of = np.unique(self.groups, return_inverse=True)
        fewest = np.full(len(names), len(self.rows))
        parts = []
        for roles in every_role:
            role_of = np.array([roles.get(str(group), "") for group in groups])[group_of]
            for role in ROLES:
                if not (role_of == role).any():
                    takes = "groups with cells for each of train, choose and report"
                    raise InputError("--group", f"no cells to {role}", takes)
                fewest = np.minimum(fewest, np.bincount(number[role_of == role], minlength=len(names)))
            parts.append((roles, role_of))
        kept = fewest >= min_cells
        if kept.sum() < 2:
            where = "role" if len(every_role) == 1 else "role of every fold"
            got = f"{kept.sum()} classes with at least {min_cells} cells in every {where} (of {len(names)})"
            raise InputError("--label", got, "a column with two or more; --min-cells sets the threshold")
        dropped = {NO_LABEL: self.unlabelled} if self.unlabelled else {}
        dropped |= {str(names[i]): int((number == i).sum()) for i in np.flatnonzero(~kept)}
        takes_part, class_of = kept[number], (np.cumsum(kept) - 1)[number]
        per_group = np.zeros((len(groups), int(kept.sum())), dtype=np.int64)
        np.add.at(per_group, (group_of[takes_part], class_of[takes_part]), 1)
        sources = dict(zip(map(str, groups), per_group, strict=True))
        splits = []
        for roles, role_of in parts:
            chosen = {role: takes_part & (role_of == role) for role in ROLES}
            splits.append(
                GroupSplit(
                    [str(name) for name in names[kept]],
                    {role: self.rows[cells] for role, cells in chosen.items()},
                    {role: class_of[cells].astype(np.int64) for role, cells in chosen.items()},
                    roles,
                    dict(dropped),
                    {group: sources[group] for group in roles},
                )
            )
        return splits


def group_roles(group_of: NDArray[np.str_], assigned: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Give every group its role: the one it is assigned, or dealt out by size as :func:`split_by_group` says.

    Parameters
    ----------
    group_of
        The group of each cell, shape (cells,).
    assigned
        Role -> its groups; empty where they are to be dealt out.
    """
    names, sizes = np.unique(group_of, return_counts=True)
    given = {role: tuple(assigned.get(role, ())) for role in ROLES}
    if any(given.values()):
        roles: dict[str, str] = {}
        for role, chosen in given.items():
            for group in chosen:
                if group not in names:
                    raise InputError(f"--{role}-groups", repr(group), f"groups that cells have: {', '.join(names)}")
                if group in roles:
                    raise InputError(f"--{role}-groups", repr(group), f"a group that does not {roles[group]} already")
                roles[group] = role
        return roles
    if len(names) < len(ROLES):
        raise InputError(
            "--group", f"{len(names)} groups", "a column with at least three: one each to train, choose and report"
        )
    roles = {}
    filled = dict.fromkeys(ROLES, 0)
    for position in np.lexsort((names, -sizes)):
        # The role that is furthest below its share; each of the last groups goes to a role that has none yet.
        empty = [role for role in ROLES if filled[role] == 0]
        open_roles = empty if len(names) - len(roles) <= len(empty) else list(ROLES)
        role = min(open_roles, key=lambda name: (filled[name] / SHARES[name], -SHARES[name]))
        roles[str(names[position])] = role
        filled[role] += int(sizes[position])
    return roles
