"""Recording on a real MLflow store: what is logged, what a broken store costs, and how it is finished. Without Ray."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow.exceptions import MlflowException

from geneformer_ray.compute.classifier import CellClassifier, new_classifier, predict_logits
from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.compute.scores import probabilities
from geneformer_ray.data import storage
from geneformer_ray.data.cells import CellTable
from geneformer_ray.data.shards import VOCABULARY_KEY
from geneformer_ray.data.splits import split_by_group
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError, RegistryUnavailable
from geneformer_ray.manage import registry
from geneformer_ray.manage.registry import find_registered, open_store
from geneformer_ray.manage.trial_records import Record, record_trials
from geneformer_ray.manage.trials import FINISHED, Trial, read_predictions, write_predictions
from ray_jobs import promote, register
from ray_jobs.command_line import build
from tests.conftest import random_cells

pytestmark = pytest.mark.integration

REPOSITORY = Path(__file__).resolve().parents[2]
LABELS = ["alpha", "beta"]
GROUPS = ("donor1", "donor2", "donor3")
HISTORY = [
    {
        "step": epoch, "optimiser_steps": 10.0 * epoch, "train_loss": 1 / epoch, "train_accuracy": 0.5,
        "choosing_macro_f1": 0.4 + epoch / 10, "choosing_accuracy": 0.6, "learning_rate": 1e-3 / epoch, "note": "text",
    }
    for epoch in (1, 2, 3)
]  # fmt: skip


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A database without runs: making one takes seconds, copying it none."""
    folder = tmp_path_factory.mktemp("empty-store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        open_store(str(folder))
        yield folder / "mlflow.db"


@pytest.fixture
def store(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    database = tmp_path / "store" / "mlflow.db"
    database.parent.mkdir()
    shutil.copy(empty_store, database)
    with sqlite3.connect(database) as connection:
        location = (database.parent / "artifacts").as_uri()
        connection.execute("UPDATE experiments SET artifact_location = ? WHERE name = 'geneformer-ray'", (location,))
    connection.close()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    mlflow.set_tracking_uri(f"sqlite:///{database}")
    return database


def write_cells(folder: Path, vocabulary: GeneVocabulary) -> CellTable:
    rng = np.random.default_rng(3)
    cells = random_cells(vocabulary, rng, rng.integers(4, 14, 90).tolist())
    table = pa.table(
        {
            "cell_id": [f"cell{number:02d}" for number in range(90)],
            "input_ids": pa.array([ids.tolist() for ids in cells], pa.list_(pa.int32())),
            "length": pa.array([len(ids) for ids in cells], pa.int32()),
            "cell_type": LABELS * 45,
            "donor": np.repeat(GROUPS, 30),
        }
    )
    table = table.replace_schema_metadata({VOCABULARY_KEY: vocabulary.digest.encode()})
    folder.mkdir(parents=True)
    pq.write_table(table, folder / "part-0.parquet")
    return CellTable(str(folder))


def trained(
    folder: Path, directory: Path, vocabulary: GeneVocabulary, folds: int = 1, poolings: tuple[str, ...] = ("mean",)
) -> Record:
    """What finetune has in its hands once training is done: classifiers with random heads."""
    table, output = write_cells(folder / "cells", vocabulary), str(folder / "classifiers")
    splits = []
    for fold in range(folds):
        roles = {role: (GROUPS[(fold + number) % 3],) for number, role in enumerate(("train", "choose", "report"))}
        types, donors = table.column("cell_type", "--label"), table.column("donor", "--group")
        splits.append(split_by_group(np.arange(90), types, donors, assigned=roles, min_cells=1))
    numbers = [None] if folds == 1 else list(range(folds))
    trials = [Trial(pooling, 0, fold) for pooling in poolings for fold in numbers]
    plan = {
        "job": "finetune", "cells": table.digest, "vocabulary": vocabulary.digest, "label": "cell_type",
        "group": "donor", "workers": 1, "options": {"epochs": 3, "learning_rate": 1e-3}, "precision": "fp32",
    }  # fmt: skip
    storage.claim_output(output, plan, overwrite=False)
    for trial in trials:
        place = trial.directory(output)
        model, own = new_classifier(directory, vocabulary, LABELS, trial.pooling)
        model.eval()
        Path(place, "model").mkdir(parents=True)
        model.save(Path(place, "model"), own)
        storage.write_json(f"{place}/history.json", HISTORY)
        storage.write_json(f"{place}/{FINISHED}", {"trial": trial.name, "execution": "cpu, float32 (asked for)"})
        for role in ("choose", "report"):
            split = splits[trial.fold or 0]
            logits = predict_logits(
                model, table.read(split.rows[role]).input_ids, own.pad_id, execution=choose_execution()
            )
            ids = [str(table.cell_ids[row]) for row in split.rows[role]]
            write_predictions(place, role, ids, split.targets[role], logits * 40)
    manifests = [split.manifest(table.cell_ids) for split in splits]
    return Record(table, vocabulary, splits, manifests, trials, output, "m", plan)


@pytest.fixture
def record(tmp_path: Path, model_directory: Path, vocabulary: GeneVocabulary) -> Record:
    return trained(tmp_path, model_directory, vocabulary, poolings=("mean", "first_gene"))


def runs() -> list[Any]:
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("geneformer-ray")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def versions(name: str = "m") -> list[Any]:
    return list(mlflow.MlflowClient().search_model_versions(f"name = '{name}'"))


def finish(record: Record, **flags: Any) -> dict[str, Any]:
    return register.run(build(register.RegisterConfig, {"output": record.output, **flags}))


def manifest(record: Record) -> dict[str, Any]:
    found: dict[str, Any] = storage.read_json(f"{record.output}/_manifest.json")
    return found


def check_whole(record: Record, summary: dict[str, Any]) -> None:
    """Every run and version once, finished, with whole curves."""
    client = mlflow.MlflowClient()
    assert len(runs()) == len(record.trials) + len(record.splits)
    assert {run.info.status for run in runs()} == {"FINISHED"}
    assert sorted(int(version.version) for version in versions()) == sorted(t["version"] for t in summary["trials"])
    assert len(versions()) == len(record.trials)
    for trial in summary["trials"]:
        assert [point.step for point in client.get_metric_history(trial["run_id"], "train_loss")] == [1, 2, 3]
        assert len(client.get_metric_history(trial["run_id"], "reporting_macro_f1")) == 1
        files = {item.path for item in client.list_artifacts(trial["run_id"])}
        assert {"misclassified.csv", "config.json", "calibration_reporting.png"} <= files
        (version,) = (item for item in versions() if item.run_id == trial["run_id"])
        assert find_registered(f"models:/m/{version.version}").is_dir()


# ---------------------------------------------------------------------- what is logged


def test_a_run_holds_all_that_it_is_judged_by(record: Record, store: Path, tmp_path: Path) -> None:
    summary = record_trials(record)
    check_whole(record, summary)
    trial = summary["trials"][0]
    client = mlflow.MlflowClient()
    run = client.get_run(trial["run_id"])
    metrics, tags = run.data.metrics, run.data.tags
    for name in ("precision", "recall", "f1", "cells"):
        assert {f"reporting_{name}_alpha", f"choosing_{name}_beta"} <= metrics.keys()
    assert metrics["reporting_cells_alpha"] == 15
    assert metrics["reporting_expected_calibration_error"] == trial["reporting_expected_calibration_error"]
    assert {"reporting_brier_score", "learning_rate", "train_accuracy"} <= metrics.keys()
    assert "note" not in metrics
    assert tags["vocabulary_digest"] == record.vocabulary.digest
    assert len(tags["code_revision"]) >= 5
    files = Path(client.download_artifacts(trial["run_id"], "", str(tmp_path)))
    assert json.loads((files / "config.json").read_text()) == record.plan
    assert json.loads((files / "split.json").read_text())["groups"] == record.splits[0].groups
    scores = json.loads((files / "scores.json").read_text())["reporting"]
    wrong = pd.read_csv(files / "misclassified.csv")
    assert 0 < len(wrong) == round((1 - scores["accuracy"]) * 30)
    ids, targets, logits = read_predictions(record.trials[0].directory(record.output), "report")
    odds = pd.DataFrame(probabilities(logits), index=ids, columns=LABELS)
    for row in wrong.itertuples():
        assert odds.loc[row.cell_id, row.true_label] == pytest.approx(row.probability_true)
        assert odds.loc[row.cell_id].max() == pytest.approx(row.probability_predicted)
        assert LABELS[targets[ids.index(row.cell_id)]] == row.true_label != row.predicted_label
    assert wrong["probability_predicted"].is_monotonic_decreasing
    assert set(wrong["group"]) == {"donor3"}


def test_a_version_carries_what_promotion_compares(record: Record, store: Path) -> None:
    summary = record_trials(record)
    one, other = (version.tags for version in sorted(versions(), key=lambda version: int(version.version)))
    for tag in ("test_digest", "labels_digest", "vocabulary_digest", "split_digest", "cells_digest"):
        assert one[tag] == other[tag] != ""
    assert one["trial_digest"] != other["trial_digest"]
    assert float(one["reporting_macro_f1"]) == pytest.approx(summary["trials"][0]["reporting_macro_f1"], abs=1e-6)
    named = {"reporting_accuracy", "reporting_expected_calibration_error", "choosing_macro_f1", "pooling", "seed"}
    assert named <= one.keys()
    assert Path(one["model_directory"]).is_dir()


def test_the_champion_gives_the_same_answers_through_mlflow(record: Record, store: Path) -> None:
    record_trials(record)
    champion = promote.run(build(promote.PromoteConfig, {"registered_model": "m"}))
    assert champion["promoted"]
    cells = record.table.read(record.splits[0].rows["report"]).input_ids
    directory = find_registered("models:/m@champion")
    vocabulary = GeneVocabulary.load(str(directory))
    model = CellClassifier.load(directory, vocabulary)
    logits = predict_logits(model, cells, vocabulary.pad_id, execution=choose_execution())
    loaded = mlflow.pyfunc.load_model("models:/m@champion")
    answers = loaded.predict(pd.DataFrame({"input_ids": [ids.tolist() for ids in cells]}))
    assert list(answers.columns) == LABELS
    np.testing.assert_allclose(answers.to_numpy(), probabilities(logits), rtol=1e-5)
    assert loaded.metadata.signature.inputs.input_names() == ["input_ids"]
    example = loaded.input_example
    assert [list(ids) for ids in example["input_ids"]] == [ids.tolist() for ids in cells[:2]]
    np.testing.assert_allclose(loaded.predict(example).to_numpy(), answers.to_numpy()[:2], rtol=1e-5)


def test_folds_are_summarised_together(
    tmp_path: Path, model_directory: Path, vocabulary: GeneVocabulary, store: Path
) -> None:
    record = trained(tmp_path, model_directory, vocabulary, folds=3)
    summary = record_trials(record)
    check_whole(record, summary)
    mine = [trial for trial in summary["trials"] if trial["pooling"] == "mean"]
    assert [trial["fold"] for trial in mine] == [0, 1, 2]
    values = [trial["reporting_macro_f1"] for trial in mine]
    found = summary["pooling"]["mean"]
    assert found["macro_f1"] == pytest.approx(np.mean(values), abs=1e-4)
    assert found["macro_f1_std"] == pytest.approx(np.std(values, ddof=1), abs=1e-4)
    assert found["trials"] == summary["baseline"]["trials"] == len(summary["folds"]) == 3
    assert len({version.tags["test_digest"] for version in versions()}) == 3
    groups = pd.read_csv(Path(record.trials[1].directory(record.output)) / "misclassified.csv")["group"]
    assert set(groups) == {"donor1"}


def test_one_trial_has_no_spread(record: Record, store: Path) -> None:
    assert record_trials(record)["pooling"]["mean"]["macro_f1_std"] is None


# ---------------------------------------------------------------------- a store that fails


@pytest.mark.slow
def test_a_locked_store_costs_no_model(record: Record, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_store(str(store.parent))
    monkeypatch.setattr(registry, "LOCKED_AT_MOST", 0.5)
    lock = sqlite3.connect(store, isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    started = time.monotonic()
    try:
        with pytest.raises(RegistryUnavailable, match="database is locked") as raised:
            record_trials(record)
        assert f"python -m ray_jobs.register --output {record.output} --registered-model m`" in str(raised.value)
        assert "\n" not in str(raised.value)
        with pytest.raises(RegistryUnavailable, match="locked"):
            finish(record)
        assert time.monotonic() - started < 60
    finally:
        lock.execute("ROLLBACK")
        lock.close()
    assert all(Path(trial.directory(record.output), "model", "model.safetensors").exists() for trial in record.trials)
    assert not manifest(record)["finished"]
    summary = finish(record)
    check_whole(record, summary)
    assert manifest(record)["finished"]
    assert manifest(record)["summary"] == summary


@pytest.mark.slow
def test_a_server_that_is_not_there_is_one_line_and_exit_code_1(record: Record, store: Path) -> None:
    record_trials(replace(record, registered_model=None))
    shutil.rmtree(record.table.path)  # the cells are not needed any more
    command = [sys.executable, "-m", "ray_jobs.register", "--output", record.output, "--registered-model", "m"]
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": "http://someone:secret@127.0.0.1:1", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    }  # fmt: skip
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, text=True, capture_output=True, timeout=100)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("python -m ray_jobs.register: MLflow at http://127.0.0.1:1 failed")
    assert "secret" not in line
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{store}"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, text=True, capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr
    check_whole(record, json.loads(done.stdout))


@pytest.mark.slow
@pytest.mark.parametrize(
    "step",
    [
        "create_run", "log_batch", "log_artifacts", "set_terminated", "create_logged_model", "log_model_artifacts",
        "log_outputs", "finalize_logged_model", "create_registered_model", "create_model_version",
    ],
)  # fmt: skip
def test_a_failure_at_any_step_leaves_nothing_twice(
    tmp_path: Path, model_directory: Path, vocabulary: GeneVocabulary, store: Path,
    monkeypatch: pytest.MonkeyPatch, step: str,
) -> None:  # fmt: skip
    record = trained(tmp_path, model_directory, vocabulary)
    original, calls = getattr(mlflow.MlflowClient, step), 0
    failures = {1: MlflowException("down"), 3: PermissionError(13, "Permission denied")}

    def fail(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in failures:
            raise failures[calls]
        return original(*arguments, **named)

    monkeypatch.setattr(mlflow.MlflowClient, step, fail)
    for _ in failures:
        try:
            record_trials(record)
        except RegistryUnavailable as unavailable:
            assert unavailable.why in ("down", "[Errno 13] Permission denied")
    assert calls >= 2
    summary = record_trials(record)
    check_whole(record, summary)
    assert finish(record)["trials"] == summary["trials"]
    check_whole(record, summary)
    experiment = mlflow.MlflowClient().get_experiment_by_name("geneformer-ray")
    models = mlflow.MlflowClient().search_logged_models([experiment.experiment_id])
    assert len(models) == len(record.trials)


def test_a_second_attempt_keeps_the_first_ones_scores(
    record: Record, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_trials(record)
    before = {path: path.stat().st_mtime_ns for path in Path(record.output).rglob("scores.json")}
    summary = record_trials(record)
    assert before == {path: path.stat().st_mtime_ns for path in Path(record.output).rglob("scores.json")}
    check_whole(record, summary)
    receipt = storage.read_json(f"{record.trials[0].directory(record.output)}/recorded.json")
    assert receipt["run_id"] == summary["trials"][0]["run_id"]
    assert receipt["versions"] == {"m": summary["trials"][0]["version"]}


def test_models_are_registered_under_a_second_name(record: Record, store: Path) -> None:
    assert {trial["version"] for trial in record_trials(replace(record, registered_model=None))["trials"]} == {None}
    finish(record, registered_model="m")
    other = finish(record, registered_model="n")
    assert [len(versions("m")), len(versions("n")), len(runs())] == [2, 2, 3]
    assert {trial["version"] for trial in other["trials"]} == {1, 2}


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"output": "/nowhere"}, "--output: got /nowhere without record.json"),
        ({"registered_model": "a/b"}, "--registered-model: got 'a/b'"),
        ({"registered_model": ""}, "--registered-model"),
    ],
)
def test_register_refuses_bad_input(record: Record, store: Path, flags: dict[str, Any], text: str) -> None:
    record_trials(replace(record, registered_model=None))
    with pytest.raises(InputError, match=text):
        finish(record, **flags)


def test_a_broken_record_is_named(record: Record, store: Path) -> None:
    record_trials(replace(record, registered_model=None))
    storage.write_json(f"{record.output}/record.json", {"trials": []})
    with pytest.raises(InputError, match=r"--output.*broken record\.json"):
        finish(record)


# ---------------------------------------------------------------------- pickles


def test_pickled_models_are_refused_whatever_the_environment_says(tmp_path: Path) -> None:
    script = f"""
import mlflow, pandas as pd
class Model(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None): return model_input
mlflow.pyfunc.save_model({str(tmp_path / "pickled")!r}, python_model=Model(), pip_requirements=["mlflow"])
import geneformer_ray.manage.registry
try:
    mlflow.pyfunc.load_model({str(tmp_path / "pickled")!r})
except mlflow.exceptions.MlflowException as error:
    print(error)
else:
    print("loaded")
"""
    environment = os.environ | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "true"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, env=environment, text=True, capture_output=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert "pickle is disallowed" in done.stdout
