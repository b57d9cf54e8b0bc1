"""Rank tests of all genes at once equal scipy's, gene by gene."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from geneformer_ray.compute.rank_tests import (
    benjamini_hochberg,
    mean_per_gene,
    rank_sum_against_pool,
    rank_sum_per_gene,
    signed_rank_per_gene,
)

GENES = 5
Pairs = list[tuple[int, float]]
# Few distinct values, so that ties and zeros are the rule; and values that hardly ever tie.
tied = st.lists(st.tuples(st.integers(0, GENES - 1), st.integers(-3, 3).map(float)), max_size=40)
spread_out = st.lists(st.tuples(st.integers(0, GENES - 1), st.floats(-1, 1, width=32)), max_size=40)
some_pairs = st.one_of(tied, spread_out)


def arrays(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    return np.array([value for _, value in pairs], dtype=np.float64), np.array([g for g, _ in pairs], dtype=np.int64)


@settings(deadline=None, max_examples=60)
@given(some_pairs.filter(len))
def test_rank_sum_against_the_pool_equals_scipy(pairs: Pairs) -> None:
    value, gene = arrays(pairs)
    p = rank_sum_against_pool(value, gene, GENES)
    for code in range(GENES):
        own = value[gene == code]
        if own.size:
            assert p[code] == pytest.approx(stats.ranksums(value, own).pvalue, rel=1e-12)
        else:
            assert np.isnan(p[code])


@settings(deadline=None, max_examples=60)
@given(some_pairs, some_pairs)
def test_rank_sum_of_two_screens_equals_scipy(pairs: Pairs, others: Pairs) -> None:
    (value, gene), (other, other_gene) = arrays(pairs), arrays(others)
    p = rank_sum_per_gene(value, gene, other, other_gene, GENES)
    for code in range(GENES):
        mine, theirs = value[gene == code], other[other_gene == code]
        if mine.size and theirs.size:
            assert p[code] == pytest.approx(stats.ranksums(mine, theirs).pvalue, rel=1e-12)
        else:
            assert np.isnan(p[code])
    np.testing.assert_allclose(rank_sum_per_gene(other, other_gene, value, gene, GENES), p, rtol=1e-9)


@settings(deadline=None, max_examples=100)
@given(some_pairs)
@example([(0, float(i + 1)) for i in range(50)])
@example([(0, float(i - 9)) for i in range(60)])
@example([(0, float(i) + 0.5) for i in range(-20, 31)])
def test_signed_rank_equals_scipy(pairs: Pairs) -> None:
    value, gene = arrays(pairs)
    p = signed_rank_per_gene(value, gene, GENES)
    for code in range(GENES):
        own = value[gene == code]
        if not own.size:
            assert np.isnan(p[code])
        elif not own.any():
            assert p[code] == 1
        else:
            size = np.abs(own)
            exact = own.size <= 50 and own.all() and np.unique(size).size == size.size
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # scipy finds small samples too small for a normal distribution
                expected = stats.wilcoxon(own, method="exact" if exact else "asymptotic").pvalue
            assert p[code] == pytest.approx(expected, rel=1e-10)


@given(some_pairs)
def test_means_equal_a_loop(pairs: Pairs) -> None:
    value, gene = arrays(pairs)
    found = mean_per_gene(value, gene, GENES)
    for code in range(GENES):
        own = value[gene == code]
        assert np.isnan(found[code]) if not own.size else found[code] == pytest.approx(own.mean(), abs=1e-12)


@given(st.lists(st.floats(0, 1, allow_subnormal=False), min_size=1, max_size=50))
def test_benjamini_hochberg_equals_statsmodels(p: list[float]) -> None:
    expected = multipletests(p, method="fdr_bh")[1]
    np.testing.assert_allclose(benjamini_hochberg(np.array(p)), expected, rtol=1e-12)
    with_gap = benjamini_hochberg(np.array([np.nan, *p]))
    assert np.isnan(with_gap[0])
    np.testing.assert_allclose(with_gap[1:], expected, rtol=1e-12)
