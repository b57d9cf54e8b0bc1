"""Bootstrap intervals for every gene of a screen at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]
    CodeArray = NDArray[np.int64]

__all__ = ["bootstrap_effect_interval"]

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
    low_G, high_G = np.full(n_genes, np.nan), np.full(n_genes, np.nan)
    n_units = int(unit_N.max()) + 1 if unit_N.size else 0
    if replicates == 0 or n_units < 2:
        return low_G, high_G
    # The effect does not depend on the origin; centred values keep the variance below from cancelling.
    centred_N = value_N - value_N.mean()
    count_GU = sparse.coo_array((np.ones_like(centred_N), (gene_N, unit_N)), shape=(n_genes, n_units)).tocsr()
    sum_GU = sparse.coo_array((centred_N, (gene_N, unit_N)), shape=(n_genes, n_units)).tocsr()
    # Count, sum and sum of squares of each unit: all that the pool's mean and deviation need.
    powers = (centred_N**0, centred_N, centred_N**2)
    pool_3U = np.stack([np.bincount(unit_N, weights=power, minlength=n_units) for power in powers])

    genes_step = max(1, BLOCK_NUMBERS // replicates)
    replicates_step = max(1, min(64, BLOCK_NUMBERS // n_units))
    for g in range(0, n_genes, genes_step):
        block = slice(g, min(g + genes_step, n_genes))
        effect_GR = np.empty((block.stop - g, replicates))
        for r in range(0, replicates, replicates_step):
            columns = slice(r, min(r + replicates_step, replicates))
            weight_UR = _resample(n_units, range(r, columns.stop), seed)
            n_R, sum_R, square_R = pool_3U @ weight_UR
            mean_R = sum_R / n_R
            spread_R = np.sqrt(np.maximum(square_R / n_R - mean_R**2, 0.0))
            with np.errstate(invalid="ignore", divide="ignore"):
                mean_GR = (sum_GU[block] @ weight_UR) / (count_GU[block] @ weight_UR)
                effect_GR[:, columns] = (mean_GR - mean_R) / spread_R
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
