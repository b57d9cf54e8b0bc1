"""From a finished training of gene classes to MLflow: one run of all folds, a run a trial below it, and versions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from geneformer_ray.data import storage
from geneformer_ray.data.digests import digest_of
from geneformer_ray.manage import plots
from geneformer_ray.manage.gene_report import REPORT, draw_roc
from geneformer_ray.manage.gene_run import GENES_TABLE, KIND, REPORTED, GeneRun
from geneformer_ray.manage.promotion import SPLIT_TAG, TEST_TAG
from geneformer_ray.manage.registry import reaching_store
from geneformer_ray.manage.roc_plot import roc_figure
from geneformer_ray.manage.runs import PARENT_TAG, RunRecord, log_run
from geneformer_ray.manage.score_metrics import class_metrics
from geneformer_ray.manage.training_curves import training_curves
from geneformer_ray.manage.trial_records import curve_of
from geneformer_ray.manage.trial_versions import (
    TrialVersion,
    origin_tags,
    parameters_of,
    trial_tags,
    what_finishes,
)
from geneformer_ray.manage.trials import FINISHED

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.figure import Figure

    from geneformer_ray.manage.gene_run import GeneRecord
    from geneformer_ray.manage.trials import Trial

__all__ = ["log_gene_run", "record_genes"]

SCORES = ("auc", "macro_f1", "accuracy")
# Of the plan, beside its options; all of it is in config.json.
LOGGED = (
    "folds", "split_seed", "min_cells", "chosen_cells", "workers", "class_weights", "label_smoothing",
    "attention_dropout", "precision",
)  # fmt: skip


def record_genes(record: GeneRecord) -> dict[str, Any]:
    """Write all that recording needs, then log and register it; give the summary of all.

    A second attempt goes on where the first one stopped.

    Raises
    ------
    RegistryUnavailable
        MLflow is down, locked or refuses; the message names the command that finishes the job.
    """
    return log_gene_run(GeneRun.of(record), record.registered_model)


def log_gene_run(run: GeneRun, registered_model: str | None) -> dict[str, Any]:
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
        As :func:`record_genes`.
    """
    then = what_finishes(run.output, registered_model)
    with reaching_store(then):
        whole = log_run(_whole_record(run))
        baselines = [log_run(_baseline_record(run, fold, whole)) for fold in range(run.folds)]
    trials = [_log_trial(run, trial, registered_model, whole, then) for trial in run.trials]
    splits = [run.split(fold) for fold in range(run.folds)]
    spread = {what: _rounded(its) for what, its in run.spread().items()}
    return {
        "genes": run.plan["classes"]["genes_per_class"],
        "unknown_genes": run.plan["classes"]["unknown_genes"],
        "genes_in_too_few_cells": run.plan["classes"]["genes_in_too_few_cells"],
        "cells": run.plan["chosen_cells"],
        "cells_without_target_gene": splits[0]["cells_without_target_gene"],
        "folds": [{"cells": split["cells"], "tokens": split["tokens"]} for split in splits],
        "model": {**spread["model"], "tokens": spread["model_tokens"]},
        "baseline": {**spread["baseline"], "tokens": spread["baseline_tokens"]},
        "trials": trials,
        "run_id": whole,
        "baseline_run": baselines,
        "genes_table": storage.join(run.output, GENES_TABLE),
        "report": storage.join(run.output, REPORT),
    }


def _log_trial(run: GeneRun, trial: Trial, registered_model: str | None, whole: str, then: str) -> dict[str, Any]:
    """Log one trial and register its model; give its line of the summary."""
    scores, digest = run.scores(trial), digest_of(run.id, trial.name)
    tags = _trial_tags(run, trial, scores)
    version = TrialVersion(trial.directory(run.output), digest, tags, run.example, "gene_pyfunc_model")
    found = version.log(
        lambda tags: _trial_record(run, trial, digest, scores, {**tags, PARENT_TAG: whole}), registered_model, then
    )
    return {**_named(trial), **found, **_summarised(scores)}


def _named(trial: Trial) -> dict[str, Any]:
    return {"seed": trial.seed, "fold": trial.fold}


def _whole_record(run: GeneRun) -> RunRecord:
    metrics: dict[str, float] = {}
    for what, its in run.spread().items():
        of, _, unit = what.partition("_")
        metrics |= _present(its, ("baseline_" if of == "baseline" else "") + ("token_" if unit else ""))
    return RunRecord(
        f"genes: {run.folds} folds",
        digest_of(run.id, "all folds"),
        parameters=_parameters(run),
        metrics={f"reporting_{name}": value for name, value in metrics.items()},
        figures={"roc.png": draw_roc(run)},
        documents={"config.json": run.plan, **{f"split-fold{fold}.json": run.split(fold) for fold in range(run.folds)}},
        files={name: storage.read_bytes(storage.join(run.output, name)) for name in (GENES_TABLE, REPORT)},
        tags={**_tags(run), SPLIT_TAG: str(run.plan["split"])},
    )


