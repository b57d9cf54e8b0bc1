"""Fine-tuning on classes of genes: cross-validated over genes, with a baseline beside it."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from geneformer_ray.compute.gene_baseline import GeneOccurrence
from geneformer_ray.data import storage
from geneformer_ray.data.digests import digest_of
from geneformer_ray.data.gene_classes import GeneClasses, read_gene_classes
from geneformer_ray.data.gene_folds import FEWEST_FOLDS, GeneFolds, cell_blocks
from geneformer_ray.distribute.cluster import connected
from geneformer_ray.distribute.finetune import finetune_trials
from geneformer_ray.distribute.learned_genes import LearnedGenes
from geneformer_ray.distribute.train_workers import discard_checkpoints
from geneformer_ray.errors import InputError
from geneformer_ray.manage.gene_records import record_genes
from geneformer_ray.manage.gene_run import KIND, GeneRecord
from geneformer_ray.manage.registry import open_store, without_credentials
from geneformer_ray.manage.trained_run import TrainedRun
from geneformer_ray.manage.trials import Trial
from geneformer_ray.progress import say
from ray_jobs.command_line import place
from ray_jobs.training_inputs import TrainingInputs

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ray_jobs.finetune_flags import FinetuneConfig

__all__ = ["check_gene_flags", "run_genes"]

FOLDS = 5


def check_gene_flags(config: FinetuneConfig) -> None:
    """Refuse flags that a training of gene classes cannot go by."""
    if config.gene_dropout:
        takes = "0 with --task genes: a gene that is left out of a step cannot be classified in it"
        raise InputError("--gene-dropout", config.gene_dropout, takes)
    if config.folds is not None and config.folds < FEWEST_FOLDS:
        takes = f"{FEWEST_FOLDS} or more with --task genes: some of each class to train, to choose and to report"
        raise InputError("--folds", config.folds, takes)


def run_genes(config: FinetuneConfig) -> dict[str, Any]:
    """Train a trial for each seed and fold, record them in MLflow, register the models."""
    inputs = TrainingInputs.open(config)
    output, table, model = inputs.output, inputs.table, inputs.model
    file, folds = place(str(config.gene_classes), "--gene-classes"), config.folds or FOLDS
    # Before a cell is read: a class of unknown genes is known by then.
    named = GeneClasses.of(read_gene_classes(file), model.vocabulary, fewest=folds)
    rows = config.rows(table)
    occurrence = GeneOccurrence.count(cell_blocks(table, rows, model.vocabulary), model.vocabulary)
    classes = named.held_by(occurrence.held_V, min_cells=config.min_cells, fewest=folds)
    dealt = GeneFolds.deal(classes, folds, config.split_seed)
    held_CF = dealt.count_held(cell_blocks(table, rows, model.vocabulary), len(model.vocabulary))
    splits = dealt.splits(rows, held_CF)
    trials = [Trial(KIND, *each) for each in itertools.product(config.seeds, range(folds))]
    plan = inputs.plan(config) | {
        "task": KIND,
        "gene_classes": classes.digest,
        "classes": classes.report(),
        "folds": folds,
        "split_seed": config.split_seed,
        "min_cells": config.min_cells,
        "max_cells": config.max_cells,
        "filter": {name: list(values) for name, values in config.filter.items()},
        "chosen_cells": len(rows),
        "token_predictions": config.token_predictions,
        "trials": [trial.name for trial in trials],
        "split": digest_of(*(split.digest for split in splits)),
    }
    del plan["examples"]  # no model of genes carries a cell
    storage.claim_output(
        output, plan, overwrite=config.overwrite, resume=True, inputs=[inputs.cells, model.source, file]
    )
    for split in splits:
        storage.write_json(storage.join(output, f"split-fold{split.fold}.json"), split.manifest())
    _tell(classes, splits[0].without, rows)
    tracking = without_credentials(open_store(inputs.store))
    say(f"MLflow: {tracking}")
    if not TrainedRun.present_in(output):  # else the store was out of reach when all was trained
        learned = [
            LearnedGenes(split, occurrence.held_V[split.tokens["train"]], config.token_predictions) for split in splits
        ]
        with connected():
            finetune_trials(
                inputs.worker_config(config), trials, learned, workers=config.workers(), precision=config.precision
            )
    record = GeneRecord(model.vocabulary, splits, occurrence, trials, output, config.registered_model, plan)
    summary = record_genes(record) | {"output": output, "mlflow": tracking}
    storage.finish_output(output, plan, summary)
    discard_checkpoints(output)
    return summary


def _tell(classes: GeneClasses, without: int, rows: NDArray[np.int64]) -> None:
    """Say what takes part and what does not."""
    report = classes.report()
    for label, genes in report["genes_per_class"].items():
        say(f"genes of {label}: {genes}")
    for what, why in (("unknown_genes", "not in the vocabulary"), ("genes_in_too_few_cells", "in too few cells")):
        for label, names in report[what].items():
            say(f"left out of {label}: {len(names)} {why}")
    say(f"cells without a target gene, left out: {without} of {len(rows)}")
