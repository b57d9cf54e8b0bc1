"""Normalised expression and its medians, held to slow and obvious references."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy import sparse

from geneformer_ray.data.expression import expressed_values, non_zero_medians
from geneformer_ray.data.median_sketch import MedianSketch

Pairs = list[tuple[int, float]]
COLUMNS = [f"G{number}" for number in range(6)]
count_matrices = hnp.arrays(np.int64, st.tuples(st.integers(1, 6), st.just(len(COLUMNS))), elements=st.integers(0, 5))


def slow_values(dense: NDArray[np.float64], totals: list[float], gene_of_column: list[int]) -> list[Pairs]:
    cells: list[Pairs] = []
    for row, total in zip(dense.tolist(), totals, strict=True):
        sums: dict[int, float] = {}
        for gene, count in zip(gene_of_column, row, strict=True):
            if gene >= 0:
                sums[gene] = sums.get(gene, 0.0) + count
        cells.append([(gene, sums[gene] / total * 10_000) for gene in sorted(sums) if sums[gene] != 0])
    return cells


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=5),
    st.lists(st.integers(-1, 3), min_size=6, max_size=6),
    st.sampled_from([np.float32, np.float64, np.int32, np.uint16]),
)
def test_columns_of_a_gene_are_summed_and_zeros_are_no_expression(
    rows: list[list[int]], gene_of_column: list[int], dtype: type
) -> None:
    dense = np.array(rows, dtype=np.float64)
    totals = [7.0 + number for number in range(len(rows))]
    matrix = sparse.csr_array(dense.astype(dtype))
    genes, values = expressed_values(matrix, np.array(totals), np.array(gene_of_column), 4)
    expected = sorted(pair for cell in slow_values(dense, totals, gene_of_column) for pair in cell)
    assert sorted(zip(genes.tolist(), values.tolist(), strict=True)) == expected


def test_entries_stored_in_pieces_out_of_order_or_as_zeros() -> None:
    # One cell: column 2 in two pieces, column 0 behind it, column 1 an explicit zero.
    stored = (np.array([1, 0, 2, 3], np.float32), np.array([2, 1, 2, 0]), np.array([0, 4, 4]))
    matrix = sparse.csr_array(stored, shape=(2, 3))
    genes, values = expressed_values(matrix, np.array([6.0, 0.0]), np.array([0, 1, 2]), 3)
    assert sorted(zip(genes.tolist(), values.tolist(), strict=True)) == [(0, 3 / 6 * 10_000), (2, 3 / 6 * 10_000)]


def test_files_without_a_gene_that_is_wanted_have_no_values() -> None:
    genes, values = expressed_values(sparse.csr_array(np.ones((2, 2))), np.ones(2), np.array([-1, -1]), 3)
    assert (len(genes), len(values)) == (0, 0)
    MedianSketch(3).add(genes, values)


@settings(max_examples=50)
@given(counts=count_matrices, min_cells=st.integers(1, 4))
def test_non_zero_medians_equal_numpy_gene_by_gene(counts: NDArray[np.int64], min_cells: int) -> None:
    totals = counts.sum(axis=1) + 1.0
    medians = non_zero_medians(sparse.csr_array(counts), totals, COLUMNS, min_cells=min_cells)
    for column, gene in enumerate(COLUMNS):
        expressed = counts[:, column] > 0
        if expressed.sum() < min_cells:
            assert gene not in medians
        else:
            values = counts[expressed, column] / totals[expressed] * 10_000
            assert medians[gene] == pytest.approx(np.median(values), rel=1e-12)


def test_non_zero_medians_pass_over_explicit_zeros_and_leave_the_counts_alone() -> None:
    counts = sparse.csr_array((np.array([0.0, 4.0, 2.0]), (np.array([0, 1, 2]), np.zeros(3, int))), shape=(3, 1))
    assert non_zero_medians(counts, np.array([1.0, 1.0, 1.0]), ["A"]) == {"A": 30_000.0}
    assert counts.data.tolist() == [0.0, 4.0, 2.0]
