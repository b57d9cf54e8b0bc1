"""A path of deletions by itself: what anchors say of steps, and what becomes of what is missing."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from geneformer_ray.compute.deletion_path import DeletionPath, first_anchors


def path_of(
    genes: int, anchors: list[int], rng: np.random.Generator, off: float = 0.0
) -> tuple[DeletionPath, np.ndarray]:
    """A path whose steps change evenly with the neighbourhood that they are taken in, and its values."""
    base_SQ, slope_SQ = rng.normal(size=(2, 2, genes - 1))
    step_SQ = base_SQ + slope_SQ * (np.arange(genes - 1) + 0.5)
    value_SN = np.concatenate([np.zeros((2, 1)), step_SQ.cumsum(axis=1)], axis=1) + rng.normal(size=(2, 1))
    path = DeletionPath(genes, 2)
    for anchor in anchors:
        some = path.reach(anchor, anchors)
        near = slice(some.start, some.stop)
        path.add_anchor(anchor, value_SN[:, anchor], some.start, (base_SQ + slope_SQ * anchor)[:, near] + off)
    return path, value_SN


@given(st.integers(2, 40), st.integers(2, 9), st.integers(0, 99))
def test_steps_between_anchors_are_between_what_they_say(genes: int, anchors: int, seed: int) -> None:
    path, value_SN = path_of(genes, first_anchors(genes, anchors), np.random.default_rng(seed))
    np.testing.assert_allclose(path.values(), value_SN, atol=1e-9 * genes**2)
    assert max(path.gaps(2).values()) < 1e-9 * genes**2


@given(st.integers(3, 40), st.integers(2, 9), st.integers(0, 99))
def test_every_exact_value_is_met(genes: int, anchors: int, seed: int) -> None:
    """Steps that are all off by one thing; held-out values are met too, but where they are left out."""
    rng = np.random.default_rng(seed)
    path, value_SN = path_of(genes, first_anchors(genes, anchors), rng, off=1.0)
    if anchors < genes:
        assert max(path.gaps(2).values()) > 0.5
    other = int(rng.integers(genes))
    before_SN = path.values()
    path.add_exact(other, value_SN[:, other] + (1.0 if other not in path.anchors else 0.0))
    met = sorted(path.exact)
    np.testing.assert_allclose(path.values()[:, met], np.stack([path.exact[k] for k in met], axis=1), atol=1e-6)
    if other not in path.anchors:
        np.testing.assert_array_equal(path.values(without=[other]), before_SN)


def test_what_is_missing_goes_where_anchors_disagree() -> None:
    path = DeletionPath(5, 1)
    path.add_anchor(0, np.zeros(1), 0, np.zeros((1, 4)))
    path.add_anchor(4, np.ones(1), 0, np.array([[0.0, 0.0, 1e-9, 0.0]]))
    np.testing.assert_allclose(path.values()[0], [0, 0, 0, 1, 1], atol=2e-3)
    path.beside_FN[0, 1] = 0.25  # of this gene alone
    np.testing.assert_allclose(path.values()[0], [0, 0.25, 0, 1, 1], atol=2e-3)


@given(st.integers(1, 3000), st.integers(2, 50))
def test_first_anchors(genes: int, anchors: int) -> None:
    chosen = first_anchors(genes, anchors)
    assert chosen == sorted(set(chosen))
    assert (chosen[0], chosen[-1]) == (0, genes - 1)
    assert len(chosen) <= max(2, anchors)
    if anchors >= genes:
        assert chosen == list(range(genes))
    if genes > 100 and anchors > 2:
        assert chosen[1] - chosen[0] < chosen[-1] - chosen[-2]


def test_anchors_reach_to_the_next_ones() -> None:
    path = DeletionPath(10, 1)
    assert path.reach(4, [0, 4, 9]) == range(9)
    assert path.reach(4, [0, 2, 4, 6, 9]) == range(2, 6)
    assert path.reach(9, [0, 2, 4, 6, 9]) == range(6, 9)
