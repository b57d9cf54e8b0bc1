"""Fine-tune cell-type classifiers, one for each pooling and seed, and register them."""

from __future__ import annotations

import itertools
from typing import Any, Literal

from pydantic import Field

from geneformer_ray.compute.classifier import check_pooling
from geneformer_ray.data import storage
from geneformer_ray.data.cells import CellTable
from geneformer_ray.data.splits import NO_LABEL, split_by_group
from geneformer_ray.distribute.cluster import check_workers, connected
from geneformer_ray.distribute.finetune import finetune_worker
from geneformer_ray.distribute.train_workers import discard_checkpoints, fit
from geneformer_ray.errors import InputError
from geneformer_ray.manage.registry import open_store
from geneformer_ray.manage.trial_records import Record, record_trials
from geneformer_ray.manage.trials import Trial
from geneformer_ray.progress import say
from ray_jobs.command_line import main, place, store_directory
from ray_jobs.model_argument import open_model
from ray_jobs.training_flags import TrainingConfig


class FinetuneConfig(TrainingConfig):
    """Flags of ``python -m ray_jobs.finetune``."""

    cells: str = Field(description="table of tokenised cells")
    label: str = Field(description="column of cell types or states to learn")
    group: str = Field(description="column of donors, libraries, individuals: no group is on both sides of the split")
    model: str = Field(description="pretrained model: directory, hub id, or models:/NAME@ALIAS")
    output: str = Field(description="directory for models and predictions")
    vocabulary: str | None = Field(None, description="the model's vocabulary, where it does not carry one")
    pooling: tuple[str, ...] = Field(("mean",), description="first_gene, cls, mean: one or several, comma-separated")
    seeds: tuple[int, ...] = Field((0,), description="of weights and order, comma-separated")
    train_groups: tuple[str, ...] = Field((), description="groups to train on (default: dealt out by size)")
    choose_groups: tuple[str, ...] = Field((), description="groups to choose epoch and champion on")
    report_groups: tuple[str, ...] = Field((), description="groups to report on")
    min_cells: int = Field(10, ge=1, description="labels with fewer cells in some role are dropped, and listed")
    class_weights: Literal["none", "balanced"] = Field("none", description="balanced: every class counts the same")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")
    gene_dropout: float = Field(0.0, ge=0, lt=1, description="share of a cell's genes left out of a training step")
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="of attention weights; on CPU it dominates a step")
    registered_model: str | None = Field(None, description="name in the registry; without it, models stay on disk")


def run(config: FinetuneConfig) -> dict[str, Any]:
    """Train every trial, record it in MLflow, register the models."""
    for pooling in config.pooling:
        check_pooling(pooling)
    for flag, values in (("--pooling", config.pooling), ("--seeds", config.seeds)):
        if not values or len(set(values)) < len(values):
            raise InputError(flag, ",".join(map(str, values)) or "nothing", "one or several, each once")
    if min(config.seeds) < 0:
        raise InputError("--seeds", min(config.seeds), "seeds from 0 on")
    check_workers(config.num_workers, config.cpus_per_worker)
    output, cells = place(config.output, "--output"), place(config.cells, "--cells")
    store = store_directory()
    table = CellTable(cells)
    model = open_model(config.model, config.vocabulary)
    table.check(model.vocabulary)
    model.check_lengths(int(table.lengths.max()))
    split = split_by_group(
        table.select(config.filter),
        table.column(config.label, "--label"),
        table.column(config.group, "--group"),
        assigned={"train": config.train_groups, "choose": config.choose_groups, "report": config.report_groups},
        min_cells=config.min_cells,
    )
    manifest = split.manifest(table.cell_ids)
    options = {**config.options(), "gene_dropout": config.gene_dropout}
    trials = [Trial(pooling, seed) for pooling, seed in itertools.product(config.pooling, config.seeds)]
    plan = {
        "job": "finetune",
        "cells": table.digest,
        "model": model.digest,
        "vocabulary": model.vocabulary.digest,
        "label": config.label,
        "group": config.group,
        "groups": split.groups,
        "labels": split.labels,
        "trials": [trial.name for trial in trials],
        "options": options,
        "class_weights": config.class_weights,
        "label_smoothing": config.label_smoothing,
        "attention_dropout": config.attention_dropout,
        "workers": config.num_workers,
        "precision": config.precision,
        "split": split.digest,
    }
    storage.claim_output(output, plan, overwrite=config.overwrite, resume=True, inputs=[cells, model.source])
    storage.write_json(storage.join(output, "split.json"), manifest)
    for label, count in split.dropped.items():
        why = "" if label == NO_LABEL else f", fewer than {config.min_cells} in some role"
        say(f"dropped {label}: {count} cells{why}")
    tracking = open_store(store)
    say(f"MLflow: {tracking}")
    worker_config = {
        "cells": cells,
        **model.reference(),
        "rows": {role: rows.tolist() for role, rows in split.rows.items()},
        "targets": {role: targets.tolist() for role, targets in split.targets.items()},
        "labels": split.labels,
        "trials": trials,
        "options": options,
        "class_weights": config.class_weights,
        "label_smoothing": config.label_smoothing,
        "attention_dropout": config.attention_dropout,
        "output": output,
    }
    with connected():
        total = len(split.rows["train"]) * config.epochs * len(trials)
        fit(
            finetune_worker, worker_config, workers=config.workers(), output=output, precision=config.precision,
            total=total, what="finetune",
        )  # fmt: skip
    record = Record(table, model.vocabulary, split, manifest, trials, output, config.registered_model, plan)
    summary = record_trials(record)
    summary |= {"output": output, "mlflow": tracking}
    storage.finish_output(output, plan, summary)
    discard_checkpoints(output)
    return summary


if __name__ == "__main__":
    main(FinetuneConfig, run, __doc__ or "")
