"""The driver's side of works that train: their progress, an interruption that loses nothing, and their errors."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from geneformer_ray.distribute.board import Board
from geneformer_ray.distribute.worker import SECONDS_BETWEEN_POLLS
from geneformer_ray.errors import InputError
from geneformer_ray.progress import Progress, say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["Course", "bad_input_in", "new_board", "on_this_node", "supervise"]

SECONDS_TO_STOP = 10.0
# After an error nobody waits by the clock, and a group that is only starting hears nothing until it has started.
SECONDS_TO_END = 60.0
# Less than a cluster gives a stopped job, which docs/cluster.md sets to 60.
SECONDS_TO_SAVE = 40.0


@dataclass(frozen=True)
class Course:
    """How the works of a driver go: whether they are over, and what went wrong.

    Parameters
    ----------
    over
        Set where no run that waits may begin.
    errors
        What was raised. One is enough to end all.
    """

    over: threading.Event = field(default_factory=threading.Event)
    errors: list[BaseException] = field(default_factory=list)


def new_board() -> Any:
    """Start the actor on which runs write how far they are."""
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    # On the driver's node, as Ray Train's own controller is: an actor that asks for nothing lies on any node, and with
    # that one would go what every worker asks when its group starts again.
    return ray.remote(num_cpus=0)(Board).options(scheduling_strategy=on_this_node()).remote()


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """Keep an actor on the node of whoever starts it."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def supervise(board: Any, works: Sequence[Callable[[Course], None]], *, total: int, what: str) -> None:
    """Let works that train runs go on side by side, show what the workers tell, and end all where one fails.

    Parameters
    ----------
    board
        What the runs of these works tell.
    works
        Each begins runs and waits for them.
    total
        Cells to train in all, for the progress shown.
    what
        A name, for the progress shown.

    Raises
    ------
    InputError
        If a worker met bad input. No error of a run leaves another one running.
    """
    course = Course()

    def do(work: Callable[[Course], None], end: threading.Event) -> None:
        try:
            work(course)
        except BaseException as error:  # noqa: BLE001  (the driver's thread raises it)
            course.errors.append(error)
        finally:
            end.set()

    # Not by Thread.join and is_alive: Python 3.11 takes a thread for ended once a join of it was interrupted.
    ends, patience = [threading.Event() for _ in works], SECONDS_TO_END
    try:
        for work, end in zip(works, ends, strict=True):
            # Of a daemon: a run that cannot be stopped does not keep the process alive.
            threading.Thread(target=do, args=(work, end), daemon=True).start()
        _watch(board, ends, course.errors, total, what)
    except KeyboardInterrupt:
        patience = SECONDS_TO_STOP
        course.over.set()  # no run that waits begins
        _let_save(board, ends)
        raise
    finally:
        course.over.set()
        if not all(end.is_set() for end in ends):
            _stop(board, ends, patience)
    if course.errors:
        first = course.errors[0]
        raise bad_input_in(first) or _os_error_in(first) or first


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


def _stop(board: Any, ends: Sequence[threading.Event], patience: float) -> None:
    """End the runs that are left, in about so many seconds."""
    try:
        controllers = ray.get(board.stop.remote(), timeout=SECONDS_TO_STOP)
        aborted = [controller.abort.remote() for controller in controllers]
        # Killed where it does not answer. Not at once: what it holds of the cluster would stay taken.
        _, busy = ray.wait(aborted, num_returns=len(aborted), timeout=patience) if aborted else ([], [])
        for controller, answer in zip(controllers, aborted, strict=True):
            if answer in busy:
                ray.kill(controller)
    except ray.exceptions.RayError:
        return  # the connection is gone, and with it all that ran
    for end in ends:
        end.wait(SECONDS_TO_STOP)


def bad_input_in(error: BaseException) -> InputError | None:
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
