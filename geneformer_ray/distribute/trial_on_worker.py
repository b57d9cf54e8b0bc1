"""A trial on one worker of its group: training with the best epoch kept, whatever is learned, and its predictions."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from geneformer_ray.compute.freezing import freeze
from geneformer_ray.compute.lora import Adapters, LoraOptions
from geneformer_ray.compute.model_directory import find_model, model_vocabulary, read_config, weights_digest
from geneformer_ray.compute.training import TrainingOptions
from geneformer_ray.data import storage
from geneformer_ray.data.cells import CellTable
from geneformer_ray.distribute.streamed_training import StreamedTraining
from geneformer_ray.errors import InputError
from geneformer_ray.manage.registry import local_source
from geneformer_ray.manage.trials import ADAPTERS, FINISHED, Trial

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from geneformer_ray.compute.training import BatchLoss
    from geneformer_ray.data.vocabulary import GeneVocabulary
    from geneformer_ray.distribute.streamed_training import History
    from geneformer_ray.distribute.worker import Worker

__all__ = ["Learned", "TrialOnWorker", "diverged"]


def diverged(learning_rate: float, what: str) -> InputError:
    """Say that a training has diverged: its weights, or what follows from them, are no numbers any more."""
    return InputError("--learning-rate", learning_rate, f"a lower one: the training has diverged, and {what}")


class Learned(Protocol):
    """What a trial learns from which cells: made on the driver, and sent to the workers as it is."""

    @property
    def rows(self) -> Mapping[str, NDArray[np.int64]]:
        """Role (``train``, ``choose``, ``report``) -> row numbers of its cells."""

    @property
    def chosen_by(self) -> str:
        """The entry of an epoch's history that is highest in the best epoch."""

    def new_model(
        self, source: Path, parent: GeneVocabulary, trial: Trial, *, attention_dropout: float
    ) -> tuple[Any, GeneVocabulary]:
        """Put a fresh head on a pretrained trunk; give the model, and the vocabulary that it uses."""

    def loss(self, vocabulary: GeneVocabulary, *, class_weights: str, label_smoothing: float, device: str) -> BatchLoss:
        """Give the loss of a batch of training cells, named by their positions among ``rows["train"]``."""

    def items_of(self, batch: NDArray[np.int64]) -> int:
        """Say over how many items the loss of a batch is summed."""

    def choose(self, on: TrialOnWorker) -> dict[str, float]:
        """Score the choosing cells with the present weights: entries of the history. Every worker calls it."""

    def predict(self, on: TrialOnWorker, kept: Path) -> None:
        """Predict with the kept weights, and write all that belongs to it. Every worker calls it."""


