"""Training on real groups of workers: the stream, trials at once, and runs that are killed and go on."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from safetensors.torch import load_file

from geneformer_ray.compute.classifier import CellClassifier, new_classifier, predict_logits
from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.compute.lora import adapted_classifier
from geneformer_ray.compute.model_directory import weights_digest
from geneformer_ray.compute.optimisation import Optimisation
from geneformer_ray.compute.training import Share, TrainingOptions, classifier_loss, train_step, training_plan
from geneformer_ray.data.batching import TrainingPlan
from geneformer_ray.data.cell_schema import cells_schema
from geneformer_ray.data.cells import CellTable
from geneformer_ray.data.splits import GroupSplit
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.distribute import finetune, train_workers
from geneformer_ray.distribute.cell_stream import shards_of, stream_cells
from geneformer_ray.distribute.learned_labels import OneLabel
from geneformer_ray.distribute.train_workers import Workers
from geneformer_ray.errors import InputError
from geneformer_ray.manage.trials import Trial, read_predictions
from tests.conftest import random_cells
from tests.reference import Cell

pytestmark = [pytest.mark.slow, pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]

REPOSITORY = Path(__file__).resolve().parents[2]
OPTIONS = {
    "epochs": 4, "learning_rate": 3e-3, "tokens_per_batch": 64, "accumulate": 2, "gene_dropout": 0.1,
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """Three hundred cells in row groups of seven, a tiny model, a split, and what is trained on them."""

    cells: list[Cell]
    split: GroupSplit
    config: dict[str, Any]

    def train(self, output: Path, *trials: Trial, workers: int = 1, every: int | None = None, **changes: Any) -> None:
        config = {**self.config, "output": str(output), **changes}
        finetune.finetune_trials(
            config, trials, [OneLabel(self.split)], workers=Workers(workers, 1, False, every), precision="fp32"
        )


@pytest.fixture(scope="module")
def setting(vocabulary: GeneVocabulary, model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    rng = np.random.default_rng(5)
    cells = random_cells(vocabulary, rng, rng.integers(3, 17, size=300).tolist())
    file = tmp_path_factory.mktemp("cells") / "part-0.parquet"
    table = pa.table(
        {"cell_id": [f"cell{i}" for i in range(300)], "input_ids": pa.array(cells, pa.list_(pa.int32())),
         "length": pa.array([len(ids) for ids in cells], pa.int32())},
        schema=cells_schema(vocabulary.digest),
    )  # fmt: skip
    pq.write_table(table, file, row_group_size=7)
    targets = np.array([int(np.median(ids) > 21) for ids in cells])
    rows = dict(zip(("train", "choose", "report"), np.split(rng.permutation(110), [50, 70]), strict=True))
    split = GroupSplit(["a", "b"], rows, {role: targets[some] for role, some in rows.items()}, {}, {})
    config = {
        "cells": str(file), "model": str(model_directory), "vocabulary": None, "tracking_uri": None,
        "options": OPTIONS, "class_weights": "none", "label_smoothing": 0.0, "attention_dropout": 0.0,
        "freeze_layers": 1, "freeze_embeddings": True, "patience": None, "examples": True,
    }  # fmt: skip
    return Setting(cells, split, config)


def results(output: Path, trial: Trial) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """History and logits of a trial."""
    directory = trial.directory(str(output))
    history = json.loads(Path(directory, "history.json").read_text())
    return history, {role: read_predictions(directory, role) for role in ("choose", "report")}


def assert_same(first: Path, second: Path, trial: Trial) -> None:
    (history, predictions), (other_history, others) = results(first, trial), results(second, trial)
    assert len(history) == len(other_history)
    for entry, other in zip(history, other_history, strict=True):
        assert entry == pytest.approx(other, abs=1e-4)
    for role, (ids, targets, logits) in predictions.items():
        assert ids == others[role][0]
        np.testing.assert_array_equal(targets, others[role][1])
        np.testing.assert_allclose(logits, others[role][2], atol=1e-4)
    model, other = (Path(trial.directory(str(output)), "model") for output in (first, second))
    assert (model / "examples.json").read_bytes() == (other / "examples.json").read_bytes()
    states, those = (json.loads((place / "states.json").read_text()) for place in (model, other))
    assert states["model"] == weights_digest(model)
    assert {**states, "model": "", "states": ""} == {**those, "model": "", "states": ""}
    for label, mean in states["states"].items():
        np.testing.assert_allclose(mean, those["states"][label], atol=1e-4)


# ---------------------------------------------------------------------- the stream


@pytest.mark.parametrize("first", [(0, 0), (1, 3)])
def test_the_stream_gives_the_cells_of_the_plan(
    setting: Setting, first: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over many windows, several pipelines, two epochs, for each rank, from anywhere."""
    monkeypatch.setattr("geneformer_ray.distribute.cell_stream.WINDOWS_A_PIPELINE", 4)
    table, rows = CellTable(setting.config["cells"]), np.random.default_rng(0).permutation(300)
    shards = shards_of(table, rows)
    assert shards.tolist() == (rows // 7).tolist()
    plan = TrainingPlan(table.lengths[rows], shards, seed=3, workers=2, tokens_per_batch=2, window_tokens=1)
    assert len(plan.windows(0)) > 4
    expected = [step for epoch in range(first[0], 2) for step in plan.steps(epoch, first[1] * (epoch == first[0]))]
    for rank in (0, 1):
        steps = 0
        for got, wanted in zip(
            stream_cells(table.path, rows, plan, rank=rank, epochs=2, first=first), expected, strict=True
        ):
            step, sequences = got
            assert (step.epoch, step.number) == (wanted.epoch, wanted.number)
            for batch, ids in zip(wanted.batches, sequences, strict=True):
                assert [one.tolist() for one in ids] == [setting.cells[rows[i]].tolist() for i in batch[rank]]
            steps += 1
        assert steps > 2


class Together(Optimisation):
    """Takes a step once each of two workers has left its gradients, at their mean, as data-parallel workers do."""

    waiting = True

    def step(self) -> None:
        self.waiting = not self.waiting
        if self.waiting:
            for parameter in self._parameters:
                assert parameter.grad is not None
                parameter.grad /= 2
            super().step()


@pytest.fixture(scope="module")
def whole(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One trial on two workers that was left in peace."""
    output = tmp_path_factory.mktemp("whole")
    setting.train(output, Trial("mean", 0), workers=2)
    return output


def test_streamed_training_on_two_workers_is_training_in_memory(
    setting: Setting, whole: Path, vocabulary: GeneVocabulary, model_directory: Path
) -> None:
    options = TrainingOptions(**OPTIONS, seed=0)
    torch.manual_seed(0)
    model, own = new_classifier(model_directory, vocabulary, ["a", "b"], "mean")
    for part in (model.bert.encoder.layer[0], model.bert.embeddings):
        part.requires_grad_(False)
    rows, targets = setting.split.rows["train"], setting.split.targets["train"]
    cells = [setting.cells[row] for row in rows]
    plan = training_plan(np.array([len(ids) for ids in cells]), np.zeros(len(cells), dtype=int), options, 2)
    optimisation = Together(model, options, sum(plan.count(epoch) for epoch in range(4)))
    losses = []
    for epoch in range(4):
        total = 0.0
        for step in plan.steps(epoch):
            for rank in (0, 1):
                mine = [[cells[i] for i in batch[rank]] for batch in step.batches]
                total += train_step(
                    model, optimisation, step, mine, classifier_loss(targets), len, options,
                    vocabulary=own, execution=choose_execution(cpus=1), share=Share(rank, 2),
                ).loss_sum  # fmt: skip
        losses.append(total / len(cells))
    history, _ = results(whole, Trial("mean", 0))
    assert [entry["train_loss"] for entry in history] == pytest.approx(losses, abs=1e-5)
    assert losses[-1] < losses[0]


def test_a_new_cls_is_learned_on_two_workers_where_embeddings_are_frozen(
    setting: Setting, vocabulary: GeneVocabulary, model_directory: Path, tmp_path: Path
) -> None:
    """All other rows stay as they were, to the last bit."""
    name = "bert.embeddings.word_embeddings.weight"
    torch.manual_seed(0)
    start = new_classifier(model_directory, vocabulary, ["a", "b"], "cls")[0].state_dict()[name]
    setting.train(tmp_path, Trial("cls", 0), workers=2)
    directory = Path(Trial("cls", 0).directory(str(tmp_path)))
    tokens = load_file(directory / "model" / "model.safetensors")[name]
    assert torch.equal(tokens[:-1], start[:-1])
    assert float((tokens[-1] - start[-1]).abs().max()) > 1e-3


# ---------------------------------------------------------------------- killed, and going on


def killed_once(marker: Path, at_step: int) -> Callable[[dict[str, Any]], None]:
    """Train as ever, but the last worker is killed once, before a step."""

    def train(config: dict[str, Any]) -> None:
        from geneformer_ray.distribute import finetune, streamed_training

        take, calls = streamed_training.train_step, []

        def step(*values: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) == at_step and options["share"].rank == options["share"].workers - 1 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if not marker.exists():
                time.sleep(0.15)  # time for the checkpoints before it to be known
            return take(*values, **options)

        streamed_training.train_step = step  # type: ignore[attr-defined]
        finetune.finetune_worker(config)

    return train


def test_a_worker_killed_between_checkpoints_leaves_the_same_result(
    setting: Setting, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying, marker = killed_once(tmp_path / "killed", at_step=9), tmp_path / "killed"
    fit_all = train_workers.fit_all
    monkeypatch.setattr(finetune, "fit_all", lambda _, runs, **options: fit_all(dying, runs, **options))
    setting.train(tmp_path / "out", Trial("mean", 0), workers=2, every=2)
    assert marker.exists()
    assert_same(tmp_path / "out", whole, Trial("mean", 0))


DRIVER = """
import pickle, sys, time
import geneformer_ray.distribute
from geneformer_ray.distribute import finetune
from geneformer_ray.distribute.cluster import connected
from geneformer_ray.distribute.learned_labels import OneLabel
from geneformer_ray.distribute.train_workers import Workers, fit_all

def slow(config):
    from geneformer_ray.distribute import finetune, streamed_training
    take = streamed_training.train_step
    def step(*values, **options):
        time.sleep(0.7)
        return take(*values, **options)
    streamed_training.train_step = step
    finetune.finetune_worker(config)

config, trial, split, workers = pickle.load(open(sys.argv[1], "rb"))
finetune.fit_all = lambda _, runs, **options: fit_all(slow, runs, **options)
with connected(cpus=2):
    finetune.finetune_trials(config, [trial], [OneLabel(split)], workers=workers, precision="fp32")
"""


def start_driver(
    setting: Setting, output: Path, trial: Trial, workers: Workers, **changes: Any
) -> subprocess.Popen[bytes]:
    """Train in a process of its own, each step of which takes a while."""
    what = output.with_suffix(".pickle")
    what.write_bytes(
        pickle.dumps(({**setting.config, "output": str(output), **changes}, trial, setting.split, workers))
    )
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(what)], cwd=REPOSITORY,
        env={name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
    )  # fmt: skip


def wait_for_checkpoint(driver: subprocess.Popen[bytes], output: Path, trial: Trial, pattern: str) -> None:
    deadline = time.monotonic() + 300
    while not list((output / "ray_train" / trial.name).glob(pattern)):
        assert time.monotonic() < deadline and driver.poll() is None
        time.sleep(0.1)


@pytest.fixture(scope="module")
def pair(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trials at once, one worker each."""
    output = tmp_path_factory.mktemp("pair")
    setting.train(output, Trial("mean", 0), Trial("cls", 1))
    return output


def test_a_driver_killed_within_an_epoch_leaves_the_same_result(setting: Setting, pair: Path, tmp_path: Path) -> None:
    output, trial = tmp_path / "out", Trial("mean", 0)
    driver = start_driver(setting, output, trial, Workers(1, 1, False, 2))
    wait_for_checkpoint(driver, output, trial, "epoch-0001-step-00000[1-9]")
    driver.kill()
    driver.wait()
    time.sleep(3)  # its cluster ends with it
    assert not (Path(trial.directory(str(output))) / "finished.json").exists()
    setting.train(output, trial, every=2)
    assert_same(output, pair, trial)


def test_a_driver_that_is_asked_to_stop_writes_a_checkpoint_within_the_epoch(setting: Setting, tmp_path: Path) -> None:
    """As by ``ray job stop``; without it, this training has checkpoints at the ends of epochs only."""
    output, trial = tmp_path / "out", Trial("mean", 0)
    many_steps = {"options": {**OPTIONS, "epochs": 2, "tokens_per_batch": 32, "accumulate": 1}}
    setting.train(tmp_path / "whole", trial, workers=2, **many_steps)
    driver = start_driver(setting, output, trial, Workers(2, 1, False, None), **many_steps)
    wait_for_checkpoint(driver, output, trial, "epoch-0001-step-000000")
    time.sleep(1)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(60) != 0
    (left,) = (output / "ray_train" / trial.name).glob("epoch-*")
    assert left.name.startswith("epoch-0001-") and not left.name.endswith("step-000000")
    assert not (Path(trial.directory(str(output))) / "finished.json").exists()
    time.sleep(3)  # its cluster ends with it
    setting.train(output, trial, workers=2, **many_steps)
    assert_same(output, tmp_path / "whole", trial)


# -------------------------------------------------------------------- adapters

ADAPTED: dict[str, Any] = {
    "freeze_layers": 0, "freeze_embeddings": False, "options": {**OPTIONS, "learning_rate": 3e-2},
    "lora": {"rank": 2, "alpha": 4.0, "dropout": 0.1, "projections": ("query", "value"), "layers": (1,)},
}  # fmt: skip


def test_adapters_are_learned_on_two_workers_and_merged_and_go_on_after_a_kill(
    setting: Setting,
    vocabulary: GeneVocabulary,
    model_directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The model is an ordinary one; adapters alone and the base are that model; whatever is not adapted stays."""
    trial = Trial("cls", 0)
    setting.train(tmp_path / "whole", trial, workers=2, every=2, **ADAPTED)
    directory = Path(trial.directory(str(tmp_path / "whole")))
    assert not list((directory / "model").glob("adapter*"))
    start = new_classifier(model_directory, vocabulary, ["a", "b"], "cls")[0].state_dict()
    merged = load_file(directory / "model" / "model.safetensors")
    adapted = {f"bert.encoder.layer.1.attention.self.{name}.weight" for name in ("query", "value")}
    tokens = "bert.embeddings.word_embeddings.weight"
    head = {name for name in merged if name.startswith(("bert.pooler.", "classifier."))}
    for name, weights in merged.items():
        stays = torch.equal(weights, start[name])
        assert stays == (name not in adapted | head | {tokens}), name
    assert torch.equal(merged[tokens][:-1], start[tokens][:-1])

    # Of the tokens' matrix, only the new row is learned.
    alone = load_file(directory / "adapters" / "adapter_model.safetensors")
    finished = json.loads((directory / "finished.json").read_text())
    assert finished["learned_parameters"] == sum(tensor.numel() for tensor in alone.values())

    again, own = adapted_classifier(model_directory, directory / "adapters", vocabulary)
    cells = [own.adapt(ids, vocabulary.digest) for ids in setting.cells[:40]]
    logits = [
        predict_logits(model, cells, own.pad_id, execution=choose_execution(cpus=1))
        for model in (again, CellClassifier.load(directory / "model", own))
    ]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)

    dying, marker = killed_once(tmp_path / "killed", at_step=9), tmp_path / "killed"
    fit_all = train_workers.fit_all
    monkeypatch.setattr(finetune, "fit_all", lambda _, runs, **options: fit_all(dying, runs, **options))
    setting.train(tmp_path / "out", trial, workers=2, every=2, **ADAPTED)
    assert marker.exists()
    assert_same(tmp_path / "out", tmp_path / "whole", trial)
    theirs = (load_file(place) for place in sorted(tmp_path.glob("*/trials/*/adapters/*.safetensors")))
    for one, other in zip(*(sorted(tensors.items()) for tensors in theirs), strict=True):
        assert one[0] == other[0]
        np.testing.assert_allclose(one[1], other[1], atol=1e-4)


def test_adapters_that_diverge_are_refused_with_the_rate(setting: Setting, tmp_path: Path) -> None:
    options = {**OPTIONS, "epochs": 1, "learning_rate": 1e30}
    with pytest.raises(InputError, match="--learning-rate: got 1e"):
        setting.train(tmp_path, Trial("mean", 0), **{**ADAPTED, "options": options})


# ---------------------------------------------------------------------- trials


def test_trials_at_once_are_trials_one_after_another(
    setting: Setting, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_workers, "runs_at_once", lambda workers: 1)
    trials = (Trial("mean", 0), Trial("cls", 1))
    setting.train(tmp_path, *trials)
    for trial in trials:
        assert_same(tmp_path, pair, trial)
    # Finished trials are not trained again: a model that is not there would be missed.
    setting.train(tmp_path, *trials, model="/nowhere")


def test_patience_stops_a_trial_that_does_not_improve(setting: Setting, tmp_path: Path) -> None:
    options = {**OPTIONS, "epochs": 9, "learning_rate": 1e-12}
    setting.train(tmp_path, Trial("mean", 0), patience=2, options=options)
    history, _ = results(tmp_path, Trial("mean", 0))
    assert [entry["epochs_without_improvement"] for entry in history] == [0, 1, 2]


def test_bad_input_of_one_trial_ends_all_in_one_error(setting: Setting, tmp_path: Path) -> None:
    """At once: neither is the other trained to its end, nor the bad one tried again."""
    options = {**OPTIONS, "epochs": 2_000}
    with pytest.raises(InputError, match="--pooling: got median"):
        setting.train(tmp_path, Trial("mean", 0), Trial("median", 0), options=options)
    assert not list(tmp_path.glob("trials/*/history.json"))
    deadline = time.monotonic() + 120
    while ray.available_resources().get("CPU") != 2:
        assert time.monotonic() < deadline, "something is left running"
        time.sleep(0.2)
