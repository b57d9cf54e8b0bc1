"""Fine-tuning on a group of workers: one trial after another."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from geneformer_ray.compute.classifier import CellClassifier, new_classifier, predict_logits
from geneformer_ray.compute.model_directory import find_model, model_vocabulary, read_config
from geneformer_ray.compute.scores import score
from geneformer_ray.compute.training import (
    Optimisation,
    TrainingOptions,
    balanced_weights,
    classifier_loss,
    planned_steps,
    train_epoch,
)
from geneformer_ray.data import storage
from geneformer_ray.data.cells import CellTable
from geneformer_ray.distribute.train_workers import Worker
from geneformer_ray.manage.registry import local_source
from geneformer_ray.manage.trials import Trial, write_predictions

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["finetune_worker"]


def finetune_worker(config: dict[str, Any]) -> None:
    """Train every trial of the configuration; runs on each worker.

    Parameters
    ----------
    config
        ``cells``, ``model``, ``vocabulary`` (sources), ``rows`` and ``targets`` by role, ``labels``, ``trials``,
        ``options`` of the training, ``class_weights``, ``label_smoothing``,
        ``attention_dropout``, ``output``.
    """
    worker = Worker(config)
    table = CellTable(config["cells"])
    saved = worker.saved()
    first = saved[0]["trial"] if saved else 0
    done = first * len(config["rows"]["train"]) * config["options"]["epochs"]
    for number, trial in enumerate(config["trials"]):
        if number >= first:
            training = _Training(worker, config, table, number, trial, done)
            training.train(saved if number == first else None)
            training.predict()
            done = training.done


class _Training:
    """One trial on one worker."""

    def __init__(
        self, worker: Worker, config: dict[str, Any], table: CellTable, number: int, trial: Trial, done: int
    ) -> None:
        self.worker, self.config, self.table, self.number, self.done = worker, config, table, number, done
        self.name = trial.name
        self.directory = trial.directory(config["output"])
        self.options = TrainingOptions(**{**config["options"], "seed": trial.seed})
        torch.manual_seed(trial.seed)  # the fresh head, the same on every worker
        source = find_model(local_source(config["model"], config["tracking_uri"]))
        parent = model_vocabulary(source, config["vocabulary"], read_config(source))
        self.model, self.vocabulary = new_classifier(
            source, parent, config["labels"], trial.pooling, attention_dropout=config["attention_dropout"]
        )
        self.cells_digest = table.vocabulary_digest or parent.digest

    def _sequences(self, role: str, rank: int = 0, step: int = 1) -> list[NDArray[np.int32]]:
        rows = np.array(self.config["rows"][role][rank::step], dtype=np.int64)
        return [self.vocabulary.adapt(ids, self.cells_digest) for ids in self.table.read(rows).input_ids]

    def train(self, saved: tuple[dict[str, Any], dict[str, Any]] | None) -> None:
        """Train all epochs, keeping the weights that do best on the choosing cells."""
        sequences = self._sequences("train")
        targets = np.array(self.config["targets"]["train"], dtype=np.int64)
        lengths = np.array([len(ids) for ids in sequences])
        execution = self.worker.execution
        parallel = self.worker.parallel(self.model.to(execution.device))
        steps = planned_steps(lengths, self.options, self.worker.share.workers)
        optimisation = Optimisation(self.model, self.options, steps)
        weights = None
        if self.config["class_weights"] == "balanced":
            weights = balanced_weights(targets, len(self.config["labels"])).to(execution.device)
        loss_of = classifier_loss(targets, weights, self.config["label_smoothing"])
        history: list[dict[str, float]] = []
        best, first = -1.0, 0
        if saved is not None:
            state, tensors = saved
            self.model.load_state_dict(tensors["model"])
            optimisation.restore(tensors)
            history, best, first = state["history"], state["best"], state["epoch"] + 1
            self.done += first * len(sequences)
        for epoch in range(first, self.options.epochs):
            sums, cells = np.zeros(3), 0
            for result in train_epoch(
                parallel, optimisation, sequences, loss_of, len, self.options,
                epoch=epoch, vocabulary=self.vocabulary, execution=execution, share=self.worker.share,
            ):  # fmt: skip
                sums += (result.loss_sum, result.items, result.correct)
                note = f"{self.name}, epoch {epoch + 1}, loss {result.loss_sum / max(1, result.items):.3f}"
                cells += result.cells * self.worker.share.workers
                self.worker.tell(self.done + min(len(sequences), cells), note)
            self.done += len(sequences)
            loss, items, correct = np.sum(self.worker.gather(sums), axis=0)
            chosen = score(*self._scored("choose"), self.config["labels"])
            history.append(
                {
                    "step": epoch + 1,
                    "optimiser_steps": (epoch + 1) * steps / self.options.epochs,
                    "train_loss": loss / items,
                    "train_accuracy": correct / items,
                    "choosing_macro_f1": chosen["macro_f1"],
                    "choosing_accuracy": chosen["accuracy"],
                }
            )
            if chosen["macro_f1"] > best:
                best = chosen["macro_f1"]
                self._keep_weights()
            state = {"trial": self.number, "epoch": epoch, "history": history, "best": best}
            self.worker.save(state, self.model, optimisation, history[-1])
        if self.worker.leads:
            storage.write_json(storage.join(self.directory, "history.json"), history)

    def _keep_weights(self) -> None:
        if self.worker.leads:
            with tempfile.TemporaryDirectory() as folder:
                self.model.save(Path(folder), self.vocabulary)
                storage.upload(Path(folder), storage.join(self.directory, "model"))

    def _scored(self, role: str) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Predict a role's cells, shared among the workers; targets and logits on every worker, in row order."""
        share = self.worker.share
        sequences = self._sequences(role, share.rank, share.workers)
        mine = predict_logits(self.model, sequences, self.vocabulary.pad_id, execution=self.worker.execution)
        logits = np.empty((len(self.config["rows"][role]), len(self.config["labels"])), dtype=np.float32)
        for rank, part in enumerate(self.worker.gather(mine)):
            logits[rank :: share.workers] = part
        return np.array(self.config["targets"][role], dtype=np.int64), logits

    def predict(self) -> None:
        """Predict choosing and reporting cells with the kept weights, and write ``predictions.parquet``."""
        self.worker.gather(None)  # the first worker has written the weights once all are here
        kept = find_model(storage.join(self.directory, "model"))
        self.model = CellClassifier.load(kept, self.vocabulary).to(self.worker.execution.device)
        for role in ("choose", "report"):
            targets, logits = self._scored(role)
            if self.worker.leads:
                rows = np.array(self.config["rows"][role], dtype=np.int64)
                ids = [str(self.table.cell_ids[row]) for row in rows]
                write_predictions(self.directory, role, ids, targets, logits)
