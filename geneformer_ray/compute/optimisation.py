"""The optimiser: AdamW, clipping and the schedule of the learning rate, as one thing that can be saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import get_scheduler

from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from geneformer_ray.compute.training import TrainingOptions

__all__ = ["SCHEDULES", "Optimisation"]

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


class Optimisation:
    """AdamW with clipping and a warm-up schedule. Frozen parameters are no part of it.

    Parameters
    ----------
    model
        The module; those of its parameters that need a gradient are learned.
    options
        The training's options.
    total_steps
        Optimiser steps of the whole training.
    undecayed
        Matrices that weight decay spares too.
    """

    def __init__(
        self, model: nn.Module, options: TrainingOptions, total_steps: int, undecayed: Sequence[nn.Parameter] = ()
    ) -> None:
        # By identity: == compares the numbers in them.
        exempt = {id(parameter) for parameter in undecayed}
        spared: list[nn.Parameter] = []
        decayed: list[nn.Parameter] = []
        for parameter in model.parameters():
            if parameter.requires_grad:
                # Biases and LayerNorm parameters are vectors; everything else is a matrix.
                (spared if parameter.ndim < 2 or id(parameter) in exempt else decayed).append(parameter)
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

    def step(self) -> None:
        """Take one step down the gradients that the parameters hold, and clear them."""
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
