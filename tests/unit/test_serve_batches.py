"""What requests share: the model's thread and its batches, without Ray."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geneformer_ray.compute.classifier import new_classifier
from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.data.vocabulary import GeneVocabulary
from serve.batches import SHORT_TOKENS, ModelThread, Piece, abandon, compute, cut, joined
from serve.found_model import find_served_model
from serve.metrics import NoMetrics
from serve.model import ServedModel

EXECUTION = choose_execution(cpus=1)


@pytest.fixture(scope="module")
def model(model_directory: Path, vocabulary: GeneVocabulary, tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return made(model_directory, vocabulary, tmp_path_factory.mktemp("batches") / "model", 1)


@pytest.fixture(scope="module")
def other(model_directory: Path, vocabulary: GeneVocabulary, tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return made(model_directory, vocabulary, tmp_path_factory.mktemp("batches") / "other", 2)


def made(model_directory: Path, vocabulary: GeneVocabulary, directory: Path, seed: int) -> ServedModel:
    torch.manual_seed(seed)
    classifier, own = new_classifier(model_directory, vocabulary, ["alpha", "beta", "delta"], "mean")
    with torch.no_grad():
        classifier.classifier.weight.normal_(std=2.0)
    classifier.save(directory, own)
    return ServedModel(find_served_model(str(directory)), execution=EXECUTION)


def cells(lengths: Sequence[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [(rng.permutation(40)[:length] + 2).astype(np.int32) for length in lengths]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=12), st.integers(1, 64))
def test_cut_and_joined_are_the_whole(model: ServedModel, lengths: list[int], budget: int) -> None:
    sequences = cells(lengths)
    pieces, order = cut(model, "logits", sequences, budget)
    assert all(piece.tokens <= max(budget, max(lengths)) for piece in pieces)
    together = joined(compute(pieces), order)
    np.testing.assert_allclose(together, model.logits(sequences), atol=2e-6)


def test_pieces_of_other_models_and_kinds_keep_apart(model: ServedModel) -> None:
    pieces = [Piece(model, what, cells([5, 9], seed)) for seed, what in enumerate(["logits", "mean", "logits", "mean"])]
    for piece, found in zip(pieces, compute(pieces), strict=True):
        np.testing.assert_allclose(found, model.vectors(piece.sequences, piece.what), atol=2e-6)


def test_two_versions_in_a_batch_keep_apart(model: ServedModel, other: ServedModel) -> None:
    """A request that began before a swap meets one that came after it."""
    pieces = [Piece(which, "logits", cells([5, 9], seed)) for seed, which in enumerate([model, other, model])]
    for piece, found in zip(pieces, compute(pieces), strict=True):
        np.testing.assert_allclose(found, piece.model.vectors(piece.sequences, piece.what), atol=2e-6)
    assert np.abs(model.logits(cells([5])) - other.logits(cells([5]))).max() > 1e-3


def test_what_nobody_waits_for_is_not_computed(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    vectors = model.vectors
    monkeypatch.setattr(model, "vectors", lambda ids, what: seen.append(len(ids)) or vectors(ids, what))
    pieces = [Piece(model, "logits", cells([3, 4])), Piece(model, "logits", cells([5]))]
    abandon(pieces[:1])
    first, second = compute(pieces)
    assert (seen, first.size, second.shape) == ([1], 0, (1, 3))


def test_a_batch_that_memory_refuses_is_halved(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = model.vectors
    tried: list[int] = []

    def limited(ids: Sequence[np.ndarray], what: Any) -> np.ndarray:
        tried.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return vectors(ids, what)

    monkeypatch.setattr(model, "vectors", limited)
    (found,) = compute([Piece(model, "logits", cells([3, 4, 5, 6, 7]))])
    np.testing.assert_allclose(found, vectors(cells([3, 4, 5, 6, 7]), "logits"), atol=2e-6)
    assert tried == [5, 2, 3, 1, 2]


# ---------------------------------------------------------------------- the thread


class Gate:
    """Holds the thread until it is opened, so that what is asked meanwhile waits."""

    def __init__(self, thread: ModelThread) -> None:
        self._open, self._held = threading.Event(), threading.Event()
        self._task = asyncio.get_running_loop().create_task(thread.run(self._hold))

    def _hold(self) -> None:
        self._held.set()
        self._open.wait(10)

    async def closed(self) -> None:
        await asyncio.to_thread(self._held.wait, 10)

    async def open(self) -> None:
        self._open.set()
        await self._task


def test_what_waits_is_joined_up_to_the_budget(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    vectors = model.vectors
    monkeypatch.setattr(model, "vectors", lambda ids, what: sizes.append(len(ids)) or vectors(ids, what))

    async def ask() -> list[list[np.ndarray]]:
        thread = ModelThread(1, 40, NoMetrics())
        gate = Gate(thread)
        await gate.closed()
        asked = [asyncio.create_task(thread.compute([Piece(model, "logits", cells([10], n))])) for n in range(6)]
        await asyncio.sleep(0.05)
        assert thread.waiting == 6
        await gate.open()
        return await asyncio.gather(*asked)

    answers = asyncio.run(ask())
    assert sizes == [4, 2]
    for number, (answer,) in enumerate(answers):
        np.testing.assert_allclose(answer, vectors(cells([10], number), "logits"), atol=2e-6)


def test_short_and_long_work_take_turns(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither waits for all of the other: a short cell for one long turn, long work for one short batch."""
    order: list[str] = []
    vectors = model.vectors
    monkeypatch.setattr(
        model, "vectors", lambda ids, what: order.append("short" if len(ids) == 1 else "long") or vectors(ids, what)
    )

    async def ask() -> None:
        thread = ModelThread(1, 4, NoMetrics())  # nothing is joined
        gate = Gate(thread)
        await gate.closed()
        long = [Piece(model, "logits", cells([16] * (SHORT_TOKENS // 16 + 1))) for _ in range(3)]
        asked = [asyncio.create_task(thread.compute([piece])) for piece in long]
        asked += [asyncio.create_task(thread.compute([Piece(model, "mean", cells([4]))])) for _ in range(5)]
        asked.append(asyncio.create_task(thread.run(lambda: order.append("other"))))
        await asyncio.sleep(0.05)
        await gate.open()
        await asyncio.gather(*asked)

    asyncio.run(ask())
    assert order == ["short", "long", "short", "long", "short", "long", "short", "other", "short"]


def test_what_is_long_is_not_joined_to_what_is_short(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    vectors = model.vectors
    monkeypatch.setattr(model, "vectors", lambda ids, what: sizes.append(len(ids)) or vectors(ids, what))

    async def ask() -> None:
        thread = ModelThread(1, 1_000_000, NoMetrics())
        gate = Gate(thread)
        await gate.closed()
        pieces = [Piece(model, "logits", cells([16] * size)) for size in (1, 100, 2, 100)]
        asked = [asyncio.create_task(thread.compute([piece])) for piece in pieces]
        await asyncio.sleep(0.05)
        await gate.open()
        await asyncio.gather(*asked)

    asyncio.run(ask())
    assert sizes == [3, 200]


def test_one_requests_fault_is_no_others(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = model.vectors

    def failing(ids: Sequence[np.ndarray], what: Any) -> np.ndarray:
        if any(len(cell) == 7 for cell in ids):
            raise ZeroDivisionError("seven")
        return vectors(ids, what)

    monkeypatch.setattr(model, "vectors", failing)

    async def ask() -> list[Any]:
        thread = ModelThread(1, 4_096, NoMetrics())
        gate = Gate(thread)
        await gate.closed()
        asked = [asyncio.create_task(thread.compute([Piece(model, "logits", cells([n]))])) for n in (6, 7, 8)]
        await asyncio.sleep(0.05)
        await gate.open()
        return await asyncio.gather(*asked, return_exceptions=True)

    (six,), (seven,), (eight,) = asyncio.run(ask())
    assert isinstance(seven, ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        joined([six, seven], np.arange(2))
    np.testing.assert_allclose(six, vectors(cells([6]), "logits"), atol=2e-6)
    np.testing.assert_allclose(eight, vectors(cells([8]), "logits"), atol=2e-6)


def test_cancelled_work_never_starts(model: ServedModel) -> None:
    done: list[int] = []

    async def ask() -> None:
        thread = ModelThread(1, 64, NoMetrics())
        gate = Gate(thread)
        await gate.closed()
        asked = asyncio.create_task(thread.run(lambda: done.append(1)))
        await asyncio.sleep(0.05)
        asked.cancel()
        await asyncio.sleep(0.05)
        await gate.open()
        await thread.run(lambda: done.append(2))

    asyncio.run(ask())
    assert done == [2]


class Failing(NoMetrics):
    """Metrics that fail, as anything on the thread may."""

    def queued(self, seconds: float) -> None:
        raise OSError("no more file descriptors")


def test_the_thread_outlives_whatever_fails_on_it(model: ServedModel) -> None:
    async def ask() -> str:
        thread = ModelThread(1, 64, Failing())
        for _ in range(2):
            with pytest.raises(OSError, match="descriptors"):
                await thread.compute([Piece(model, "logits", cells([4]))])
        return thread.fault

    assert asyncio.run(ask()) == ""


def test_a_device_that_is_lost_is_a_fault(model: ServedModel) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    async def ask() -> str:
        thread = ModelThread(1, 64, NoMetrics())
        with pytest.raises(RuntimeError):
            await thread.run(lost)
        return thread.fault

    assert "CUDA error" in asyncio.run(ask())
