"""Splits by group: no donor or library on two sides."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from geneformer_ray.data.splits import NO_LABEL, ROLES, GroupSplit, folds_by_group, split_by_group
from geneformer_ray.errors import InputError

NONE: dict[str, tuple[str, ...]] = {}


def split(
    labels: list[str], groups: list[str], assigned: dict[str, tuple[str, ...]] = NONE, min_cells: int = 1
) -> GroupSplit:
    rows = np.arange(len(labels))
    return split_by_group(rows, np.array(labels), np.array(groups), assigned=assigned, min_cells=min_cells)


def cells_of(sizes: list[int]) -> tuple[list[str], list[str]]:
    """Cells of two types in turn, in groups of these sizes."""
    groups = [f"donor{number}" for number, size in enumerate(sizes) for _ in range(size)]
    return ["alpha" if number % 2 else "beta" for number in range(len(groups))], groups


def check_sides(found: GroupSplit, labels: NDArray[np.str_], groups: NDArray[np.str_]) -> None:
    """No group in two roles, every row where its group is, every target the row's label."""
    sides = {role: set(groups[found.rows[role]]) for role in ROLES}
    assert all(sides.values())
    assert sum(len(side) for side in sides.values()) == len(set().union(*sides.values()))
    for role in ROLES:
        assert {found.groups[group] for group in sides[role]} == {role}
        assert [found.labels[target] for target in found.targets[role]] == labels[found.rows[role]].tolist()


