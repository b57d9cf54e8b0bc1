"""Which cells a pretraining learns from, and which it is measured on: cells at random, or whole groups of them.

Cells of one donor or library resemble each other, so that a model that has seen some of them has an easier task with
the others. What holds for donors that no training has seen is measured on whole groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from geneformer_ray.data.digests import digest_of
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["HeldOut", "hold_out_cells", "hold_out_groups"]


@dataclass(frozen=True)
class HeldOut:
    """A split of cells into those that train and those that are held out.

    Parameters
    ----------
    train, validate
        Row numbers, in random order.
    group
        The column of whose groups none is on both sides; None where single cells were drawn.
    groups
        Which groups are held out.
    without_group
        Cells that have no group and take no part.
    """

    train: NDArray[np.int64]
    validate: NDArray[np.int64]
    group: str | None = None
    groups: tuple[str, ...] = ()
    without_group: int = 0

    @property
    def digest(self) -> str:
        """A hash of which cells do what."""
        return digest_of(np.concatenate([self.validate, self.train]), len(self.validate))

    def described(self) -> dict[str, Any]:
        """Say what is held out, in plain values."""
        which = {"groups": list(self.groups), "without_group": self.without_group} if self.group else {}
        return {"cells": len(self.validate), "group": self.group, **which}


def hold_out_cells(rows: NDArray[np.int64], share: float, seed: int) -> HeldOut:
    """Hold out a share of the cells, at least one, whatever groups they belong to."""
    order = np.random.default_rng(seed).permutation(rows)
    number = max(1, round(share * len(rows)))
    return HeldOut(order[number:], order[:number])


def hold_out_groups(
    rows: NDArray[np.int64], column: str, groups: NDArray[Any], share: float, seed: int, named: Sequence[str] = ()
) -> HeldOut:
    """Hold out whole groups.

    Parameters
    ----------
    rows
        The chosen cells' row numbers.
    column, groups
        The column's name, and its value for every cell of the table.
    share
        Groups in random order are held out as long as they do not go beyond this share of the cells; the smallest
        where each of them does.
    seed
        Of that order, and of the cells'.
    named
        Groups to hold out instead.
    """
    missing = pd.isna(groups[rows])
    rng = np.random.default_rng(seed)
    order = rng.permutation(rows[~missing])
    group_of = groups[order].astype(str)
    names, sizes = np.unique(group_of, return_counts=True)
    if len(names) < 2:
        got = f"{column} with {len(names) or 'no'} group"
        raise InputError("--group", got, "a column with two or more: one to hold out")
    there = [str(name) for name in names]
    for group in named:
        if group not in there:
            raise InputError("--validation-groups", repr(group), f"groups that cells have: {', '.join(there)}")
    chosen = set(named)
    if not chosen:
        room = share * len(order)
        for number in rng.permutation(len(names)):
            if sizes[number] <= room:
                chosen.add(there[number])
                room -= sizes[number]
        chosen = chosen or {there[int(sizes.argmin())]}
    if len(chosen) == len(names):
        raise InputError("--validation-groups", ",".join(sorted(chosen)), f"not all groups of {column}: some train")
    held_out = np.isin(group_of, sorted(chosen))
    return HeldOut(order[~held_out], order[held_out], column, tuple(sorted(chosen)), int(missing.sum()))
