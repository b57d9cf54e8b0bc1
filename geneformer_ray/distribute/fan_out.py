"""Independent pieces of work over a pool of Ray Data actors, each of which holds its model once."""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import ray
import ray.data

from geneformer_ray.distribute.job_metrics import JobMetrics
from geneformer_ray.errors import InputError
from geneformer_ray.run_log import Run, current_run

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["ItemWorker", "Pool", "fan_out"]

COUNTED = ("cells", "events", "tokens")
BAD_INPUT, OS_ERROR = "bad input", "os error"
# A pipeline's bookkeeping grows with its items: a long run is done by several, one after another, so that driver and
# object store hold no more of a million items than of so many. Its actors are started anew, which takes seconds.
ITEMS_A_PIPELINE = 4_096


class ItemWorker(Protocol):
    """Does one piece of work at a time; made once an actor."""

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Do one piece; both what comes in and what goes out are plain JSON values.

        ``cells``, ``events`` and ``tokens`` of what goes out are counted in Ray's metrics.
        """
        ...


class Pool:
    """How many actors, and what each is given.

    Parameters
    ----------
    smallest, largest
        Bounds of the pool; an autoscaling cluster grows and shrinks with it.
    cpus, gpus
        Of each actor; GPUs may be fractions.
    """

    def __init__(self, smallest: int, largest: int, *, cpus: float = 1, gpus: float = 0) -> None:
        self.smallest, self.largest, self.cpus, self.gpus = smallest, max(smallest, largest), cpus, gpus

    @classmethod
    def of_cluster(
        cls,
        *,
        model: bool,
        smallest: int | None = None,
        largest: int | None = None,
        gpus: float | None = None,
    ) -> Pool:
        """Use the whole cluster: one actor a GPU for a model where there are GPUs, else one a CPU.

        Parameters
        ----------
        model
            Whether the actors hold a model, which computes on a GPU where there is one.
        smallest, largest
            Bounds of the pool; by default what the cluster has room for.
        gpus
            Of each actor; by default one where there are GPUs. A part of one lets several share it.

        Raises
        ------
        InputError
            If a cluster that does not grow has no room for as many as are asked for: they would wait for ever.
        """
        resources = ray.cluster_resources()
        there = float(resources.get("GPU", 0)) if model else 0.0
        gpus = (1.0 if there else 0.0) if gpus is None else gpus
        grows = "RAY_ADDRESS" in os.environ
        room = int(there / gpus + 1e-6) if gpus else int(resources.get("CPU", 0))
        if not grows and (room < 1 or (smallest or 1) > room):
            got = f"{smallest or 1} of {gpus:g} GPUs each"
            raise InputError("--min-workers, --gpus-per-worker", got, f"at most {room}, what this machine has room for")
        # A cluster of others may grow with what is asked for, from no worker at all: as many actors as there are items.
        # One of our own does not: start all of it at once.
        most = min(largest or sys.maxsize, sys.maxsize if grows else room)
        return cls(smallest or (1 if grows else most), most, gpus=gpus)

    def execution(self) -> dict[str, Any]:
        """Say what each actor's model may use, as :class:`ModelRunner` takes it."""
        return {"cpus": self.cpus, "gpu": self.gpus > 0}


class _Actor:
    """Adapts a worker to Ray Data: one row in, one row out, both JSON."""

    def __init__(self, kind: type[ItemWorker], options: dict[str, Any], cpus: float, run: Run) -> None:
        _limit_threads(cpus)
        self._metrics = JobMetrics(run)
        self._refused: InputError | None = None
        try:
            self._worker = kind(**options)
        except InputError as error:
            self._refused = error

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        return {"result": [json.dumps(self._answer(json.loads(text))) for text in batch["item"]]}

    def _answer(self, item: dict[str, Any]) -> dict[str, Any]:
        # What a person can mend is told as an answer: Ray Data would wrap the exception in a trace, and try again.
        try:
            if self._refused is not None:
                raise self._refused
            answer = self._worker(item)
            self._metrics.count(**{name: answer[name] for name in COUNTED if name in answer})
            return answer
        except InputError as error:
            return {BAD_INPUT: [error.field, str(error.got), error.takes]}
        except OSError as error:
            return {OS_ERROR: f"{type(error).__name__}: {error}"}


def fan_out(
    kind: type[ItemWorker], options: dict[str, Any], items: Iterable[dict[str, Any]], pool: Pool
) -> Iterator[dict[str, Any]]:
    """Do every item once, yielding results as they come, in any order.

    Parameters
    ----------
    kind, options
        The worker's class and what it is made with; paths in `options` must be reachable from every node.
    items
        Plain JSON values that say what to do: row numbers of a shared table, not the rows themselves. They are taken
        some thousands at a time.
    pool
        The actors. No more are started than there are items.

    Raises
    ------
    InputError
        If a worker met bad input in an item.
    OSError
        If a worker could not read or write: a full disk, a store that does not answer.
    """
    _quiet()
    waiting = iter(items)
    while some := list(itertools.islice(waiting, ITEMS_A_PIPELINE)):
        yield from _pipeline(kind, options, some, pool)


def _pipeline(
    kind: type[ItemWorker], options: dict[str, Any], items: list[dict[str, Any]], pool: Pool
) -> Iterator[dict[str, Any]]:
    """Do some items with actors of their own."""
    # One block an item: an actor that is free takes the next, and a result is seen as soon as it is there.
    dataset = ray.data.from_items([{"item": json.dumps(item)} for item in items], override_num_blocks=len(items))
    largest = min(pool.largest, len(items))
    results = dataset.map_batches(
        _Actor,
        fn_constructor_kwargs={"kind": kind, "options": options, "cpus": pool.cpus, "run": current_run()},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=min(pool.smallest, largest), max_size=largest),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus or None,
    )
    for row in results.iter_rows():
        answer = json.loads(row["result"])
        if BAD_INPUT in answer:
            raise InputError(*answer[BAD_INPUT])
        if OS_ERROR in answer:
            raise OSError(f"in a worker: {answer[OS_ERROR]}")
        yield answer


def _limit_threads(cpus: float) -> None:
    """Set an actor's threads to the CPUs it was given; torch costs seconds to import, and not every worker needs it."""
    pa.set_cpu_count(max(1, int(cpus)))
    os.environ["OMP_NUM_THREADS"] = str(max(1, int(cpus)))
    if "torch" in sys.modules:
        from geneformer_ray.compute.execution import use_threads

        use_threads(cpus)


def _quiet() -> None:
    """Leave progress to our own: Ray Data's bars fill a log file."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
