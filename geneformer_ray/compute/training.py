"""Training steps: optimiser, schedule, and an epoch of cells, the same on one process as on many workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import nn
from transformers import get_scheduler

from geneformer_ray.compute.encoder import attention_mask
from geneformer_ray.data.batching import pad, training_steps
from geneformer_ray.data.vocabulary import gene_mask
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from geneformer_ray.compute.execution import Execution
    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = [
    "SCHEDULES",
    "BatchLoss",
    "Optimisation",
    "Share",
    "StepResult",
    "TrainingOptions",
    "balanced_weights",
    "classifier_loss",
    "drop_genes",
    "planned_steps",
    "train_epoch",
]

# Those of transformers that need nothing beyond the steps.
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)


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
        One of `SCHEDULES`.
    weight_decay
        Of weights; biases and LayerNorm are spared.
    max_grad_norm
        Gradients are clipped to this norm.
    tokens_per_batch
        Padded tokens of one worker's batch.
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


class BatchLoss(Protocol):
    """Computes the summed loss of a batch."""

    def __call__(
        self, model: nn.Module, ids_BL: torch.Tensor, mask_BL: torch.Tensor, batch: NDArray[np.int64]
    ) -> tuple[torch.Tensor, int]:
        """Give the loss summed over the batch's items, and how many of them were predicted right."""
        ...


class Optimisation:
    """AdamW with clipping and a warm-up schedule.

    Parameters
    ----------
    model
        The module whose parameters are learned.
    options
        The training's options.
    total_steps
        Optimiser steps of the whole training.
    """

    def __init__(self, model: nn.Module, options: TrainingOptions, total_steps: int) -> None:
        spared: list[nn.Parameter] = []
        decayed: list[nn.Parameter] = []
        for parameter in model.parameters():
            if parameter.requires_grad:
                # Biases and LayerNorm parameters are vectors; everything else is a matrix.
                (spared if parameter.ndim < 2 else decayed).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": options.weight_decay},
            {"params": spared, "weight_decay": 0.0},
        ]
        self._parameters = [*decayed, *spared]
        self._max_grad_norm = options.max_grad_norm
        self._adamw = torch.optim.AdamW(groups, lr=options.learning_rate, fused=True)
        if options.schedule not in SCHEDULES:
            raise InputError("--schedule", options.schedule, f"one of {', '.join(SCHEDULES)}")
        warmup = round(options.warmup_fraction * total_steps)
        self._schedule = get_scheduler(options.schedule, self._adamw, warmup, total_steps)

    def step(self, loss: torch.Tensor) -> None:
        """Take one step down the gradient of a loss."""
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm)
        self._adamw.step()
        self._schedule.step()
        self._adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """Give what a checkpoint needs to go on."""
        return {"adamw": self._adamw.state_dict(), "schedule": self._schedule.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._adamw.load_state_dict(state["adamw"])
        self._schedule.load_state_dict(state["schedule"])


def planned_steps(lengths: NDArray[np.integer], options: TrainingOptions, workers: int) -> int:
    """Count the optimiser steps of a whole training."""
    return sum(len(_plan(lengths, options, epoch, workers)) for epoch in range(options.epochs))


def _plan(
    lengths: NDArray[np.integer], options: TrainingOptions, epoch: int, workers: int
) -> list[list[NDArray[np.int64]]]:
    return training_steps(
        lengths, seed=options.seed, epoch=epoch, workers=workers, tokens_per_batch=options.tokens_per_batch
    )


def train_epoch(
    model: nn.Module,
    optimisation: Optimisation,
    sequences: Sequence[NDArray[np.integer]],
    loss_of: BatchLoss,
    items_of: Callable[[NDArray[np.int64]], int],
    options: TrainingOptions,
    *,
    epoch: int,
    vocabulary: GeneVocabulary,
    execution: Execution,
    share: Share | None = None,
) -> Iterator[StepResult]:
    """Train one epoch, yielding after every step.

    Parameters
    ----------
    model
        The module, or its data-parallel wrapper, which averages gradients over workers.
    optimisation
        Optimiser and schedule.
    sequences
        Every training cell's token ids: all workers hold the same.
    loss_of
        The summed loss of a batch.
    items_of
        How many items the loss of a batch of these cells counts. Known on every worker for every other's batch, so that
        gradients are weighted by items without a message: each worker's loss is scaled to the mean over all of them.
    options, epoch, share
        Determine the order, with the lengths.
    """
    share = share or Share()
    lengths = np.array([len(ids) for ids in sequences])
    model.train()
    for number, step in enumerate(_plan(lengths, options, epoch, share.workers)):
        mine = step[share.rank]
        # Dropout too is a function of where we are, so that a resumed run draws what an unbroken one would.
        where = (options.seed, epoch, number, share.rank)
        torch.manual_seed(hash(where) % 2**63)
        cells = [sequences[i] for i in mine]
        if options.gene_dropout:
            cells = drop_genes(cells, options.gene_dropout, vocabulary, np.random.default_rng(where))
        ids, real = pad(cells, vocabulary.pad_id)
        ids_BL = torch.from_numpy(ids).to(execution.device)
        mask_BL = attention_mask(torch.from_numpy(real).to(execution.device), ids_BL.shape[1])
        with execution.autocast():
            loss_sum, correct = loss_of(model, ids_BL, mask_BL, mine)
        items = items_of(mine)
        everyone = sum(items_of(batch) for batch in step)
        optimisation.step(loss_sum * (share.workers / everyone))
        yield StepResult(len(mine), float(loss_sum.detach()), items, correct, int(real.sum()), ids.size)


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
