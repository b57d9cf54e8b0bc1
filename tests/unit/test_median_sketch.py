"""Sketches of non-zero values: exact while small, bounded beyond, and blind to the order in which values come."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from geneformer_ray.data.median_sketch import ERROR_BOUND, MedianSketch
from geneformer_ray.errors import InputError

GENES = 5
Pairs = list[tuple[int, float]]

# Values as they occur, and as they might: whole octaves, neighbours, ties, the ends of what a float64 holds.
VALUES = st.one_of(
    st.floats(1e-4, 1e4),
    st.sampled_from([1.0, 2.0, math.nextafter(2.0, 0), 4.0, 0.1, 2.5, 1e-300, 1e300]),
    st.integers(1, 40).map(lambda count: count / 4000 * 10_000),
)
PAIRS = st.lists(st.tuples(st.integers(0, GENES - 1), VALUES), max_size=60)
LIMITS = st.sampled_from([0, 1, 10, 30, 1000])


def add(sketch: MedianSketch, pairs: Pairs) -> MedianSketch:
    sketch.add(np.array([gene for gene, _ in pairs], np.int64), np.array([value for _, value in pairs], np.float64))
    return sketch


def sketch_of(pairs: Pairs, limit: int = 1000) -> MedianSketch:
    return add(MedianSketch(GENES, exact_values=limit), pairs)


def by_gene(pairs: Pairs) -> list[list[float]]:
    return [[value for gene, value in pairs if gene == wanted] for wanted in range(GENES)]


def same(one: MedianSketch, other: MedianSketch) -> bool:
    """Whether two sketches give the same counts and medians, bit for bit."""
    (seen, medians), (other_seen, other_medians) = one.medians(), other.medians()
    return one.exact == other.exact and (seen == other_seen).all() and medians.tobytes() == other_medians.tobytes()


# ---------------------------------------------------------------------- medians


@given(PAIRS)
def test_few_values_give_the_very_median(pairs: Pairs) -> None:
    sketch = sketch_of(pairs)
    seen, medians = sketch.medians()
    assert (sketch.exact, sketch.error_bound) == (True, 0)
    assert (seen.dtype, medians.dtype, seen.shape, medians.shape) == (np.int64, np.float64, (GENES,), (GENES,))
    for gene, values in enumerate(by_gene(pairs)):
        assert seen[gene] == len(values)
        assert medians[gene] == np.median(values) == statistics.median(values) if values else np.isnan(medians[gene])


@given(PAIRS)
@example([(0, 1.0)] * 9 + [(0, 2.0)])
@example([(0, math.nextafter(2.0, 0))] * 40)
def test_beyond_the_limit_the_error_stays_below_the_bound(pairs: Pairs) -> None:
    sketch = sketch_of(pairs, limit=0)
    assert sketch.exact == (not pairs)
    assert sketch.error_bound == (ERROR_BOUND if pairs else 0)
    seen, medians = sketch.medians()
    for gene, values in enumerate(by_gene(pairs)):
        assert seen[gene] == len(values)
        if values:
            assert abs(medians[gene] - statistics.median(values)) < ERROR_BOUND * statistics.median(values)
        else:
            assert np.isnan(medians[gene])


@given(VALUES)
def test_a_single_value_is_met_within_half_a_bin(value: float) -> None:
    assert sketch_of([(2, value)], limit=0).medians()[1][2] == pytest.approx(value, rel=ERROR_BOUND / 2, abs=0)


def test_smooth_values_are_met_far_below_the_bound() -> None:
    values = np.exp(np.linspace(-1, 2.3, 20_000))
    sketch = MedianSketch(1, exact_values=0)
    sketch.add(np.zeros(len(values), np.int32), values)
    assert sketch.medians()[1][0] == pytest.approx(np.median(values), rel=ERROR_BOUND / 100)


def test_the_median_does_not_hang_on_genes_beside_it() -> None:
    alone = sketch_of([(3, 2.0), (3, 5.0)], limit=0).medians()[1]
    crowded = sketch_of([(2, 7.0), (3, 2.0), (4, 1e9), (3, 5.0), (0, 1e-9)], limit=0).medians()[1]
    assert alone[3] == crowded[3]


# ---------------------------------------------------------------------- order


@given(PAIRS, LIMITS, st.lists(st.integers(0, 60), max_size=6), st.randoms(use_true_random=False))
@settings(max_examples=200)
def test_any_order_and_any_split_give_the_same_bits(pairs: Pairs, limit: int, cuts: list[int], random: object) -> None:
    whole = sketch_of(pairs, limit)
    shuffled = list(pairs)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    edges = [0, *sorted(min(cut, len(pairs)) for cut in cuts), len(pairs)]
    parts = [sketch_of(shuffled[start:stop], limit) for start, stop in pairwise(edges)]
    random.shuffle(parts)  # type: ignore[attr-defined]
    while len(parts) > 1:  # a tree: what was merged is merged again
        first, second = parts.pop(0), parts.pop(0)
        before = first.medians()
        second.merge(first)
        assert before[1].tobytes() == first.medians()[1].tobytes()
        parts.append(second)
    assert same(whole, parts[0])
    assert whole.exact == (len(pairs) <= limit)


@given(PAIRS, LIMITS)
def test_values_may_be_added_to_a_merged_sketch(pairs: Pairs, limit: int) -> None:
    third = len(pairs) // 3
    sketch = sketch_of(pairs[third : 2 * third], limit)
    sketch.merge(sketch_of(pairs[:third], limit))
    assert same(add(sketch, pairs[2 * third :]), sketch_of(pairs, limit))


def test_more_genes_than_are_read_out_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [(gene, float(value)) for gene in (0, 1, 4) for value in (gene + 1, 900, 3)]
    at_once = sketch_of(pairs, 0).medians()[1]
    monkeypatch.setattr("geneformer_ray.data.median_sketch.GENES_AT_ONCE", 2)
    in_turn = sketch_of(pairs, 0)
    assert in_turn.medians()[1].tobytes() == at_once.tobytes()
    merged = MedianSketch(GENES, exact_values=0)
    merged.merge(in_turn)
    assert same(merged, in_turn)


def test_memory_grows_with_genes_and_octaves_not_with_cells() -> None:
    once = sketch_of([(1, 1.5), (2, 1.5), (2, 3.5)], limit=0).nbytes
    often = sketch_of([(1, 1.5), (2, 1.5), (2, 3.5)] * 500, limit=0)
    assert once == add(often, [(1, 1.6), (2, 3.9)] * 500).nbytes < 5 * 512


def test_sketches_of_other_genes_or_another_limit_are_not_merged() -> None:
    for other in (MedianSketch(GENES + 1), MedianSketch(GENES, exact_values=3)):
        with pytest.raises(ValueError, match="same genes and the same limit"):
            MedianSketch(GENES).merge(other)


def test_a_counter_never_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    sketch = sketch_of([(1, 3.0)], limit=0)
    for _ in range(31):  # doubles each time
        copy = MedianSketch(GENES, exact_values=0)
        copy.merge(sketch)
        sketch.merge(copy)
    assert sketch.medians()[0].tolist() == [0, 2**31, 0, 0, 0]
    assert sketch.medians()[1][1] == pytest.approx(3, rel=ERROR_BOUND)
    copy = MedianSketch(GENES, exact_values=0)
    copy.merge(sketch)
    with pytest.raises(OverflowError, match="4,294,967,295"):
        sketch.merge(copy)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("limit", [0, 100])
def test_what_is_no_expression_is_refused(value: float, limit: int) -> None:
    with pytest.raises(InputError, match="--input: got a count / total"):
        sketch_of([(0, 1.0), (1, value)], limit)


def test_what_was_added_may_change_afterwards() -> None:
    genes, values = np.array([0, 0, 1], np.int32), np.array([1.0, 3.0, 5.0])
    sketch = MedianSketch(GENES)
    sketch.add(genes, values)
    genes[:], values[:] = 4, 9
    assert sketch.medians()[1][:2].tolist() == [2, 5]


# ---------------------------------------------------------------------- files


@given(PAIRS, PAIRS, LIMITS)
@settings(max_examples=40)
def test_a_sketch_that_was_saved_goes_on_as_if_it_had_not_been(
    tmp_path_factory: pytest.TempPathFactory, pairs: Pairs, more: Pairs, limit: int
) -> None:
    path = str(tmp_path_factory.mktemp("sketch") / "below" / "one.parquet")
    sketch = sketch_of(pairs, limit)
    sketch.save(path)
    loaded = MedianSketch.load(path)
    assert (loaded.genes, loaded.exact_values) == (GENES, limit)
    assert same(loaded, sketch)
    assert same(add(loaded, more), sketch_of(pairs + more, limit))


def test_pages_take_the_same_bytes_whatever_the_order(tmp_path: Path) -> None:
    pairs = [(gene, 1.7**step) for gene in range(GENES) for step in range(-20, 20)]
    sketch_of(pairs, 0).save(str(tmp_path / "forth"))
    sketch_of(pairs[::-1], 0).save(str(tmp_path / "back"))
    assert (tmp_path / "forth").read_bytes() == (tmp_path / "back").read_bytes()
