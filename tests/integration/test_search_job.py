"""Hyper-parameter search on real Ray Tune: ASHA's word ends a trial, and a search that is killed goes on as it was."""

from __future__ import annotations

import csv
import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

from geneformer_ray.compute.model_directory import save_model
from geneformer_ray.compute.pretraining import new_model
from geneformer_ray.data.cells import CellTable
from geneformer_ray.data.shards import write_shard
from geneformer_ray.data.splits import split_by_group
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.distribute.learned_labels import OneLabel
from geneformer_ray.distribute.search import Halving, search_trials
from geneformer_ray.distribute.train_workers import Workers
from geneformer_ray.errors import InputError
from geneformer_ray.manage.search_journal import Journal, Report
from geneformer_ray.manage.trials import Trial
from tests.integration.processes import Job, Run, end_processes_of, seconds_until_none

pytestmark = [pytest.mark.slow, pytest.mark.integration]

EPOCHS, TRIALS = 3, 4
SPACE = "learning_rate: {low: 1e-7, high: 2e-2, log: true}\nfreeze_layers: {choices: [0, 2]}\n"
# Of a killed driver, two agents of Ray outlive the rest.
SECONDS_TO_END = 600.0  # a busy machine is no failure


@dataclass(frozen=True)
class Setting:
    """Cells of two types and three donors, a tiny model, and the command that searches on them."""

    folder: Path
    ray: Path

    def flags(self, output: Path, **others: object) -> list[str]:
        given = {
            "cells": self.folder / "cells", "model": self.folder / "model", "output": output, "label": "cell_type",
            "group": "donor", "epochs": EPOCHS, "tokens-per-batch": 64, "space": self.folder / "space.yaml",
            "trials": TRIALS, "reduction": 2, "registered-model": "searched", "checkpoint-every": 5,
            # Both CPUs: one trial at a time, so that ASHA hears of epochs in one order.
            "cpus-per-worker": 2, **others,
        }  # fmt: skip
        return [f"--{name}={value}" for name, value in given.items()]

    def job(self, output: Path, **others: object) -> Job:
        environment = {"MLFLOW_TRACKING_URI": f"sqlite:///{output}.db", "RAY_TMPDIR": str(self.ray)}
        return Job("search", *self.flags(output, **others), **environment)

    def run(self, output: Path, **others: object) -> Run:
        with self.job(output, **others) as job:
            return job.finished()


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    folder = tmp_path_factory.mktemp("search")
    vocabulary = GeneVocabulary.from_medians({f"GENE{i:02d}": 1.0 for i in range(40)}, max_length=16)
    rng = np.random.default_rng(3)
    genes = np.array([vocabulary.tokens[gene] for gene in vocabulary.genes], dtype=np.int32)
    types, donors = np.arange(240) % 2, np.repeat(["train", "choose", "report"], 80)
    cells = [np.concatenate([rng.permutation(genes[10 * t : 10 * t + 10])[:3], rng.permutation(genes[20:])[:9]])
             for t in types]  # fmt: skip
    table = pa.table(
        {"cell_id": [f"cell{i}" for i in range(240)], "input_ids": pa.array([rng.permutation(one) for one in cells],
         pa.list_(pa.int32())), "cell_type": [["alpha", "beta"][t] for t in types], "donor": donors.tolist()}
    )  # fmt: skip
    write_shard(str(folder / "cells"), "", 0, table, vocabulary=vocabulary.digest, row_group_size=64)
    torch.manual_seed(0)
    model = new_model(vocabulary, layers=2, width=16, heads=2, feed_forward=32, initializer_range=0.3)
    save_model(model, vocabulary, folder / "model")
    (folder / "space.yaml").write_text(SPACE)
    # A path of a socket has a hundred characters at most.
    with tempfile.TemporaryDirectory(prefix="gfr", ignore_cleanup_errors=True) as ray_folder:
        yield Setting(folder, Path(ray_folder))
        end_processes_of(Path(ray_folder))


