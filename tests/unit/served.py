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
from geneformer_ray.compute.multitask import MultiTaskClassifier, new_multitask_classifier
from geneformer_ray.data.vocabulary import GeneVocabulary
from serve.api import create_api
from serve.found_model import find_served_model
from serve.model import ServedModel
from serve.settings import ServeSettings

__all__ = [
    "EXECUTION",
    "LABELS",
    "TASKS",
    "Direct",
    "ask",
    "make_classifier",
    "make_islets",
    "make_multitask",
    "offline_odds",
    "offline_odds_by_task",
    "serve_directory",
    "some_counts",
]

LABELS = ["alpha", "beta", "delta", "ductal"]
TASKS = {"type": LABELS, "sex": ["female", "male"], "stage": ["adult", "child", "foetal"]}
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


def make_multitask(trunk: Path, vocabulary: GeneVocabulary, directory: Path, pooling: str = "mean") -> GeneVocabulary:
    """Save a classifier of several tasks, with states and examples as training writes them."""
    torch.manual_seed(1)
    rng = np.random.default_rng(3)
    model, own = new_multitask_classifier(trunk, vocabulary, TASKS, pooling)
    front = [] if own.cls_id is None else [own.cls_id]
    genes = [own.tokens[gene] for gene in own.genes]
    cells = [np.array([*front, *rng.permutation(genes)[:12]]) for _ in range(40)]
    with torch.no_grad():
        for head in model.classifier:
            head.weight.normal_(std=20.0)
        # What all cells have in common is taken off, so that each task has cells of several classes.
        common = torch.from_numpy(predict_logits(model, cells, own.pad_id, execution=EXECUTION).mean(axis=0))
        for head, part in zip(model.classifier, common.split([len(labels) for labels in TASKS.values()]), strict=True):
            head.bias -= part
    model.save(directory, own)
    states = {f"{task}: {label}": rng.normal(size=16).round(4).tolist() for task in TASKS for label in TASKS[task]}
    (directory / "states.json").write_text(json.dumps(states))
    examples = [
        {"cell_id": f"example {label}", "label": label, "input_ids": ids.tolist()}
        for label, ids in zip(LABELS, cells, strict=False)
    ]
    (directory / "examples.json").write_text(json.dumps(examples))
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


def offline_odds_by_task(
    directory: Path, vocabulary: GeneVocabulary, sequences: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """Classify encoded cells with the library alone: task -> shape (cells, its classes)."""
    model = MultiTaskClassifier.load(directory, vocabulary)
    logits = predict_logits(model, list(sequences), vocabulary.pad_id, execution=EXECUTION)
    ends = np.cumsum([len(labels) for labels in TASKS.values()])
    return {task: softmax(part, axis=1) for task, part in zip(TASKS, np.split(logits, ends[:-1], axis=1), strict=True)}


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
