"""Ray Train: a group of data-parallel workers, its progress, its checkpoints, and its errors."""

from __future__ import annotations

import json
import logging
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from geneformer_ray.compute.execution import Execution, choose_execution
from geneformer_ray.compute.training import Share
from geneformer_ray.data import storage
from geneformer_ray.errors import InputError
from geneformer_ray.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from geneformer_ray.compute.training import Optimisation

__all__ = ["Worker", "Workers", "discard_checkpoints", "fit"]

MAX_FAILURES = 3
SECONDS_BETWEEN_POLLS = 0.5
RUNS = "ray_train"


@dataclass(frozen=True)
class Workers:
    """How many workers train, and what each is given."""

    number: int = 1
    cpus: float = 1
    gpu: bool = False


class _Board:
    """Where rank 0 writes how far it is, for the driver to read."""

    def __init__(self) -> None:
        self._done, self._note = 0, ""

    def tell(self, done: int, note: str) -> None:
        self._done, self._note = done, note

    def read(self) -> tuple[int, str]:
        return self._done, self._note


class Worker:
    """What a training function sees of its place in the group.

    Parameters
    ----------
    config
        The configuration that :func:`fit` was given.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        context = ray.train.get_context()
        self.share = Share(context.get_world_rank(), context.get_world_size())
        self.execution: Execution = choose_execution(config["precision"], cpus=config["cpus"], gpu=config["gpu"])
        self._board = config["board"]
        self._told = 0.0

    @property
    def leads(self) -> bool:
        """Whether this worker writes files."""
        return self.share.rank == 0

    def parallel(self, model: nn.Module) -> nn.Module:
        """Wrap a model so that gradients are averaged over the workers."""
        wrapped: nn.Module = ray.train.torch.prepare_model(model)
        return wrapped

    def tell(self, done: int, note: str) -> None:
        """Tell the driver how much is done."""
        if self.leads and time.monotonic() - self._told >= SECONDS_BETWEEN_POLLS:
            self._told = time.monotonic()
            self._board.tell.remote(done, note)

    def gather(self, mine: Any) -> list[Any]:
        """Collect one picklable value of every worker, in rank order, on every worker."""
        if self.share.workers == 1:
            return [mine]
        everyone: list[Any] = [None] * self.share.workers
        torch.distributed.all_gather_object(everyone, mine)
        return everyone

    def save(
        self, state: dict[str, Any], model: nn.Module, optimisation: Optimisation, metrics: dict[str, Any]
    ) -> None:
        """Report an epoch, with a checkpoint from which a restarted group goes on.

        All workers call it; the first one writes.
        """
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if self.leads:
                (Path(folder) / "state.json").write_text(json.dumps(state))
                torch.save({"model": model.state_dict(), **optimisation.state()}, Path(folder) / "training.pt")
                checkpoint = Checkpoint.from_directory(folder)
            name = f"trial-{state['trial']:03d}-epoch-{state['epoch']:04d}"
            ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=name)

    def saved(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Give what the last checkpoint holds, None at the start: the state, and the tensors."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as folder:
            state = json.loads((Path(folder) / "state.json").read_text())
            tensors = torch.load(Path(folder) / "training.pt", map_location="cpu", weights_only=True)
        return state, tensors


def fit(
    train: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    *,
    workers: Workers,
    output: str,
    precision: str,
    total: int,
    what: str,
) -> None:
    """Run a training function on a group of workers, restarting it from its last checkpoint when one dies.

    Parameters
    ----------
    train
        Called with the configuration on every worker.
    config
        Plain values: what is trained on what.
    workers
        The group.
    output
        Its checkpoints lie here while it runs; a rerun with the same output goes on from the last.
    precision
        ``fp32``, ``bf16`` or ``auto``.
    total, what
        Cells to train in all, and a name, for the progress shown.

    Raises
    ------
    InputError
        If a worker met bad input.
    """
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    board = ray.remote(num_cpus=0)(_Board).remote()
    runs = storage.join(output, RUNS)
    trainer = TorchTrainer(
        train,
        train_loop_config={
            **config,
            "precision": precision,
            "cpus": workers.cpus,
            "gpu": workers.gpu,
            "board": board,
        },
        torch_config=TorchConfig(backend="nccl" if workers.gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers.number,
            use_gpu=workers.gpu,
            resources_per_worker={"CPU": workers.cpus, **({"GPU": 1} if workers.gpu else {})},
        ),
        run_config=RunConfig(
            name="run",
            storage_path=runs,
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),  # type: ignore[call-arg]
        ),
    )
    finished = threading.Event()
    watcher = threading.Thread(target=_watch, args=(board, finished, total, what), daemon=True)
    watcher.start()
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _bad_input_in(error) or error from error
    finally:
        finished.set()
        watcher.join()


def discard_checkpoints(output: str) -> None:
    """Delete the checkpoints of a training whose results are safe; until then a rerun goes on from them."""
    filesystem, inside = storage.locate(storage.join(output, RUNS))
    filesystem.delete_dir(inside)


def _watch(board: Any, finished: threading.Event, total: int, what: str) -> None:
    """Show on the driver what rank 0 tells."""
    shown = 0
    with Progress(what, total, "cells") as progress:
        while not finished.wait(SECONDS_BETWEEN_POLLS):
            shown = _show(board, progress, shown)
        _show(board, progress, shown)


def _show(board: Any, progress: Progress, shown: int) -> int:
    try:
        done, note = ray.get(board.read.remote(), timeout=5)
    except ray.exceptions.RayError:
        return shown  # the board is not up yet, or its node is gone: only the display waits
    progress.advance(done - shown, note)
    return int(done)


def _bad_input_in(error: BaseException) -> InputError | None:
    """Find bad input among what the workers raised: it is the user's to mend, not a failure of the run."""
    seen: list[BaseException | None] = [error, *getattr(error, "worker_failures", {}).values()]
    while seen:
        one = seen.pop()
        if isinstance(one, InputError):
            return one
        if one is not None:
            seen += [one.__cause__, getattr(one, "cause", None), getattr(one, "_base_exc", None)]
    return None
