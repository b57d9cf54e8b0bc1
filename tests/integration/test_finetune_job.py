"""Fine-tuning from the cells to the registry: a store that is out of reach at the end, and folds over groups."""

from __future__ import annotations

import json
import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import mlflow
import numpy as np
import pytest
import torch

from geneformer_ray.compute.cell_states import states_in_file
from geneformer_ray.compute.model_directory import save_model, weights_digest
from geneformer_ray.compute.pretraining import new_model
from geneformer_ray.compute.scores import probabilities
from geneformer_ray.data.cells import CellTable
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.manage import registry
from geneformer_ray.manage.registry import open_store
from geneformer_ray.manage.trials import Trial, read_predictions
from ray_jobs import embed, finetune, register, tokenize
from ray_jobs.command_line import build, main
from tests.integration.small_data import GROUPS, SmallData

pytestmark = [pytest.mark.slow, pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def folder(small_data: SmallData, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Iterator[Path]:
    """Tokenised cells, a model with random weights, and an MLflow store."""
    folder = tmp_path_factory.mktemp("finetune")
    tokenize.run(build(tokenize.TokenizeConfig, {
        "input": [small_data.h5ad], "vocabulary": small_data.vocabulary, "output": str(folder / "cells"),
        "obs_columns": ["cell_type", "donor"],
    }))  # fmt: skip
    vocabulary = GeneVocabulary.load(small_data.vocabulary)
    torch.manual_seed(0)
    model = new_model(vocabulary, layers=2, width=16, heads=2, feed_forward=32, initializer_range=0.1)
    save_model(model, vocabulary, folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        open_store(str(folder))
        yield folder


def flags(folder: Path, output: Path, **others: str) -> list[str]:
    given = {
        "cells": folder / "cells", "model": folder / "model", "output": output, "label": "cell_type", "group": "donor",
        "epochs": 2, "learning_rate": 5e-3, "tokens_per_batch": 256, **others,
    }  # fmt: skip
    return [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def finetuned(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> int:
    """Run the job as its command line does; its exit code."""
    monkeypatch.setattr(sys, "argv", ["finetune.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        main(finetune.FinetuneConfig, finetune.run, "")
    assert isinstance(ended.value.code, int)
    return ended.value.code


def versions(name: str) -> list[Any]:
    return sorted(mlflow.MlflowClient().search_model_versions(f"name = '{name}'"), key=lambda its: int(its.version))


def runs() -> list[Any]:
    experiment = mlflow.MlflowClient().get_experiment_by_name(registry.EXPERIMENT)
    assert experiment is not None
    return list(mlflow.MlflowClient().search_runs([experiment.experiment_id]))


@contextmanager
def locked_once(started: Path, database: Path) -> Iterator[None]:
    """Lock the database as soon as a path exists: a store that is lost while the training runs."""
    over = threading.Event()

    def lock() -> None:
        while not started.exists() and not over.wait(0.05):
            pass
        connection = sqlite3.connect(database, isolation_level=None)
        connection.execute("BEGIN EXCLUSIVE")
        over.wait()
        connection.execute("ROLLBACK")
        connection.close()

    thread = threading.Thread(target=lock)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def check_class_files(model: Path, trial: Trial, folder: Path, embedded: Path) -> None:
    """A registered model's states are the embed job's for its training cells; its examples are as it takes them."""
    states = json.loads((model / "states.json").read_text())
    assert states["model"] == weights_digest(model)
    embed.run(build(embed.EmbedConfig, {
        "cells": str(folder / "cells"), "model": str(model), "filter": {"donor": [GROUPS["train"]]},
        "state_column": "cell_type", "output": str(embedded),
    }))  # fmt: skip
    offline = json.loads((embedded / "states.json").read_text())
    assert states_in_file(states, {name: offline[name] for name in ("model", "embedding", "layer")}) == states["states"]
    assert list(states["states"]) == ["alpha", "beta"] and states["cells_by_state"] == {"alpha": 15, "beta": 15}
    for label, mean in offline["states"].items():
        np.testing.assert_allclose(states["states"][label], mean, atol=1e-6)

    examples = json.loads((model / "examples.json").read_text())
    ids, targets, logits = read_predictions(trial.directory(str(embedded.parent / "out")), "report")
    recognised = {ids[i]: ["alpha", "beta"][targets[i]] for i in np.flatnonzero(logits.argmax(axis=1) == targets)}
    assert [cell["label"] for cell in examples] == sorted(set(recognised.values()))
    table, vocabulary = CellTable(str(folder / "cells")), GeneVocabulary.load(str(model))
    for cell in examples:
        assert recognised[cell["cell_id"]] == cell["label"]
        row = table.cell_ids.tolist().index(cell["cell_id"])
        (stored,) = table.read(np.array([row])).input_ids
        assert cell["input_ids"] == vocabulary.adapt(stored, table.vocabulary_digest).tolist()


def test_a_store_lost_while_training_costs_no_model_and_register_finishes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, before = tmp_path / "out", len(runs())
    monkeypatch.setattr(registry, "LOCKED_AT_MOST", 0.5)
    roles = {f"{role}_groups": group for role, group in GROUPS.items()}
    with locked_once(output / "ray_train", folder / "mlflow.db"):
        code = finetuned(monkeypatch, flags(folder, output, pooling="cls,mean", registered_model="late", **roles))
    printed = capsys.readouterr()
    command = f"python -m ray_jobs.register --output {output} --registered-model late"
    last = printed.err.splitlines()[-1]
    assert (code, printed.out) == (1, "")
    assert last.startswith("python -m ray_jobs.finetune: MLflow at sqlite:")
    assert "database is locked" in last and last.endswith(f"`{command}` finishes the job")
    assert "Traceback" not in printed.err
    trials = [Trial("cls", 0), Trial("mean", 0)]
    for trial in trials:
        place = Path(trial.directory(str(output)))
        left = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
        assert {
            "model/model.safetensors", "model/config.json", "model/vocabulary.json", "history.json", "scores.json",
            "predictions-choose.parquet", "predictions-report.parquet", "misclassified.csv", "finished.json",
        } <= left  # fmt: skip
    assert not json.loads((output / "_manifest.json").read_text())["finished"]
    assert (versions("late"), len(runs())) == ([], before)

    config = build(register.RegisterConfig, {"output": str(output)})
    summary = register.run(config)
    assert json.loads((output / "_manifest.json").read_text())["finished"]
    assert not (output / "ray_train").exists()
    for trial, line, version in zip(trials, summary["trials"], versions("late"), strict=True):
        assert (line["version"], line["run_id"]) == (int(version.version), version.run_id)
        assert version.tags["pooling"] == trial.pooling
        for name in ("reporting_macro_f1", "reporting_accuracy", "reporting_expected_calibration_error"):
            assert float(version.tags[name]) == pytest.approx(line[name], abs=1e-6)
        assert float(version.tags["choosing_macro_f1"]) == pytest.approx(line["choosing_macro_f1"], abs=1e-6)
        model = mlflow.pyfunc.load_model(f"models:/late/{version.version}")
        assert model.metadata.signature.inputs.input_names() == ["input_ids"]
        _, _, logits = read_predictions(trial.directory(str(output)), "report")
        answers = model.predict(model.input_example).to_numpy()
        np.testing.assert_allclose(answers, probabilities(logits)[: len(answers)], atol=1e-5)
        registered = registry.find_registered(f"models:/late/{version.version}")
        check_class_files(registered, trial, folder, tmp_path / f"embedded-{trial.name}")

    assert register.run(config) == summary
    assert len(versions("late")) == len(trials)
    assert len(runs()) == before + len(trials) + 1  # and the baseline


def test_folds_report_every_cell_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = flags(folder, output, folds="3", pooling="mean", registered_model="folds")
    assert finetuned(monkeypatch, [*arguments, "--no-examples"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert [(trial["pooling"], trial["fold"]) for trial in summary["trials"]] == [("mean", fold) for fold in range(3)]
    for name in ("macro_f1", "accuracy"):
        values = [trial[f"reporting_{name}"] for trial in summary["trials"]]
        assert summary["pooling"]["mean"][name] == pytest.approx(fmean(values), abs=1e-4)
        assert summary["pooling"]["mean"][f"{name}_std"] == pytest.approx(stdev(values), abs=1e-4)
    assert summary["pooling"]["mean"]["trials"] == summary["baseline"]["trials"] == 3
    assert len(summary["baseline_run"]) == len(summary["folds"]) == 3

    table, groups, reported = CellTable(str(folder / "cells")), [], []
    donor_of = dict(zip(table.cell_ids.tolist(), table.column("donor", "--group"), strict=True))
    for fold in range(3):
        split = json.loads((output / f"split-fold{fold}.json").read_text())
        ids, _, _ = read_predictions(Trial("mean", 0, fold).directory(str(output)), "report")
        assert ids == split["cells"]["report"]
        roles = {role: {donor_of[one] for one in some} for role, some in split["cells"].items()}
        assert sorted(donor for donors in roles.values() for donor in donors) == sorted(GROUPS.values())
        assert {group for group, role in split["groups"].items() if role == "report"} == roles["report"]
        groups += roles["report"]
        reported += ids
    assert sorted(groups) == sorted(GROUPS.values())
    assert sorted(reported) == sorted(table.cell_ids.tolist())
    assert [version.tags["fold"] for version in versions("folds")] == ["0", "1", "2"]

    # Cells are data: those who keep them back get models without any.
    for number in range(1, 4):
        model = registry.find_registered(f"models:/folds/{number}")
        assert (model / "states.json").exists() and not (model / "examples.json").exists()
        example = mlflow.pyfunc.load_model(f"models:/folds/{number}").input_example
        assert [list(ids) for ids in example["input_ids"]] == [[2, 3, 4]]  # the first genes of the vocabulary