def _trial_record(
    run: GeneRun, trial: Trial, digest: str, scores: dict[str, dict[str, Any]], tags: dict[str, str]
) -> RunRecord:
    directory, fold = trial.directory(run.output), trial.fold or 0
    history = storage.read_json(storage.join(directory, "history.json"))
    finished = storage.read_json(storage.join(directory, FINISHED))
    finished.pop("trial")
    return RunRecord(
        trial.name,
        digest,
        # Of the last: device, dtype and threads, with the reason for each, and how much of the model was learned.
        parameters={**_named(trial), **_parameters(run), **finished},
        metrics=_flat(scores),
        curves=history,
        figures={
            **_figures(scores, run.baseline(fold), trial.name),
            "training_curves.png": training_curves([curve_of(trial.name, history)]),
        },
        documents={
            "config.json": run.plan,
            "split.json": run.split(fold),
            "scores.json": scores,
            "history.json": history,
        },
        files={REPORTED: storage.read_bytes(storage.join(directory, REPORTED))},
        tags=tags,
    )


def _baseline_record(run: GeneRun, fold: int, whole: str) -> RunRecord:
    scores, name = run.baseline(fold), f"baseline frequency + mean rank, fold {fold}"
    return RunRecord(
        name,
        digest_of(run.id, name),
        parameters={
            "model": "logistic regression on the share of cells that hold a gene and its mean rank in these",
            "fold": fold,
            "labels": ", ".join(run.labels),
        },
        metrics=_flat(scores),
        figures=_figures(scores, {}, name),
        documents={"config.json": run.plan, "split.json": run.split(fold), "scores.json": scores},
        tags={**_tags(run), SPLIT_TAG: run.split(fold)["digest"], PARENT_TAG: whole},
    )


def _parameters(run: GeneRun) -> dict[str, Any]:
    return {"task": KIND, "labels": ", ".join(run.labels), **parameters_of(run.plan, LOGGED)}


def _tags(run: GeneRun) -> dict[str, str]:
    return {
        **origin_tags(run.plan, run.labels, run.code_revision),
        "gene_classes_digest": str(run.plan["gene_classes"]),
    }


def _trial_tags(run: GeneRun, trial: Trial, scores: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Give what a trial's run and version are tagged with: what promotion compares, and where it comes from."""
    split = run.split(trial.fold or 0)
    return {
        "task": KIND,
        **{key: str(value) for key, value in _named(trial).items()},
        **_tags(run),
        **trial_tags(run.plan, trial.directory(run.output), scores),
        SPLIT_TAG: split["digest"],
        "reporting_auc": f"{scores['reporting']['auc']:.6f}",
        # Which genes a figure was measured on, of which class, in which cells.
        TEST_TAG: digest_of(run.plan["cells"], split["reporting_digest"]),
    }


def _flat(scores: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Give scores as MLflow's flat metrics: each role's own per gene and per token, and those of every class."""
    flat: dict[str, float] = {}
    for role, values in scores.items():
        flat |= {f"{role}_{name}": float(values[name]) for name in SCORES if values[name] is not None}
        tokens = values["tokens"]
        flat |= {f"{role}_token_{name}": float(tokens[name]) for name in SCORES if tokens[name] is not None}
        flat |= {f"{role}_genes": values["genes"], f"{role}_tokens": tokens["tokens"]}
        flat |= class_metrics(role, values["per_class"], ("precision", "recall", "f1", "auc", "genes"))
    return flat


def _figures(scores: dict[str, dict[str, Any]], beside: Mapping[str, dict[str, Any]], title: str) -> dict[str, Figure]:
    figures = {}
    for role, values in scores.items():
        heading = f"{title}: {role} genes"
        figures[f"confusion_matrix_{role}.png"] = plots.confusion_matrix(
            values["confusion_matrix"], list(values["per_class"]), heading, "genes"
        )
        figures[f"roc_{role}.png"] = roc_figure([values], [beside[role]] if beside else [], heading)
    return figures


def _summarised(scores: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Give the scores that a summary shows, by role."""
    named = {f"{role}_{name}": values[name] for role, values in scores.items() for name in SCORES}
    return named | {f"{role}_token_auc": values["tokens"]["auc"] for role, values in scores.items()}


def _present(spread: dict[str, Any], prefix: str) -> dict[str, float]:
    return {f"{prefix}{name}": value for name, value in spread.items() if value is not None}


def _rounded(spread: dict[str, Any]) -> dict[str, Any]:
    return {name: None if value is None else round(value, 4) for name, value in spread.items()}
