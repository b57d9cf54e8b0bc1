"""The Ray Serve application: ``serve run serve.app:app``, or ``serve deploy serve/config.yaml``.

A replica holds the model and the routes in one process, so that a request makes one hop. Cells of all requests are
computed together in batches of a token budget; only token ids enter a batch, so that one request's options cannot
reach another's answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI
from numpy.typing import NDArray
from ray import serve as ray_serve

from geneformer_ray.compute.execution import choose_execution
from serve.api import create_api
from serve.batches import SHORT_TOKENS, Computed, ModelThread, Piece, abandon, cut, joined
from serve.bound_host import bound_host
from serve.found_model import FoundModel, ModelSource
from serve.keys import check_keys
from serve.model import CellVector, ServedModel
from serve.model_cache import ModelCache
from serve.ray_metrics import RayMetrics
from serve.request_log import note, write_requests_to_stderr
from serve.settings import ServeSettings
from serve.watcher import ModelWatcher, first_model

__all__ = ["GeneformerService", "build"]

ResultT = TypeVar("ResultT")
# Batches that Serve has formed wait for the model's thread, which joins them.
BATCHES_AT_ONCE, PIECES_AT_ONCE = 256, 4
# Where they are more for a while, another replica is started: a few batches are in the model or wait for it.
REQUESTS_A_REPLICA = 16


def _tokens(pieces: Sequence[Piece]) -> int:
    return sum(piece.tokens for piece in pieces)


@ray_serve.deployment(
    name="Geneformer",
    max_ongoing_requests=64,
    # A finite queue: who comes later is told at once, and when to try again.
    max_queued_requests=128,
    backpressure_config={"status_code": 503, "retry_after_s": 1},
    # A replacement starts before the old replica stops: redeploying a single replica does not stall its callers.
    max_surge_percent=100,
    max_constructor_retry_count=3,
    health_check_period_s=5,
    graceful_shutdown_timeout_s=30,
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
        self._keys = check_keys(settings, bound_host())
        self._metrics = RayMetrics()
        write_requests_to_stderr()
        self._execution = choose_execution(cpus=settings.num_cpus, gpu=settings.num_gpus > 0)
        source = ModelSource(settings.model, settings.tracking_uri, ModelCache(settings.cache_directory))
        self._model = first_model(source, self._open)
        self._tell_model()
        self._longest = 0
        self._thread = ModelThread(settings.num_cpus, settings.tokens_of_a_batch, self._metrics)
        self._set_batch_size()
        self._watcher = ModelWatcher(
            source, self._open, lambda: self._model, self._replace, self._metrics.refusal, settings.num_cpus
        )
        self._watch: asyncio.Task[None] | None = None
        if source.moves and settings.watch_s:
            self._watch = asyncio.get_running_loop().create_task(self._watcher.watch(settings.watch_s))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Make the routes, once the model is loaded."""
        return create_api(self, keys=self._keys, metrics=self._metrics, behind_proxy=True)

    def check_health(self) -> None:
        """Let Serve replace a replica that cannot compute any more."""
        if self._thread.fault:
            raise RuntimeError(self._thread.fault)

    @property
    def model(self) -> ServedModel:
        """The model that new requests are answered with."""
        return self._model

    def _open(self, found: FoundModel) -> ServedModel:
        return ServedModel(
            found,
            vocabulary=self.settings.vocabulary,
            execution=self._execution,
            tokens_per_batch=self.settings.tokens_of_a_batch,
        )

    def _replace(self, model: ServedModel) -> None:
        self._model = model
        self._set_batch_size()
        self._metrics.swap()
        self._tell_model()

    def _tell_model(self) -> None:
        self._metrics.model(self._model.name, self._model.version, self._model.digest)

    def _set_batch_size(self) -> None:
        # A single cell may be longer than the budget; Serve refuses what does not fit a batch. A request may still have
        # pieces of a model that was replaced, so it never shrinks. (Serve takes the tokens for requests, and warns
        # that they are more than max_ongoing_requests.)
        self._longest = max(self._longest, self.settings.tokens_of_a_batch, self._model.max_length)
        for lane in (self._short, self._long):
            batched: Any = lane  # the decorator adds the setters
            batched.set_max_batch_size(self._longest)
            batched.set_batch_wait_timeout_s(self.settings.batch_wait_s)

    async def vectors(
        self, model: ServedModel, sequences: Sequence[NDArray[np.integer]], what: CellVector
    ) -> NDArray[np.float32]:
        """Compute one vector a cell, in pieces that fit a batch: a large request does not keep a small one waiting."""
        pieces, order = cut(model, what, sequences, self.settings.tokens_of_a_batch)
        # A few of them at a time: those of other requests come between.
        places = asyncio.Semaphore(PIECES_AT_ONCE)

        async def compute(piece: Piece) -> Computed:
            lane: Any = self._short if piece.tokens <= SHORT_TOKENS else self._long
            async with places:
                computed: Computed = await lane(piece)
                return computed

        try:
            computed = await asyncio.gather(*map(compute, pieces))
            note(cells=len(sequences), tokens=sum(map(len, sequences)), model=model.name, version=model.version)
            self._metrics.cells("classify" if what == "logits" else "embed", len(sequences))
            return joined(computed, order)
        finally:
            # Of one that was cancelled, nothing more is computed.
            abandon(pieces)

    async def run(self, work: Callable[[], ResultT]) -> ResultT:
        """Do other work of the model, in turn with the batches."""
        return await self._thread.run(work)

    # Two lanes: what Serve puts into one batch is answered together, and a short cell must not wait for a long one.
    @ray_serve.batch(batch_size_fn=_tokens, max_concurrent_batches=BATCHES_AT_ONCE)
    async def _short(self, pieces: list[Piece]) -> list[Computed]:
        return await self._thread.compute(pieces)

    @ray_serve.batch(batch_size_fn=_tokens, max_concurrent_batches=BATCHES_AT_ONCE)
    async def _long(self, pieces: list[Piece]) -> list[Computed]:
        return await self._thread.compute(pieces)


def build(args: dict[str, Any]) -> ray_serve.Application:
    """Build the application from ``args`` of a configuration file; what they leave out comes from the environment."""
    settings = ServeSettings.read(args)
    deployment: Any = GeneformerService  # what its decorators make of it
    application: ray_serve.Application = deployment.options(
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": max(settings.min_replicas, settings.max_replicas),
            "target_ongoing_requests": REQUESTS_A_REPLICA,
        },
    ).bind(settings)
    return application


def __getattr__(name: str) -> Any:
    """Build ``app`` when it is asked for, from the environment: a replica, which imports this module too, is not."""
    if name == "app":
        return build({})
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