@pytest.fixture
def common(setting: Setting) -> dict[str, Any]:
    """What trials of three epochs need, with a learning rate of next to nothing."""
    table = CellTable(str(setting.folder / "cells"))
    split = split_by_group(
        np.arange(240), table.column("cell_type", "--label"), table.column("donor", "--group"),
        assigned={role: (role,) for role in ("train", "choose", "report")}, min_cells=1,
    )  # fmt: skip
    return {
        "cells": table.path, "model": str(setting.folder / "model"), "vocabulary": None, "tracking_uri": None,
        "options": {"epochs": 3, "learning_rate": 1e-9, "tokens_per_batch": 256}, "class_weights": "none",
        "label_smoothing": 0.0, "attention_dropout": 0.0, "freeze_layers": 0, "freeze_embeddings": False,
        "patience": None, "trial": Trial("mean", 0), "learned": OneLabel(split),
    }  # fmt: skip


def assert_all_free() -> None:
    """What workers were given is free again."""
    since = time.monotonic()
    while ray.available_resources().get("CPU", 0) < 2:
        assert time.monotonic() - since < 20, "its workers still have what they were given"
        time.sleep(0.1)


def test_a_trial_that_asha_stops_gives_back_what_it_held(
    common: dict[str, Any], ray_cluster: None, tmp_path: Path
) -> None:
    """Beside what an earlier attempt left: a trial that has ended, far better than any random head of one epoch."""
    configs = [{**common, "output": str(tmp_path / str(number))} for number in range(2)]
    journal = Journal(str(tmp_path))
    for epoch in (1, 2, 3):
        journal.add(Report(0, epoch, 1.0, epoch == 3))
    ended, trained = (Path(one["trial"].directory(one["output"]), "history.json") for one in configs)
    ended.parent.mkdir(parents=True)
    ended.write_text("[]")
    search_trials(configs, journal, Halving(3, 1, 2), workers=Workers(), output=str(tmp_path), precision="fp32")
    assert [(one.trial, one.epoch, one.over) for one in journal.reports[3:]] == [(1, 1, True)]
    (entry,) = json.loads(trained.read_text())
    assert entry["choosing_macro_f1"] == journal.reports[3].score < 1
    assert ended.read_text() == "[]"
    assert list((tmp_path / "ray_train").iterdir()) == []
    assert_all_free()


def test_bad_input_that_a_worker_meets_ends_all_trials(
    common: dict[str, Any], ray_cluster: None, tmp_path: Path
) -> None:
    configs = [{**common, "output": str(tmp_path / str(number))} for number in range(3)]
    configs[1]["model"] = str(tmp_path / "nowhere")
    with pytest.raises(InputError, match="nowhere"):
        search_trials(
            configs, Journal(str(tmp_path)), Halving(3, 1, 2), workers=Workers(), output=str(tmp_path),
            precision="fp32",
        )  # fmt: skip
    assert_all_free()


# ------------------------------------------------------------------ whole searches


@pytest.fixture(scope="module")
def whole(setting: Setting) -> tuple[Path, Run]:
    """A search that nothing disturbed."""
    output = setting.folder / "whole"
    return output, setting.run(output)


def reports(output: Path) -> list[list[Any]]:
    file = output / "search" / "journal.json"
    found: list[list[Any]] = json.loads(file.read_text())["reports"] if file.exists() else []
    return found


