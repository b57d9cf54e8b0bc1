"""Several label columns learned at once: one trunk, one pooling, one head a task.

The loss of a step. A *label* is a cell's class in one task; a cell without a class in a task has no label there. With
``S`` the labels of the step's cells, ``n_t`` the training cells that have a label for task ``t``, ``M`` the sum of all
``n_t``, and task weights ``w_t`` scaled to a sum of 1::

    L(step) = 1 / |S| * sum over (i, t) in S of  w_t * M / n_t * CE_t(i)

Over all training cells, where ``|S|`` is ``M``, that is the sum over tasks of ``w_t`` times the mean cross entropy of
the cells labelled for it. Within a step, labels of a task weigh the same wherever they are: however the step's cells
are cut into batches, and dealt out to workers, the step is the same. (A sum of each task's mean over a batch would give
a label the more weight, the fewer others of its task happen to be in its batch.) With one task, all of it is the mean
cross entropy of a :class:`CellClassifier` over the cells that have a label.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from geneformer_ray.compute import model_directory
from geneformer_ray.compute.classifier import CellClassifier, new_classifier
from geneformer_ray.compute.task_scores import logits_by_task
from geneformer_ray.compute.training import balanced_weights
from geneformer_ray.data.task_splits import UNLABELLED, class_name
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from transformers import BertConfig

    from geneformer_ray.compute.training import BatchLoss
    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = [
    "MultiTaskClassifier",
    "balanced_task_weights",
    "check_task_weights",
    "count_labels",
    "load_classifier",
    "multitask_loss",
    "new_multitask_classifier",
]

Tasks = dict[str, list[str]]


class TaskHeads(nn.ModuleList):
    """One linear layer a task on the same vector, their logits side by side."""

    def forward(self, pooled_BD: torch.Tensor) -> torch.Tensor:
        """Compute the logits of all tasks, shape (batch, classes of all tasks)."""
        return torch.cat([head(pooled_BD) for head in self], dim=1)


class MultiTaskClassifier(CellClassifier):
    """A cell classifier that answers several questions.

    Its logits are those of all tasks side by side; :meth:`by_task` takes them apart. Dense layer, tanh and dropout in
    front of the heads are shared, so that with one task it is a :class:`CellClassifier` in every number.

    ``config.json`` names the tasks with their classes. The heads are named so that no loader of a single classifier can
    take them for its own.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.classifier = TaskHeads(nn.Linear(config.hidden_size, len(labels)) for labels in self.tasks.values())
        self.post_init()

    @property
    def tasks(self) -> Tasks:
        """Task -> class names, in the order of the logits."""
        return {task["name"]: list(task["labels"]) for task in self.config.tasks}

    @property
    def is_stock(self) -> bool:
        """No class of transformers has several heads."""
        return False

    def by_task(self, logits_NC: NDArray[np.floating]) -> dict[str, NDArray[np.floating]]:
        """Take logits apart: task -> shape (cells, the task's classes)."""
        return logits_by_task(logits_NC, self.tasks)

    # ------------------------------------------------------------------ files

    @classmethod
    def load(cls, directory: Path, vocabulary: GeneVocabulary, flag: str = "--model") -> MultiTaskClassifier:
        """Load a classifier of several tasks."""
        config = model_directory.read_config(directory, flag)
        if not _has_tasks(config):
            raise InputError(flag, f"{directory}, which has no tasks", "a classifier of several tasks")
        _check_tasks(config, flag)
        model: MultiTaskClassifier = model_directory.load_weights(cls, directory, config=config).eval()
        return model

    def save(self, directory: Path, vocabulary: GeneVocabulary) -> None:
        """Write a self-contained model directory."""
        model_directory.save_model(self, vocabulary, directory)


def load_classifier(directory: Path, vocabulary: GeneVocabulary, flag: str = "--model") -> CellClassifier:
    """Load a classifier directory, of one task or of several."""
    kind = MultiTaskClassifier if _has_tasks(model_directory.read_config(directory, flag)) else CellClassifier
    return kind.load(directory, vocabulary, flag)


def new_multitask_classifier(
    directory: Path,
    vocabulary: GeneVocabulary,
    tasks: Mapping[str, Sequence[str]],
    pooling: str,
    *,
    attention_dropout: float = 0.0,
) -> tuple[MultiTaskClassifier, GeneVocabulary]:
    """Put fresh heads on a pretrained trunk.

    Parameters
    ----------
    tasks
        Task -> class names, in the order of its logits.
    directory, vocabulary, pooling, attention_dropout
        As for :func:`geneformer_ray.compute.classifier.new_classifier`.

    Returns
    -------
    classifier, vocabulary
        The vocabulary that the classifier uses: extended by ``<cls>`` where that was needed.
    """
    if not tasks:
        raise InputError("--label", "nothing", "one column a task")
    for name, labels in tasks.items():
        if len(labels) < 2:
            raise InputError("--label", f"{name} with {len(labels)} classes", "columns with two or more")
    names = [class_name(task, label) for task, labels in tasks.items() for label in labels]
    # One wide layer, cut into the heads: every other weight is that of a single classifier.
    single, own = new_classifier(directory, vocabulary, names, pooling, attention_dropout=attention_dropout)
    config = single.config
    config.tasks = [{"name": task, "labels": list(labels)} for task, labels in tasks.items()]
    # A frame without weights, which are all put in: drawing random ones for the whole trunk would take seconds.
    with torch.device("meta"):
        model = MultiTaskClassifier(config)
    model.bert, model.dropout = single.bert, single.dropout
    sizes = [len(labels) for labels in tasks.values()]
    weights, biases = (one.detach().split(sizes) for one in (single.classifier.weight, single.classifier.bias))
    for head, weight, bias in zip(model.classifier, weights, biases, strict=True):
        head.weight, head.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
    return model, own


