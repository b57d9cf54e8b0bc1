"""What a search remembers, how its ASHA goes on from that, and its table and figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import pytest

from geneformer_ray.errors import InputError
from geneformer_ray.manage.registry import open_store
from geneformer_ray.manage.search_journal import Journal, Report
from geneformer_ray.manage.search_record import SearchRecord

REPORTS = [
    Report(0, 1, 0.5, False), Report(1, 1, 0.4, True), Report(0, 2, 0.7, False), Report(2, 1, 0.6, False),
    Report(0, 3, 0.6, True), Report(2, 2, 0.65, False), Report(2, 3, 0.7, True),
]  # fmt: skip
VALUES = [
    {"learning_rate": 5e-5, "pooling": "mean"}, {"learning_rate": 1e-2, "pooling": "cls"},
    {"learning_rate": 1e-3, "pooling": "mean"},
]  # fmt: skip
PLAN = {
    "label": ["type", "sex"], "task_weights": {"type": 1.0, "sex": 0.5}, "group": "donor",
    "grace_epochs": 1, "reduction": 3.0, "draw_seed": 0,
}  # fmt: skip


def filled(directory: Path) -> Journal:
    journal = Journal(str(directory))
    for report in REPORTS:
        journal.add(report)
    return journal


def test_a_journal_is_found_again_as_it_was_left(tmp_path: Path) -> None:
    empty = Journal(str(tmp_path))
    assert Journal(str(tmp_path)).id == empty.id
    journal = filled(tmp_path)
    again = Journal(str(tmp_path))
    assert (again.id, again.reports) == (journal.id, REPORTS)
    assert [again.over(trial) for trial in range(4)] == [True, True, True, False]
    assert again.find(0, 2) == REPORTS[2] and again.find(1, 2) is None
    assert again.best() == REPORTS[2]  # the first of two trials with the same score
    assert again.best(1) == REPORTS[1]


def test_a_broken_journal_is_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    content = json.loads((tmp_path / "journal.json").read_text())
    (tmp_path / "journal.json").write_text(json.dumps({**content, "columns": ["trial", "epoch"]}))
    with pytest.raises(InputError, match="a journal that search wrote"):
        Journal(str(tmp_path))


@pytest.fixture
def record(tmp_path: Path) -> SearchRecord:
    journal, histories = filled(tmp_path), []
    for trial in range(3):
        histories.append(str(tmp_path / f"{trial}.json"))
        entries = [{"step": one.epoch, "choosing_macro_f1": one.score} for one in journal.of(trial)]
        Path(histories[-1]).write_text(json.dumps(entries))
    return SearchRecord(
        str(tmp_path), PLAN, journal, "choosing_macro_f1", 3, VALUES, histories, ["learning_rate"]
    )  # fmt: skip


def test_the_table_has_a_row_a_trial_and_the_figure_is_drawn(record: SearchRecord) -> None:
    assert record.table.to_dict("list") == {
        "trial": [0, 1, 2], "learning_rate": [5e-5, 1e-2, 1e-3], "pooling": ["mean", "cls", "mean"],
        "score": [0.7, 0.4, 0.7], "best_epoch": [2, 1, 3], "epochs": [3, 1, 3],
        "stopped_early": [False, True, False],
    }  # fmt: skip
    assert record.summary() == {
        "trials": 3, "stopped_early": 1, "epochs_trained": 7, "epochs_without_stopping": 9,
        "best": {"trial": 0, "values": VALUES[0], "epoch": 2, "choosing_macro_f1": 0.7},
        "as_given": {"choosing_macro_f1": 0.7},
    }  # fmt: skip
    files = record.write()
    assert Path(files["table"]).read_text().splitlines()[2] == "1,0.01,cls,0.4,1,1,True"
    assert Path(files["figure"]).read_bytes().startswith(b"\x89PNG")


def test_a_search_is_one_run_with_a_run_for_each_trial_below_it(
    record: SearchRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    open_store(str(tmp_path))
    client = mlflow.MlflowClient()
    (experiment,) = (one.experiment_id for one in client.search_experiments() if one.name != "Default")
    best, baseline = (client.create_run(experiment).info.run_id for _ in range(2))
    client.create_registered_model("toy")
    version = client.create_model_version("toy", str(tmp_path), best).version
    final: dict[str, Any] = {"baseline_run": baseline, "trials": [{"run_id": best, "version": version}]}
    parent = record.log_runs(final, "toy", "then")
    assert record.log_runs(final, "toy", "then") == parent  # each once
    below = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert len(below) == 5 and {best, baseline} < {run.info.run_id for run in below}
    trials = {int(run.data.params["trial"]): run for run in below if "trial" in run.data.params}
    assert {number: run.data.params["pooling"] for number, run in trials.items()} == {0: "mean", 1: "cls", 2: "mean"}
    assert trials[1].data.metrics["stopped_at_epoch"] == 1 and "stopped_at_epoch" not in trials[0].data.metrics
    curve = client.get_metric_history(trials[2].info.run_id, "choosing_macro_f1")
    assert [(point.step, point.value) for point in curve] == [(1, 0.6), (2, 0.65), (3, 0.7)]
    assert client.get_run(parent).data.metrics["best_choosing_macro_f1"] == 0.7
    parameters = client.get_run(parent).data.params
    assert (parameters["label"], parameters["task_weights"]) == ("type, sex", "type=1, sex=0.5")
    tags = client.get_model_version("toy", str(version)).tags
    assert (tags["search"], tags["search_trials"]) == (record.journal.id, "3")