@pytest.mark.timeout(1800)
def test_the_best_is_trained_again_registered_and_recorded(setting: Setting, whole: tuple[Path, Run]) -> None:
    output, run = whole
    assert run.code == 0, run.errors
    summary, best = run.summary, run.summary["best"]
    scores = {trial: max(score for which, _, score, _ in reports(output) if which == trial) for trial in range(TRIALS)}
    assert best["choosing_macro_f1"] == max(scores.values()) == scores[best["trial"]]
    assert 0 < summary["stopped_early"] < TRIALS
    assert summary["epochs_trained"] == len(reports(output)) < TRIALS * EPOCHS
    with open(summary["files"]["table"]) as file:
        rows = list(csv.DictReader(file))
    assert [float(row["score"]) for row in rows] == list(scores.values())
    # The first trial is of the flags as given.
    assert (float(rows[0]["learning_rate"]), int(rows[0]["freeze_layers"])) == (5e-5, 0)
    options = json.loads((output / "best" / "_manifest.json").read_text())["plan"]["options"]
    assert options["learning_rate"] == float(best["values"]["learning_rate"])
    # The same seed and setting: the same training again.
    (final,) = summary["final"]["trials"]
    assert final["choosing_macro_f1"] == pytest.approx(best["choosing_macro_f1"], abs=1e-6)
    assert Path(summary["files"]["figure"]).stat().st_size > 10_000
    assert not (output / "ray_train").exists()

    client = mlflow.MlflowClient(summary["mlflow"])
    parent = client.get_run(summary["search_run"])
    below = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    trials = {int(one.data.params["trial"]): one for one in below if "trial" in one.data.params}
    assert sorted(trials) == list(range(TRIALS)) and len(below) == TRIALS + 2
    for number, one in trials.items():
        its = [score for which, _, score, _ in reports(output) if which == number]
        curve = client.get_metric_history(one.info.run_id, "choosing_macro_f1")
        assert [point.value for point in sorted(curve, key=lambda point: point.step)] == its
        assert ("stopped_at_epoch" in one.data.metrics) == (len(its) < EPOCHS)
        assert float(one.data.params["learning_rate"]) == float(rows[number]["learning_rate"])
    tags = client.get_model_version("searched", str(final["version"])).tags
    assert tags["search"] == parent.data.tags["search"]

    again = setting.run(output, trials=TRIALS + 1)
    assert again.code == 2 and "a finished run" in again.errors


@pytest.mark.timeout(1800)
def test_a_search_that_is_stopped_and_killed_ends_as_if_it_had_not_been(
    setting: Setting, whole: tuple[Path, Run]
) -> None:
    output, training = setting.folder / "broken", setting.folder / "broken" / "ray_train"
    with setting.job(output) as job:
        # Within the first trial: it has to save, and to go on from there.
        job.wait_until(lambda: len(reports(output)) == 1)
        os.kill(job.process.pid, signal.SIGINT)
        stopped = job.finished()
    assert stopped.code == 130 and "goes on where it can" in stopped.errors, stopped.errors
    assert "no checkpoint" not in stopped.errors
    seconds_until_none(setting.ray, SECONDS_TO_END)
    assert any(training.glob("search-000/epoch-*"))
    with setting.job(output) as job:
        job.wait_until(lambda: len(list(training.glob("search-001/epoch-*"))) > 0)
        first = output / "search" / "000" / "trials" / "mean-seed0" / "history.json"
        written = first.stat().st_mtime_ns
        job.kill()
    seconds_until_none(setting.ray, SECONDS_TO_END)
    resumed = setting.run(output)
    assert resumed.code == 0, resumed.errors
    assert first.stat().st_mtime_ns == written
    ours, theirs = reports(output), reports(whole[0])
    assert [row[:2] + row[3:] for row in ours] == [row[:2] + row[3:] for row in theirs]
    assert [row[2] for row in ours] == pytest.approx([row[2] for row in theirs], abs=1e-9)
    summary, undisturbed = resumed.summary, whole[1].summary
    assert summary["best"] == undisturbed["best"]
    assert summary["final"]["pooling"] == undisturbed["final"]["pooling"]


@pytest.mark.timeout(900)
def test_a_trial_that_diverges_scores_worst_and_is_no_error(setting: Setting) -> None:
    output = setting.folder / "diverged"
    (setting.folder / "far.yaml").write_text("learning_rate: {choices: [1.0e+30]}\n")
    run = setting.run(output, space=setting.folder / "far.yaml", trials=2, epochs=2)
    assert run.code == 0, run.errors
    assert [row for row in reports(output) if row[0] == 1] == [[1, 1, 0.0, True]]
    assert run.summary["best"]["trial"] == 0
