"""Cells for training, read ahead by Ray Data in the order of a plan, a window at a time."""

from __future__ import annotations

import functools
import itertools
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from geneformer_ray.data import storage
from geneformer_ray.data.cells import CellTable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from geneformer_ray.data.batching import Step, TrainingPlan

__all__ = ["shards_of", "stream_cells"]

# A pipeline's bookkeeping grows with its windows: a long training is read by several, one after another.
WINDOWS_A_PIPELINE = 512
# Windows that may wait in the object store: the next one, while the present one is trained on.
WINDOWS_AHEAD = 2
BYTES_A_TOKEN = 4
LEAST_HELD_BYTES = 16 * 2**20
# What a block of Ray Data holds at most, so that training can start before a whole window has been read.
CELLS_A_BLOCK = 2_048
ROWS_A_SHARD = 4_096

Sequences = list[list["NDArray[np.int32]"]]


def shards_of(table: CellTable, rows: NDArray[np.int64]) -> NDArray[np.int32]:
    """Say which part of the table each row lies in: row groups of its files, shape (cells,)."""
    if not table.files:
        return (rows // ROWS_A_SHARD).astype(np.int32)
    sizes: list[int] = []
    for file in table.files:
        filesystem, inside = storage.locate(file)
        metadata = pq.read_metadata(inside, filesystem=filesystem)
        sizes += [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    return np.searchsorted(np.cumsum(sizes), rows, side="right").astype(np.int32)


def stream_cells(
    cells: str, rows: NDArray[np.int64], plan: TrainingPlan, *, rank: int, epochs: int, first: tuple[int, int] = (0, 0)
) -> Iterator[tuple[Step, Sequences]]:
    """Give the steps of a training, each with one worker's cells, as one stream over all epochs.

    While a window is trained on, a task of Ray Data reads the next one. It takes no CPU of the cluster's count: the
    workers may hold all of them, and wait for it.

    Parameters
    ----------
    cells
        The table of tokenised cells.
    rows
        Row numbers of the training cells, in the order that the plan numbers them, shape (cells,).
    plan
        Which cells are in which step.
    rank
        Whose cells are read.
    epochs
        Passes over the training cells.
    first
        Epoch and step to start with; what is before it is not read.

    Yields
    ------
    step, sequences
        Token ids as they are in the table, for each micro-batch a list of int32 arrays.
    """
    source = ray.put((plan, rows))
    windows = _windows(plan, epochs, first)
    pipelines = iter(lambda: list(itertools.islice(windows, WINDOWS_A_PIPELINE)), [])
    ids = itertools.chain.from_iterable(_read(cells, source, rank, some, _held_bytes(plan)) for some in pipelines)
    for epoch in range(first[0], epochs):
        for step in plan.steps(epoch, first[1] if epoch == first[0] else 0):
            yield step, [[next(ids) for _ in workers[rank]] for workers in step.batches]


def _windows(plan: TrainingPlan, epochs: int, first: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """Say what each task reads: a window, and how many of its steps are done already."""
    for epoch in range(first[0], epochs):
        before = first[1] if epoch == first[0] else 0
        for window, parts in enumerate(plan.windows(epoch)):
            steps = len(plan.window_batches(epoch, window, parts)) if before else 1
            if before < steps:
                yield {"epoch": epoch, "window": window, "parts": parts, "done": before}
            before = max(0, before - steps)


def _held_bytes(plan: TrainingPlan) -> int:
    """Bound what waits in the object store; a window of all workers' cells is split among them."""
    window = min(int(plan.lengths.sum()), 2 * plan.window_tokens)
    return WINDOWS_AHEAD * max(LEAST_HELD_BYTES, BYTES_A_TOKEN * window // plan.workers)


def _read(
    cells: str, source: ray.ObjectRef[Any], rank: int, windows: list[dict[str, Any]], held_bytes: int
) -> Iterator[NDArray[np.int32]]:
    """Run one pipeline over windows, giving one cell after another."""

    def read(batch: Any) -> Iterator[Any]:
        for item in batch["item"]:
            yield from _read_window(cells, source, rank, **item)

    _quiet()
    dataset = ray.data.from_items([{"item": item} for item in windows], override_num_blocks=len(windows))
    context = dataset.context
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ray.data.ExecutionResources(object_store_memory=held_bytes)
    tables = dataset.map_batches(
        read, batch_size=None, num_cpus=0, compute=ray.data.TaskPoolStrategy(size=1)
    ).iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)
    for table in tables:
        lists = pa.table(table)["input_ids"].combine_chunks()
        flat, ends = lists.flatten().to_numpy(), np.cumsum(lists.value_lengths().to_numpy())
        yield from np.split(flat, ends[:-1])


def _read_window(
    cells: str, source: ray.ObjectRef[Any], rank: int, epoch: int, window: int, parts: NDArray[np.int64], done: int
) -> Iterator[pa.Table]:
    """Read one worker's cells of a window, in the order of its steps; runs in a task."""
    plan, rows = ray.get(source)  # shared memory: no copy a task
    steps = plan.window_batches(epoch, window, parts)[done:]
    mine = np.concatenate([workers[rank] for batches in steps for workers in batches])
    input_ids = _open(cells).read(rows[mine]).input_ids
    for start in range(0, len(input_ids), CELLS_A_BLOCK):
        some = input_ids[start : start + CELLS_A_BLOCK]
        offsets = np.cumsum([0, *map(len, some)], dtype=np.int32)
        yield pa.table({"input_ids": pa.ListArray.from_arrays(offsets, np.concatenate(some))})


@functools.lru_cache(maxsize=1)
def _open(cells: str) -> CellTable:
    """Open a table once a process: tasks of one pipeline run in few processes."""
    return CellTable(cells)


def _quiet() -> None:
    """Leave progress to our own: Ray Data's bars fill a log file."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
