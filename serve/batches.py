"""Cells of several requests computed together, and the one thread that does it."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from geneformer_ray.compute.execution import use_threads
from geneformer_ray.compute.token_budget import out_of_memory
from geneformer_ray.data.batching import length_batches
from serve.metrics import Metrics
from serve.model import CellVector, ServedModel

__all__ = ["SHORT_TOKENS", "ModelThread", "Piece", "abandon", "compute", "cut", "joined"]

ResultT = TypeVar("ResultT")
# Work of more tokens than this lets what arrives within so many seconds after it go first: a long cell does not keep
# short ones waiting, and many short ones do not keep it waiting for ever.
SHORT_TOKENS, PATIENCE = 1_024, 1.0


@dataclass(eq=False)
class Piece:
    """Cells of one request that are computed together: by which model, and what.

    Nothing else of a request is here, so that its options cannot reach another one's answer.
    """

    model: ServedModel
    what: CellVector
    sequences: Sequence[NDArray[np.integer]]
    # Set when nobody waits for it any more: its deadline has passed, or the client has gone.
    abandoned: bool = field(default=False)

    @property
    def tokens(self) -> int:
        """What it takes in memory, padding included."""
        return len(self.sequences) * max(len(ids) for ids in self.sequences)


def cut(
    model: ServedModel, what: CellVector, sequences: Sequence[NDArray[np.integer]], batch_tokens: int
) -> tuple[list[Piece], NDArray[np.int64]]:
    """Cut a request's cells into pieces of like lengths that fit a batch.

    Returns
    -------
    pieces, order
        The pieces, and which of the request's cells each of their cells is, shape (cells,).
    """
    batches = length_batches(np.array([len(ids) for ids in sequences]), batch_tokens)
    pieces = [Piece(model, what, [sequences[i] for i in batch]) for batch in batches]
    return pieces, np.concatenate(batches)


def joined(computed: Sequence[NDArray[np.float32]], order: NDArray[np.int64]) -> NDArray[np.float32]:
    """Put what was computed of pieces back into the order of the request's cells."""
    vectors = np.empty((len(order), computed[0].shape[1]), dtype=np.float32)
    vectors[order] = np.concatenate(computed)
    return vectors


