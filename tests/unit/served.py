"""What tests of serving share: a small classifier, a service without Ray, and a client without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from fastapi import FastAPI
from scipy.special import softmax

from geneformer_ray.compute.classifier import CellClassifier, new_classifier, predict_logits
from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.data.vocabulary import GeneVocabulary
from serve.api import create_api
from serve.found_model import find_served_model
from serve.model import ServedModel
from serve.settings import ServeSettings

__all__ = [
    "EXECUTION",
    "LABELS",
    "Direct",
    "ask",
    "make_classifier",
    "make_islets",
    "offline_odds",
    "serve_directory",
    "some_counts",
]

LABELS = ["alpha", "beta", "delta", "ductal"]
EXECUTION = choose_execution(cpus=1)


def make_classifier(trunk: Path, vocabulary: GeneVocabulary, pooling: str, directory: Path) -> GeneVocabulary:
    """Save a classifier with weights that tell cells apart; give its vocabulary."""
    torch.manual_seed(1)
    model, own = new_classifier(trunk, vocabulary, LABELS, pooling)
    with torch.no_grad():
        model.classifier.weight.normal_(std=2.0)
    model.save(directory, own)
    return own


def make_islets(trunk: Path, vocabulary: GeneVocabulary, directory: Path, pooling: str = "mean") -> GeneVocabulary:
    """Save a classifier with two states."""
    own = make_classifier(trunk, vocabulary, pooling, directory)
    states = np.random.default_rng(3).normal(size=(2, 16)).round(4)
    (directory / "states.json").write_text(json.dumps({"alpha": states[0].tolist(), "beta": states[1].tolist()}))
    return own


def serve_directory(directory: Path) -> ServedModel:
    """Open a model as a service does."""
    return ServedModel(find_served_model(str(directory)), execution=EXECUTION)


def some_counts(vocabulary: GeneVocabulary, rng: np.random.Generator, genes: int) -> dict[str, float]:
    """Make a cell of so many genes of a vocabulary."""
    names = rng.permutation(vocabulary.genes)[:genes]
    return {str(name): float(rng.integers(1, 40)) for name in names}


def offline_odds(directory: Path, vocabulary: GeneVocabulary, sequences: Sequence[np.ndarray]) -> np.ndarray:
    """Classify encoded cells with the library alone."""
    model = CellClassifier.load(directory, vocabulary)
    return softmax(predict_logits(model, list(sequences), vocabulary.pad_id, execution=EXECUTION), axis=1)


class Direct:
    """A service that computes where it stands."""

    def __init__(self, model: ServedModel, settings: ServeSettings) -> None:
        self.model = model
        self.settings = settings
        self.turns = 0

    @cached_property
    def api(self) -> FastAPI:
        return create_api(self)

    async def vectors(self, model: ServedModel, sequences: Sequence[np.ndarray], what: Any) -> np.ndarray:
        return model.vectors(sequences, what)

    async def run(self, work: Callable[[], Any]) -> Any:
        self.turns += 1
        return work()


def ask(service: Direct, method: str, path: str, **options: Any) -> httpx.Response:
    """Send one request to a service's application."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(service.api)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())
