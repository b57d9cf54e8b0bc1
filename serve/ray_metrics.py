"""What a replica counts, through Ray's own metrics export: names begin with ``ray_geneformer_`` there.

Ray keeps of a histogram's values only their buckets: counts are exact, sums are rough. The share of padding is
``padding_tokens_total / (padding_tokens_total + tokens_total)``, which are exact.
"""

from __future__ import annotations

from typing import Any, Literal

from ray.serve.metrics import Counter, Gauge, Histogram

__all__ = ["RayMetrics"]

# Seconds and sizes by powers, wide enough for a laptop's CPU and for a GPU.
SECONDS: list[float] = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60]
CELLS: list[float] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
TOKENS: list[float] = [64, 256, 1_024, 4_096, 16_384, 65_536, 262_144]
SHARES: list[float] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]


class RayMetrics:
    """Counts for one replica; Ray adds the application, the deployment and the replica to each."""

    def __init__(self) -> None:
        self._requests = Counter("geneformer_requests", "answered requests", _tags("route", "status"))
        self._seconds = Histogram("geneformer_request_seconds", "time to the answer's end", SECONDS, ("route",))
        self._batch_cells = Histogram("geneformer_batch_cells", "cells computed together", CELLS)
        self._batch_tokens = Histogram("geneformer_batch_tokens", "tokens of a batch, padding included", TOKENS)
        self._batch_fill = Histogram("geneformer_batch_fill", "share of the budget that a batch takes", SHARES)
        self._tokens = Counter("geneformer_tokens", "tokens computed, without padding")
        self._padding = Counter("geneformer_padding_tokens", "tokens computed that were padding")
        self._queued = Histogram("geneformer_queue_seconds", "time spent waiting for the model's thread", SECONDS)
        self._waiting = Gauge("geneformer_pieces_waiting", "pieces that wait for the model's thread")
        self._cells = Counter("geneformer_cells", "cells classified or embedded", ("kind",))
        self._events = Counter("geneformer_events", "perturbations measured")
        self._model = Gauge("geneformer_model", "1 for the model that serves", _tags("name", "version", "digest"))
        self._swaps = Counter("geneformer_model_swaps", "models replaced by another one")
        self._refusals = Counter("geneformer_model_refusals", "candidates that were refused")
        self._serving: dict[str, str] | None = None

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count an answered request, by its route's template."""
        self._requests.inc(1, {"route": route, "status": str(status)})
        self._seconds.observe(seconds, {"route": route})

    def batch(self, cells: int, tokens: int, padded_tokens: int, budget: int) -> None:
        """Count cells computed together: their tokens, those with padding, and the budget of a batch."""
        self._batch_cells.observe(cells, {})
        self._batch_tokens.observe(padded_tokens, {})
        self._batch_fill.observe(padded_tokens / budget, {})
        _add(self._tokens, tokens)
        _add(self._padding, padded_tokens - tokens)

    def queued(self, seconds: float) -> None:
        """Note how long something waited for its turn on the model's thread."""
        self._queued.observe(seconds, {})

    def waiting(self, pieces: int) -> None:
        """Note how many pieces wait now."""
        self._waiting.set(pieces, {})

    def cells(self, kind: Literal["classify", "embed"], number: int) -> None:
        """Count cells that were classified or embedded."""
        _add(self._cells, number, {"kind": kind})

    def events(self, number: int) -> None:
        """Count perturbations that were measured."""
        _add(self._events, number)

    def model(self, name: str, version: int | None, digest: str) -> None:
        """Note which model serves from now on; the one before falls to 0."""
        if self._serving is not None:
            self._model.set(0, self._serving)
        self._serving = {"name": name, "version": "none" if version is None else str(version), "digest": digest}
        self._model.set(1, self._serving)

    def swap(self) -> None:
        """Count a model that was replaced."""
        self._swaps.inc(1, {})

    def refusal(self) -> None:
        """Count a candidate that was refused."""
        self._refusals.inc(1, {})


def _tags(*names: str) -> Any:
    return names  # annotated there as a tuple of one


def _add(counter: Counter, number: int, tags: dict[str, str] | None = None) -> None:
    if number:  # Ray refuses to add nothing
        counter.inc(number, tags or {})
