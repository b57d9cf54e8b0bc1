"""What pretraining is measured on: cells at random as ever, or whole groups."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geneformer_ray.data.digests import digest_of
from geneformer_ray.data.held_out import HeldOut, hold_out_cells, hold_out_groups
from geneformer_ray.errors import InputError

ROWS = np.arange(100, 200)


def of(sizes: dict[str, int], share: float = 0.2, seed: int = 0, named: tuple[str, ...] = ()) -> HeldOut:
    """Hold out groups of these sizes."""
    groups = np.array([name for name, size in sizes.items() for _ in range(size)], dtype=object)
    return hold_out_groups(np.arange(len(groups)), "donor", groups, share, seed, named)


def test_single_cells_are_those_of_earlier_outputs() -> None:
    """An unfinished output of an earlier version goes on: it has the same rows, and the same digest of them."""
    order = np.random.default_rng(3).permutation(ROWS)
    held = hold_out_cells(ROWS, 0.1, 3)
    assert np.array_equal(held.validate, order[:10]) and np.array_equal(held.train, order[10:])
    assert held.digest == digest_of(order, 10)
    assert held.described() == {"cells": 10, "group": None}
    assert len(hold_out_cells(ROWS, 1e-9, 3).validate) == 1


@given(
    st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 30), min_size=2),
    st.floats(0.01, 0.9), st.integers(0, 5),
)  # fmt: skip
def test_no_group_is_on_both_sides(sizes: dict[str, int], share: float, seed: int) -> None:
    held, total = of(sizes, share, seed), sum(sizes.values())
    assert sorted([*held.train, *held.validate]) == list(range(total))
    names = np.array([name for name, size in sizes.items() for _ in range(size)])
    assert set(names[held.validate]) == set(held.groups)
    assert not set(names[held.train]) & set(held.groups)
    assert len(held.train) and len(held.validate)
    # Up to the share, unless no group is that small.
    assert len(held.validate) <= max(share * total, min(sizes.values()))


def test_the_smallest_group_is_held_out_where_all_are_beyond_the_share() -> None:
    assert of({"a": 50, "b": 20, "c": 30}, share=0.1).groups == ("b",)


def test_the_seed_decides_which_groups() -> None:
    sizes = dict.fromkeys("abcdefghij", 10)
    drawn = {of(sizes, seed=seed).groups for seed in range(12)}
    assert len(drawn) > 3
    assert of(sizes, seed=4).digest == of(sizes, seed=4).digest != of(sizes, seed=5).digest
    assert all(len(groups) == 2 for groups in drawn)


def test_named_groups_are_held_out_whatever_the_share() -> None:
    held = of({"a": 50, "b": 20, "c": 30}, share=0.1, named=("c", "a"))
    assert (held.groups, len(held.validate)) == (("a", "c"), 80)


def test_cells_without_a_group_take_no_part_and_are_counted() -> None:
    groups = np.array(["a", None, "b", np.nan, "b", "a"], dtype=object)
    held = hold_out_groups(np.arange(1, 6), "donor", groups, 0.5, 0)
    assert sorted([*held.train, *held.validate]) == [2, 4, 5]
    assert held.described() == {"cells": len(held.validate), "group": "donor", "groups": ["a"], "without_group": 2}


@pytest.mark.parametrize(
    ("sizes", "named", "says"),
    [
        ({"a": 5}, (), "--group: got donor with 1 group; takes a column with two or more"),
        ({"a": 5, "b": 2}, ("c",), "--validation-groups: got 'c'; takes groups that cells have: a, b"),
        ({"a": 5, "b": 2}, ("a", "b"), "--validation-groups: got a,b; takes not all groups of donor"),
    ],
)
def test_groups_that_leave_nothing_to_train_or_to_hold_out(
    sizes: dict[str, int], named: tuple[str, ...], says: str
) -> None:
    with pytest.raises(InputError, match=f"^{says}"):
        of(sizes, named=named)
