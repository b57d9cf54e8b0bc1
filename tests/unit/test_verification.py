"""Estimates against exact values, by correlations written out and by counting."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geneformer_ray.compute.verification import agreement, gene_agreement, genes_to_verify
from geneformer_ray.errors import InputError


def test_agreement_by_hand() -> None:
    exact = np.array([0.9, -0.8, 0.1, 0.0, -0.2])
    estimate = np.array([0.5, -0.1, 0.2, 0.0, -0.3])
    found = agreement(exact, estimate, top=2)
    # Ranks 5 1 4 3 2 and 5 2 4 3 1: the squares of their differences sum to 2.
    assert found.spearman == pytest.approx(1 - 6 * 2 / (5 * 24))
    a, b = exact - exact.mean(), estimate - estimate.mean()
    assert found.pearson == pytest.approx(float(a @ b / math.sqrt(float(a @ a) * float(b @ b))))
    assert (found.recall, found.top, found.events) == (0.5, 2, 5)  # of both signs: 0.9 and -0.8 against 0.5 and -0.3


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=30, unique_by=abs), st.integers(1, 40))
def test_the_same_values_agree(values: list[int], top: int) -> None:
    found = agreement(np.array(values), 3.0 * np.array(values), top=top)
    assert found.spearman == pytest.approx(1)
    assert found.pearson == pytest.approx(1)
    assert found.recall == 1
    assert found.trusted
    assert found.top == min(top, len(values))
    assert not agreement(np.array(values), -1.0 * np.array(values), top=top).trusted


def test_what_does_not_vary_is_not_trusted() -> None:
    for exact, estimate in ([1.0, 1.0], [1.0, 2.0]), ([1.0, 2.0], [0.0, 0.0]), ([1.0], [1.0]):
        found = agreement(np.array(exact), np.array(estimate), top=1)
        assert math.isnan(found.spearman)
        assert not found.trusted


@pytest.mark.parametrize(
    ("exact", "estimate", "top", "text"),
    [([1.0, 2.0], [1.0], 1, "one value for each"), ([1.0], [math.nan], 1, "not finite"), ([1.0], [1.0], 0, "--top")],
)
def test_values_that_do_not_compare(exact: list[float], estimate: list[float], top: int, text: str) -> None:
    with pytest.raises(InputError, match=text):
        agreement(np.array(exact), np.array(estimate), top=top)


def test_genes_are_compared_by_their_means() -> None:
    gene = np.array([7, 3, 7, 3, 5])
    exact, estimate = np.array([1.0, 5.0, 3.0, -3.0, 0.5]), np.array([4.0, 1.0, 0.0, 1.0, -9.0])
    ours = gene_agreement(gene, exact, estimate, top=1)
    by_gene = agreement(np.array([1.0, 0.5, 2.0]), np.array([1.0, -9.0, 2.0]), top=1)
    assert ours == by_gene
    assert ours.recall == 0


def test_the_strongest_of_both_signs_and_a_random_control() -> None:
    gene = np.repeat(np.arange(100, 140), 2)
    value = np.repeat(np.linspace(-1, 0.9, 40), 2) + np.tile([0.3, -0.3], 40)
    top, controls = genes_to_verify(gene, value, top=4, controls=10)
    assert top.tolist() == [100, 101, 102, 139]
    assert len(controls) == 10
    assert not set(controls) & set(top)
    assert genes_to_verify(gene, value, top=4, controls=10)[1].tolist() == controls.tolist()
    assert genes_to_verify(gene, value, top=4, controls=10, seed=1)[1].tolist() != controls.tolist()
    top, controls = genes_to_verify(gene[:4], value[:4], top=1, controls=9)
    assert (top.tolist(), controls.tolist()) == ([100], [101])
    with pytest.raises(InputError, match="--top"):
        genes_to_verify(gene, value, top=-1, controls=0)
