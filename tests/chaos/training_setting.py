"""Cells, a model, the command that fine-tunes it on two workers, and what it takes to be the same result."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from mlflow import MlflowClient

from geneformer_ray.compute.model_directory import save_model
from geneformer_ray.compute.pretraining import new_model
from geneformer_ray.data.shards import write_shard
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.manage.registry import EXPERIMENT, WEIGHTS_TAG
from geneformer_ray.manage.runs import DIGEST_TAG
from geneformer_ray.manage.trials import FINISHED, Trial, read_predictions
from tests.conftest import random_cells
from tests.integration.processes import Job, Run

CELLS = {"train": 1_200, "choose": 200, "report": 200}
GENES, LONGEST = 120, 80
TRIAL = Trial("mean", 0)
NAME = "chaos"
METRIC = re.compile("^(choosing|reporting)_")


@dataclass(frozen=True)
class TrainingSetting:
    """Cells of two types and three donors, a model, and the command that trains on them."""

    folder: Path

    @classmethod
    def of(cls, folder: Path) -> TrainingSetting:
        """Write cells and model into a folder. A type's own genes stand in front, more often than not."""
        vocabulary = GeneVocabulary.from_medians({f"GENE{i:03d}": 1.0 for i in range(GENES)}, max_length=LONGEST)
        rng = np.random.default_rng(3)
        number = sum(CELLS.values())
        cells = random_cells(vocabulary, rng, rng.integers(40, LONGEST, size=number).tolist())
        types = rng.integers(0, 2, size=number)
        cells = [
            cell[np.argsort((cell % 2 != kind) * rng.random(len(cell)) + rng.random(len(cell)))]
            for cell, kind in zip(cells, types, strict=True)
        ]
        table = pa.table(
            {
                "cell_id": [f"cell{i}" for i in range(number)],
                "input_ids": pa.array(cells, pa.list_(pa.int32())),
                "cell_type": [["alpha", "beta"][kind] for kind in types],
                "donor": np.repeat(list(CELLS), list(CELLS.values())).tolist(),
            }
        )
        write_shard(str(folder / "cells"), "", 0, table, vocabulary=vocabulary.digest, row_group_size=64)
        torch.manual_seed(0)
        save_model(new_model(vocabulary, layers=2, width=32, heads=2, feed_forward=64), vocabulary, folder / "model")
        return cls(folder)

    def flags(self, output: Path) -> list[str]:
        flags = {
            "cells": self.folder / "cells", "model": self.folder / "model", "output": output, "label": "cell_type",
            "group": "donor", "train-groups": "train", "choose-groups": "choose", "report-groups": "report",
            "epochs": 8, "learning-rate": 1e-3, "gene-dropout": 0.1, "tokens-per-batch": 512, "num-workers": 2,
            "checkpoint-every": 20, "registered-model": NAME,
        }  # fmt: skip
        return [f"--{name}={value}" for name, value in flags.items()]

    def start(self, output: Path, *more: str, **environment: str) -> Job:
        return Job("finetune", *self.flags(output), *more, **environment)

    def run(self, output: Path, *more: str, **environment: str) -> Run:
        with self.start(output, *more, **environment) as job:
            return job.finished()


def within_an_epoch(output: Path) -> bool:
    """Whether a checkpoint lies there that was written in the middle of an epoch, after the first one."""
    names = [path.parent.name for path in output.glob(f"ray_train/{TRIAL.name}/epoch-*-step-*/training.pt")]
    return any(re.fullmatch(r"epoch-(?!0000)\d+-step-(?!000000)\d+", name) for name in names)


def trained(output: Path) -> bool:
    """Whether the training has come to its end."""
    return Path(TRIAL.directory(str(output)), FINISHED).exists()


def assert_same(output: Path, whole: Path) -> None:
    """The same weights, predictions, scores and history, to the last bit; nothing left that a rerun would need."""
    mine, theirs = (Path(TRIAL.directory(str(place))) for place in (output, whole))
    for role in ("choose", "report"):
        left, right = (read_predictions(str(place), role) for place in (mine, theirs))
        assert left[0] == right[0]
        assert len(set(left[0])) == len(left[0]) == CELLS[role]
        np.testing.assert_array_equal(left[1], right[1])
        np.testing.assert_array_equal(left[2], right[2])
    for name in ("model/model.safetensors", "model/examples.json", "scores.json"):
        assert (mine / name).read_bytes() == (theirs / name).read_bytes(), name
    entries, others = (json.loads((place / "history.json").read_text()) for place in (mine, theirs))
    assert len(entries) == len(others)
    for entry, other in zip(entries, others, strict=True):
        # A resumed epoch adds up the workers' losses in another order.
        assert entry == pytest.approx(other, rel=1e-9)
    for place in (output, whole):
        assert json.loads((place / "_manifest.json").read_text())["finished"]
        assert not (place / "ray_train").exists()


@dataclass(frozen=True)
class Recorded:
    """What a store holds of the trainings: finished runs, and the tags of each version."""

    runs: int
    versions: list[dict[str, str]]

    @classmethod
    def of(cls, uri: str) -> Recorded:
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id])
        assert all(run.info.status == "FINISHED" for run in runs)
        found = sorted(client.search_model_versions(f"name = '{NAME}'"), key=lambda version: int(version.version))
        return cls(len(runs), [dict(version.tags) for version in found])


def assert_recorded_once(uri: str, trainings: int) -> None:
    """Each training is two runs, of its trial and of the baseline, and one version, with the same metrics."""
    recorded = Recorded.of(uri)
    assert recorded.runs == 2 * trainings
    assert len(recorded.versions) == trainings
    assert len({tags[DIGEST_TAG] for tags in recorded.versions}) == trainings
    metrics = [{key: value for key, value in tags.items() if METRIC.search(key)} for tags in recorded.versions]
    assert len(metrics[0]) == 4
    assert all(some == metrics[0] for some in metrics)
    assert len({tags[WEIGHTS_TAG] for tags in recorded.versions}) == 1
