"""Bootstrap intervals for every gene of a screen at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]
    CodeArray = NDArray[np.int64]

__all__ = ["bootstrap_effect_interval", "bootstrap_mean_interval", "group_codes", "resampling_units"]

INTERVAL = (0.025, 0.975)
# Numbers held at once in the bootstrap: 2**24 float64 are 128 MiB.
BLOCK_NUMBERS = 1 << 24


def bootstrap_effect_interval(
    value_N: FloatArray, gene_N: CodeArray, unit_N: CodeArray, n_genes: int, replicates: int, seed: int
) -> tuple[FloatArray, FloatArray]:
    """95 % percentile bootstrap interval of each gene's effect, over cells or groups of cells.

    Parameters
    ----------
    value_N, gene_N, unit_N
        Values, and the codes of their gene and of the unit that is resampled (cell or group), each of shape
        (N,).
    n_genes
        Number of genes, G.
    replicates
        Number of bootstrap replicates.
    seed
        Seed, not negative. Replicate r draws from a stream of (seed, r), so block sizes do not change the
        result.

    Returns
    -------
    Lower and upper bounds, each of shape (G,). NaN for a gene that fewer than two units have.

    Notes
    -----
    Each replicate draws as many units as there are, with replacement (Efron 1979), and recomputes *every*
    gene's effect from that one draw, the pool's mean and deviation included. A cell that any perturbation
    moves far therefore enters gene and pool together, as it does in the estimate. Replicates that miss a gene
    are left out for that gene. A draw is a vector of weights, so a block of replicates is one sparse product
    (genes x units) @ (units x replicates). Percentile intervals of a handful of units are known to be too
    narrow.
    """
    if not value_N.size:
        return np.full(n_genes, np.nan), np.full(n_genes, np.nan)
    # The effect does not depend on the origin; centred values keep the variance below from cancelling.
    centred_N = value_N - value_N.mean()
    # Count, sum and sum of squares of each unit: all that the pool's mean and deviation need.
    powers = (centred_N**0, centred_N, centred_N**2)
    pool_3U = np.stack([np.bincount(unit_N, weights=power) for power in powers])

    def pool(weight_UR: FloatArray) -> tuple[FloatArray, FloatArray]:
        n_R, sum_R, square_R = pool_3U @ weight_UR
        mean_R = sum_R / n_R
        return mean_R, np.sqrt(np.maximum(square_R / n_R - mean_R**2, 0.0))

    return _intervals(centred_N, gene_N, unit_N, n_genes, replicates, seed, pool)


def bootstrap_mean_interval(
    value_N: FloatArray, gene_N: CodeArray, unit_N: CodeArray, n_genes: int, replicates: int, seed: int
) -> tuple[FloatArray, FloatArray]:
    """95 % percentile bootstrap interval of each gene's mean, over cells or groups of cells.

    Parameters and returned bounds are those of :func:`bootstrap_effect_interval`, and so are the draws.
    """

    def zero_and_one(weight_UR: FloatArray) -> tuple[FloatArray, FloatArray]:
        return np.zeros(weight_UR.shape[1]), np.ones(weight_UR.shape[1])

    return _intervals(value_N, gene_N, unit_N, n_genes, replicates, seed, zero_and_one)


def group_codes(cells: Sequence[str], groups: Mapping[str, str]) -> CodeArray:
    """Give the code of each cell's group, in the groups' sorted order; shape (cells,)."""
    missing = [cell for cell in cells if cell not in groups]
    if missing:
        got = f"no group for {len(missing)} cells, such as {missing[0]}"
        raise InputError("groups", got, "a group for every cell")
    codes, _ = pd.factorize(pd.Series([groups[cell] for cell in cells], dtype=object), sort=True)
    return codes.astype(np.int64)


def resampling_units(cells: Sequence[str], groups: Mapping[str, str] | None) -> CodeArray:
    """Give the code of what a bootstrap draws for each cell: its group, or itself without groups; shape (cells,)."""
    return np.arange(len(cells)) if groups is None else group_codes(cells, groups)


def _intervals(
    value_N: FloatArray,
    gene_N: CodeArray,
    unit_N: CodeArray,
    n_genes: int,
    replicates: int,
    seed: int,
    origin_and_scale: Callable[[FloatArray], tuple[FloatArray, FloatArray]],
) -> tuple[FloatArray, FloatArray]:
    """Give the interval of each gene's (mean - origin) / scale, origin and scale those of the replicate (U, R)."""
    low_G, high_G = np.full(n_genes, np.nan), np.full(n_genes, np.nan)
    n_units = int(unit_N.max()) + 1 if unit_N.size else 0
    if replicates == 0 or n_units < 2:
        return low_G, high_G
    count_GU = sparse.coo_array((np.ones_like(value_N), (gene_N, unit_N)), shape=(n_genes, n_units)).tocsr()
    sum_GU = sparse.coo_array((value_N, (gene_N, unit_N)), shape=(n_genes, n_units)).tocsr()
    genes_step = max(1, BLOCK_NUMBERS // replicates)
    replicates_step = max(1, min(64, BLOCK_NUMBERS // n_units))
    for g in range(0, n_genes, genes_step):
        block = slice(g, min(g + genes_step, n_genes))
        effect_GR = np.empty((block.stop - g, replicates))
        for r in range(0, replicates, replicates_step):
            columns = slice(r, min(r + replicates_step, replicates))
            weight_UR = _resample(n_units, range(r, columns.stop), seed)
            origin_R, scale_R = origin_and_scale(weight_UR)
            with np.errstate(invalid="ignore", divide="ignore"):
                mean_GR = (sum_GU[block] @ weight_UR) / (count_GU[block] @ weight_UR)
                effect_GR[:, columns] = (mean_GR - origin_R) / scale_R
        low_G[block], high_G[block] = _quantiles(effect_GR, INTERVAL)
    alone_G = np.diff(count_GU.indptr) < 2
    low_G[alone_G] = high_G[alone_G] = np.nan
    return low_G, high_G


def _resample(n_units: int, replicates: range, seed: int) -> FloatArray:
    """How often each unit is drawn in each replicate, shape (U, R)."""
    weight_UR = np.empty((n_units, len(replicates)))
    for column, replicate in enumerate(replicates):
        drawn = np.random.default_rng([seed, replicate]).integers(n_units, size=n_units)
        weight_UR[:, column] = np.bincount(drawn, minlength=n_units)
    return weight_UR


def _quantiles(value_GR: FloatArray, quantiles: tuple[float, ...]) -> list[FloatArray]:
    """Linear quantiles along the rows, non-finite values left out; `nanquantile` would loop over the rows."""
    value_GR[~np.isfinite(value_GR)] = np.nan
    value_GR.sort(axis=1)  # NaN sorts to the end
    last_G = np.maximum((~np.isnan(value_GR)).sum(axis=1) - 1, 0)
    result = []
    for quantile in quantiles:
        position_G = quantile * last_G
        below_G = np.floor(position_G).astype(np.int64)
        above_G = np.minimum(below_G + 1, last_G)
        low_G, high_G = (np.take_along_axis(value_GR, i[:, None], axis=1)[:, 0] for i in (below_G, above_G))
        result.append(low_G + (position_G - below_G) * (high_G - low_G))
    return result
