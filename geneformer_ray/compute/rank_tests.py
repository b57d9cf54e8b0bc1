"""Rank tests of every gene at once: one sort for all of them, and sums by gene."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

if TYPE_CHECKING:
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]
    CodeArray = NDArray[np.int64]

__all__ = [
    "benjamini_hochberg",
    "mean_per_gene",
    "rank_sum_against_pool",
    "rank_sum_per_gene",
    "signed_rank_per_gene",
]

# Up to so many differences the signed-rank statistic's distribution is counted out, as scipy does.
EXACT_UP_TO = 50


def rank_sum_against_pool(value_N: FloatArray, gene_N: CodeArray, n_genes: int) -> FloatArray:
    """Test each gene's values against the pool of all values, for all genes with one sort.

    Parameters
    ----------
    value_N
        Values, shape (N,).
    gene_N
        Code of the gene of each value, shape (N,), from 0 to n_genes - 1.
    n_genes
        Number of genes, G.

    Returns
    -------
    p-values, shape (G,): what `scipy.stats.ranksums(value_N, values of the gene)` gives, i.e. the two-sided
    normal approximation with average ranks and without a correction for ties or continuity. NaN for a gene
    without values.

    Notes
    -----
    With n values in the pool and m of the gene, a value's average rank among all n + m is its average rank in
    the pool minus 1/2, plus its average rank among the m; the latter sum to m(m + 1)/2, whatever the ties. So
    the Mann-Whitney statistic U is the sum of (rank in the pool - 1/2) over the gene's values, its mean is
    nm/2 and its variance nm(n + m + 1)/12.
    """
    n = value_N.size
    rank_N = np.asarray(stats.rankdata(value_N), dtype=np.float64)
    m_G = np.bincount(gene_N, minlength=n_genes).astype(np.float64)
    u_G = np.bincount(gene_N, weights=rank_N - 0.5, minlength=n_genes)
    with np.errstate(invalid="ignore", divide="ignore"):
        z_G = (u_G - n * m_G / 2) / np.sqrt(n * m_G * (n + m_G + 1) / 12)
    return _two_sided(z_G)


def rank_sum_per_gene(
    value_N: FloatArray, gene_N: CodeArray, other_M: FloatArray, other_gene_M: CodeArray, n_genes: int
) -> FloatArray:
    """Test each gene's values against other values of the same gene, for all genes with one sort.

    Parameters
    ----------
    value_N, gene_N
        Values and the codes of their genes, each of shape (N,).
    other_M, other_gene_M
        The other values and the codes of their genes, each of shape (M,).
    n_genes
        Number of genes, G.

    Returns
    -------
    p-values, shape (G,): what `scipy.stats.ranksums(values of the gene, other values of the gene)` gives. NaN for a
    gene that lacks either.
    """
    gene = np.concatenate([gene_N, other_gene_M])
    rank, _ = _ranks_within_genes(np.concatenate([value_N, other_M]), gene, n_genes)
    n_G = np.bincount(gene_N, minlength=n_genes).astype(np.float64)
    m_G = np.bincount(other_gene_M, minlength=n_genes).astype(np.float64)
    sum_G = np.bincount(gene_N, weights=rank[: value_N.size], minlength=n_genes)
    with np.errstate(invalid="ignore", divide="ignore"):
        z_G = (sum_G - n_G * (n_G + m_G + 1) / 2) / np.sqrt(n_G * m_G * (n_G + m_G + 1) / 12)
    return _two_sided(z_G)


def signed_rank_per_gene(difference_N: FloatArray, gene_N: CodeArray, n_genes: int) -> FloatArray:
    """Test whether each gene's differences lie around zero: the Wilcoxon signed-rank test, two-sided.

    Parameters
    ----------
    difference_N
        Differences, shape (N,).
    gene_N
        Code of the gene of each, shape (N,).
    n_genes
        Number of genes, G.

    Returns
    -------
    p-values, shape (G,). Differences of zero are left out (Wilcoxon 1945). With 50 differences or fewer, none of them
    zero or tied, the p-value is exact: `scipy.stats.wilcoxon(method="exact")`. Otherwise it is the normal
    approximation with a correction for ties, and none for continuity. 1 where all differences are zero, NaN for a
    gene without any.
    """
    n_all_G = np.bincount(gene_N, minlength=n_genes)
    other = difference_N != 0
    difference, gene = difference_N[other], gene_N[other]
    rank, ties_G = _ranks_within_genes(np.abs(difference), gene, n_genes)
    n_G = np.bincount(gene, minlength=n_genes)
    up_G = np.bincount(gene, weights=rank * (difference > 0), minlength=n_genes)
    with np.errstate(invalid="ignore", divide="ignore"):
        variance_G = (n_G * (n_G + 1.0) * (2 * n_G + 1) - ties_G / 2) / 24
        p_G = _two_sided((up_G - n_G * (n_G + 1) / 4) / np.sqrt(variance_G))
    exact_G = (n_G > 0) & (n_G <= EXACT_UP_TO) & (ties_G == 0) & (n_G == n_all_G)
    if exact_G.any():
        n, up = n_G[exact_G], up_G[exact_G].astype(np.int64)
        below = _signed_rank_distribution()
        p_G[exact_G] = np.minimum(1.0, 2 * np.minimum(below[n, up], below[n, n * (n + 1) // 2 - up]))
    p_G[(n_G == 0) & (n_all_G > 0)] = 1.0
    return p_G


def benjamini_hochberg(p_G: FloatArray) -> FloatArray:
    """Adjust p-values for the false discovery rate (Benjamini and Hochberg 1995); NaN stays NaN."""
    fdr_G = np.full(p_G.shape, np.nan)
    tested = ~np.isnan(p_G)
    if tested.any():
        fdr_G[tested] = stats.false_discovery_control(p_G[tested], method="bh")
    return fdr_G


def mean_per_gene(value_N: FloatArray, gene_N: CodeArray, n_genes: int) -> FloatArray:
    """Average the values of each gene, shape (G,); NaN for a gene without values."""
    with np.errstate(invalid="ignore"):
        return np.asarray(
            np.bincount(gene_N, weights=value_N, minlength=n_genes) / np.bincount(gene_N, minlength=n_genes)
        )


def _two_sided(z_G: FloatArray) -> FloatArray:
    return np.asarray(2 * stats.norm.sf(np.abs(z_G)), dtype=np.float64)


def _ranks_within_genes(value_N: FloatArray, gene_N: CodeArray, n_genes: int) -> tuple[FloatArray, FloatArray]:
    """Rank each value among its gene's, ties averaged, shape (N,); and the sum of t^3 - t over each gene's ties."""
    order_N = np.lexsort((value_N, gene_N))
    value, gene = value_N[order_N], gene_N[order_N]
    new_gene = np.ones(gene.size, dtype=bool)
    new_gene[1:] = gene[1:] != gene[:-1]
    new_run = new_gene.copy()
    new_run[1:] |= value[1:] != value[:-1]
    start_R = np.flatnonzero(new_run)
    length_R = np.diff(np.append(start_R, gene.size))
    gene_start_R = np.flatnonzero(new_gene)[np.cumsum(new_gene)[start_R] - 1]
    rank_N = np.empty(gene.size)
    rank_N[order_N] = np.repeat(start_R - gene_start_R + (length_R + 1) / 2, length_R)
    ties_R = length_R.astype(np.float64) ** 3 - length_R
    ties_G = np.bincount(gene[start_R], weights=ties_R, minlength=n_genes)
    return rank_N, np.asarray(ties_G, dtype=np.float64)


@functools.cache
def _signed_rank_distribution() -> FloatArray:
    """Probability that the sum of the positive ranks of n untied differences is at most w, at [n, w]."""
    largest = EXACT_UP_TO * (EXACT_UP_TO + 1) // 2
    ways = np.zeros((EXACT_UP_TO + 1, largest + 1))  # of 2^n choices of signs: exact in float64
    ways[0, 0] = 1
    for n in range(1, EXACT_UP_TO + 1):
        ways[n] = ways[n - 1]
        ways[n, n:] += ways[n - 1, :-n]
    return np.asarray(np.cumsum(ways, axis=1) / 2.0 ** np.arange(EXACT_UP_TO + 1)[:, None])