class TrialOnWorker:
    """One trial on one worker.

    Parameters
    ----------
    worker
        This worker's place in its group.
    config
        As for :func:`geneformer_ray.distribute.finetune.finetune_trials`, with ``trial`` and ``learned``.
    """

    def __init__(self, worker: Worker, config: dict[str, Any]) -> None:
        self.worker, self.config = worker, config
        self.trial: Trial = config["trial"]
        self.learned: Learned = config["learned"]
        self.table = CellTable(config["cells"])
        self.directory = self.trial.directory(config["output"])
        self.options = TrainingOptions(**{**config["options"], "seed": self.trial.seed})
        torch.manual_seed(self.trial.seed)  # the fresh head, the same on every worker
        self._source = find_model(local_source(config["model"], config["tracking_uri"]))
        parent = model_vocabulary(self._source, config["vocabulary"], read_config(self._source))
        self.model, self.vocabulary = self.learned.new_model(
            self._source, parent, self.trial, attention_dropout=config["attention_dropout"]
        )
        self._new_tokens = len(self.vocabulary) - len(parent)
        self._undecayed = self._choose_what_is_learned(self._new_tokens)
        self.cells_digest = self.table.vocabulary_digest or parent.digest

    def _choose_what_is_learned(self, new_tokens: int) -> list[nn.Parameter]:
        """Put on adapters, or freeze parts; give what the optimiser must not let decay."""
        self._adapters = None
        if self.config.get("lora"):
            self._adapters = Adapters(self.model, LoraOptions(**self.config["lora"]), new_tokens=new_tokens)
            return self._adapters.undecayed
        return freeze(
            self.model, layers=self.config["freeze_layers"], embeddings=self.config["freeze_embeddings"],
            new_tokens=new_tokens,
        )  # fmt: skip

    def read(self, rows: NDArray[np.int64]) -> list[NDArray[np.int32]]:
        """Read cells as the model takes them: token ids of each, in the order of `rows`."""
        return [self.vocabulary.adapt(ids, self.cells_digest) for ids in self.table.read(rows).input_ids]

    # ---------------------------------------------------------------- training

    def train(self, *, keep: bool = True) -> None:
        """Train all epochs, or until they help no more.

        Parameters
        ----------
        keep
            Whether to write the weights that do best on the choosing cells.
        """
        self._keeps = keep
        how = self.config
        loss = self.learned.loss(
            self.vocabulary, class_weights=how["class_weights"], label_smoothing=how["label_smoothing"],
            device=self.worker.execution.device,
        )  # fmt: skip
        rows = self.learned.rows["train"]
        training = StreamedTraining(
            self.worker, self.model, self.vocabulary, self.table, rows, self.cells_digest, loss,
            self.learned.items_of, self.options, f"{self.trial.name}, ", self._undecayed,
        )  # fmt: skip
        history = training.run(self._end_epoch)
        self.worker.tell(len(rows) * self.options.epochs, f"{self.trial.name} trained", now=True)
        if self.worker.leads:
            storage.write_json(storage.join(self.directory, "history.json"), history)

    def _end_epoch(self, history: History) -> bool:
        """Score the choosing cells, keep the best weights, and say whether patience is at its end."""
        # The first worker's word counts for all: the number of epochs may not depend on a rounding.
        chosen: dict[str, float] = self.worker.gather(self.learned.choose(self))[0]
        by = self.learned.chosen_by
        improved = all(chosen[by] > entry[by] for entry in history[:-1])
        without = 0 if improved else history[-2]["epochs_without_improvement"] + 1
        history[-1] |= {**chosen, "epochs_without_improvement": without}
        if improved and self._keeps:
            self._keep_weights()
        return self.config["patience"] is not None and without >= self.config["patience"]

    def _keep_weights(self) -> None:
        if not self.worker.leads:
            return
        model = self.model
        if self._adapters:
            try:
                model = self._adapters.merged()
            except ValueError as error:
                raise diverged(self.options.learning_rate, "adapters hold what is no number") from error
        self._upload(lambda folder: model.save(folder, self.vocabulary), "model")
        if self._adapters:
            adapters, base = self._adapters, weights_digest(self._source)
            self._upload(lambda folder: adapters.save(folder, base), ADAPTERS)

    def _upload(self, save: Any, name: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder))
            storage.upload(Path(folder), storage.join(self.directory, name))

    # -------------------------------------------------------------- prediction

    def predict(self) -> None:
        """Predict with the kept weights, and vouch for all that the trial has written."""
        self.worker.gather(None)  # the first worker has written the weights once all are here
        learned = self._count_learned()
        self.learned.predict(self, find_model(storage.join(self.directory, "model")))
        if self.worker.leads:
            finished = {
                "trial": self.trial.name,
                "execution": self.worker.execution.reason,
                "learned_parameters": learned,
            }
            storage.write_json(storage.join(self.directory, FINISHED), finished)

    def _count_learned(self) -> int:
        """Count the numbers that are learned; of a matrix that is learned in part, its new tokens' rows alone."""
        partly = {id(parameter) for parameter in self._undecayed}
        return sum(
            parameter[-self._new_tokens :].numel() if id(parameter) in partly else parameter.numel()
            for parameter in self.model.parameters()
            if parameter.requires_grad
        )
