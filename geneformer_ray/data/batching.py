"""Which cells go into which batch: planned ahead, as a pure function of lengths, seed and epoch.

An epoch of more cells than are held at once falls into windows. The table's shards (row groups of its files) are
shuffled, some of them make a window, and inside it cells are shuffled and batched by length. So what a worker holds is
bounded, a file is read in few places at a time, and still every step mixes cells of many places of the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

__all__ = ["Step", "TrainingPlan", "length_batches", "pad", "training_steps"]

# Cells are shuffled whole, then sorted by length inside windows of this many batches: nearly the order of a full
# shuffle, with little padding.
WINDOW_BATCHES = 16
# Tokens of all workers' cells that are shuffled among each other: 64 MB as int32.
WINDOW_TOKENS = 2**24
# A window takes in at least so many shards, so that its cells come from many places; larger shards are cut.
SHARDS_A_WINDOW = 16


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
    lengths: NDArray[np.integer], *, seed: int, epoch: int, workers: int, tokens_per_batch: int, window: int = 0
) -> list[list[NDArray[np.int64]]]:
    """Plan an epoch of data-parallel training, or one window of it.

    Parameters
    ----------
    lengths
        Tokens a cell, shape (cells,).
    seed, epoch, workers, window
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
    rng = np.random.default_rng([seed, epoch, window])
    lengths = np.asarray(lengths)
    shuffled = rng.permutation(len(lengths))
    mean = max(1.0, float(lengths.mean()))
    cells = max(workers, int(WINDOW_BATCHES * workers * tokens_per_batch / mean))
    batches: list[NDArray[np.int64]] = []
    # The last of them takes in what is left over: a few cells alone would not reach every worker.
    for block in np.split(shuffled, range(cells, len(shuffled) - workers + 1, cells)):
        block = block[np.argsort(-lengths[block], kind="stable")]
        # One global batch a step, dealt out in turn: the workers' batches have nearly the same lengths.
        batches += _cut(block, lengths, tokens_per_batch, workers)
    # Shuffled, else every window would run from long cells to short ones.
    return [[batches[i][rank::workers] for rank in range(workers)] for i in rng.permutation(len(batches))]


@dataclass(frozen=True)
class Step:
    """One optimiser step.

    Parameters
    ----------
    epoch, number
        Where it is: the epoch, and the step's number in it.
    batches
        Micro-batch -> worker -> the numbers of its cells.
    """

    epoch: int
    number: int
    batches: list[list[NDArray[np.int64]]]


@dataclass(frozen=True)
class TrainingPlan:
    """The order of a whole training: a pure function of what it is made of, and of epoch and step.

    It holds two numbers a cell; the steps are worked out a window at a time.

    Parameters
    ----------
    lengths
        Tokens a training cell, shape (cells,).
    shards
        Which part of the table each of them lies in: cells of one shard are read together.
    seed, workers, tokens_per_batch
        As for :func:`training_steps`.
    accumulate
        Micro-batches of a step; the last step of a window may have fewer.
    window_tokens
        A window holds about so many tokens, and never fewer than `WINDOW_BATCHES` steps.
    """

    lengths: NDArray[np.integer]
    shards: NDArray[np.integer]
    seed: int
    workers: int
    tokens_per_batch: int
    accumulate: int = 1
    window_tokens: int = WINDOW_TOKENS

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def _parts(self) -> list[NDArray[np.int64]]:
        """Cells of each shard, in order; large shards in pieces, so that a window always mixes several places."""
        if int(self.lengths.sum()) <= self._bound:
            return [np.arange(len(self.lengths))]
        order = np.argsort(self.shards, kind="stable")
        shard, tokens = self.shards[order], np.cumsum(self.lengths[order], dtype=np.int64)
        piece = tokens // max(1, self._bound // SHARDS_A_WINDOW)
        cuts = np.flatnonzero((np.diff(shard) != 0) | (np.diff(piece) != 0)) + 1
        return np.split(order, cuts)

    @cached_property
    def _bound(self) -> int:
        batch = max(self.tokens_per_batch, int(self.lengths.max(initial=0)))
        return max(self.window_tokens, WINDOW_BATCHES * self.workers * batch * self.accumulate)

    def windows(self, epoch: int) -> list[NDArray[np.int64]]:
        """Give an epoch's windows in order, each as the numbers of its parts of the table."""
        parts = self._parts
        if len(parts) == 1:
            return [np.zeros(1, dtype=np.int64)]
        # One number more than a window's own generator takes.
        order = np.random.default_rng([self.seed, epoch, 0, 1]).permutation(len(parts))
        tokens = np.cumsum([int(self.lengths[parts[part]].sum()) for part in order])
        # As many windows as fit, all of about the same size: none is so small that a worker would get no cell.
        number = max(1, int(tokens[-1] // self._bound))
        window = np.maximum(tokens - 1, 0) * number // tokens[-1]
        return np.split(order, np.flatnonzero(np.diff(window)) + 1)

    def window_batches(self, epoch: int, window: int, parts: NDArray[np.int64]) -> list[list[list[NDArray[np.int64]]]]:
        """Give the steps of a window, each as micro-batch -> worker -> the numbers of its cells."""
        cells = np.concatenate([self._parts[part] for part in parts])
        batches = training_steps(
            self.lengths[cells], seed=self.seed, epoch=epoch, workers=self.workers,
            tokens_per_batch=self.tokens_per_batch, window=window,
        )  # fmt: skip
        batches = [[cells[batch] for batch in workers] for workers in batches]
        return [batches[start : start + self.accumulate] for start in range(0, len(batches), self.accumulate)]

    def steps(self, epoch: int, first: int = 0) -> Iterator[Step]:
        """Give an epoch's steps from number `first` on."""
        number = 0
        for window, parts in enumerate(self.windows(epoch)):
            for batches in self.window_batches(epoch, window, parts):
                if number >= first:
                    yield Step(epoch, number, batches)
                number += 1

    def count(self, epoch: int) -> int:
        """Count an epoch's optimiser steps."""
        windows = enumerate(self.windows(epoch))
        return sum(len(self.window_batches(epoch, window, parts)) for window, parts in windows)


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
