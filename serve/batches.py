"""Cells of several requests computed together, and the one thread that does it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from geneformer_ray.compute.execution import use_threads
from geneformer_ray.compute.token_budget import out_of_memory
from geneformer_ray.data.batching import length_batches
from serve.metrics import Metrics
from serve.model import CellVector, ServedModel

__all__ = ["SHORT_TOKENS", "Computed", "ModelThread", "Piece", "abandon", "compute", "cut", "joined"]

ResultT = TypeVar("ResultT")
# Pieces of more tokens than this are long work.
SHORT_TOKENS = 1_024
# What was computed of a piece, or why nothing was.
Computed: TypeAlias = "NDArray[np.float32] | Exception"


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


def joined(computed: Sequence[Computed], order: NDArray[np.int64]) -> NDArray[np.float32]:
    """Put what was computed of pieces back into the order of the request's cells; raise what one failed with."""
    for one in computed:
        if isinstance(one, Exception):
            raise one
    arrays = [np.asarray(one) for one in computed]
    vectors = np.empty((len(order), arrays[0].shape[1]), dtype=np.float32)
    vectors[order] = np.concatenate(arrays)
    return vectors


@dataclass
class _Waiting:
    """Something to do, and who waits for it."""

    since: float
    result: Future[Any]
    work: Callable[[], Any] | None = None
    pieces: Sequence[Piece] = ()

    @property
    def tokens(self) -> int:
        return sum(piece.tokens for piece in self.pieces)


class ModelThread:
    """The thread that computes with the model. The event loop stays free for health checks and other requests.

    Short and long work take turns where both wait: a short cell waits for one long turn at most, and long work goes on
    however many short cells come. Serve forms batches by time alone, so that those which are ready while another is
    computed would go one behind the other. Here they are joined up to the budget when their turn comes.

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
        self._lanes: dict[bool, deque[_Waiting]] = {True: deque(), False: deque()}  # short, and long
        self._ready = threading.Condition()
        self._short_next = True
        self._lost = ""
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many things wait for their turn."""
        return sum(map(len, self._lanes.values()))

    @property
    def fault(self) -> str:
        """Why nothing more can be computed here; nothing where it can."""
        return self._lost or ("" if self._thread.is_alive() else "the model's thread has ended")

    async def run(self, work: Callable[[], ResultT]) -> ResultT:
        """Do something on the thread. It counts as long work, whatever it is."""
        done: ResultT = await self._done(short=False, work=work)
        return done

    async def compute(self, pieces: Sequence[Piece]) -> list[Computed]:
        """Compute pieces, together with others that wait; an array of shape (cells, ...) or an error for each."""
        short = max(piece.tokens for piece in pieces) <= SHORT_TOKENS
        done: list[Computed] = await self._done(short=short, pieces=pieces)
        return done

    async def _done(self, *, short: bool, **what: Any) -> Any:
        waiting = _Waiting(time.monotonic(), Future(), **what)
        with self._ready:
            self._lanes[short].append(waiting)
            self._ready.notify()
        return await asyncio.wrap_future(waiting.result)

    def _work(self) -> None:
        use_threads(self._cpus)
        while True:
            self._turn()  # a function of its own: nothing of the last turn, such as a replaced model, is held meanwhile

    def _turn(self) -> None:
        together = [one for one in self._next() if one.result.set_running_or_notify_cancel()]
        if not together:
            return
        try:
            self._tell(together)
            found = [together[0].work()] if together[0].work else _compute_all(together)
        except BaseException as error:  # noqa: BLE001  (whoever waits gets it)
            self._lost = self._lost or (str(error) if "CUDA error" in str(error) else "")
            for one in together:
                one.result.set_exception(error)
        else:
            for one, result in zip(together, found, strict=True):
                one.result.set_result(result)

    def _tell(self, together: Sequence[_Waiting]) -> None:
        self._metrics.waiting(self.waiting)
        for one in together:
            self._metrics.queued(time.monotonic() - one.since)
        pieces = [piece for one in together for piece in one.pieces if not piece.abandoned]
        if pieces:
            lengths = [len(ids) for piece in pieces for ids in piece.sequences]
            padded = sum(piece.tokens for piece in pieces)
            self._metrics.batch(len(lengths), sum(lengths), padded, self.batch_tokens)

    def _next(self) -> list[_Waiting]:
        """Wait for whose turn it is, with whatever else of its lane fits the same batch."""
        with self._ready:
            while not self.waiting:
                self._ready.wait()
            short = bool(self._lanes[True]) and (self._short_next or not self._lanes[False])
            lane, self._short_next = self._lanes[short], not short
            together = [lane.popleft()]
            tokens = together[0].tokens
            while (
                together[0].work is None
                and lane
                and lane[0].work is None
                and tokens + lane[0].tokens <= self.batch_tokens
            ):
                together.append(lane.popleft())
                tokens += together[-1].tokens
            return together


def _compute_all(together: Sequence[_Waiting]) -> list[list[Computed]]:
    pieces = [piece for one in together for piece in one.pieces]
    found: list[Computed]
    try:
        found = list(compute(pieces))
    except Exception:
        if len(pieces) == 1:
            raise
        # One request's fault is no other's.
        found = [_alone(piece) for piece in pieces]
    rest = iter(found)
    return [[next(rest) for _ in one.pieces] for one in together]


def _alone(piece: Piece) -> Computed:
    try:
        return compute([piece])[0]
    except Exception as error:  # noqa: BLE001  (whoever asked gets it)
        return error


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
