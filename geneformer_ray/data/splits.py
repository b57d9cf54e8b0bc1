"""Which cells train, choose and report: whole groups (donors, libraries), never cells of one group on both sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from geneformer_ray.data.digests import digest_of
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

__all__ = ["NO_LABEL", "ROLES", "GroupSplit", "split_by_group"]

ROLES = ("train", "choose", "report")
# Of the cells, when the groups are dealt out by size.
SHARES = {"train": 0.6, "choose": 0.2, "report": 0.2}


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
    """

    labels: list[str]
    rows: dict[str, NDArray[np.int64]]
    targets: dict[str, NDArray[np.int64]]
    groups: dict[str, str]
    dropped: dict[str, int]

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
            "cells": {role: [str(cell_ids[row]) for row in self.rows[role]] for role in ROLES},
        }


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
    missing = pd.isna(labels[rows]) | pd.isna(groups[rows])
    unlabelled, rows = int(missing.sum()), rows[~missing]
    label_of, group_of = labels[rows].astype(str), groups[rows].astype(str)
    roles = _roles(group_of, assigned)
    role_of = np.array([roles.get(group, "") for group in group_of])
    in_role = {role: rows[role_of == role] for role in ROLES}
    for role, chosen in in_role.items():
        if len(chosen) == 0:
            raise InputError("--group", f"no cells to {role}", "groups with cells for each of train, choose and report")
    names: list[str] = []
    dropped: dict[str, int] = {NO_LABEL: unlabelled} if unlabelled else {}
    for name in np.unique(label_of):
        fewest = min(int((labels[chosen].astype(str) == name).sum()) for chosen in in_role.values())
        if fewest >= min_cells:
            names.append(str(name))
        else:
            dropped[str(name)] = int((label_of == name).sum())
    if len(names) < 2:
        got = f"{len(names)} classes with at least {min_cells} cells in every role (of {len(names) + len(dropped)})"
        raise InputError("--label", got, "a column with two or more; --min-cells sets the threshold")
    number = {name: i for i, name in enumerate(names)}
    kept = {role: chosen[np.isin(labels[chosen].astype(str), names)] for role, chosen in in_role.items()}
    targets = {
        role: np.array([number[str(x)] for x in labels[chosen]], dtype=np.int64) for role, chosen in kept.items()
    }
    return GroupSplit(names, {role: chosen.astype(np.int64) for role, chosen in kept.items()}, targets, roles, dropped)


def _roles(group_of: NDArray[np.str_], assigned: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
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
