"""Ray Train from the driver's side: groups of workers, several at once, their progress and their errors."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from geneformer_ray.data import storage
from geneformer_ray.distribute.board import Board
from geneformer_ray.distribute.worker import SECONDS_BETWEEN_POLLS
from geneformer_ray.errors import InputError
from geneformer_ray.progress import Progress, say
from geneformer_ray.run_log import current_run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["TrainingRun", "Workers", "discard_checkpoints", "fit", "fit_all", "runs_at_once"]

MAX_FAILURES = 3
SECONDS_TO_STOP = 10.0
# Less than a cluster gives a stopped job, which docs/cluster.md sets to 60.
SECONDS_TO_SAVE = 40.0
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
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    # On the driver's node, as Ray Train's own controller is: an actor that asks for nothing lies on any node, and with
    # that one would go what every worker asks when its group starts again.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0)(Board).options(scheduling_strategy=here).remote()
    waiting, errors = list(runs), list[BaseException]()
    lock, over = threading.Lock(), threading.Event()

    def work(end: threading.Event) -> None:
        try:
            while not over.is_set():
                with lock:
                    run = waiting.pop(0) if waiting else None
                if run is None:
                    return
                _trainer(train, run, board, workers, output, precision).fit()
        except BaseException as error:  # noqa: BLE001  (the driver's thread raises it)
            errors.append(error)
        finally:
            end.set()

    # Not by Thread.join and is_alive: Python 3.11 takes a thread for ended once a join of it was interrupted.
    ends = [threading.Event() for _ in range(min(len(runs), runs_at_once(workers)))]
    try:
        for end in ends:
            # Of a daemon: a run that cannot be stopped does not keep the process alive.
            threading.Thread(target=work, args=(end,), daemon=True).start()
        _watch(board, ends, errors, sum(run.cells for run in runs), what)
    except KeyboardInterrupt:
        over.set()  # no run that waits begins
        _let_save(board, ends)
        raise
    finally:
        over.set()
        if not all(end.is_set() for end in ends):
            _stop(board, ends)
    if errors:
        raise _bad_input_in(errors[0]) or _os_error_in(errors[0]) or errors[0]


def runs_at_once(workers: Workers) -> int:
    """Say how many groups the connected cluster has room for now; at least one, for which a cluster may grow."""
    resources = ray.cluster_resources()
    room = resources.get("CPU", 0) // (workers.number * workers.cpus)
    if workers.gpu:
        room = min(room, resources.get("GPU", 0) // workers.number)
    return max(1, int(room))


def discard_checkpoints(output: str) -> None:
    """Delete the checkpoints of trainings whose results are safe; until then a rerun goes on from them."""
    storage.remove(storage.join(output, RUNS))


def _trainer(
    train: Callable[[dict[str, Any]], None],
    run: TrainingRun,
    board: Any,
    workers: Workers,
    output: str,
    precision: str,
) -> TorchTrainer:
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
            if bad := _bad_input_in(error):
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


def _watch(board: Any, ends: Sequence[threading.Event], errors: list[BaseException], total: int, what: str) -> None:
    """Show on the driver what the workers tell, until all runs are done or one of them failed."""
    shown = 0
    with Progress(what, total, "cells") as progress:
        while not errors and (running := [end for end in ends if not end.is_set()]):
            running[0].wait(SECONDS_BETWEEN_POLLS)
            shown = _show(board, progress, shown)
        if not errors:
            _show(board, progress, shown)


def _show(board: Any, progress: Progress, shown: int) -> int:
    try:
        done, note, bad_input = ray.get(board.read.remote(), timeout=5)
    except ray.exceptions.RayError:
        return shown  # the board is not up yet, or its node is gone: only the display waits
    if bad_input is not None:
        raise bad_input
    progress.advance(done - shown, note)
    return int(done)


def _let_save(board: Any, ends: Sequence[threading.Event]) -> None:
    """Wait until every run that trains has written a checkpoint; a second interruption ends the wait."""
    say(f"stopping: writing a checkpoint, for {SECONDS_TO_SAVE:.0f} s at most")
    deadline = time.monotonic() + SECONDS_TO_SAVE
    try:
        while not all(end.is_set() for end in ends):
            if not (unsafe := ray.get(board.save.remote(), timeout=SECONDS_TO_STOP)):
                return
            if time.monotonic() > deadline:
                say(f"no checkpoint in time of {', '.join(unsafe)}: the one before counts")
                return
            time.sleep(SECONDS_BETWEEN_POLLS / 5)
    except ray.exceptions.RayError as error:
        say(f"no checkpoint: the cluster is gone ({type(error).__name__})")


def _stop(board: Any, ends: Sequence[threading.Event]) -> None:
    """End the runs that are left."""
    try:
        controllers = ray.get(board.stop.remote(), timeout=SECONDS_TO_STOP)
        aborted = [controller.abort.remote() for controller in controllers]
        # Killed where it does not answer. Not at once: what it holds of the cluster would stay taken.
        _, busy = ray.wait(aborted, num_returns=len(aborted), timeout=SECONDS_TO_STOP) if aborted else ([], [])
        for controller, answer in zip(controllers, aborted, strict=True):
            if answer in busy:
                ray.kill(controller)
    except ray.exceptions.RayError:
        return  # the connection is gone, and with it all that ran
    for end in ends:
        end.wait(SECONDS_TO_STOP)


def _bad_input_in(error: BaseException) -> InputError | None:
    """Find bad input among what the workers raised: it is the user's to mend, not a failure of the run."""
    return next((one for one in _causes(error) if isinstance(one, InputError)), None)


def _os_error_in(error: BaseException) -> OSError | None:
    """Find what a person can mend as well, and the same command then goes on: a full disk, a store out of reach."""
    # Ray's own time-outs are OSErrors as well, and nobody mends them.
    theirs = (TimeoutError, ray.exceptions.RayError)
    found = next((one for one in _causes(error) if isinstance(one, OSError) and not isinstance(one, theirs)), None)
    if found is None:
        return None
    told = OSError(f"in a worker: {type(found).__name__}: {found}")
    told.__cause__ = error
    return told


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Give an error, those of the workers and of the controller that it stands for, and what caused them."""
    failures = getattr(error, "worker_failures", {}).values()
    seen: list[BaseException | None] = [error, getattr(error, "controller_failure", None), *failures]
    while seen:
        one = seen.pop()
        if one is not None:
            yield one
            seen += [one.__cause__, getattr(one, "cause", None), getattr(one, "_base_exc", None)]
