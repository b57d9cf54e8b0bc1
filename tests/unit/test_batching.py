"""Batches: every cell once, within a budget of padded tokens, the same in every process."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from geneformer_ray.data.batching import WINDOW_BATCHES, Step, TrainingPlan, length_batches, pad, training_steps
from geneformer_ray.errors import InputError

Steps = list[list[NDArray[np.int64]]]
many_lengths = st.lists(st.integers(0, 60), max_size=80).map(lambda lengths: np.array(lengths, dtype=np.int64))


def skewed(cells: int, seed: int = 0) -> NDArray[np.int64]:
    """Lengths as real cells have them: most are short, a few fill the model."""
    lengths = np.random.default_rng(seed).lognormal(6.5, 0.7, cells)
    return np.clip(lengths, 10, 2048).astype(np.int64)


def padded(batch: NDArray[np.int64], lengths: NDArray[np.int64]) -> int:
    return len(batch) * int(lengths[batch].max(initial=0))


def plan(lengths: NDArray[np.int64], seed: int = 0, epoch: int = 0, workers: int = 2, tokens: int = 4096) -> Steps:
    return training_steps(lengths, seed=seed, epoch=epoch, workers=workers, tokens_per_batch=tokens)


def same(first: Steps, second: Steps) -> bool:
    return [[batch.tolist() for batch in step] for step in first] == [[b.tolist() for b in step] for step in second]


@given(sequences=st.lists(st.lists(st.integers(1, 99), max_size=9), max_size=6))
@settings(max_examples=40)
def test_pad_keeps_every_token_and_fills_behind(sequences: list[list[int]]) -> None:
    ids, lengths = pad([np.array(ids, dtype=np.int32) for ids in sequences], pad_id=0)
    assert ids.shape == (len(sequences), max(map(len, sequences), default=0))
    assert ids.dtype == lengths.dtype == np.int64
    assert [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)] == sequences
    assert not any(row[length:].any() for row, length in zip(ids, lengths, strict=True))


# ---------------------------------------------------------------------- inference


@given(lengths=many_lengths, budget=st.integers(1, 300))
@settings(max_examples=60)
def test_length_batches_hold_every_cell_once_within_the_budget(lengths: NDArray[np.int64], budget: int) -> None:
    batches = length_batches(lengths, budget)
    assert sorted(int(cell) for batch in batches for cell in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or padded(batch, lengths) <= budget


def test_length_batches_pad_little() -> None:
    lengths = skewed(2_000)
    batches = length_batches(lengths, 16_384)
    assert sum(padded(batch, lengths) for batch in batches) < 1.03 * lengths.sum()
    longest = [int(lengths[batch].max()) for batch in batches]
    assert longest == sorted(longest, reverse=True)  # the first batch shows whether memory is enough


# ---------------------------------------------------------------------- training


@given(
    lengths=many_lengths,
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
    workers=st.integers(1, 5),
    budget=st.integers(1, 300),
)
@settings(max_examples=200)
def test_every_cell_once_an_epoch_and_work_for_every_worker(
    lengths: NDArray[np.int64], seed: int, epoch: int, workers: int, budget: int
) -> None:
    if len(lengths) < workers:
        with pytest.raises(InputError, match="--num-workers"):
            plan(lengths, seed, epoch, workers, budget)
        return
    steps = plan(lengths, seed, epoch, workers, budget)
    assert sorted(int(cell) for step in steps for batch in step for cell in batch) == list(range(len(lengths)))
    for step in steps:
        assert len(step) == workers
        # A worker without a cell would wait for ever, or be waited for.
        assert min(len(batch) for batch in step) >= 1
        cells = sum(len(batch) for batch in step)
        for batch in step:
            # One cell a worker is the least there is; too few for another step of one cell each have to join one.
            assert padded(batch, lengths) <= budget or len(batch) == 1 or cells < 2 * workers


@given(workers=st.integers(1, 4), left_over=st.integers(0, 3), budget=st.sampled_from([2048, 4096, 8192]))
@settings(max_examples=15)
def test_no_batch_passes_the_budget_for_the_cells_left_over(workers: int, left_over: int, budget: int) -> None:
    """Whatever the number of cells: the last ones never join a batch that they would make much larger."""
    lengths = skewed(600 + left_over)
    for step in plan(lengths, 0, 0, workers, budget):
        assert max(padded(batch, lengths) for batch in step) <= budget


def test_a_plan_is_a_pure_function() -> None:
    lengths = skewed(300)
    again = lengths.copy()
    np.random.default_rng().random()
    assert same(plan(lengths, 3, 5), plan(again, 3, 5))
    np.testing.assert_array_equal(lengths, again)


def test_other_epochs_and_seeds_have_other_orders() -> None:
    lengths = skewed(300)
    plans = [plan(lengths, seed, epoch) for seed in range(3) for epoch in range(3)]
    for number, one in enumerate(plans):
        assert not any(same(one, other) for other in plans[:number])


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("tokens", [8_192, 32_768])
def test_padding_stays_below_a_tenth(workers: int, tokens: int) -> None:
    lengths = skewed(4_000)
    steps = plan(lengths, 0, 0, workers, tokens)
    total = sum(padded(batch, lengths) for step in steps for batch in step)
    assert 1 - lengths.sum() / total < 0.10


def test_workers_of_a_step_have_like_work() -> None:
    lengths = skewed(4_000)
    for step in plan(lengths, 0, 0, 4, 16_384):
        work = [int(lengths[batch].max()) for batch in step]
        assert min(work) > 0.8 * max(work)


def test_an_epoch_does_not_run_from_long_cells_to_short_ones() -> None:
    lengths = skewed(4_000)
    longest = np.array([lengths[np.concatenate(step)].max() for step in plan(lengths, 0, 0, 2, 4096)])
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.3


# ---------------------------------------------------------------------- windows of many shards


def plan_of(
    lengths: NDArray[np.int64], rows_a_shard: int = 50, *, seed: int = 0, workers: int = 2, tokens: int = 2048,
    accumulate: int = 1, window: int = 2**16,
) -> TrainingPlan:  # fmt: skip
    return TrainingPlan(
        lengths, np.arange(len(lengths)) // rows_a_shard, seed=seed, workers=workers, tokens_per_batch=tokens,
        accumulate=accumulate, window_tokens=window,
    )  # fmt: skip


def listed(steps: list[Step]) -> list[object]:
    return [(s.epoch, s.number, [[cells.tolist() for cells in batch] for batch in s.batches]) for s in steps]


@given(
    cells=st.integers(5, 600),
    longest=st.integers(1, 40),
    rows_a_shard=st.integers(1, 40),
    workers=st.integers(1, 5),
    budget=st.integers(1, 60),
    accumulate=st.integers(1, 3),
    window=st.integers(1, 4000),
    epoch=st.integers(0, 2),
)
@settings(max_examples=150)
def test_windows_hold_every_cell_once_with_work_for_every_worker(
    cells: int, longest: int, rows_a_shard: int, workers: int, budget: int, accumulate: int, window: int, epoch: int
) -> None:
    lengths = np.random.default_rng(cells).integers(0, longest + 1, cells)
    made = plan_of(lengths, rows_a_shard, workers=workers, tokens=budget, accumulate=accumulate, window=window)
    steps = list(made.steps(epoch))
    assert sorted(int(i) for s in steps for batch in s.batches for cells in batch for i in cells) == list(
        range(len(lengths))
    )
    assert [step.number for step in steps] == list(range(made.count(epoch)))
    for step in steps:
        assert 1 <= len(step.batches) <= accumulate
        assert all(len(batch) == workers and min(map(len, batch)) >= 1 for batch in step.batches)
    for first in (0, 1, len(steps) // 2, len(steps)):
        assert listed(list(made.steps(epoch, first))) == listed(steps[first:])


def test_long_cells_in_small_batches_leave_no_worker_without_one() -> None:
    steps = list(plan_of(np.full(300, 60), 1, workers=5, tokens=1, window=1).steps(0))
    assert [len(cells) for step in steps for batch in step.batches for cells in batch] == [1] * 300


def test_a_window_is_bounded_and_mixes_many_places() -> None:
    lengths = skewed(20_000)
    made = plan_of(lengths, rows_a_shard=20_000, workers=1, tokens=1024, window=2**20)  # one huge row group
    windows = made.windows(0)
    assert len(windows) > 5
    for number, parts in enumerate(windows):
        cells = np.concatenate([i for step in made.window_batches(0, number, parts) for batch in step for i in batch])
        assert 0.8 * 2**20 < lengths[cells].sum() < 2.2 * 2**20
        assert np.ptp(cells) > 10_000


def test_a_window_is_never_smaller_than_a_full_shuffle_needs() -> None:
    lengths = skewed(4_000)
    tokens = 8 * WINDOW_BATCHES * 2048
    made = plan_of(lengths, workers=4, accumulate=2, window=1)
    assert all(
        lengths[np.concatenate([i for step in made.window_batches(0, n, parts) for batch in step for i in batch])].sum()
        > 0.8 * tokens
        for n, parts in enumerate(made.windows(0))
    )


def test_few_cells_are_shuffled_whole_wherever_they_lie() -> None:
    lengths = skewed(400)
    steps = [step.batches[0] for step in plan_of(lengths, 7, window=2**24).steps(3)]
    assert same(steps, plan(lengths, 0, 3, 2, 2048))


def test_a_plan_of_windows_is_a_pure_function_of_seed_and_epoch() -> None:
    lengths = skewed(2_000)
    seen = [
        listed(list(plan_of(lengths.copy(), seed=seed, workers=workers).steps(epoch)))
        for seed in (0, 1) for epoch in (0, 1) for workers in (1, 2)
    ]  # fmt: skip
    np.random.default_rng().random()
    assert listed(list(plan_of(lengths, seed=1, workers=2).steps(1))) == seen[-1]
    assert all(one != other for number, one in enumerate(seen) for other in seen[:number])


def test_each_epoch_has_windows_of_other_shards() -> None:
    made = plan_of(skewed(2_000))
    windows = [{frozenset(parts.tolist()) for parts in made.windows(epoch)} for epoch in range(3)]
    assert len(windows[0]) > 5
    assert not windows[0] & windows[1] & windows[2]


def pancreas(cells: int) -> NDArray[np.int64]:
    """Lengths as in Baron's pancreas: about 1,900 genes a cell, few of them below 1,000."""
    return np.clip(np.random.default_rng(1).normal(1_900, 550, cells), 300, 4_096).astype(np.int64)


@pytest.mark.parametrize("lengths", [np.clip(skewed(8_000), 200, 2_048), pancreas(4_000)], ids=["log-normal", "baron"])
@pytest.mark.parametrize("workers", [1, 4])
def test_padding_stays_below_a_tenth_in_windows(lengths: NDArray[np.int64], workers: int) -> None:
    made = plan_of(lengths, 100, workers=workers, tokens=8_192, window=2**20)
    assert len(made.windows(0)) > 1
    batches = [cells for step in made.steps(0) for batch in step.batches for cells in batch]
    assert 1 - lengths.sum() / sum(padded(batch, lengths) for batch in batches) < 0.10
