"""Fine-tuning on groups of workers: one group a trial."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from geneformer_ray.compute.classifier import CellClassifier, new_classifier, predict_logits
from geneformer_ray.compute.freezing import freeze
from geneformer_ray.compute.model_directory import find_model, model_vocabulary, read_config
from geneformer_ray.compute.scores import score
from geneformer_ray.compute.training import TrainingOptions, balanced_weights, classifier_loss
from geneformer_ray.data import storage
from geneformer_ray.data.cells import CellTable
from geneformer_ray.distribute.class_states import class_states, example_cells, write_class_files
from geneformer_ray.distribute.streamed_training import StreamedTraining
from geneformer_ray.distribute.train_workers import TrainingRun, fit_all
from geneformer_ray.distribute.worker import Worker
from geneformer_ray.manage.registry import local_source
from geneformer_ray.manage.trials import FINISHED, Trial, write_predictions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from geneformer_ray.data.splits import GroupSplit
    from geneformer_ray.distribute.streamed_training import History
    from geneformer_ray.distribute.train_workers import Workers

__all__ = ["finetune_trials"]

# Cells of which tokens are held at once to predict them.
CELLS_AT_ONCE = 4_096


def finetune_trials(
    config: dict[str, Any], trials: Sequence[Trial], splits: Sequence[GroupSplit], *, workers: Workers, precision: str
) -> None:
    """Train every trial that is not finished yet, as many at once as the cluster has room for.

    Parameters
    ----------
    config
        ``cells``, ``model``, ``vocabulary``, ``tracking_uri`` (sources), ``options`` of the training,
        ``class_weights``, ``label_smoothing``, ``attention_dropout``, ``freeze_layers``, ``freeze_embeddings``,
        ``patience``, ``examples``, ``output``.
    trials
        What is trained. A trial's fold is the number of its split.
    splits
        Which cells train, choose and report: one a fold, or a single one.
    workers, precision
        Of each trial's group.
    """
    output = config["output"]
    runs = []
    for trial in trials:
        if not storage.exists(storage.join(trial.directory(output), FINISHED)):
            split = splits[trial.fold or 0]
            cells = len(split.rows["train"]) * config["options"]["epochs"]
            runs.append(TrainingRun(trial.name, {**config, "trial": trial, "split": split}, cells))
    if runs:
        fit_all(finetune_worker, runs, workers=workers, output=output, precision=precision, what="finetune")


def finetune_worker(config: dict[str, Any]) -> None:
    """Train the trial of a configuration; runs on each worker."""
    trial = _TrialOnWorker(Worker(config), config)
    trial.train()
    trial.predict()


class _TrialOnWorker:
    """One trial on one worker."""

    def __init__(self, worker: Worker, config: dict[str, Any]) -> None:
        self.worker, self.config = worker, config
        self.trial: Trial = config["trial"]
        self.split: GroupSplit = config["split"]
        self.table = CellTable(config["cells"])
        self.directory = self.trial.directory(config["output"])
        self.options = TrainingOptions(**{**config["options"], "seed": self.trial.seed})
        torch.manual_seed(self.trial.seed)  # the fresh head, the same on every worker
        source = find_model(local_source(config["model"], config["tracking_uri"]))
        parent = model_vocabulary(source, config["vocabulary"], read_config(source))
        self.model, self.vocabulary = new_classifier(
            source, parent, self.split.labels, self.trial.pooling, attention_dropout=config["attention_dropout"]
        )
        self.undecayed = freeze(
            self.model, layers=config["freeze_layers"], embeddings=config["freeze_embeddings"],
            new_tokens=len(self.vocabulary) - len(parent),
        )  # fmt: skip
        self.cells_digest = self.table.vocabulary_digest or parent.digest

    def train(self) -> None:
        """Train all epochs, or until they help no more, keeping the weights that do best on the choosing cells."""
        targets = self.split.targets["train"]
        weights = None
        if self.config["class_weights"] == "balanced":
            weights = balanced_weights(targets, len(self.split.labels)).to(self.worker.execution.device)
        training = StreamedTraining(
            self.worker, self.model, self.vocabulary, self.table, self.split.rows["train"], self.cells_digest,
            classifier_loss(targets, weights, self.config["label_smoothing"]), len, self.options,
            f"{self.trial.name}, ", self.undecayed,
        )  # fmt: skip
        history = training.run(self._end_epoch)
        self.worker.tell(len(targets) * self.options.epochs, f"{self.trial.name} trained", now=True)
        if self.worker.leads:
            storage.write_json(storage.join(self.directory, "history.json"), history)

    def _end_epoch(self, history: History) -> bool:
        """Score the choosing cells, keep the best weights, and say whether patience is at its end."""
        # The first worker's word counts for all: the number of epochs may not depend on a rounding.
        chosen = self.worker.gather(score(*self._scored("choose"), self.split.labels))[0]
        best = max((entry["choosing_macro_f1"] for entry in history[:-1]), default=-1.0)
        improved = chosen["macro_f1"] > best
        without = 0 if improved else history[-2]["epochs_without_improvement"] + 1
        history[-1] |= {
            "choosing_macro_f1": chosen["macro_f1"],
            "choosing_accuracy": chosen["accuracy"],
            "epochs_without_improvement": without,
        }
        if improved:
            self._keep_weights()
        return self.config["patience"] is not None and without >= self.config["patience"]

    def _keep_weights(self) -> None:
        if self.worker.leads:
            with tempfile.TemporaryDirectory() as folder:
                self.model.save(Path(folder), self.vocabulary)
                storage.upload(Path(folder), storage.join(self.directory, "model"))

    def _scored(self, role: str) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Predict a role's cells, shared among the workers; targets and logits on every worker, in row order."""
        share, rows = self.worker.share, self.split.rows[role]
        mine = rows[share.rank :: share.workers]
        logits = np.empty((len(rows), len(self.split.labels)), dtype=np.float32)
        parts = [self._predict(mine[start : start + CELLS_AT_ONCE]) for start in range(0, len(mine), CELLS_AT_ONCE)]
        for rank, part in enumerate(self.worker.gather(np.concatenate([logits[:0], *parts]))):
            logits[rank :: share.workers] = part
        return self.split.targets[role], logits

    def _read(self, rows: NDArray[np.int64]) -> list[NDArray[np.int32]]:
        return [self.vocabulary.adapt(ids, self.cells_digest) for ids in self.table.read(rows).input_ids]

    def _predict(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return predict_logits(self.model, self._read(rows), self.vocabulary.pad_id, execution=self.worker.execution)

    def predict(self) -> None:
        """Predict choosing and reporting cells with the kept weights, average the classes, and write it all."""
        self.worker.gather(None)  # the first worker has written the weights once all are here
        place = storage.join(self.directory, "model")
        kept = find_model(place)
        self.model = CellClassifier.load(kept, self.vocabulary).to(self.worker.execution.device)
        scored = {role: self._scored(role) for role in ("choose", "report")}
        states = class_states(kept, self.split, self._read, self.vocabulary, seed=self.trial.seed, worker=self.worker)
        if self.worker.leads:
            ids = {role: self.table.ids_of(self.split.rows[role]) for role in scored}
            for role, (targets, logits) in scored.items():
                write_predictions(self.directory, role, ids[role], targets, logits)
            examples = None
            if self.config["examples"]:
                logits = scored["report"][1]
                examples = example_cells(self.split, ids["report"], logits, self._read, seed=self.trial.seed)
            write_class_files(place, states, examples)
            finished = {"trial": self.trial.name, "execution": self.worker.execution.reason}
            storage.write_json(storage.join(self.directory, FINISHED), finished)
