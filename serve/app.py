"""The Ray Serve application: ``serve run serve.app:app``, or ``serve deploy serve/config.yaml``.

A replica holds the model and the routes in one process, so that a request makes one hop. Cells of all requests are
computed together in batches of a token budget; only token ids enter a batch, so that one request's options cannot
reach another's answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI
from numpy.typing import NDArray
from ray import serve as ray_serve

from geneformer_ray.compute.execution import choose_execution, use_threads
from geneformer_ray.data.batching import length_batches
from serve.api import create_api
from serve.found_model import find_served_model
from serve.model import CellVector, ServedModel
from serve.settings import ServeSettings

__all__ = ["GeneformerService", "app", "build"]

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class BatchPiece:
    """Cells of one request that are computed together: by which model, and what."""

    model: ServedModel
    what: CellVector
    sequences: Sequence[NDArray[np.integer]]

    @property
    def padded_tokens(self) -> int:
        """The tokens that they take in memory."""
        return len(self.sequences) * max(len(ids) for ids in self.sequences)


def _padded_tokens(pieces: Sequence[BatchPiece]) -> int:
    return sum(piece.padded_tokens for piece in pieces)


@ray_serve.deployment(
    name="Geneformer",
    max_ongoing_requests=32,
    # A finite queue: who comes later is told at once, and when to try again.
    max_queued_requests=128,
    backpressure_config={"status_code": 503, "retry_after_s": 1},
    # A replacement starts before the old replica stops: redeploying a single replica does not stall its callers.
    max_surge_percent=100,
    max_constructor_retry_count=3,
)
@ray_serve.ingress()
class GeneformerService:
    """One replica.

    Parameters
    ----------
    settings
        What it was started with.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        execution = choose_execution(cpus=settings.num_cpus, gpu=settings.num_gpus > 0)
        self.model = ServedModel(
            find_served_model(settings.model, settings.tracking_uri),
            vocabulary=settings.vocabulary,
            execution=execution,
            tokens_per_batch=settings.batch_tokens,
        )
        # The event loop stays free for health checks and other requests; one thread, for forwards share the CPUs.
        self._worker = ThreadPoolExecutor(1, "model", initializer=use_threads, initargs=(settings.num_cpus,))
        batched: Any = self._batched  # the decorator adds the setters
        # A single cell may be longer than the budget; Serve refuses what does not fit a batch. (It takes the tokens
        # for requests, and warns that they are more than max_ongoing_requests.)
        batched.set_max_batch_size(max(settings.batch_tokens, self.model.max_length))
        batched.set_batch_wait_timeout_s(settings.batch_wait_s)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Make the routes, once the model is loaded."""
        return create_api(self)

    async def vectors(
        self, model: ServedModel, sequences: Sequence[NDArray[np.integer]], what: CellVector
    ) -> NDArray[np.float32]:
        """Compute one vector a cell, in pieces that fit a batch: a large request does not keep a small one waiting."""
        pieces = length_batches(np.array([len(ids) for ids in sequences]), self.settings.batch_tokens)
        given = [BatchPiece(model, what, [sequences[i] for i in piece]) for piece in pieces]
        computed: list[NDArray[np.float32]] = await asyncio.gather(*map(self._batched, given))
        vectors = np.empty((len(sequences), computed[0].shape[1]), dtype=np.float32)
        vectors[np.concatenate(pieces)] = np.concatenate(computed)
        return vectors

    async def run(self, work: Callable[[], ResultT]) -> ResultT:
        """Run other work of the model, in turn with the batches."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)

    @ray_serve.batch(batch_size_fn=_padded_tokens)
    async def _batched(self, pieces: list[BatchPiece]) -> list[NDArray[np.float32]]:
        return await self.run(lambda: _compute(pieces))


def _compute(pieces: Sequence[BatchPiece]) -> list[NDArray[np.float32]]:
    """Compute pieces together that ask the same of the same model."""
    alike: dict[tuple[int, CellVector], list[int]] = {}
    for number, piece in enumerate(pieces):
        alike.setdefault((id(piece.model), piece.what), []).append(number)
    found: dict[int, NDArray[np.float32]] = {}
    for numbers in alike.values():
        first = pieces[numbers[0]]
        computed = first.model.vectors([ids for number in numbers for ids in pieces[number].sequences], first.what)
        ends = np.cumsum([len(pieces[number].sequences) for number in numbers])
        found |= dict(zip(numbers, np.split(computed, ends[:-1]), strict=True))
    return [found[number] for number in range(len(pieces))]


def build(args: dict[str, Any]) -> ray_serve.Application:
    """Build the application from ``args`` of a configuration file; what they leave out comes from the environment."""
    settings = ServeSettings.read(args)
    resources = {"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus}
    deployment: Any = GeneformerService  # what its decorators make of it
    application: ray_serve.Application = deployment.options(ray_actor_options=resources).bind(settings)
    return application


app = build({})
