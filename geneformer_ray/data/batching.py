"""Which cells go into which batch: planned ahead, as a pure function of lengths, seed and epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["length_batches", "pad", "training_steps"]

# Cells are shuffled whole, then sorted by length inside windows of this many batches: nearly the order of a full
# shuffle, with little padding.
WINDOW_BATCHES = 16


def pad(sequences: Sequence[NDArray[np.integer]], pad_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Put sequences of different lengths into one array.

    Returns
    -------
    ids, lengths
        int64 of shape (batch, longest), padded behind with `pad_id`; int64 of shape (batch,).
    """
    lengths = np.array([len(ids) for ids in sequences], dtype=np.int64)
    ids_BL = np.full((len(sequences), int(lengths.max(initial=0))), pad_id, dtype=np.int64)
    for row, ids in enumerate(sequences):
        ids_BL[row, : len(ids)] = ids
    return ids_BL, lengths


def length_batches(lengths: NDArray[np.integer], tokens_per_batch: int) -> list[NDArray[np.int64]]:
    """Cut cells into batches of like length, longest first, none over a budget of padded tokens.

    Parameters
    ----------
    lengths
        Tokens a cell, shape (cells,).
    tokens_per_batch
        A batch's cells times its longest cell stay within this; a single longer cell is a batch of its own.

    Returns
    -------
    list of int64 arrays
        Indices into `lengths`; every cell once.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return _cut(order, np.asarray(lengths), tokens_per_batch)


def training_steps(
    lengths: NDArray[np.integer], *, seed: int, epoch: int, workers: int, tokens_per_batch: int
) -> list[list[NDArray[np.int64]]]:
    """Plan an epoch of data-parallel training.

    Parameters
    ----------
    lengths
        Tokens a cell, shape (cells,).
    seed, epoch, workers
        The plan is a pure function of these and the lengths, so a resumed run sees the same order.
    tokens_per_batch
        Padded tokens of one worker's batch. It is passed only by a cell that is longer alone, and where too few cells
        are left to give every worker one.

    Returns
    -------
    list of steps
        A step holds one array of indices a worker. Every cell is in exactly one step, and every worker has at least
        one cell in every step, given at least as many cells as workers.
    """
    if len(lengths) < workers:
        raise InputError("--num-workers", f"{workers} for {len(lengths)} training cells", "at most one worker a cell")
    rng = np.random.default_rng([seed, epoch])
    lengths = np.asarray(lengths)
    shuffled = rng.permutation(len(lengths))
    mean = max(1.0, float(lengths.mean()))
    window = max(workers, int(WINDOW_BATCHES * workers * tokens_per_batch / mean))
    batches: list[NDArray[np.int64]] = []
    # The last window takes in what is left over: a few cells alone would not reach every worker.
    for block in np.split(shuffled, range(window, len(shuffled) - workers + 1, window)):
        block = block[np.argsort(-lengths[block], kind="stable")]
        # One global batch a step, dealt out in turn: the workers' batches have nearly the same lengths.
        batches += _cut(block, lengths, tokens_per_batch, workers)
    # Shuffled, else every window would run from long cells to short ones.
    return [[batches[i][rank::workers] for rank in range(workers)] for i in rng.permutation(len(batches))]


def _cut(
    order: NDArray[np.int64], lengths: NDArray[np.integer], tokens: int, workers: int = 1
) -> list[NDArray[np.int64]]:
    """Cut an order of falling lengths into runs whose padded size stays within each worker's budget."""
    batches, start = [], 0
    while start < len(order):
        size = workers * max(1, tokens // max(1, int(lengths[order[start]])))
        missing = workers - (len(order) - start - size)
        if 0 < missing < workers:
            # The next run would leave a worker without a cell: hand it some of these, or take it in.
            size += workers - missing if size < workers + missing else -missing
        batches.append(order[start : start + size].astype(np.int64))
        start += size
    return batches
