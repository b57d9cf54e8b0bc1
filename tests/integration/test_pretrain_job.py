"""Pretraining from the cells to MLflow: adapters on a model, what is measured, kills, and a store that is lost."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.compute.lora import Adapters
from geneformer_ray.compute.masked_scores import count_genes, frequency_ranking, score_masked_genes
from geneformer_ray.compute.model_directory import load_weights, save_model, weights_digest
from geneformer_ray.compute.pretraining import MaskedGeneModel, new_model
from geneformer_ray.data.cells import CellTable
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.distribute import train_workers
from geneformer_ray.manage import registry
from geneformer_ray.manage.registry import open_store
from ray_jobs import pretrain, tokenize
from ray_jobs.command_line import build, main
from tests.conftest import randomise
from tests.integration.processes import Job
from tests.integration.small_data import SmallData
from tests.integration.test_finetune_job import locked_once

pytestmark = [pytest.mark.slow, pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]

TINY = ("--layers", "2", "--width", "16", "--heads", "2", "--feed-forward", "32", "--tokens-per-batch", "256")


@dataclass(frozen=True)
class Setting:
    """Tokenised cells of three donors, a model with random weights, and an MLflow store."""

    folder: Path
    vocabulary: str

    def adapt(self, output: Path, **others: Any) -> dict[str, Any]:
        """Adapt the model to the cells, a donor held out, on two workers."""
        flags = {
            "cells": str(self.folder / "cells"), "model": str(self.folder / "model"), "output": str(output),
            "group": "donor", "epochs": 4, "learning_rate": 0.01, "tokens_per_batch": 128, "num_workers": 2,
            "checkpoint_every": 2, "lora_rank": 2, "lora_dropout": 0.1, "lora_layers": [1],
        }  # fmt: skip
        return pretrain.run(build(pretrain.PretrainConfig, flags | others))

    def flags(self, output: Path, *others: str) -> list[str]:
        """Of a model from scratch."""
        paths = {"cells": self.folder / "cells", "vocabulary": self.vocabulary, "output": output}
        return [*(part for name, path in paths.items() for part in (f"--{name}", str(path))), *TINY, *others]


@pytest.fixture(scope="module")
def setting(small_data: SmallData, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Iterator[Setting]:
    folder = tmp_path_factory.mktemp("pretrain")
    tokenize.run(build(tokenize.TokenizeConfig, {
        "input": [small_data.h5ad], "vocabulary": small_data.vocabulary, "output": str(folder / "cells"),
        "obs_columns": ["donor"],
    }))  # fmt: skip
    vocabulary = GeneVocabulary.load(small_data.vocabulary)
    torch.manual_seed(0)
    model = new_model(vocabulary, layers=2, width=16, heads=2, feed_forward=32)
    randomise(model, 0.3)
    save_model(model, vocabulary, folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        open_store(str(folder))
        yield Setting(folder, small_data.vocabulary)


@dataclass(frozen=True)
class Adapted:
    """What an adaptation that was left in peace has left."""

    output: Path
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def adapted(setting: Setting) -> Adapted:
    output = setting.folder / "adapted"
    return Adapted(output, setting.adapt(output))


def runs() -> list[Any]:
    experiment = mlflow.MlflowClient().get_experiment_by_name(registry.EXPERIMENT)
    assert experiment is not None
    return list(mlflow.MlflowClient().search_runs([experiment.experiment_id]))


def assert_same(output: Path, other: Path) -> None:
    """Two outputs tell the same."""
    history, its = (json.loads((place / "history.json").read_text()) for place in (output, other))
    assert len(history) == len(its)
    for entry, that in zip(history, its, strict=True):
        assert entry == pytest.approx(that, abs=1e-4)
    measured, those = (json.loads((place / "measured.json").read_text()) for place in (output, other))
    assert measured == those
    for name in ("model/model.safetensors", "adapters/adapter_model.safetensors"):
        if (output / name).exists() or (other / name).exists():
            tensors, theirs = load_file(output / name), load_file(other / name)
            assert tensors.keys() == theirs.keys()
            for key, tensor in tensors.items():
                torch.testing.assert_close(tensor, theirs[key], atol=1e-4, rtol=0)


# ---------------------------------------------------------------------- adapters, and what is measured


def test_a_whole_donor_is_held_out(adapted: Adapted, setting: Setting) -> None:
    held_out = adapted.summary["held_out"]
    assert (held_out["cells"], held_out["group"], held_out["without_group"]) == (30, "donor", 0)
    assert len(held_out["groups"]) == 1
    assert (adapted.summary["cells"], adapted.summary["frequency_cells"]) == (90, 60)


def test_what_two_workers_measured_is_what_one_process_measures(adapted: Adapted, setting: Setting) -> None:
    """The saved model, the one that it began with, and the baseline, on the donor that no training has seen."""
    table, vocabulary = CellTable(str(setting.folder / "cells")), GeneVocabulary.load(setting.vocabulary)
    held_out = np.isin(table.column("donor", "--group"), adapted.summary["held_out"]["groups"])
    rows = np.flatnonzero(held_out)
    training = table.read(np.flatnonzero(~held_out)).input_ids
    ranking = frequency_ranking(count_genes(training, vocabulary), vocabulary)
    for front, directory in (("", adapted.output / "model"), ("before_", setting.folder / "model")):
        model = load_weights(MaskedGeneModel, directory)
        scores = score_masked_genes(
            model, table.read(rows).input_ids, rows, ranking, vocabulary, seed=0, execution=choose_execution(cpus=1)
        ).scores()
        named = {name: value for name, value in scores.items() if name.startswith("masked_a") or "top10" in name}
        for name, value in named.items():
            front_of = "" if name.startswith("baseline") else front
            assert adapted.summary[front_of + name] == pytest.approx(value, abs=1e-12)
        assert adapted.summary["baseline_accuracy"] == scores["baseline_accuracy"]
        assert adapted.summary["masked_genes"] == scores["masked_genes"] > 50
    # Else one could pass for another.
    fronts = ("masked", "before_masked", "baseline")
    assert len({adapted.summary[f"{front}_top10_accuracy"] for front in fronts}) == 3


def test_adapters_are_merged_into_the_model_and_lie_alone_beside_it(adapted: Adapted, setting: Setting) -> None:
    base, output = setting.folder / "model", adapted.output
    assert adapted.summary["adapters"] == str(output / "adapters")
    assert {file.name for file in (output / "adapters").iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json",
    }  # fmt: skip
    assert not list((output / "model").glob("adapter*"))
    before, after = (load_file(place / "model.safetensors") for place in (base, output / "model"))
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert {name for name in changed if name.startswith("bert.")} == {
        f"bert.encoder.layer.1.attention.self.{name}.weight" for name in ("query", "value")
    }
    assert any(name.startswith("cls.") for name in changed)
    again = Adapters.load(load_weights(MaskedGeneModel, base), output / "adapters", weights_digest(base)).merged()
    for name, tensor in load_weights(MaskedGeneModel, output / "model").state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, atol=1e-6, rtol=0)
    assert 0 < adapted.summary["trainable_parameters"] < adapted.summary["parameters"] / 2
    assert adapted.summary["parameters"] == sum(
        parameter.numel() for parameter in load_weights(MaskedGeneModel, base).parameters()
    )


def test_a_pretraining_is_one_run(adapted: Adapted, setting: Setting) -> None:
    client, summary = mlflow.MlflowClient(), adapted.summary
    run = client.get_run(summary["run_id"])
    assert summary["mlflow"] == os.environ["MLFLOW_TRACKING_URI"]
    assert run.data.params["lora_rank"] == "2"
    assert run.data.params["held_out_groups"] == str(summary["held_out"]["groups"])
    for name in ("masked_accuracy", "masked_top10_accuracy", "baseline_accuracy", "before_masked_accuracy"):
        assert run.data.metrics[name] == summary[name]
    curve = client.get_metric_history(summary["run_id"], "validation_loss")
    assert [point.step for point in curve] == [1, 2, 3, 4]
    assert run.data.tags[registry.WEIGHTS_TAG] == weights_digest(adapted.output / "model")
    assert run.data.tags["base_digest"] == weights_digest(setting.folder / "model")
    files = {file.path for file in client.list_artifacts(summary["run_id"])}
    assert {"training_curves.png", "config.json", "history.json", "measured.json", "held_out.json"} <= files
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files
    assert (adapted.output / "training_curves.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------- killed, and going on


def test_a_worker_killed_between_checkpoints_leaves_the_same_model(
    setting: Setting, adapted: Adapted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "killed"

    def dying(config: dict[str, Any]) -> None:
        from geneformer_ray.distribute import pretrain, streamed_training

        take, calls = streamed_training.train_step, []

        def step(*values: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) == 13 and options["share"].rank == 1 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if not marker.exists():
                time.sleep(0.15)  # time for the checkpoints before it to be known
            return take(*values, **options)

        streamed_training.train_step = step  # type: ignore[attr-defined]
        pretrain.pretrain_worker(config)

    monkeypatch.setattr(pretrain, "fit", lambda _, config, **options: train_workers.fit(dying, config, **options))
    summary = setting.adapt(tmp_path / "out")
    assert marker.exists()
    assert_same(tmp_path / "out", adapted.output)
    numbers = {key: value for key, value in adapted.summary.items() if isinstance(value, int | float)}
    assert len(numbers) > 10 and {key: summary[key] for key in numbers} == pytest.approx(numbers, abs=1e-4)
    assert summary["held_out"] == adapted.summary["held_out"]


def test_a_driver_killed_while_training_leaves_the_same_model(setting: Setting, tmp_path: Path) -> None:
    flags = ("--epochs", "14", "--learning-rate", "0.003", "--seed", "3")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    pretrain.run(build(pretrain.PretrainConfig, _values(setting.flags(whole, *flags))))
    with Job("pretrain", *setting.flags(broken, *flags)) as job:
        job.wait_until(lambda: bool(list((broken / "ray_train" / "run").glob("epoch-0003-*"))))
        job.kill()
    time.sleep(3)  # its cluster ends with it
    assert not (broken / "history.json").exists()
    pretrain.run(build(pretrain.PretrainConfig, _values(setting.flags(broken, *flags))))
    assert_same(broken, whole)
    manifest = json.loads((broken / "_manifest.json").read_text())
    assert manifest["summary"]["held_out"] == {"cells": 9, "group": None}
    assert "before_masked_accuracy" not in manifest["summary"]
    # What outputs of earlier versions have: they go on as well.
    assert set(manifest["plan"]) == {
        "job", "cells", "vocabulary", "model", "shape", "options", "filter", "workers", "precision", "rows",
    }  # fmt: skip


def _values(flags: list[str]) -> dict[str, str]:
    names = [flag.removeprefix("--").replace("-", "_") for flag in flags[::2]]
    return dict(zip(names, flags[1::2], strict=True))


# ---------------------------------------------------------------------- the store


def test_a_store_lost_while_training_costs_no_model_and_the_same_command_finishes(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, before = tmp_path / "out", len(runs())

    def pretrained() -> int:
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *setting.flags(output, "--epochs", "2")])
        with pytest.raises(SystemExit) as ended:
            main(pretrain.PretrainConfig, pretrain.run, "")
        assert isinstance(ended.value.code, int)
        return ended.value.code

    with locked_once(output / "ray_train", setting.folder / "mlflow.db"):
        assert pretrained() == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"the model is safe in {output}: once it answers, the same command finishes the job" in captured.err
    weights = (output / "model" / "model.safetensors").stat().st_mtime_ns
    assert (output / "training_curves.png").exists() and len(runs()) == before
    monkeypatch.setattr(pretrain, "fit", None)  # nothing trains again
    assert pretrained() == 0
    summary = json.loads(capsys.readouterr().out)
    assert len(runs()) == before + 1
    assert mlflow.get_run(summary["run_id"]).info.status == "FINISHED"
    assert (output / "model" / "model.safetensors").stat().st_mtime_ns == weights
    assert not (output / "ray_train").exists()
