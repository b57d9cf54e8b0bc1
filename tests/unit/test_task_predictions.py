"""What is said of predictions: mistakes, scores and digests of one label, and of several with labels missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from geneformer_ray.compute.scores import score
from geneformer_ray.manage.misclassified_cells import misclassified_cells
from geneformer_ray.manage.score_metrics import curve_metrics, flat_metrics, score_figures
from geneformer_ray.manage.task_predictions import (
    TaskPredictions,
    digest_of_test,
    mistakes_in,
    predictions_of,
    scores_of,
)
from geneformer_ray.manage.trials import read_predictions, write_predictions

IDS = ["c0", "c1", "c2", "c3", "c4"]
TASKS = {"type": ["a", "b", "c"], "sex": ["f", "m"]}
# The second cell has no sex, the fourth no type.
TARGETS = np.array([[0, 1], [1, -1], [2, 0], [-1, 1], [0, 0]])
# In the type, the second and the last are taken for another; in the sex the last.
LOGITS = np.array(
    [[3, 0, 0, 0, 2], [5, 1, 0, 9, 9], [0, 0, 4, 1, 0], [9, 9, 9, 0, 1], [0, 2, 0, 0, 3]], dtype=np.float32
)
GROUPS = np.array([f"g{number}" for number in range(5)])


def one_label(ids: list[str], targets: list[int], labels: list[str], task: str | None = None) -> TaskPredictions:
    wanted = np.array(targets)
    return TaskPredictions(task, labels, ids, wanted, np.zeros((len(ids), len(labels))), np.arange(len(ids)))


@pytest.fixture
def predictions(tmp_path: Path) -> list[TaskPredictions]:
    write_predictions(str(tmp_path), "report", IDS, TARGETS, LOGITS)
    return predictions_of(str(tmp_path), "report", [], TASKS)


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("targets", [TARGETS[:, 0], TARGETS, TARGETS[:, :1]], ids=["one", "several", "one of several"])
def test_predictions_come_back_as_they_were(targets: np.ndarray, tmp_path: Path) -> None:
    write_predictions(str(tmp_path), "choose", IDS, targets, LOGITS)
    ids, found, logits = read_predictions(str(tmp_path), "choose")
    assert ids == IDS and found.shape == targets.shape
    np.testing.assert_array_equal(found, targets)
    np.testing.assert_array_equal(logits, LOGITS)
    columns = pq.read_schema(tmp_path / "predictions-choose.parquet")
    assert columns.names == ["cell_id", "target", "logits"]
    assert str(columns.field("target").type) == (
        "int64" if targets.ndim == 1 else f"fixed_size_list<element: int64>[{targets.shape[1]}]"
    )


def test_predictions_of_no_cells_keep_their_shape(tmp_path: Path) -> None:
    write_predictions(str(tmp_path), "choose", [], TARGETS[:0], LOGITS[:0])
    _, targets, logits = read_predictions(str(tmp_path), "choose")
    assert (targets.shape, logits.shape) == ((0, 2), (0, 5))


# ---------------------------------------------------------------------- taken apart


def test_each_task_has_the_cells_that_are_labelled_for_it(predictions: list[TaskPredictions], tmp_path: Path) -> None:
    of_type, of_sex = predictions
    assert (of_type.task, of_type.cell_ids, of_type.targets.tolist()) == (
        "type",
        ["c0", "c1", "c2", "c4"],
        [0, 1, 2, 0],
    )
    assert (of_sex.task, of_sex.cell_ids, of_sex.targets.tolist()) == ("sex", ["c0", "c2", "c3", "c4"], [1, 0, 1, 0])
    np.testing.assert_array_equal(of_type.logits, LOGITS[[0, 1, 2, 4], :3])
    np.testing.assert_array_equal(of_sex.logits, LOGITS[[0, 2, 3, 4], 3:])
    write_predictions(str(tmp_path), "choose", IDS, TARGETS[:, 1] + 1, LOGITS)
    (single,) = predictions_of(str(tmp_path), "choose", list("vwxyz"), None)
    assert (single.task, single.cell_ids, single.labels) == (None, IDS, list("vwxyz"))


def test_scores_are_the_means_beside_each_task(predictions: list[TaskPredictions]) -> None:
    scores = scores_of(predictions)
    each = [score(its.targets, its.logits, its.labels) for its in predictions]
    assert scores["tasks"] == dict(zip(TASKS, each, strict=True))
    assert [one["accuracy"] for one in each] == [0.5, 0.75]
    assert scores["accuracy"] == 0.625
    assert scores["macro_f1"] == pytest.approx((each[0]["macro_f1"] + each[1]["macro_f1"]) / 2)
    single = TaskPredictions(None, *(getattr(predictions[0], name) for name in list(vars(predictions[0]))[1:]))
    assert scores_of([single]) == each[0]


# ---------------------------------------------------------------------- mistakes


def test_mistakes_are_listed_with_the_most_confident_first() -> None:
    logits = pd.DataFrame([[2.0, 0, 0], [0, 1, 0], [9, 0, 0], [0, 0, 3]]).to_numpy()
    targets = np.array([0, 0, 1, 1])
    found = misclassified_cells(list("abcd"), targets, logits, ["x", "y", "z"], ["g1", "g2", "g3", "g4"])
    assert found["cell_id"].tolist() == ["c", "d", "b"]
    assert found["true_label"].tolist() == ["y", "y", "x"]
    assert found["predicted_label"].tolist() == ["x", "z", "y"]
    assert found["group"].tolist() == ["g3", "g4", "g2"]
    assert (found["probability_predicted"] > found["probability_true"]).all()
    assert "group" not in misclassified_cells(list("abcd"), targets, logits, ["x", "y", "z"]).columns


def test_mistakes_of_several_tasks_name_theirs(predictions: list[TaskPredictions]) -> None:
    found = mistakes_in(predictions, GROUPS)
    assert list(found.columns)[:3] == ["task", "cell_id", "group"]
    said = found[["task", "cell_id", "group", "true_label", "predicted_label"]].to_numpy().tolist()
    assert said == [
        ["type", "c1", "g1", "b", "a"], ["type", "c4", "g4", "a", "b"], ["sex", "c4", "g4", "f", "m"],
    ]  # fmt: skip
    only = mistakes_in([predictions[0], predictions[1].__class__("sex", ["f", "m"], [], *empty())], GROUPS)
    assert set(only["task"]) == {"type"}
    assert "task" not in mistakes_in([one_label(IDS, [1, 0, 0, 0, 0], ["x", "y"])], GROUPS).columns


def empty() -> tuple[Any, ...]:
    return np.zeros(0, dtype=int), np.zeros((0, 2)), np.zeros(0, dtype=int)


# ---------------------------------------------------------------------- digests


def test_the_test_digest_knows_cells_and_labels_in_any_order() -> None:
    def digest(*given: Any) -> str:
        return digest_of_test([one_label(*given)])

    one = digest(["a", "b", "c"], [0, 1, 0], ["x", "y"])
    assert digest(["c", "b", "a"], [0, 1, 0], ["x", "y"]) == one
    assert digest(["a", "b", "c"], [1, 2, 1], ["w", "x", "y"]) == one
    assert digest(["a", "b"], [0, 1], ["x", "y"]) != one
    assert digest(["a", "b", "c"], [0, 1, 1], ["x", "y"]) != one
    assert digest(["a", "b", "d"], [0, 1, 0], ["x", "y"]) != one


def test_the_test_digest_knows_the_task() -> None:
    both = [one_label(["a", "b"], [0, 1], ["x", "y"], "t"), one_label(["b"], [0], ["x", "y"], "u")]
    one = digest_of_test(both)
    assert digest_of_test(both[::-1]) == one
    assert digest_of_test(both[:1]) != one
    assert digest_of_test([both[0], one_label(["b"], [0], ["x", "y"], "v")]) != one
    assert digest_of_test([one_label(["a", "b"], [0, 1], ["x", "y"])]) != digest_of_test(both[:1])


# ---------------------------------------------------------------------- what MLflow gets


def test_metrics_of_several_tasks_are_the_means_and_each_tasks(predictions: list[TaskPredictions]) -> None:
    scores = {"reporting": scores_of(predictions)}
    flat = flat_metrics(scores)
    each = scores["reporting"]["tasks"]
    assert flat["reporting_macro_f1"] == scores["reporting"]["macro_f1"]
    assert flat["reporting_expected_calibration_error"] == scores["reporting"]["expected_calibration_error"]
    for task, its in each.items():
        assert flat[f"reporting_accuracy_{task}"] == its["accuracy"]
        assert flat[f"reporting_brier_score_{task}"] == its["calibration"]["brier_score"]
        for label, one in its["per_class"].items():
            assert flat[f"reporting_f1_{task}_{label}"] == one["f1"]
    single = flat_metrics({"reporting": each["type"]})
    assert single["reporting_macro_f1"] == each["type"]["macro_f1"]
    assert single["reporting_f1_a"] == each["type"]["per_class"]["a"]["f1"]
    assert not [name for name in single if "type" in name]


def test_no_metric_takes_anothers_name() -> None:
    """MLflow admits few characters: what is left of two names may be the same."""
    one = {"accuracy": 0.1, "macro_f1": 0.2, "calibration": {"expected_calibration_error": 0.3, "brier_score": 0.4}}
    classes = {"CD4+": {"precision": 1, "recall": 2, "f1": 3, "cells": 4}, "CD4*": dict.fromkeys(
        ("precision", "recall", "f1", "cells"), 9
    )}  # fmt: skip
    tasks = {name: {**one, "macro_f1": value, "per_class": classes} for name, value in {"a/b": 5, "a?b": 6}.items()}
    flat = flat_metrics({"choosing": {**one, "expected_calibration_error": 0, "tasks": tasks}})
    assert len(flat) == 3 + 2 * (4 + 2 * 4)
    assert (flat["choosing_macro_f1_a_b"], flat["choosing_macro_f1_a_b_1"]) == (5, 6)
    assert sorted(value for name, value in flat.items() if "_f1_a_b" in name and "CD4" in name) == [3, 3, 9, 9]
    assert all(character.isalnum() or character in "_-. " for name in flat for character in name)
    (entry,) = curve_metrics([{"step": 1, "choosing_macro_f1_a/b": 0.5, "choosing_macro_f1_a?b": 0.75}])
    assert entry == {"step": 1, "choosing_macro_f1_a_b": 0.5, "choosing_macro_f1_a_b_2": 0.75}


def test_each_task_has_its_figures(predictions: list[TaskPredictions]) -> None:
    scores = {"reporting": scores_of(predictions)}
    figures = score_figures(scores, "mean-seed0")
    assert list(figures) == [
        f"{what}_reporting_{task}.png" for task in TASKS for what in ("confusion_matrix", "calibration")
    ]
    titles = [axes.get_title(loc="left") for axes in figures["confusion_matrix_reporting_sex.png"].axes]
    assert "mean-seed0, sex: reporting cells" in titles
    single = score_figures({"reporting": scores["reporting"]["tasks"]["type"]}, "mean-seed0")
    assert list(single) == ["confusion_matrix_reporting.png", "calibration_reporting.png"]
