"""Splits of several labels: one role a cell, classes of each task's own, missing labels."""

from __future__ import annotations

import numpy as np
import pytest

from geneformer_ray.data.splits import NO_LABEL, ROLES, split_by_group
from geneformer_ray.data.task_splits import UNLABELLED, split_tasks, tasks_of
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


@pytest.mark.parametrize("folds", [None, 3])
def test_cells_without_a_label_in_any_task_are_left_out_and_counted(folds):
    """Those of a dropped class too, where no other task has a label for them."""
    kind = TYPE.copy()
    rare = [20, 21]
    kind[rare] = "rare"
    sex = SEX.copy()
    sex[rare] = [None, "f"]
    for split in split_tasks(ROWS, {"type": kind, "sex": sex}, GROUPS, assigned=NONE, min_cells=3, folds=folds):
        taking_part = set(np.concatenate([split.rows[role] for role in ROLES]).tolist())
        without = {row for row in ROWS.tolist() if row not in taking_part}
        assert {5, 20} <= without and 21 in taking_part
        assert {row for row in without if GROUPS[row] is not None} == {
            row for row in ROWS.tolist() if kind[row] in (None, "rare") and sex[row] is None and GROUPS[row] is not None
        }
        assert split.left_out == split.dropped[NO_LABEL] == len(without)
        assert split.dropped["type: rare"] == 2
        missing = sum(sex[row] is None or GROUPS[row] is None for row in ROWS)
        assert split.dropped[f"sex: {NO_LABEL}"] == missing
        assert next(iter(split.dropped)) == NO_LABEL


def test_an_empty_text_is_a_missing_label():
    """As in tables that know no missing values; a number that is none is missing as well."""
    empty = np.array(["" if one is None else one for one in SEX], dtype=object)
    blank = np.array([" " if one is None else one for one in SEX], dtype=object)
    number = np.array([np.nan if one is None else float(one == "m") for one in SEX])
    wanted, *others = (
        split_tasks(ROWS, {"type": TYPE, "sex": sex}, GROUPS, assigned=NONE, min_cells=3)[0]
        for sex in (SEX, empty, blank, number)
    )
    for split in others:
        for role in ROLES:
            np.testing.assert_array_equal(split.rows[role], wanted.rows[role])
            np.testing.assert_array_equal(split.targets[role], wanted.targets[role])
        assert split.dropped == wanted.dropped


def test_the_manifest_names_classes_with_their_task():
    (split,) = split_tasks(ROWS, {"type": TYPE, "sex": SEX}, GROUPS, assigned=NONE, min_cells=2)
    ids = np.array([f"cell{row}" for row in range(N)])
    manifest = split.manifest(ids)
    assert manifest["tasks"] == split.tasks == {"type": ["a", "b", "c"], "sex": ["f", "m"]}
    assert manifest["labels"] == ["type: a", "type: b", "type: c", "sex: f", "sex: m"]
    assert manifest["groups"] == split.groups == {g: r for its in split.by_task.values() for g, r in its.groups.items()}
    assert set(split.groups) == {f"d{number}" for number in range(6)}
    for role in ROLES:
        assert manifest["cells"][role] == [f"cell{row}" for row in split.rows[role]]
        for name, count in manifest["cells_per_label"][role].items():
            task, label = name.split(": ")
            column = {"type": TYPE, "sex": SEX}[task]
            assert count == sum(column[row] == label for row in split.rows[role])
    for group, counts in manifest["cells_per_group"].items():
        assert list(counts) == split.labels
        assert counts["sex: m"] == sum((SEX[row] == "m") & (GROUPS[row] == group) for row in ROWS)


def test_what_is_uneven_is_said_with_the_task():
    often = np.isin(GROUPS, ["d4"]) | (np.arange(N) % 10 == 1)
    sex = np.where(often, "m", "f").astype(object)
    assigned = {"train": ("d0", "d1", "d2", "d3"), "choose": ("d4",), "report": ("d5",)}
    sex[np.flatnonzero(GROUPS == "d4")[:2]] = "f"
    (split,) = split_tasks(ROWS, {"type": TYPE, "sex": sex}, GROUPS, assigned=assigned, min_cells=1)
    found = split.balance()
    assert any(line.startswith("sex: m is ") and "of the cells to choose" in line for line in found)
    assert split.manifest(np.arange(N))["balance"] == found


def test_tasks_have_their_own_class_numbers():
    (split,) = split_tasks(ROWS, {"type": TYPE, "sex": SEX}, GROUPS, assigned=NONE, min_cells=2)
    single = split_by_group(ROWS, TYPE, GROUPS, assigned=NONE, min_cells=2)
    first, second = tasks_of(split)
    assert [(its.name, its.labels) for its in (first, second)] == list(split.tasks.items())
    np.testing.assert_array_equal(second.targets["train"], split.targets["train"][:, 1])
    (only,) = tasks_of(single)
    assert (only.name, only.labels, only.targets) == (None, single.labels, single.targets)


def test_classes_that_would_read_the_same_are_refused():
    kind = np.array([f"b: {one}" for one in SEX], dtype=object)
    other = np.array([str(one) for one in SEX], dtype=object)
    with pytest.raises(InputError, match="--label: got two classes that read 'a: b: None'"):
        split_tasks(ROWS, {"a": kind, "a: b": other}, GROUPS, assigned=NONE, min_cells=1)
