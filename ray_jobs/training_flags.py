"""The flags that every training has."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from geneformer_ray.compute.optimisation import SCHEDULES
from geneformer_ray.distribute.train_workers import Workers
from ray_jobs.command_line import JobConfig

__all__ = ["TrainingConfig"]

OPTIONS = (
    "epochs", "learning_rate", "warmup_fraction", "schedule", "weight_decay", "tokens_per_batch", "accumulate",
)  # fmt: skip


class TrainingConfig(JobConfig):
    """How weights are learned, and on what."""

    filter: dict[str, tuple[str, ...]] = Field(
        {}, description="only cells with one of these values", json_schema_extra={"metavar": "COLUMN=A,B"}
    )
    epochs: int = Field(10, ge=1, description="passes over the training cells")
    learning_rate: float = Field(5e-5, gt=0, description="the highest")
    warmup_fraction: float = Field(0.1, ge=0, le=1, description="share of the steps over which the rate rises")
    weight_decay: float = Field(0.001, ge=0, description="of weights, not of biases and LayerNorm")
    schedule: Literal[SCHEDULES] = Field("linear", description="of the learning rate after the warm-up")  # type: ignore[valid-type]
    tokens_per_batch: int = Field(8192, ge=1, description="padded tokens of a worker's batch")
    accumulate: int = Field(1, ge=1, description="batches a worker sums up in one optimiser step")
    checkpoint_every: int | None = Field(
        None, ge=1, description="optimiser steps between checkpoints (default: one at each epoch's end)"
    )
    num_workers: int = Field(1, ge=1, description="data-parallel workers")
    cpus_per_worker: float = Field(1, gt=0, description="CPUs of each worker")
    gpu: bool = Field(False, description="one GPU a worker")
    precision: Literal["fp32", "bf16", "auto"] = Field("fp32", description="what matrix products are computed in")

    def options(self) -> dict[str, Any]:
        """Give the fields of :class:`TrainingOptions` that are flags of every training."""
        return {name: getattr(self, name) for name in OPTIONS}

    def workers(self) -> Workers:
        """Give the group of workers that trains."""
        return Workers(self.num_workers, self.cpus_per_worker, self.gpu, self.checkpoint_every)
