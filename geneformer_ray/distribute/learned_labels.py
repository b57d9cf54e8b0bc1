"""Labels of cells, as a trial learns them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from geneformer_ray.compute.classifier import new_classifier, predict_logits
from geneformer_ray.compute.multitask import (
    balanced_task_weights,
    count_labels,
    load_classifier,
    multitask_loss,
    new_multitask_classifier,
)
from geneformer_ray.compute.scores import score
from geneformer_ray.compute.task_scores import mean_scores, score_tasks
from geneformer_ray.compute.training import balanced_weights, classifier_loss
from geneformer_ray.data import storage
from geneformer_ray.data.task_splits import TaskSplit
from geneformer_ray.distribute.class_states import class_states, example_cells, write_class_files
from geneformer_ray.manage.trials import write_predictions

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from geneformer_ray.compute.training import BatchLoss
    from geneformer_ray.data.splits import GroupSplit
    from geneformer_ray.data.task_splits import LabelSplit
    from geneformer_ray.data.vocabulary import GeneVocabulary
    from geneformer_ray.distribute.trial_on_worker import TrialOnWorker
    from geneformer_ray.manage.trials import Trial

__all__ = ["OneLabel", "SeveralLabels", "learn_labels", "predict_role"]

# Cells of which tokens are held at once to predict them.
CELLS_AT_ONCE = 4_096


@dataclass(frozen=True)
class OneLabel:
    """The classes of one label column.

    Parameters
    ----------
    split
        Which cells train, choose and report, and their classes.
    """

    split: GroupSplit
    chosen_by: ClassVar[str] = "choosing_macro_f1"

    @property
    def rows(self) -> Mapping[str, NDArray[np.int64]]:
        """Role -> row numbers of its cells."""
        return self.split.rows

    def new_model(
        self, source: Path, parent: GeneVocabulary, trial: Trial, *, attention_dropout: float
    ) -> tuple[Any, GeneVocabulary]:
        """Put a fresh head on a pretrained trunk."""
        return new_classifier(source, parent, self.split.labels, trial.pooling, attention_dropout=attention_dropout)

    def loss(self, vocabulary: GeneVocabulary, *, class_weights: str, label_smoothing: float, device: str) -> BatchLoss:
        """Give the cross entropy, summed over cells."""
        targets, weights = self.split.targets["train"], None
        if class_weights == "balanced":
            weights = balanced_weights(targets, len(self.split.labels)).to(device)
        return classifier_loss(targets, weights, label_smoothing)

    def items_of(self, batch: NDArray[np.int64]) -> int:
        """Count cells."""
        return len(batch)

    def choose(self, on: TrialOnWorker) -> dict[str, float]:
        """Score the choosing cells."""
        scores = score(
            self.split.targets["choose"], predict_role(on, "choose", len(self.split.labels)), self.split.labels
        )
        return {"choosing_macro_f1": scores["macro_f1"], "choosing_accuracy": scores["accuracy"]}

    def predict(self, on: TrialOnWorker, kept: Path) -> None:
        """Predict choosing and reporting cells, average the classes, and write it all."""
        _predict_labels(on, kept, self.split)


@dataclass(frozen=True)
class SeveralLabels:
    """The classes of several label columns: one trunk, a head a column, and cells that lack some of the labels.

    Epochs are chosen by the mean of the tasks' macro F1, under the name that one label's has: whatever compares
    classifiers compares these.

    Parameters
    ----------
    split
        Which cells train, choose and report, and their classes in each task.
    task_weights
        Task -> its weight in the loss, 1 where it is not named.
    """

    split: TaskSplit
    task_weights: Mapping[str, float]
    chosen_by: ClassVar[str] = "choosing_macro_f1"

    @property
    def rows(self) -> Mapping[str, NDArray[np.int64]]:
        """Role -> row numbers of its cells."""
        return self.split.rows

    def new_model(
        self, source: Path, parent: GeneVocabulary, trial: Trial, *, attention_dropout: float
    ) -> tuple[Any, GeneVocabulary]:
        """Put fresh heads on a pretrained trunk."""
        return new_multitask_classifier(
            source, parent, self.split.tasks, trial.pooling, attention_dropout=attention_dropout
        )

    def loss(self, vocabulary: GeneVocabulary, *, class_weights: str, label_smoothing: float, device: str) -> BatchLoss:
        """Give the weighted cross entropy of all tasks, summed over labels."""
        targets_NT, weights = self.split.targets["train"], None
        if class_weights == "balanced":
            weights = [its.to(device) for its in balanced_task_weights(targets_NT, self.split.tasks)]
        return multitask_loss(targets_NT, self.split.tasks, self.task_weights, weights, label_smoothing)

    def items_of(self, batch: NDArray[np.int64]) -> int:
        """Count labels."""
        return count_labels(self.split.targets["train"][batch])

    def choose(self, on: TrialOnWorker) -> dict[str, float]:
        """Score the choosing cells: the means over tasks, and each task's own."""
        logits = predict_role(on, "choose", len(self.split.labels))
        scores = mean_scores(score_tasks(self.split.targets["choose"], logits, self.split.tasks))
        chosen = {f"choosing_{name}": scores[name] for name in ("macro_f1", "accuracy")}
        for task, its in scores["tasks"].items():
            chosen |= {f"choosing_{name}_{task}": its[name] for name in ("macro_f1", "accuracy")}
        return chosen

    def predict(self, on: TrialOnWorker, kept: Path) -> None:
        """Predict choosing and reporting cells, average the classes of every task, and write it all."""
        _predict_labels(on, kept, self.split)


def learn_labels(split: LabelSplit, task_weights: Mapping[str, float]) -> OneLabel | SeveralLabels:
    """Give what is learned of a split, by one label column or by several."""
    return SeveralLabels(split, task_weights) if isinstance(split, TaskSplit) else OneLabel(split)


def _predict_labels(on: TrialOnWorker, kept: Path, split: LabelSplit) -> None:
    on.model = load_classifier(kept, on.vocabulary).to(on.worker.execution.device)
    logits = {role: predict_role(on, role, len(split.labels)) for role in ("choose", "report")}
    states = class_states(kept, split, on.read, on.vocabulary, seed=on.trial.seed, worker=on.worker)
    if on.worker.leads:
        ids = {role: on.table.ids_of(split.rows[role]) for role in logits}
        for role, its in logits.items():
            write_predictions(on.directory, role, ids[role], split.targets[role], its)
        examples = None
        if on.config["examples"]:
            examples = example_cells(split, ids["report"], logits["report"], on.read, seed=on.trial.seed)
        write_class_files(storage.join(on.directory, "model"), states, examples)


def predict_role(on: TrialOnWorker, role: str, classes: int) -> NDArray[np.float32]:
    """Predict a role's cells, shared among the workers: logits on every worker, in row order."""
    share, rows = on.worker.share, on.learned.rows[role]
    mine = rows[share.rank :: share.workers]
    logits = np.empty((len(rows), classes), dtype=np.float32)
    parts = [
        predict_logits(
            on.model, on.read(mine[start : start + CELLS_AT_ONCE]), on.vocabulary.pad_id,
            execution=on.worker.execution,
        )
        for start in range(0, len(mine), CELLS_AT_ONCE)
    ]  # fmt: skip
    for rank, part in enumerate(on.worker.gather(np.concatenate([logits[:0], *parts]))):
        logits[rank :: share.workers] = part
    return logits
