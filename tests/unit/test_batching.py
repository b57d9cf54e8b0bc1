"""Batches: every cell once, within a budget of padded tokens, the same in every process."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from geneformer_ray.data.batching import length_batches, pad, training_steps
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