@dataclass(order=True)
class _Waiting:
    """Something to do, in the order in which it is due."""

    due: float
    number: int
    short: bool = field(compare=False)
    since: float = field(compare=False)
    result: Future[Any] = field(compare=False)
    work: Callable[[], Any] | None = field(compare=False, default=None)
    pieces: list[Piece] = field(compare=False, default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(piece.tokens for piece in self.pieces)


class ModelThread:
    """The thread that computes with the model. The event loop stays free for health checks and other requests.

    Serve forms batches by time alone: those that are ready while another is computed wait one behind the other. Here
    they are joined up to the budget when their turn comes.

    Parameters
    ----------
    cpus
        Threads of the matrix products.
    batch_tokens
        Padded tokens computed at once.
    metrics
        Told of batches and of what waits.
    """

    def __init__(self, cpus: float, batch_tokens: int, metrics: Metrics) -> None:
        self.batch_tokens = batch_tokens
        self._cpus, self._metrics = cpus, metrics
        self._heap: list[_Waiting] = []
        self._ready = threading.Condition()
        self._numbers = itertools.count()
        threading.Thread(target=self._work, name="model", daemon=True).start()

    @property
    def waiting(self) -> int:
        """How many things wait for their turn."""
        return len(self._heap)

    async def run(self, work: Callable[[], ResultT]) -> ResultT:
        """Do something on the thread. It counts as long work, whatever it is."""
        done: ResultT = await self._done(short=False, work=work)
        return done

    async def compute(self, pieces: list[Piece]) -> list[NDArray[np.float32]]:
        """Compute pieces, together with others that wait; one array of shape (cells, ...) a piece."""
        short = max(piece.tokens for piece in pieces) <= SHORT_TOKENS
        done: list[NDArray[np.float32]] = await self._done(short=short, pieces=pieces)
        return done

    async def _done(self, *, short: bool, **what: Any) -> Any:
        now = time.monotonic()
        waiting = _Waiting(now if short else now + PATIENCE, next(self._numbers), short, now, Future(), **what)
        with self._ready:
            heapq.heappush(self._heap, waiting)
            self._ready.notify()
        return await asyncio.wrap_future(waiting.result)

    def _work(self) -> None:
        use_threads(self._cpus)
        while True:
            together = [one for one in self._next() if one.result.set_running_or_notify_cancel()]
            self._metrics.waiting(self.waiting)
            if together:
                self._tell(together)
                self._do(together)

    def _tell(self, together: Sequence[_Waiting]) -> None:
        for one in together:
            self._metrics.queued(time.monotonic() - one.since)
        pieces = [piece for one in together for piece in one.pieces if not piece.abandoned]
        if pieces:
            lengths = [len(ids) for piece in pieces for ids in piece.sequences]
            padded = sum(piece.tokens for piece in pieces)
            self._metrics.batch(len(lengths), sum(lengths), padded, self.batch_tokens)

    def _do(self, together: list[_Waiting]) -> None:
        try:
            found = [together[0].work()] if together[0].work else _compute_all(together)
        except BaseException as error:  # noqa: BLE001  (whoever waits gets it)
            if len(together) == 1:
                together[0].result.set_exception(error)
                return
            # One request's fault is no other's.
            for one in together:
                self._do([one])
        else:
            for one, result in zip(together, found, strict=True):
                one.result.set_result(result)

    def _next(self) -> list[_Waiting]:
        """Wait for what is due first, with whatever else fits the same batch."""
        with self._ready:
            while not self._heap:
                self._ready.wait()
            first = heapq.heappop(self._heap)
            together, tokens = [first], first.tokens
            if first.work is None:
                for one in sorted(self._heap):
                    # Together they end together: nothing short is kept by something long.
                    if one.work is None and one.short == first.short and tokens + one.tokens <= self.batch_tokens:
                        together.append(one)
                        tokens += one.tokens
                taken = {one.number for one in together}
                self._heap = [one for one in self._heap if one.number not in taken]
                heapq.heapify(self._heap)
            return together


def _compute_all(together: Sequence[_Waiting]) -> list[list[NDArray[np.float32]]]:
    pieces = [piece for one in together for piece in one.pieces]
    found = iter(compute(pieces))
    return [[next(found) for _ in one.pieces] for one in together]


def compute(pieces: Sequence[Piece]) -> list[NDArray[np.float32]]:
    """Compute pieces together that ask the same of the same model; those that nobody waits for give nothing."""
    found = [np.empty((0, 0), dtype=np.float32)] * len(pieces)
    alike: dict[tuple[int, CellVector], list[int]] = {}
    for number, piece in enumerate(pieces):
        if not piece.abandoned:
            alike.setdefault((id(piece.model), piece.what), []).append(number)
    for numbers in alike.values():
        first = pieces[numbers[0]]
        sequences = [ids for number in numbers for ids in pieces[number].sequences]
        computed = _halved_when_too_large(first.model, first.what, sequences)
        ends = np.cumsum([len(pieces[number].sequences) for number in numbers])
        for number, vectors in zip(numbers, np.split(computed, ends[:-1]), strict=True):
            found[number] = vectors
    return found


def _halved_when_too_large(
    model: ServedModel, what: CellVector, sequences: Sequence[NDArray[np.integer]]
) -> NDArray[np.float32]:
    """Compute cells at once; by halves where memory does not suffice: others of the same GPU may have taken it."""
    try:
        return model.vectors(sequences, what)
    except Exception as error:
        if not out_of_memory(error) or len(sequences) < 2:
            raise
    half = len(sequences) // 2
    return np.concatenate([_halved_when_too_large(model, what, part) for part in (sequences[:half], sequences[half:])])


def abandon(pieces: Iterable[Piece]) -> None:
    """Note that nobody waits for these any more."""
    for piece in pieces:
        piece.abandoned = True
