"""Fine-tune cell-type classifiers, one for each pooling, seed and fold, and register them."""

from __future__ import annotations

import itertools
from typing import Any, Literal

from pydantic import Field

from geneformer_ray.compute.classifier import check_pooling
from geneformer_ray.compute.freezing import check_frozen_layers
from geneformer_ray.data import storage
from geneformer_ray.data.cells import CellTable
from geneformer_ray.data.digests import digest_of
from geneformer_ray.data.splits import NO_LABEL
from geneformer_ray.distribute.cluster import check_workers, connected
from geneformer_ray.distribute.finetune import finetune_trials
from geneformer_ray.distribute.train_workers import discard_checkpoints
from geneformer_ray.errors import InputError
from geneformer_ray.manage.registry import check_name, open_store, without_credentials
from geneformer_ray.manage.trained_run import TrainedRun
from geneformer_ray.manage.trial_records import Record, record_trials
from geneformer_ray.manage.trials import Trial
from geneformer_ray.progress import say
from ray_jobs.command_line import main, place, store_directory
from ray_jobs.model_argument import open_model
from ray_jobs.splitting_flags import SplittingConfig

# Flags beside the options of every training that determine a trial.
HOW = "class_weights label_smoothing attention_dropout freeze_layers freeze_embeddings patience examples".split()


class FinetuneConfig(SplittingConfig):
    """Flags of ``python -m ray_jobs.finetune``."""

    cells: str = Field(description="table of tokenised cells")
    model: str = Field(description="pretrained model: directory, hub id, or models:/NAME@ALIAS")
    output: str = Field(description="directory for models and predictions")
    vocabulary: str | None = Field(None, description="the model's vocabulary, where it does not carry one")
    pooling: tuple[str, ...] = Field(("mean",), description="first_gene, cls, mean: one or several, comma-separated")
    seeds: tuple[int, ...] = Field((0,), description="of weights and order, comma-separated")
    class_weights: Literal["none", "balanced"] = Field("none", description="balanced: every class counts the same")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")
    gene_dropout: float = Field(0.0, ge=0, lt=1, description="share of a cell's genes left out of a training step")
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="of attention weights; on CPU it dominates a step")
    freeze_layers: int = Field(0, ge=0, description="the first layers of the encoder stay as they are")
    freeze_embeddings: bool = Field(False, description="those of genes and ranks stay; a new <cls> is learned")
    patience: int | None = Field(None, ge=1, description="epochs without a better macro F1 after which a trial stops")
    examples: bool = Field(True, description="models carry one test cell a class; --no-examples: no model holds a cell")
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
    if config.registered_model is not None:
        check_name(config.registered_model)
    output, cells = place(config.output, "--output"), place(config.cells, "--cells")
    store = store_directory()
    table = CellTable(cells)
    model = open_model(config.model, config.vocabulary)
    table.check(model.vocabulary)
    model.check_lengths(int(table.lengths.max()))
    check_frozen_layers(config.freeze_layers, model.config)
    splits = config.splits(table)
    options = {**config.options(), "gene_dropout": config.gene_dropout}
    folds = [None] if config.folds is None else range(config.folds)
    trials = [Trial(*each) for each in itertools.product(config.pooling, config.seeds, folds)]
    how = {name: getattr(config, name) for name in HOW}
    plan = {
        "job": "finetune",
        "cells": table.digest,
        "model": model.digest,
        "vocabulary": model.vocabulary.digest,
        "label": config.label,
        "group": config.group,
        "groups": [split.groups for split in splits],
        "labels": splits[0].labels,
        "trials": [trial.name for trial in trials],
        "options": options,
        **how,
        "workers": config.num_workers,
        "precision": config.precision,
        "split": splits[0].digest if config.folds is None else digest_of(*(split.digest for split in splits)),
    }
    storage.claim_output(output, plan, overwrite=config.overwrite, resume=True, inputs=[cells, model.source])
    manifests = [split.manifest(table.cell_ids) for split in splits]
    for number, manifest in enumerate(manifests):
        name = "split.json" if config.folds is None else f"split-fold{number}.json"
        storage.write_json(storage.join(output, name), manifest)
    for label, count in splits[0].dropped.items():
        why = "" if label == NO_LABEL else f", fewer than {config.min_cells} in some role"
        say(f"dropped {label}: {count} cells{why}")
    for finding in dict.fromkeys(line for split in splits for line in split.balance()):
        say(f"classes: {finding}")
    tracking = without_credentials(open_store(store))
    say(f"MLflow: {tracking}")
    worker_config = {"cells": cells, **model.reference(), **how, "options": options, "output": output}
    if not TrainedRun.present_in(output):  # else the store was out of reach when all was trained
        with connected():
            finetune_trials(worker_config, trials, splits, workers=config.workers(), precision=config.precision)
    record = Record(table, model.vocabulary, splits, manifests, trials, output, config.registered_model, plan)
    summary = record_trials(record)
    summary |= {"output": output, "mlflow": tracking}
    storage.finish_output(output, plan, summary)
    discard_checkpoints(output)
    return summary


if __name__ == "__main__":
    main(FinetuneConfig, run, __doc__ or "")
