"""Training steps: what is learned from a step's cells, the same on one process as on many workers."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from geneformer_ray.compute.encoder import attention_mask
from geneformer_ray.data.batching import TrainingPlan, pad
from geneformer_ray.data.vocabulary import gene_mask

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from geneformer_ray.compute.execution import Execution
    from geneformer_ray.compute.optimisation import Optimisation
    from geneformer_ray.data.batching import Step
    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = [
    "BatchLoss",
    "Share",
    "StepResult",
    "TrainingOptions",
    "balanced_weights",
    "classifier_loss",
    "drop_genes",
    "train_step",
    "training_plan",
]


@dataclass(frozen=True)
class TrainingOptions:
    """What a training is made of.

    Parameters
    ----------
    epochs
        Passes over the training cells.
    learning_rate
        The highest, reached after the warm-up.
    warmup_fraction
        The share of all steps over which the rate rises.
    schedule
        One of :data:`geneformer_ray.compute.optimisation.SCHEDULES`.
    weight_decay
        Of weights; biases and LayerNorm are spared.
    max_grad_norm
        Gradients are clipped to this norm.
    tokens_per_batch
        Padded tokens of one worker's batch.
    accumulate
        Micro-batches of one optimiser step: as many times the cells for the same memory.
    gene_dropout
        Share of a cell's genes left out of a training step, drawn anew each time; the others keep their order, so all
        behind a gap move up. It keeps a small model from learning single genes by heart.
    seed
        Of initial weights, order and dropout.
    """

    epochs: int
    learning_rate: float
    warmup_fraction: float = 0.1
    schedule: str = "linear"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    tokens_per_batch: int = 4096
    accumulate: int = 1
    gene_dropout: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Share:
    """One worker's part of a data-parallel training: its rank among `workers`."""

    rank: int = 0
    workers: int = 1


@dataclass(frozen=True)
class StepResult:
    """One worker's sums over a step: cells, loss, items that the loss counts, and how many of them were right."""

    cells: int
    loss_sum: float
    items: int
    correct: int
    tokens: int
    padded_tokens: int

    def __add__(self, other: StepResult) -> StepResult:
        return StepResult(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


class BatchLoss(Protocol):
    """Computes the summed loss of a batch."""

    def __call__(
        self, model: nn.Module, ids_BL: torch.Tensor, mask_BL: torch.Tensor, batch: NDArray[np.int64]
    ) -> tuple[torch.Tensor, int]:
        """Give the loss summed over the batch's items, and how many of them were predicted right."""
        ...


def training_plan(
    lengths: NDArray[np.integer], shards: NDArray[np.integer], options: TrainingOptions, workers: int
) -> TrainingPlan:
    """Plan a training from its cells' lengths and the parts of the table that they lie in, both of shape (cells,)."""
    return TrainingPlan(
        lengths, shards, seed=options.seed, workers=workers,
        tokens_per_batch=options.tokens_per_batch, accumulate=options.accumulate,
    )  # fmt: skip


def train_step(
    model: nn.Module,
    optimisation: Optimisation,
    step: Step,
    sequences: Sequence[Sequence[NDArray[np.integer]]],
    loss_of: BatchLoss,
    items_of: Callable[[NDArray[np.int64]], int],
    options: TrainingOptions,
    *,
    vocabulary: GeneVocabulary,
    execution: Execution,
    share: Share | None = None,
) -> StepResult:
    """Take one optimiser step.

    Parameters
    ----------
    model
        The module, or its data-parallel wrapper, which averages gradients over workers.
    optimisation
        Optimiser and schedule.
    step
        Which cells every worker has in every micro-batch.
    sequences
        Token ids of this worker's cells, for each micro-batch.
    loss_of
        The summed loss of a batch.
    items_of
        How many items the loss of a batch of these cells counts. Known on every worker for every other's batch, so that
        gradients are weighted by items without a message: each loss is scaled to the mean over the whole step.
    options, share
        Determine what is dropped, with the step's place.
    """
    share = share or Share()
    model.train()
    everyone = max(1, sum(items_of(batch) for workers in step.batches for batch in workers))
    total = StepResult(0, 0.0, 0, 0, 0, 0)
    for micro, (workers, cells) in enumerate(zip(step.batches, sequences, strict=True)):
        mine = workers[share.rank]
        # Dropout too is a function of where we are, so that a resumed run draws what an unbroken one would.
        where = (options.seed, step.epoch, step.number * options.accumulate + micro, share.rank)
        torch.manual_seed(hash(where) % 2**63)
        if options.gene_dropout:
            cells = drop_genes(cells, options.gene_dropout, vocabulary, np.random.default_rng(where))
        ids, real = pad(cells, vocabulary.pad_id)
        ids_BL = torch.from_numpy(ids).to(execution.device)
        mask_BL = attention_mask(torch.from_numpy(real).to(execution.device), ids_BL.shape[1])
        # Gradients add up on each worker; only the last micro-batch sends them round.
        last = micro == len(step.batches) - 1
        alone = model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()
        with alone:
            with execution.autocast():
                loss_sum, correct = loss_of(model, ids_BL, mask_BL, mine)
            (loss_sum * (share.workers / everyone)).backward()
        items = items_of(mine)
        total += StepResult(len(mine), float(loss_sum.detach()), items, correct, int(real.sum()), ids.size)
    optimisation.step()
    return total


def drop_genes(
    sequences: Sequence[NDArray[np.integer]], share: float, vocabulary: GeneVocabulary, rng: np.random.Generator
) -> list[NDArray[np.integer]]:
    """Leave out a random share of each cell's genes; special tokens and the order of the others stay."""
    dropped = []
    for ids in sequences:
        genes = np.flatnonzero(gene_mask(vocabulary, ids))
        gone = rng.choice(genes, min(max(0, len(genes) - 1), round(share * len(genes))), replace=False)
        dropped.append(np.delete(ids, gone))
    return dropped


def balanced_weights(targets: NDArray[np.int64], classes: int) -> torch.Tensor:
    """Weigh each class by cells / (classes * the class's cells), so that all count the same; shape (classes,)."""
    counts = np.bincount(targets, minlength=classes)
    return torch.from_numpy((len(targets) / (classes * counts)).astype(np.float32))


def classifier_loss(
    targets: NDArray[np.int64], class_weights: torch.Tensor | None = None, label_smoothing: float = 0.0
) -> BatchLoss:
    """Give the summed cross entropy of a cell classifier.

    Parameters
    ----------
    targets
        Class number of every training cell, shape (cells,).
    class_weights
        Weight of each class, shape (classes,); None weighs all cells the same.
    label_smoothing
        Share of the target spread evenly over all classes.
    """

    def loss_of(
        model: nn.Module, ids_BL: torch.Tensor, mask_BL: torch.Tensor, batch: NDArray[np.int64]
    ) -> tuple[torch.Tensor, int]:
        target_B = torch.from_numpy(targets[batch]).to(ids_BL.device)
        logits_BC = model(ids_BL, mask_BL).float()
        loss = nn.functional.cross_entropy(
            logits_BC, target_B, weight=class_weights, reduction="sum", label_smoothing=label_smoothing
        )
        return loss, int((logits_BC.argmax(dim=1) == target_B).sum())

    return loss_of