def _has_tasks(config: BertConfig) -> bool:
    # Not by the tasks themselves: whoever puts another head on this trunk may keep them in its configuration.
    return MultiTaskClassifier.__name__ in (config.architectures or [])


def _check_tasks(config: BertConfig, flag: str) -> None:
    tasks = getattr(config, "tasks", None)
    try:
        numbers = [len(task["labels"]) for task in tasks or ()]
        names = {task["name"] for task in tasks or ()}
    except (KeyError, TypeError) as error:
        raise InputError(flag, f"config.json with the tasks {tasks}", "a list of name and labels") from error
    if not tasks or len(names) < len(numbers) or sum(numbers) != config.num_labels:
        takes = f"tasks of different names with {config.num_labels} labels in all"
        raise InputError(flag, f"config.json with the tasks {tasks}", takes)


# ---------------------------------------------------------------------- loss


def count_labels(targets_NT: NDArray[np.int64]) -> int:
    """Count the labels that some cells have, in all tasks: the items of :func:`multitask_loss`."""
    return int((targets_NT != UNLABELLED).sum())


def balanced_task_weights(targets_NT: NDArray[np.int64], tasks: Mapping[str, Sequence[str]]) -> list[torch.Tensor]:
    """Weigh the classes of each task so that all of a task's count the same; one of shape (classes,) a task."""
    return [
        balanced_weights(targets[targets != UNLABELLED], len(labels))
        for targets, labels in zip(targets_NT.T, tasks.values(), strict=True)
    ]


def multitask_loss(
    targets_NT: NDArray[np.int64],
    tasks: Mapping[str, Sequence[str]],
    task_weights: Mapping[str, float] | None = None,
    class_weights: Sequence[torch.Tensor] | None = None,
    label_smoothing: float = 0.0,
) -> BatchLoss:
    """Give the loss at the top of this module, summed over the labels of a batch: as many as :func:`count_labels` says.

    Parameters
    ----------
    targets_NT
        Class number of every training cell in every task, :data:`UNLABELLED` where it has none; shape (cells, tasks).
    tasks
        Task -> class names.
    task_weights
        Task -> its weight, 1 where it is not named. Only how they compare counts.
    class_weights
        Weights of each task's classes, on the device; None weighs all cells the same.
    label_smoothing
        Share of the target spread evenly over a task's classes.
    """
    labelled_T = (targets_NT != UNLABELLED).sum(axis=0)
    for name, count in zip(tasks, labelled_T, strict=True):
        if not count:
            raise InputError("--label", f"{name} without a labelled cell to train", "columns with labelled cells")
    weights_T = check_task_weights(task_weights or {}, tasks)
    scale_T = weights_T / weights_T.sum() * (labelled_T.sum() / labelled_T)
    sizes = [len(labels) for labels in tasks.values()]

    def loss_of(
        model: nn.Module, ids_BL: torch.Tensor, mask_BL: torch.Tensor, batch: NDArray[np.int64]
    ) -> tuple[torch.Tensor, int]:
        target_BT = torch.from_numpy(targets_NT[batch]).to(ids_BL.device)
        logits_BC = model(ids_BL, mask_BL).float()
        loss, right = logits_BC.new_zeros(()), 0
        for number, logits in enumerate(logits_BC.split(sizes, dim=1)):
            target_B = target_BT[:, number]
            entropy = nn.functional.cross_entropy(
                logits, target_B, weight=None if class_weights is None else class_weights[number],
                reduction="sum", ignore_index=UNLABELLED, label_smoothing=label_smoothing,
            )  # fmt: skip
            loss = loss + float(scale_T[number]) * entropy
            right += int((logits.argmax(dim=1) == target_B).sum())
        return loss, right

    return loss_of


def check_task_weights(given: Mapping[str, float], tasks: Iterable[str]) -> NDArray[np.float64]:
    """Give every task's weight, in the order of the tasks, or refuse those that are of no task, or no weight."""
    names = list(tasks)
    for name, weight in given.items():
        if name not in names:
            raise InputError("--task-weights", name, f"weights of {', '.join(names)}")
        if not 0 < weight < float("inf"):
            raise InputError("--task-weights", f"{name}={weight}", "weights above 0")
    return np.array([given.get(name, 1.0) for name in names], dtype=np.float64)
