"""What the jobs on the embedded pancreas cells share: timed stages, their settings, and a small pretrained model."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from geneformer_ray.data import storage
from geneformer_ray.manage.demo import GROUPS, prepare
from geneformer_ray.progress import say
from ray_jobs import pretrain, tokenize
from ray_jobs.command_line import build

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FINETUNING", "PRETRAINING", "SPLIT", "Stages", "encode_and_pretrain"]

PRETRAINING = {
    "layers": 2, "width": 64, "heads": 4, "feed_forward": 128, "initializer_range": 0.08, "epochs": 4,
    "learning_rate": 5e-3, "weight_decay": 0.01, "tokens_per_batch": 2048, "num_workers": 2,
}  # fmt: skip
FINETUNING = {
    "pooling": ["first_gene", "cls", "mean"], "epochs": 8, "learning_rate": 2e-3, "weight_decay": 0.01,
    "warmup_fraction": 0.05, "class_weights": "balanced", "label_smoothing": 0.05, "gene_dropout": 0.2,
    "tokens_per_batch": 2048, "num_workers": 2,
}  # fmt: skip
SPLIT = {
    "label": "cell_type", "group": "library", **{f"{role}_groups": [group] for role, group in GROUPS.items()},
}  # fmt: skip


class Stages:
    """Runs the stages in turn and keeps their summaries and seconds."""

    def __init__(self, output: str) -> None:
        self.output = output
        self.seconds: dict[str, float] = {}
        self.summaries: dict[str, dict[str, Any]] = {}

    def at(self, *parts: str) -> str:
        """Give a place in the output."""
        return storage.join(self.output, *parts)

    def __call__(self, name: str, run: Callable[[], dict[str, Any]], output: str | None = None) -> dict[str, Any]:
        """Run a stage, unless its own output is given and is finished: then take its summary from there."""
        say(f"== {name}")
        started = time.monotonic()
        manifest = storage.join(output, storage.MANIFEST) if output else None
        found = storage.read_json(manifest) if manifest and storage.exists(manifest) else {}
        self.summaries[name] = found["summary"] if found.get("finished") else run()
        self.seconds[name] = round(time.monotonic() - started, 1)
        return self.summaries[name]


def encode_and_pretrain(stage: Stages, seed: int) -> None:
    """Write ``cells``, ``vocabulary`` and ``pretrained/model``: the first stages of every job on these cells."""
    at = stage.at
    data = stage("data", lambda: prepare(stage.output))
    stage("tokenize", lambda: tokenize.run(build(tokenize.TokenizeConfig, {
        "input": [data["h5ad"]], "vocabulary": data["vocabulary"], "output": at("cells"),
        "obs_columns": ["cell_type", "library"],
    })), at("cells"))  # fmt: skip
    stage("pretrain", lambda: pretrain.run(build(pretrain.PretrainConfig, PRETRAINING | {
        "cells": at("cells"), "vocabulary": data["vocabulary"], "output": at("pretrained"),
        "filter": {"library": [GROUPS["train"]]}, "seed": seed,
    })), at("pretrained"))  # fmt: skip
