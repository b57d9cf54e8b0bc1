"""Bootstrap of classifiers' scores over cells, the same draw for every classifier: their differences stay paired."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]
    CodeArray = NDArray[np.int64]

__all__ = ["bootstrap_scores", "draw_cells", "percentile_interval", "weighted_scores"]

INTERVAL = (0.025, 0.975)
# Numbers of one block of draws: 2**24 float64 are 128 MiB.
BLOCK_NUMBERS = 1 << 24


def draw_cells(group_N: CodeArray, replicates: range, seed: int) -> FloatArray:
    """Draw cells with replacement, within groups that are drawn with replacement first.

    Parameters
    ----------
    group_N
        Code of each cell's group, from 0 on, shape (N,). Of a single group only cells are drawn.
    replicates
        Numbers of the draws. Draw r is a stream of (seed, r) of its own, whatever else is drawn.
    seed
        Not negative.

    Returns
    -------
    How often each cell is drawn in each replicate, shape (N, R). As many groups are drawn as there are, and from each
    drawn group as many cells as it has: cells of one donor are alike, so that cells alone would promise too much.
    """
    sizes = np.bincount(group_N)
    cells_of = np.split(np.argsort(group_N, kind="stable"), np.cumsum(sizes)[:-1])
    weight_NR = np.zeros((len(group_N), len(replicates)))
    for column, replicate in enumerate(replicates):
        rng = np.random.default_rng([seed, replicate])
        for group in rng.integers(len(sizes), size=len(sizes)) if len(sizes) > 1 else (0,):
            drawn = rng.integers(sizes[group], size=sizes[group])
            weight_NR[cells_of[group], column] += np.bincount(drawn, minlength=sizes[group])
    return weight_NR


def weighted_scores(target_N: CodeArray, predicted_N: CodeArray, classes: int, weight_NR: FloatArray) -> FloatArray:
    """Score one classifier's predictions under each column of weights.

    Returns
    -------
    Shape (2 + classes, R): macro F1 over the classes that a column holds, accuracy, and the F1 of every class, NaN
    where a column does not hold it. A column without cells is NaN. With weights 1 these are the numbers of
    :func:`geneformer_ray.compute.scores.score`.
    """
    cells = np.arange(len(target_N))
    shape = (classes, len(target_N))
    true_CN = sparse.csr_array((np.ones(len(cells)), (target_N, cells)), shape=shape)
    said_CN = sparse.csr_array((np.ones(len(cells)), (predicted_N, cells)), shape=shape)
    right_N = (target_N == predicted_N).astype(float)
    right_CN = sparse.csr_array((right_N, (target_N, cells)), shape=shape)
    true_CR, said_CR, right_CR = (matrix @ weight_NR for matrix in (true_CN, said_CN, right_CN))
    with np.errstate(invalid="ignore", divide="ignore"):
        f1_CR = np.where(true_CR > 0, 2 * right_CR / (true_CR + said_CR), np.nan)
        present_R = (true_CR > 0).sum(axis=0)
        macro_R = np.nansum(f1_CR, axis=0) / np.where(present_R > 0, present_R, np.nan)
        accuracy_R = right_CR.sum(axis=0) / true_CR.sum(axis=0)
    return np.vstack([macro_R, accuracy_R, f1_CR])


def bootstrap_scores(
    cell_TN: Sequence[CodeArray],
    target_TN: Sequence[CodeArray],
    predicted_TN: Sequence[CodeArray],
    group_N: CodeArray,
    classes: int,
    *,
    replicates: int,
    seed: int,
) -> FloatArray:
    """Score every classifier on the same draws of cells.

    Parameters
    ----------
    cell_TN, target_TN, predicted_TN
        For each of the T classifiers: which cells it was scored on (codes below N; folds have cells of their own), and
        their true and predicted classes.
    group_N
        Code of each cell's group, shape (N,).
    classes
        Number of classes, C.
    replicates, seed
        Of the draws.

    Returns
    -------
    Shape (T, 2 + C, R), as :func:`weighted_scores` gives them.
    """
    result = np.empty((len(cell_TN), 2 + classes, replicates))
    step = max(1, min(replicates, BLOCK_NUMBERS // max(1, len(group_N))))
    for start in range(0, replicates, step):
        block = slice(start, min(start + step, replicates))
        weight_NR = draw_cells(group_N, range(start, block.stop), seed)
        for number, (cells, targets, predicted) in enumerate(zip(cell_TN, target_TN, predicted_TN, strict=True)):
            result[number, :, block] = weighted_scores(targets, predicted, classes, weight_NR[cells])
    return result


def percentile_interval(value_R: FloatArray) -> tuple[float, float]:
    """Give the 95 % percentile interval (Efron 1979) of bootstrap values; those that are NaN are left out."""
    finite = value_R[np.isfinite(value_R)]
    if not len(finite):
        return float("nan"), float("nan")
    low, high = np.quantile(finite, INTERVAL)
    return float(low), float(high)
