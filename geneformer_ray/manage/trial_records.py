"""From a finished training to MLflow runs, registered versions and one summary, with the baseline beside them."""

from __future__ import annotations

import shlex
import statistics
from typing import TYPE_CHECKING, Any

import pandas as pd

from geneformer_ray.compute.model_directory import find_model, weights_digest
from geneformer_ray.data import storage
from geneformer_ray.data.digests import digest_of
from geneformer_ray.manage.misclassified_cells import MISCLASSIFIED
from geneformer_ray.manage.promotion import (
    CHOOSING_METRIC,
    LABELS_TAG,
    REPORTING_METRIC,
    SPLIT_TAG,
    TEST_TAG,
    VOCABULARY_TAG,
)
from geneformer_ray.manage.registry import WEIGHTS_TAG, reaching_store
from geneformer_ray.manage.runs import DIGEST_TAG, RunRecord, log_run, register
from geneformer_ray.manage.score_metrics import curve_metrics, flat_metrics, score_figures
from geneformer_ray.manage.task_predictions import digest_of_test
from geneformer_ray.manage.trained_run import Record, TrainedRun
from geneformer_ray.manage.training_curves import TrainingCurve, training_curves
from geneformer_ray.manage.trials import ADAPTERS, FINISHED, Trial
from geneformer_ray.run_log import current_run

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
    name = f" --registered-model {shlex.quote(registered_model)}" if registered_model else ""
    command = f"python -m ray_jobs.register --output {shlex.quote(run.output)}{name}"
    then = f"the trained models are safe in {run.output}: once it answers, `{command}` finishes the job"
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
    directory = trial.directory(run.output)
    scores = storage.read_json(storage.join(directory, "scores.json"))
    digest = digest_of(run.id, trial.name)
    model = find_model(storage.join(directory, "model"), "--output")
    tags = {**_trial_tags(run, trial, scores), WEIGHTS_TAG: weights_digest(model)}
    record = _trial_record(run, trial, digest, scores, tags)
    with reaching_store(then):
        run_id = log_run(record)
    _keep_receipt(directory, {DIGEST_TAG: digest, "run_id": run_id})
    version = None
    if registered_model is not None:
        with reaching_store(then):
            version = register(run_id, digest, model, registered_model, tags, run.example).version
        _keep_receipt(directory, {DIGEST_TAG: digest, "run_id": run_id, "versions": {registered_model: version}})
    return {**_named(trial), "run_id": run_id, "version": version, **_summarised(scores)}


def _keep_receipt(directory: str, receipt: dict[str, Any]) -> None:
    """Write down beside a trial what it is in MLflow: for people; MLflow itself is asked by the digest."""
    storage.write_json(storage.join(directory, "recorded.json"), receipt)


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
            **_logged(plan, LOGGED),
            **{f"lora_{name}": value for name, value in plan.get("lora", {}).items()},
            # Device, dtype and threads, with the reason for each.
            "execution": finished["execution"],
            **{name: finished[name] for name in ("learned_parameters",) if name in finished},  # not in earlier ones
            "labels": ", ".join(run.fold_of(trial).labels),
            **plan.get("options", {}),
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


def _logged(plan: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Give entries of a plan as they read as parameters."""
    found = {name: plan[name] for name in names if name in plan}
    for name, value in found.items():
        if isinstance(value, dict):
            value = [f"{key}={one:g}" for key, one in value.items()]
        found[name] = ", ".join(value) if isinstance(value, list) else value
    return found


def _baseline_record(run: TrainedRun, number: int, fold: Fold, scores: dict[str, dict[str, Any]]) -> RunRecord:
    named = {"fold": number} if len(run.folds) > 1 else {}
    name = "baseline PCA + logistic regression" + (f", fold {number}" if named else "")
    return RunRecord(
        name,
        digest_of(run.id, name),
        parameters={
            "model": "PCA(50) + logistic regression on rank value encodings",
            **named,
            **_logged(run.plan, ("label", "group")),
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
    return {
        "cells_digest": str(run.plan["cells"]),
        VOCABULARY_TAG: str(run.plan["vocabulary"]),
        LABELS_TAG: digest_of(fold.labels),
        SPLIT_TAG: fold.digest,
        "code_revision": run.code_revision,
        **({"job_run": current_run().id} if current_run().id else {}),  # as in the log and in Ray's metrics
    }


def _trial_tags(run: TrainedRun, trial: Trial, scores: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Give what a trial's run and version are tagged with: what promotion compares, and where it comes from."""
    directory, fold = trial.directory(run.output), run.fold_of(trial)
    choosing, reporting = scores["choosing"], scores["reporting"]
    return {
        **{key: str(value) for key, value in _named(trial).items()},
        **_tags(run, fold),
        CHOOSING_METRIC: f"{choosing['macro_f1']:.6f}",
        REPORTING_METRIC: f"{reporting['macro_f1']:.6f}",
        "reporting_accuracy": f"{reporting['accuracy']:.6f}",
        "reporting_expected_calibration_error": f"{_summary(reporting)['expected_calibration_error']:.6f}",
        TEST_TAG: digest_of_test(fold.predictions(directory, "report")),
        "model_directory": storage.join(directory, "model"),
        **({ADAPTERS: storage.join(directory, ADAPTERS)} if "lora" in run.plan else {}),
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