@given(sizes=st.lists(st.integers(2, 40), min_size=3, max_size=10), order=st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_no_group_is_on_two_sides(sizes: list[int], order: object) -> None:
    labels, groups = cells_of(sizes)
    pairs = list(zip(labels, groups, strict=True))
    order.shuffle(pairs)  # type: ignore[attr-defined]
    labels, groups = [label for label, _ in pairs], [group for _, group in pairs]
    found = split(labels, groups)
    check_sides(found, np.array(labels), np.array(groups))
    assert sorted(np.concatenate(list(found.rows.values())).tolist()) == list(range(len(labels)))
    assert found.groups.keys() == set(groups)
    assert found.labels == ["alpha", "beta"]
    # The same cells are dealt out the same way, whatever their order in the file.
    again = split(*cells_of(sizes))
    assert again.groups == found.groups


@pytest.mark.parametrize("count", [5, 10, 20])
def test_equal_groups_are_dealt_out_60_20_20(count: int) -> None:
    found = split(*cells_of([10] * count))
    roles = list(found.groups.values())
    assert {role: roles.count(role) / count for role in ROLES} == {"train": 0.6, "choose": 0.2, "report": 0.2}


@given(sizes=st.lists(st.integers(2, 60), min_size=3, max_size=8))
@settings(max_examples=40)
def test_the_largest_group_trains(sizes: list[int]) -> None:
    found = split(*cells_of(sizes))
    assert max(sizes) in [
        sizes[int(group.removeprefix("donor"))] for group, role in found.groups.items() if role == "train"
    ]


def test_assigned_groups_go_where_they_are_told() -> None:
    labels, groups = cells_of([4, 50, 6, 8, 30])
    assigned = {"train": ("donor0", "donor2"), "choose": ("donor1",), "report": ("donor3",)}
    found = split(labels, groups, assigned)
    check_sides(found, np.array(labels), np.array(groups))
    assert {role: {group for group, its in found.groups.items() if its == role} for role in ROLES} == {
        role: set(chosen) for role, chosen in assigned.items()
    }
    # A group that no role names takes no part.
    assert {role: len(found.rows[role]) for role in ROLES} == {"train": 10, "choose": 50, "report": 8}


def test_only_the_chosen_rows_take_part() -> None:
    labels, groups = cells_of([10, 10, 10, 10])
    rows = np.array([35, 1, 2, 11, 12, 21, 22, 38])
    found = split_by_group(rows, np.array(labels), np.array(groups), assigned=NONE, min_cells=1)
    assert sorted(np.concatenate(list(found.rows.values())).tolist()) == sorted(rows.tolist())
    check_sides(found, np.array(labels), np.array(groups))


def test_rare_labels_are_dropped_and_listed() -> None:
    """Rare means: too few cells in some role, however many there are in the others."""
    labels = ["alpha", "beta"] * 15 + ["delta"] * 20 + ["pp"] * 3
    groups = ["a"] * 10 + ["b"] * 10 + ["c"] * 10 + ["a"] * 18 + ["b", "c", "a", "b", "c"]
    assigned = {"train": ("a",), "choose": ("b",), "report": ("c",)}
    found = split(labels, groups, assigned, min_cells=2)
    assert found.labels == ["alpha", "beta"]
    assert found.dropped == {"delta": 20, "pp": 3}
    check_sides(found, np.array(labels), np.array(groups))
    everything = split(labels, groups, assigned, min_cells=1)
    assert everything.labels == ["alpha", "beta", "delta", "pp"]
    assert everything.dropped == {}


def test_the_manifest_says_how_to_split_again() -> None:
    labels, groups = cells_of([6, 6, 6])
    found = split(labels, groups)
    ids = np.array([f"cell{number}" for number in range(18)])
    manifest = found.manifest(ids)
    assert manifest["cells"] == {role: ids[found.rows[role]].tolist() for role in ROLES}
    assert manifest["groups"] == found.groups
    assert manifest["cells_per_label"] == {role: {"alpha": 3, "beta": 3} for role in ROLES}
    again = {role: tuple(g for g, its in manifest["groups"].items() if its == role) for role in ROLES}
    assert split(labels, groups, again).manifest(ids) == manifest


@pytest.mark.parametrize(
    ("sizes", "assigned", "field", "says"),
    [
        ([9, 9], NONE, "--group", "2 groups"),
        ([9, 9, 9], {"train": ("donor0",), "choose": ("donor9",)}, "--choose-groups", "donor9"),
        ([9, 9, 9], {"train": ("donor0",), "report": ("donor0",)}, "--report-groups", "donor0"),
        ([9, 9, 9], {"train": ("donor0",), "choose": ("donor1",)}, "--group", "no cells to report"),
    ],
    ids=["too few groups", "unknown group", "a group twice", "an empty role"],
)
def test_a_split_that_cannot_be_is_refused(
    sizes: list[int], assigned: dict[str, tuple[str, ...]], field: str, says: str
) -> None:
    with pytest.raises(InputError, match=says) as raised:
        split(*cells_of(sizes), assigned)
    assert raised.value.field == field


def test_one_class_only_is_refused() -> None:
    _, groups = cells_of([9, 9, 9])
    with pytest.raises(InputError, match="--label: got 1 classes"):
        split(["alpha"] * 27, groups)
    with pytest.raises(InputError, match="--min-cells"):
        split(*cells_of([9, 9, 9]), min_cells=100)


def test_cells_without_label_or_group_are_dropped_and_listed() -> None:
    labels = np.array(["a", "b", None] * 30, dtype=object)
    groups = np.repeat(np.array(["x", "y", "z"], dtype=object), 30)
    groups[0] = None
    split = split_by_group(np.arange(90), labels, groups, assigned={}, min_cells=1)
    assert split.labels == ["a", "b"]
    assert split.dropped == {NO_LABEL: 31}
    assert 0 not in np.concatenate(list(split.rows.values()))


# ---------------------------------------------------------------------- class balance


def test_even_classes_are_nothing_to_speak_of() -> None:
    found = split(*cells_of([20] * 5))
    assert found.balance() == []
    assert found.manifest(np.arange(100))["balance"] == []


def test_uneven_classes_are_said() -> None:
    """Three in a hundred train but half report; gamma trains from one of two groups."""
    groups = ["a"] * 100 + ["b"] * 100 + ["c"] * 100 + ["d"] * 100
    labels = ["alpha"] * 97 + ["rare"] * 3 + ["alpha"] * 90 + ["rare"] * 3 + ["gamma"] * 7
    labels += ["alpha"] * 90 + ["rare"] * 5 + ["gamma"] * 5 + ["alpha"] * 40 + ["rare"] * 50 + ["gamma"] * 10
    found = split(labels, groups, {"train": ("a", "b"), "choose": ("c",), "report": ("d",)})
    assert found.balance() == [
        "rare is 3.0% of the cells to train, 15.2% of all",
        "rare is 5.0% of the cells to choose, 15.2% of all",
        "rare is 50.0% of the cells to report, 15.2% of all",
        "every gamma cell to train comes from one group, b",
    ]
    manifest = found.manifest(np.arange(400))
    assert manifest["balance"] == found.balance()
    assert manifest["cells_per_group"]["d"] == {"alpha": 40, "gamma": 10, "rare": 50}


def test_a_single_training_group_is_said_once() -> None:
    found = split(*cells_of([50, 20, 20]))
    assert found.balance() == ["every cell to train comes from one group, donor0"]


# ---------------------------------------------------------------------- folds

Cells = tuple[list[str], list[str], list[str]]


@st.composite
def tables(draw: st.DrawFn) -> Cells:
    """Labels and groups of some cells in any order, and groups to hold out, at least three others beside them."""
    pairs = [
        (label, f"donor{number}")
        for number in range(draw(st.integers(3, 9)))
        for label in ("alpha", "beta", "gamma")
        for _ in range(draw(st.integers(0 if label == "gamma" else 1, 6)))
    ]
    order = draw(st.permutations(pairs))
    names = sorted({group for _, group in pairs})
    held_out = names[: draw(st.integers(0, len(names) - 3))]
    return [label for label, _ in order], [group for _, group in order], held_out


@given(table=tables(), data=st.data())
@settings(max_examples=80)
def test_every_group_takes_its_turn_and_is_never_on_two_sides(table: Cells, data: st.DataObject) -> None:
    labels, groups, held_out = (np.array(part, dtype=str) for part in table)
    free = sorted(set(groups) - set(held_out))
    folds = data.draw(st.integers(2 if len(held_out) else 3, len(free)))
    min_cells = data.draw(st.integers(1, 2))
    rows = np.arange(len(labels))
    try:
        found = folds_by_group(rows, labels, groups, folds=folds, min_cells=min_cells, held_out=held_out.tolist())
    except InputError as error:
        assert error.field == "--label"  # too few cells of a class somewhere
        return
    assert len(found) == folds
    for fold in found:
        check_sides(fold, labels, groups)
        assert set(fold.groups) == set(groups)
        assert (fold.labels, fold.dropped) == (found[0].labels, found[0].dropped)
        counts = fold.manifest(rows)["cells_per_label"]
        assert min(counts[role][label] for role in ROLES for label in fold.labels) >= min_cells
        # Nothing is lost: what does not take part has a label that is listed.
        assert sum(len(its) for its in fold.rows.values()) + sum(fold.dropped.values()) == len(labels)
    for role in ("choose",) if len(held_out) else ("choose", "report"):
        turns = [group for fold in found for group, its in fold.groups.items() if its == role]
        assert sorted(turns) == free
    if len(held_out):
        assert all({g for g, its in fold.groups.items() if its == "report"} == set(held_out) for fold in found)
        assert len({tuple(fold.rows["report"]) for fold in found}) == 1
    for label in found[0].dropped:
        # With a lower threshold it would be there: in some fold's role it is too rare.
        per_fold = [[np.isin(groups, [g for g, r in f.groups.items() if r == role]) for role in ROLES] for f in found]
        assert min((labels[side] == label).sum() for sides in per_fold for side in sides) < min_cells


@given(table=tables(), order=st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_folds_depend_on_the_cells_alone_not_on_their_order(table: Cells, order: object) -> None:
    labels, groups, held_out = table
    pairs = list(zip(labels, groups, strict=True))
    order.shuffle(pairs)  # type: ignore[attr-defined]

    def deal(cells: list[tuple[str, str]]) -> list[dict[str, str]]:
        its_labels, its_groups = (np.array(part) for part in zip(*cells, strict=True))
        rows = np.arange(len(cells))
        found = folds_by_group(rows, its_labels, its_groups, folds=3, min_cells=1, held_out=held_out)
        return [fold.groups for fold in found]

    assert deal(pairs) == deal(list(zip(labels, groups, strict=True)))


def test_folds_have_like_sizes() -> None:
    labels, groups = cells_of([10, 20, 30, 10, 30, 20])
    found = folds_by_group(np.arange(120), np.array(labels), np.array(groups), folds=3, min_cells=1)
    assert [len(fold.rows["report"]) for fold in found] == [40, 40, 40]


@pytest.mark.parametrize(
    ("count", "folds", "held_out", "field", "says"),
    [
        (4, 5, [], "--folds", "at most 4, the number of groups$"),
        (4, 4, ["donor0"], "--folds", "at most 3, the number of groups beside"),
        (4, 2, [], "--folds", "3 or more"),
        (4, 1, ["donor0"], "--folds", "2 or more"),
        (4, 3, ["donor9"], "--report-groups", "donor9"),
    ],
)
def test_folds_that_cannot_be_are_refused(count: int, folds: int, held_out: list[str], field: str, says: str) -> None:
    labels, groups = (np.array(part) for part in cells_of([9] * count))
    with pytest.raises(InputError, match=says) as raised:
        folds_by_group(np.arange(9 * count), labels, groups, folds=folds, min_cells=1, held_out=held_out)
    assert raised.value.field == field


def test_a_class_that_one_fold_lacks_is_dropped_from_all() -> None:
    labels = np.array(["alpha", "beta"] * 20 + ["gamma"] * 12)
    groups = np.array(["a", "a", "b", "b", "c", "c", "d", "d"] * 5 + ["a"] * 4 + ["b"] * 4 + ["c"] * 4)
    found = folds_by_group(np.arange(52), labels, groups, folds=4, min_cells=2)
    assert all(fold.labels == ["alpha", "beta"] and fold.dropped == {"gamma": 12} for fold in found)
    assert folds_by_group(np.arange(52), labels, groups, folds=3, min_cells=2)[0].labels == ["alpha", "beta", "gamma"]
