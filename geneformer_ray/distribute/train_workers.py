"""Ray Train from the driver's side: groups of workers, several at once, their progress and their errors."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from geneformer_ray.data import storage
from geneformer_ray.distribute.supervision import bad_input_in, new_board, supervise
from geneformer_ray.run_log import current_run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from geneformer_ray.distribute.supervision import Course

__all__ = ["TrainingRun", "Workers", "discard_checkpoints", "fit", "fit_all", "runs_at_once", "trainer"]

MAX_FAILURES = 3
RUNS = "ray_train"


@dataclass(frozen=True)
class Workers:
    """How many workers train, and what each is given.

    Parameters
    ----------
    number, cpus, gpu
        Of one group: its workers, the CPUs of each, and whether each has a GPU.
    checkpoint_every
        Optimiser steps between checkpoints beside those at an epoch's end; None writes no others.
    """

    number: int = 1
    cpus: float = 1
    gpu: bool = False
    checkpoint_every: int | None = None


@dataclass(frozen=True)
class TrainingRun:
    """One training: a group of workers and a directory of checkpoints of its own.

    Parameters
    ----------
    name
        Its name among the runs of an output.
    config
        Plain values and arrays: what is trained on what.
    cells
        Cells to train in all, for the progress shown.
    """

    name: str
    config: dict[str, Any]
    cells: int


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
    """Run a training function on one group of workers; as :func:`fit_all` does with many."""
    fit_all(train, [TrainingRun("run", config, total)], workers=workers, output=output, precision=precision, what=what)


def fit_all(
    train: Callable[[dict[str, Any]], None],
    runs: Sequence[TrainingRun],
    *,
    workers: Workers,
    output: str,
    precision: str,
    what: str,
) -> None:
    """Run a training function for every configuration, as many at once as the cluster has room for.

    Each run has a group of workers, which starts again from its last checkpoint when one of them dies.

    Parameters
    ----------
    train
        Called with a run's configuration on each of its workers.
    runs
        What is trained.
    workers
        Each run's group.
    output
        Checkpoints lie here while they are needed; a rerun with the same output goes on from the last.
    precision
        ``fp32``, ``bf16`` or ``auto``.
    what
        A name, for the progress shown.

    Raises
    ------
    InputError
        If a worker met bad input. No error of a run leaves another one running.
    """
    board, waiting, lock = new_board(), list(runs), threading.Lock()

    def work(course: Course) -> None:
        while not course.over.is_set():
            with lock:
                run = waiting.pop(0) if waiting else None
            if run is None:
                return
            trainer(train, run, board, workers, output, precision).fit()

    works = [work] * min(len(runs), runs_at_once(workers))
    supervise(board, works, total=sum(run.cells for run in runs), what=what)


def runs_at_once(workers: Workers) -> int:
    """Say how many groups the connected cluster has room for now; at least one, for which a cluster may grow."""
    resources = ray.cluster_resources()
    room = resources.get("CPU", 0) // (workers.number * workers.cpus)
    if workers.gpu:
        room = min(room, resources.get("GPU", 0) // workers.number)
    return max(1, int(room))


def discard_checkpoints(output: str, run: str | None = None) -> None:
    """Delete the checkpoints of trainings whose results are safe; until then a rerun goes on from them.

    Parameters
    ----------
    output
        As for :func:`fit_all`.
    run
        The name of the one whose results are safe; None for all.
    """
    storage.remove(storage.join(output, RUNS, *([] if run is None else [run])))


def trainer(
    train: Callable[[dict[str, Any]], None],
    run: TrainingRun,
    board: Any,
    workers: Workers,
    output: str,
    precision: str,
) -> TorchTrainer:
    """Prepare one run on a group of workers, which tell the board; the rest as for :func:`fit_all`."""

    def train_and_tell(config: dict[str, Any]) -> None:
        from ray.train.v2._internal.execution.context import get_train_context

        # No public name. It ends its workers, also those that wait for each other, and gives back what they held.
        controller = get_train_context().controller_actor
        if not ray.get(board.join.remote(run.name, controller)):
            controller.abort.remote()
            threading.Event().wait()
        try:
            train(config)
        except Exception as error:
            # Told at once: Ray Train would first start the group again, as if a machine had failed.
            if bad := bad_input_in(error):
                ray.get(board.refuse.remote(bad))
            raise

    return TorchTrainer(
        train_and_tell,
        train_loop_config={
            **run.config,
            "precision": precision,
            "cpus": workers.cpus,
            "gpu": workers.gpu,
            "checkpoint_every": workers.checkpoint_every,
            "board": board,
            "run": run.name,
            "job_run": current_run(),
        },
        torch_config=TorchConfig(backend="nccl" if workers.gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers.number,
            use_gpu=workers.gpu,
            resources_per_worker={"CPU": workers.cpus, **({"GPU": 1} if workers.gpu else {})},
        ),
        run_config=RunConfig(
            name=run.name,
            # Of its own, so that going on does not depend on how many ran at once.
            storage_path=storage.join(output, RUNS),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),  # type: ignore[call-arg]
        ),
    )
