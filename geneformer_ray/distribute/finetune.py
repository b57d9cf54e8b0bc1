"""Fine-tuning on groups of workers: one group a trial."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from geneformer_ray.data import storage
from geneformer_ray.distribute.train_workers import TrainingRun, fit_all
from geneformer_ray.distribute.trial_on_worker import TrialOnWorker
from geneformer_ray.distribute.worker import Worker
from geneformer_ray.manage.trials import FINISHED, Trial

if TYPE_CHECKING:
    from collections.abc import Sequence

    from geneformer_ray.distribute.train_workers import Workers
    from geneformer_ray.distribute.trial_on_worker import Learned

__all__ = ["finetune_trials"]


def finetune_trials(
    config: dict[str, Any], trials: Sequence[Trial], learned: Sequence[Learned], *, workers: Workers, precision: str
) -> None:
    """Train every trial that is not finished yet, as many at once as the cluster has room for.

    Parameters
    ----------
    config
        ``cells``, ``model``, ``vocabulary``, ``tracking_uri`` (sources), ``options`` of the training,
        ``class_weights``, ``label_smoothing``, ``attention_dropout``, ``freeze_layers``, ``freeze_embeddings``,
        ``lora`` (may be missing), ``patience``, ``examples``, ``output``.
    trials
        What is trained. A trial's fold is the number of its split.
    learned
        What is learned from which cells: one a fold, or a single one.
    workers, precision
        Of each trial's group.
    """
    output = config["output"]
    runs = []
    for trial in trials:
        if not storage.exists(storage.join(trial.directory(output), FINISHED)):
            its = learned[trial.fold or 0]
            cells = len(its.rows["train"]) * config["options"]["epochs"]
            runs.append(TrainingRun(trial.name, {**config, "trial": trial, "learned": its}, cells))
    if runs:
        fit_all(finetune_worker, runs, workers=workers, output=output, precision=precision, what="finetune")


def finetune_worker(config: dict[str, Any]) -> None:
    """Train the trial of a configuration; runs on each worker."""
    trial = TrialOnWorker(Worker(config), config)
    trial.train()
    trial.predict()
