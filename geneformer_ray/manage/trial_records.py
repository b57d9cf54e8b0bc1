"""From finished trials to MLflow runs, registered versions and one summary, with the baseline beside them."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from geneformer_ray.compute.baseline import baseline_scores
from geneformer_ray.compute.model_directory import find_model
from geneformer_ray.compute.scores import score
from geneformer_ray.data import storage
from geneformer_ray.manage import plots
from geneformer_ray.manage.registry import CHOOSING_METRIC, SPLIT_TAG, log_run, register
from geneformer_ray.manage.training_curves import TrainingCurve, training_curves
from geneformer_ray.manage.trials import Trial, read_predictions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from geneformer_ray.data.cells import CellTable
    from geneformer_ray.data.splits import GroupSplit
    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = ["Record", "curve_of", "record_trials"]

LOGGED = ("class_weights", "label_smoothing", "attention_dropout", "precision")
SCORED_ROLES = {"choose": "choosing", "report": "reporting"}


@dataclass(frozen=True)
class Record:
    """What is to be recorded.

    Parameters
    ----------
    table, vocabulary, split, manifest
        The cells, their vocabulary, how they were split, and the split as logged.
    trials
        What was trained.
    output
        Where the trials lie.
    registered_model
        The name to register them under; None leaves them on disk.
    plan
        The run's plan: options and digests.
    """

    table: CellTable
    vocabulary: GeneVocabulary
    split: GroupSplit
    manifest: dict[str, Any]
    trials: list[Trial]
    output: str
    registered_model: str | None
    plan: dict[str, Any]


def record_trials(record: Record) -> dict[str, Any]:
    """Score every trial, log it, register it; give the summary of all."""
    baseline = _baseline(record)
    baseline_run = log_run(
        "baseline PCA + logistic regression",
        parameters={"model": "PCA(50) + logistic regression on rank value encodings", "label": record.plan["label"]},
        metrics=_flat(baseline),
        figures=_confusion(baseline, "Baseline"),
        documents={"split.json": record.manifest, "scores.json": baseline},
        tags=_tags(record),
    )
    trials = []
    for trial in record.trials:
        scores = _scores(trial.directory(record.output), record.split.labels)
        named = {"pooling": trial.pooling, "seed": trial.seed}
        trials.append({**named, **_log(record, trial, scores), "scores": scores})
    poolings = {
        pooling: _mean([t["scores"]["reporting"] for t in trials if t["pooling"] == pooling])
        for pooling in dict.fromkeys(trial.pooling for trial in record.trials)
    }
    return {
        "cells": {role: len(rows) for role, rows in record.split.rows.items()},
        "labels": record.split.labels,
        "dropped_labels": record.split.dropped,
        "pooling": poolings,
        "baseline": _mean([baseline["reporting"]]),
        "baseline_run": baseline_run,
        "trials": [
            {key: value for key, value in trial.items() if key != "scores"}
            | {
                f"{role}_{name}": trial["scores"][role][name]
                for role in trial["scores"]
                for name in ("macro_f1", "accuracy")
            }
            for trial in trials
        ],
    }


def _scores(directory: str, labels: list[str]) -> dict[str, dict[str, Any]]:
    scores = {}
    for role, name in SCORED_ROLES.items():
        _, targets, logits = read_predictions(directory, role)
        scores[name] = score(targets, logits, labels)
    return scores


def _baseline(record: Record) -> dict[str, dict[str, Any]]:
    sequences = {role: record.table.read(rows).input_ids for role, rows in record.split.rows.items()}
    others = [sequences[role] for role in SCORED_ROLES]
    labels, targets = record.split.labels, record.split.targets
    results = baseline_scores(sequences["train"], targets["train"], others, record.vocabulary, len(labels))
    return {
        name: score(targets[role], logits, labels)
        for (role, name), logits in zip(SCORED_ROLES.items(), results, strict=True)
    }


def _log(record: Record, trial: Trial, scores: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Log one trial and register its model."""
    directory = trial.directory(record.output)
    history = storage.read_json(storage.join(directory, "history.json"))
    run_id = log_run(
        trial.name,
        parameters={
            "pooling": trial.pooling,
            "seed": trial.seed,
            "label": record.plan["label"],
            "group": record.plan["group"],
            "workers": record.plan["workers"],
            "labels": ", ".join(record.split.labels),
            **record.plan["options"],
            **{
                name: record.plan[name]
                for name in ("class_weights", "label_smoothing", "attention_dropout", "precision")
            },
        },
        metrics=_flat(scores),
        curves=history,
        figures={
            **_confusion(scores, trial.name),
            "training_curves.png": training_curves([curve_of(trial.name, history)]),
        },
        documents={"split.json": record.manifest, "scores.json": scores, "history.json": history},
        tags={**_tags(record), "pooling": trial.pooling, "model_directory": storage.join(directory, "model")},
    )
    if record.registered_model is None:
        return {"run_id": run_id, "version": None}
    tags = {
        "pooling": trial.pooling,
        CHOOSING_METRIC: f"{scores['choosing']['macro_f1']:.6f}",
        "reporting_macro_f1": f"{scores['reporting']['macro_f1']:.6f}",
        "reporting_accuracy": f"{scores['reporting']['accuracy']:.6f}",
        **_tags(record),
    }
    version = register(run_id, find_model(storage.join(directory, "model")), record.registered_model, tags)
    return {"run_id": run_id, "version": version.version}


def curve_of(name: str, history: list[dict[str, float]]) -> TrainingCurve:
    """Give a trial's history as the curves that are drawn."""
    frame = pd.DataFrame(history)
    steps, epochs = frame["optimiser_steps"].tolist(), frame["step"].tolist()
    return TrainingCurve(name, steps, frame["train_loss"].tolist(), epochs, frame["choosing_macro_f1"].tolist())


def _flat(scores: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Give scores as MLflow's flat metrics, with the F1 of every class."""
    flat = {}
    for role, values in scores.items():
        flat[f"{role}_macro_f1"] = values["macro_f1"]
        flat[f"{role}_accuracy"] = values["accuracy"]
        for label, one in values["per_class"].items():
            # MLflow admits few characters in names of metrics.
            safe = "".join(c if c.isalnum() or c in "_-. " else "_" for c in label)
            flat[f"{role}_f1_{safe}"] = one["f1"]
    return flat


def _confusion(scores: dict[str, dict[str, Any]], title: str) -> dict[str, Figure]:
    return {
        f"confusion_matrix_{role}.png": plots.confusion_matrix(
            values["confusion_matrix"], list(values["per_class"]), f"{title}: {role} cells"
        )
        for role, values in scores.items()
    }


def _tags(record: Record) -> dict[str, str]:
    return {
        "cells_digest": str(record.plan["cells"]),
        "vocabulary_digest": str(record.plan["vocabulary"]),
        SPLIT_TAG: record.split.digest,
        "code_revision": _code_revision(),
    }


def _code_revision() -> str:
    """Give the commit that this code is, or the package's version outside a checkout."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        here = Path(__file__).resolve().parent
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        return found.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        try:
            return version("geneformer-ray")
        except PackageNotFoundError:
            return "unknown"


def _mean(scores: list[dict[str, Any]]) -> dict[str, float]:
    return {name: round(sum(one[name] for one in scores) / len(scores), 4) for name in ("macro_f1", "accuracy")}
