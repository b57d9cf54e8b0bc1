"""What a training function sees of its place in a group of data-parallel workers: share, progress, checkpoints."""

from __future__ import annotations

import json
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointConsistencyMode

from geneformer_ray.compute.execution import Execution, choose_execution
from geneformer_ray.compute.training import Share
from geneformer_ray.distribute.board import Line
from geneformer_ray.distribute.job_metrics import JobMetrics

if TYPE_CHECKING:
    from torch import nn

    from geneformer_ray.compute.optimisation import Optimisation

__all__ = ["SECONDS_BETWEEN_POLLS", "Worker"]

SECONDS_BETWEEN_POLLS = 0.5
# The controller takes note of a checkpoint at its next poll; what is reported within this time may be trained again.
SECONDS_BETWEEN_DURABLE_CHECKPOINTS = 10.0


class Worker:
    """One worker of a group.

    Parameters
    ----------
    config
        The configuration that :func:`geneformer_ray.distribute.train_workers.fit` was given.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        context = ray.train.get_context()
        self.share = Share(context.get_world_rank(), context.get_world_size())
        self.execution: Execution = choose_execution(config["precision"], cpus=config["cpus"], gpu=config["gpu"])
        self.metrics = JobMetrics(config["job_run"])
        self._line = Line(config["board"], config["run"])
        self._checkpoint_every: int | None = config["checkpoint_every"]
        self._told = 0.0
        self._durable = time.monotonic()

    @property
    def leads(self) -> bool:
        """Whether this worker writes files."""
        return self.share.rank == 0

    def parallel(self, model: nn.Module) -> nn.Module:
        """Wrap a model so that gradients are averaged over the workers."""
        wrapped: nn.Module = ray.train.torch.prepare_model(model)
        return wrapped

    def tell(self, done: int, note: str, *, now: bool = False) -> None:
        """Tell the driver how much is done; now and then, unless it has to be `now`."""
        if self.leads and (now or time.monotonic() - self._told >= SECONDS_BETWEEN_POLLS):
            self._told = time.monotonic()
            self._line.tell(done, note)

    def gather(self, mine: Any) -> list[Any]:
        """Collect one picklable value of every worker, in rank order, on every worker."""
        if self.share.workers == 1:
            return [mine]
        everyone: list[Any] = [None] * self.share.workers
        torch.distributed.all_gather_object(everyone, mine)
        return everyone

    def stopping(self) -> bool:
        """Whether the driver was asked to stop; the same answer on every worker, which all of them ask for at a step.

        Nobody waits for the driver: what it says is heard a step or two later.
        """
        heard = self.leads and self._line.asked_to_stop()
        if self.share.workers == 1:
            return heard
        flag = torch.tensor(heard, device=self.execution.device)
        torch.distributed.broadcast(flag, src=0)
        return bool(flag)

    def stop_here(self) -> NoReturn:
        """Say that a checkpoint holds all that was trained, and wait for the end of the group."""
        self.safe()
        threading.Event().wait()
        raise AssertionError

    def safe(self) -> None:
        """Say that a checkpoint holds all that was trained, once the controller knows of it."""
        if self.leads:
            self._await_durable()
            self._line.safe()

    def due(self, steps: int) -> bool:
        """Whether a checkpoint is to be written after so many optimiser steps, beside those at an epoch's end."""
        return self._checkpoint_every is not None and steps % self._checkpoint_every == 0

    def save(
        self, state: dict[str, Any], model: nn.Module, optimisation: Optimisation, metrics: dict[str, Any]
    ) -> None:
        """Write a checkpoint from which a restarted group goes on.

        All workers call it; the first one writes. `state` holds ``epoch`` and ``step``, where it goes on.
        """
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if self.leads:
                (Path(folder) / "state.json").write_text(json.dumps(state))
                torch.save({"model": model.state_dict(), **optimisation.state()}, Path(folder) / "training.pt")
                checkpoint = Checkpoint.from_directory(folder)
            name = f"epoch-{state['epoch']:04d}-step-{state['step']:06d}"
            ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=name)
        if self.leads and time.monotonic() - self._durable >= SECONDS_BETWEEN_DURABLE_CHECKPOINTS:
            self._await_durable()

    def _await_durable(self) -> None:
        """Wait until the controller knows of the last checkpoint, else a crash soon after would lose it."""
        ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)
        self._durable = time.monotonic()

    def saved(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Give what the last checkpoint holds, None at the start: the state, and the tensors."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as folder:
            state = json.loads((Path(folder) / "state.json").read_text())
            tensors = torch.load(Path(folder) / "training.pt", map_location="cpu", weights_only=True)
        return state, tensors
