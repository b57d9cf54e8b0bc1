"""From a finished training to MLflow runs, registered versions and one summary, with the baseline beside them."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import pandas as pd

from geneformer_ray.data import storage
from geneformer_ray.data.digests import digest_of
from geneformer_ray.manage.misclassified_cells import MISCLASSIFIED
from geneformer_ray.manage.promotion import SPLIT_TAG, TEST_TAG
from geneformer_ray.manage.registry import reaching_store
from geneformer_ray.manage.runs import RunRecord, log_run
from geneformer_ray.manage.score_metrics import curve_metrics, flat_metrics, score_figures
from geneformer_ray.manage.task_predictions import digest_of_test
from geneformer_ray.manage.trained_run import Record, TrainedRun
from geneformer_ray.manage.training_curves import TrainingCurve, training_curves
from geneformer_ray.manage.trial_versions import (
    TrialVersion,
    logged,
    origin_tags,
    parameters_of,
    trial_tags,
    what_finishes,
)
from geneformer_ray.manage.trials import FINISHED, Trial

if TYPE_CHECKING:
    from collections.abc import Sequence

    from geneformer_ray.manage.trained_run import Fold

__all__ = ["Record", "curve_of", "log_trained_run", "record_trials"]

SUMMARISED = ("macro_f1", "accuracy", "expected_calibration_error")
# Of the plan, beside its options; all of it is in config.json.
LOGGED = (
    "label", "task_weights", "group", "workers", "class_weights", "label_smoothing", "attention_dropout", "precision",
)  # fmt: skip


def record_trials(record: Record) -> dict[str, Any]:
    """Score every trial and write all that recording needs, then log and register it; give the summary of all.

    A second attempt goes on where the first one stopped.

    Raises
    ------
    RegistryUnavailable
        MLflow is down, locked or refuses; the message names the command that finishes the job.
    """
    return log_trained_run(TrainedRun.of(record), record.registered_model)


def log_trained_run(run: TrainedRun, registered_model: str | None) -> dict[str, Any]:
    """Log and register what a training left in its output; each run and version is made once, however often called.

    Parameters
    ----------
    run
        The training.
    registered_model
        The name to register under; None leaves the models on disk.

    Raises
    ------
    RegistryUnavailable
        As :func:`record_trials`.
    """
    then = what_finishes(run.output, registered_model)
    baselines, baseline_runs = [], []
    for number, fold in enumerate(run.folds):
        scores = storage.read_json(run.place("baseline", number))
        record = _baseline_record(run, number, fold, scores)
        with reaching_store(then):
            baseline_runs.append(log_run(record))
        baselines.append(scores)
    trials = [_log_trial(run, trial, registered_model, then) for trial in run.trials]
    single = len(run.folds) == 1
    return {
        **({"cells": run.folds[0].cells} if single else {"folds": [{"cells": fold.cells} for fold in run.folds]}),
        "labels": run.labels,
        **({"tasks": tasks} if (tasks := run.folds[0].tasks) else {}),
        "dropped_labels": {label: count for fold in run.folds for label, count in fold.dropped.items()},
        "pooling": {
            pooling: _spread([trial for trial in trials if trial["pooling"] == pooling])
            for pooling in dict.fromkeys(trial.pooling for trial in run.trials)
        },
        "baseline": _spread([_summarised(scores) for scores in baselines]),
        "baseline_run": baseline_runs[0] if single else baseline_runs,
        "trials": trials,
    }


def _log_trial(run: TrainedRun, trial: Trial, registered_model: str | None, then: str) -> dict[str, Any]:
    """Log one trial and register its model; give its line of the summary."""
    directory, digest = trial.directory(run.output), digest_of(run.id, trial.name)
    scores = storage.read_json(storage.join(directory, "scores.json"))
    version = TrialVersion(directory, digest, _trial_tags(run, trial, scores), run.example)
    found = version.log(lambda tags: _trial_record(run, trial, digest, scores, tags), registered_model, then)
    return {**_named(trial), **found, **_summarised(scores)}


def _named(trial: Trial) -> dict[str, Any]:
    fold = {} if trial.fold is None else {"fold": trial.fold}
    return {"pooling": trial.pooling, "seed": trial.seed, **fold}


def _trial_record(
    run: TrainedRun, trial: Trial, digest: str, scores: dict[str, dict[str, Any]], tags: dict[str, str]
) -> RunRecord:
    directory = trial.directory(run.output)
    history = storage.read_json(storage.join(directory, "history.json"))
    finished = storage.read_json(storage.join(directory, FINISHED))
    plan = run.plan
    return RunRecord(
        trial.name,
        digest,
        parameters={
            **_named(trial),
            # Device, dtype and threads, with the reason for each.
            "execution": finished["execution"],
            **{name: finished[name] for name in ("learned_parameters",) if name in finished},  # not in earlier ones
            "labels": ", ".join(run.fold_of(trial).labels),
            **parameters_of(plan, LOGGED),
        },
        metrics=flat_metrics(scores),
        curves=curve_metrics(history),
        figures={
            **score_figures(scores, trial.name),
            "training_curves.png": training_curves([curve_of(trial.name, history)]),
        },
        documents={
            "config.json": plan,
            "split.json": storage.read_json(run.place("split", trial.fold or 0)),
            "scores.json": scores,
            "history.json": history,
        },
        files={MISCLASSIFIED: storage.read_bytes(storage.join(directory, MISCLASSIFIED))},
        tags=tags,
    )


def _baseline_record(run: TrainedRun, number: int, fold: Fold, scores: dict[str, dict[str, Any]]) -> RunRecord:
    named = {"fold": number} if len(run.folds) > 1 else {}
    name = "baseline PCA + logistic regression" + (f", fold {number}" if named else "")
    return RunRecord(
        name,
        digest_of(run.id, name),
        parameters={
            "model": "PCA(50) + logistic regression on rank value encodings",
            **named,
            **logged(run.plan, ("label", "group")),
        },
        metrics=flat_metrics(scores),
        figures=score_figures(scores, name),
        documents={
            "config.json": run.plan,
            "split.json": storage.read_json(run.place("split", number)),
            "scores.json": scores,
        },
        tags=_tags(run, fold),
    )


def curve_of(name: str, history: list[dict[str, float]]) -> TrainingCurve:
    """Give a trial's history as the curves that are drawn."""
    frame = pd.DataFrame(history)
    steps, epochs = frame["optimiser_steps"].tolist(), frame["step"].tolist()
    return TrainingCurve(name, steps, frame["train_loss"].tolist(), epochs, frame["choosing_macro_f1"].tolist())


