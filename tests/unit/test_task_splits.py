"""Splits of several labels: one role a cell, classes of each task's own, missing labels."""

from __future__ import annotations

import numpy as np
import pytest

from geneformer_ray.data.splits import ROLES, split_by_group
from geneformer_ray.data.task_splits import UNLABELLED, split_tasks
from geneformer_ray.errors import InputError

N = 240
RNG = np.random.default_rng(0)
GROUPS = np.array([f"d{i % 6}" for i in range(N)], dtype=object)
TYPE = RNG.choice(["a", "b", "c"], N).astype(object)
SEX = np.array([["f", "m"][i % 2] for i in RNG.integers(2, size=N)], dtype=object)
SEX[RNG.random(N) < 0.4] = None
TYPE[RNG.random(N) < 0.1] = None
TYPE[(TYPE == "c") & np.isin(GROUPS, ["d0", "d1"])] = "a"
GROUPS[5] = None
ROWS = np.arange(3, N)
NONE: dict[str, tuple[str, ...]] = {}


def test_one_task_is_the_split_of_its_label():
    (split,) = split_tasks(ROWS, {"type": TYPE}, GROUPS, assigned=NONE, min_cells=2)
    single = split_by_group(ROWS, TYPE, GROUPS, assigned=NONE, min_cells=2)
    assert split.by_task["type"].digest == single.digest
    for role in ROLES:
        np.testing.assert_array_equal(split.rows[role], single.rows[role])
        np.testing.assert_array_equal(split.targets[role][:, 0], single.targets[role])


@pytest.mark.parametrize("folds", [None, 3])
def test_every_cell_has_one_role_and_its_labels(folds):
    splits = split_tasks(ROWS, {"type": TYPE, "sex": SEX}, GROUPS, assigned=NONE, min_cells=3, folds=folds)
    assert len({tuple(map(tuple, split.tasks.values())) for split in splits}) == 1
    for split in splits:
        seen = np.concatenate([split.rows[role] for role in ROLES])
        assert len(np.unique(seen)) == len(seen)
        for role in ROLES:
            groups = {group for its in split.by_task.values() for group, r in its.groups.items() if r == role}
            for row, target in zip(split.rows[role], split.targets[role], strict=True):
                assert GROUPS[row] in groups
                assert (target != UNLABELLED).any()
                for t, (task, column) in enumerate({"type": TYPE, "sex": SEX}.items()):
                    known = column[row] in split.tasks[task]
                    assert (target[t] != UNLABELLED) == known
                    if known:
                        assert split.tasks[task][target[t]] == column[row]
        assert any((split.targets[role] == UNLABELLED).any() for role in ROLES)
        assert len(split.digest) == 16


def test_a_task_that_a_role_lacks_is_named():
    sex = SEX.copy()
    sex[np.isin(GROUPS, ["d0"])] = None
    assigned = {"train": ("d1", "d2", "d3", "d4"), "choose": ("d0",), "report": ("d5",)}
    with pytest.raises(InputError, match="--group: got no cells to choose, for the label sex"):
        split_tasks(ROWS, {"type": TYPE, "sex": sex}, GROUPS, assigned=assigned, min_cells=2)
    with pytest.raises(InputError, match=r"--label: got .* classes with at least 99 cells .*, for the label type"):
        split_tasks(ROWS, {"type": TYPE, "sex": SEX}, GROUPS, assigned=NONE, min_cells=99)
