"""Fine-tune classifiers of cells, one for each pooling, seed and fold, or of genes, and register them."""

from __future__ import annotations

import itertools
from typing import Any

from geneformer_ray.data import storage
from geneformer_ray.data.digests import digest_of
from geneformer_ray.data.splits import NO_LABEL
from geneformer_ray.distribute.cluster import connected
from geneformer_ray.distribute.finetune import finetune_trials
from geneformer_ray.distribute.learned_labels import learn_labels
from geneformer_ray.distribute.train_workers import discard_checkpoints
from geneformer_ray.manage.registry import open_store, without_credentials
from geneformer_ray.manage.trained_run import TrainedRun
from geneformer_ray.manage.trial_records import Record, record_trials
from geneformer_ray.manage.trials import Trial
from geneformer_ray.progress import say
from ray_jobs.command_line import main
from ray_jobs.finetune_flags import FinetuneConfig, check_flags
from ray_jobs.gene_task import run_genes
from ray_jobs.training_inputs import TrainingInputs

__all__ = ["FinetuneConfig", "check_flags", "run"]


def run(config: FinetuneConfig) -> dict[str, Any]:
    """Train every trial, record it in MLflow, register the models."""
    check_flags(config)
    if config.task == "genes":
        return run_genes(config)
    inputs = TrainingInputs.open(config)
    output, table, model = inputs.output, inputs.table, inputs.model
    splits = config.splits(table)
    folds = [None] if config.folds is None else range(config.folds)
    trials = [Trial(*each) for each in itertools.product(config.pooling, config.seeds, folds)]
    plan = inputs.plan(config) | {
        **config.labels_in_plan(),
        "group": config.group,
        "groups": [split.groups for split in splits],
        "labels": splits[0].labels,
        "trials": [trial.name for trial in trials],
        "split": splits[0].digest if config.folds is None else digest_of(*(split.digest for split in splits)),
    }
    storage.claim_output(output, plan, overwrite=config.overwrite, resume=True, inputs=[inputs.cells, model.source])
    manifests = [split.manifest(table.cell_ids) for split in splits]
    for number, manifest in enumerate(manifests):
        name = "split.json" if config.folds is None else f"split-fold{number}.json"
        storage.write_json(storage.join(output, name), manifest)
    for label, count in splits[0].dropped.items():
        why = "" if label.endswith(NO_LABEL) else f", fewer than {config.min_cells} in some role"
        say(f"dropped {label}: {count} cells{why}")
    for finding in dict.fromkeys(line for split in splits for line in split.balance()):
        say(f"classes: {finding}")
    tracking = without_credentials(open_store(inputs.store))
    say(f"MLflow: {tracking}")
    if not TrainedRun.present_in(output):  # else the store was out of reach when all was trained
        with connected():
            finetune_trials(
                inputs.worker_config(config), trials, [learn_labels(split, config.weights()) for split in splits],
                workers=config.workers(), precision=config.precision,
            )  # fmt: skip
    record = Record(table, model.vocabulary, splits, manifests, trials, output, config.registered_model, plan)
    summary = record_trials(record)
    summary |= {"output": output, "mlflow": tracking}
    storage.finish_output(output, plan, summary)
    discard_checkpoints(output)
    return summary


if __name__ == "__main__":
    main(FinetuneConfig, run, __doc__ or "")