def _tags(run: TrainedRun, fold: Fold) -> dict[str, str]:
    return {**origin_tags(run.plan, fold.labels, run.code_revision), SPLIT_TAG: fold.digest}


def _trial_tags(run: TrainedRun, trial: Trial, scores: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Give what a trial's run and version are tagged with: what promotion compares, and where it comes from."""
    directory, fold = trial.directory(run.output), run.fold_of(trial)
    calibration = _summary(scores["reporting"])["expected_calibration_error"]
    return {
        **{key: str(value) for key, value in _named(trial).items()},
        **_tags(run, fold),
        **trial_tags(run.plan, directory, scores),
        "reporting_expected_calibration_error": f"{calibration:.6f}",
        TEST_TAG: digest_of_test(fold.predictions(directory, "report")),
    }


def _summarised(scores: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Give the scores that a summary shows, by role; of several tasks the means, and the same of each."""
    found: dict[str, Any] = {
        f"{role}_{name}": value for role, values in scores.items() for name, value in _summary(values).items()
    }
    if tasks := scores["reporting"].get("tasks"):
        found["tasks"] = {
            task: _summarised({role: values["tasks"][task] for role, values in scores.items()}) for task in tasks
        }
    return found


def _summary(values: dict[str, Any]) -> dict[str, float]:
    return {name: values[name] if name in values else values["calibration"][name] for name in SUMMARISED}


def _spread(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Give the mean of the reporting scores over trials, folds and seeds together, and their standard deviation."""
    found: dict[str, Any] = {}
    for name in SUMMARISED:
        values = [float(line[f"reporting_{name}"]) for line in lines]
        found[name] = round(statistics.fmean(values), 4)
        # Of a single trial, nobody knows how far another would be.
        found[f"{name}_std"] = round(statistics.stdev(values), 4) if len(values) > 1 else None
    if "tasks" in lines[0]:
        found["tasks"] = {task: _spread([line["tasks"][task] for line in lines]) for task in lines[0]["tasks"]}
    return found | {"trials": len(lines)}
