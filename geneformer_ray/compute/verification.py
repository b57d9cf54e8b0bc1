"""How far a first-order screen is to be trusted: its values against exact ones, and the genes to measure exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import pearsonr, spearmanr

from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["LEAST_SPEARMAN", "Agreement", "agreement", "gene_agreement", "genes_to_verify"]

# Below this the order of genes is not the exact engine's any more.
LEAST_SPEARMAN = 0.9


@dataclass(frozen=True)
class Agreement:
    """How well estimates agree with exact values of the same events.

    Parameters
    ----------
    spearman, pearson
        Correlations; not a number where either side does not vary.
    recall
        Which share of the `top` events with the largest exact values, of either sign, is among as many of the largest
        estimates.
    top
        How many these are: fewer than asked for where there are fewer events.
    events
        How many values were compared.
    """

    spearman: float
    pearson: float
    recall: float
    top: int
    events: int

    @property
    def trusted(self) -> bool:
        """Whether the estimates' order can be taken for that of the exact values; not where nobody knows."""
        return self.spearman >= LEAST_SPEARMAN


def agreement(exact_X: NDArray[np.floating], estimate_X: NDArray[np.floating], *, top: int) -> Agreement:
    """Compare estimates with exact values of the same events.

    Raises
    ------
    InputError
        If there are not as many of both, or one is not a finite number.
    """
    exact_X, estimate_X = exact_X.astype(np.float64), estimate_X.astype(np.float64)
    if exact_X.shape != estimate_X.shape or exact_X.ndim != 1:
        raise InputError("estimate", f"shapes {exact_X.shape} and {estimate_X.shape}", "one value for each exact one")
    if not (np.isfinite(exact_X).all() and np.isfinite(estimate_X).all()):
        raise InputError("estimate", "a number that is not finite", "finite numbers on both sides")
    if top < 1:
        raise InputError("--top", top, "at least 1")
    events, top = len(exact_X), min(top, len(exact_X))
    varies = events > 1 and np.ptp(exact_X) > 0 and np.ptp(estimate_X) > 0
    found = np.intersect1d(_largest(exact_X, top), _largest(estimate_X, top))
    return Agreement(
        spearman=float(spearmanr(exact_X, estimate_X)[0]) if varies else math.nan,
        pearson=float(pearsonr(exact_X, estimate_X)[0]) if varies else math.nan,
        recall=len(found) / top if top else math.nan,
        top=top,
        events=events,
    )


def gene_agreement(
    gene_N: NDArray[np.integer], exact_N: NDArray[np.floating], estimate_N: NDArray[np.floating], *, top: int
) -> Agreement:
    """Compare genes' means over their cells, in the cells for which both values are known.

    Parameters
    ----------
    gene_N
        Code of each value's gene, shape (values,).
    exact_N, estimate_N
        The values.
    top
        How many genes are recalled.
    """
    _, code_N = np.unique(np.asarray(gene_N), return_inverse=True)
    cells_G = np.bincount(code_N)
    exact_G, estimate_G = (np.bincount(code_N, weights=value_N) / cells_G for value_N in (exact_N, estimate_N))
    return agreement(exact_G, estimate_G, top=top)


def genes_to_verify(
    gene_N: NDArray[np.integer], estimate_N: NDArray[np.floating], *, top: int, controls: int, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose the genes that are measured exactly once all are estimated.

    Parameters
    ----------
    gene_N
        Token id of each value's gene, shape (values,).
    estimate_N
        Estimated values towards one state, over all cells.
    top
        How many genes with the largest mean over their cells, of either sign.
    controls
        How many of the others, at random: what is chosen for its estimate says nothing of how good estimates are.
    seed
        Draws them.

    Returns
    -------
    top, controls
        Token ids, sorted; shapes (top,) and (controls,), or fewer where there are fewer genes.
    """
    if top < 0 or controls < 0:
        raise InputError("--top", min(top, controls), "no negative number")
    genes, code_N = np.unique(np.asarray(gene_N, dtype=np.int64), return_inverse=True)
    mean_G = np.bincount(code_N, weights=estimate_N, minlength=len(genes)) / np.maximum(1, np.bincount(code_N))
    chosen = _largest(mean_G, min(top, len(genes)))
    others = np.setdiff1d(np.arange(len(genes)), chosen)
    drawn = np.random.default_rng(seed).choice(others, min(controls, len(others)), replace=False)
    return np.sort(genes[chosen]), np.sort(genes[drawn])


def _largest(value_X: NDArray[np.floating], number: int) -> NDArray[np.int64]:
    """Give the places of the largest values of either sign; of equal ones the first."""
    return np.argsort(-np.abs(value_X), kind="stable")[:number]
