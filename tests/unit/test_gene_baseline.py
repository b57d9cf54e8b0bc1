"""The baseline beside gene classifiers: frequency and mean rank, counted cell by cell, and what they can tell apart."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from geneformer_ray.compute.gene_baseline import GeneOccurrence, gene_baseline
from geneformer_ray.data.vocabulary import GeneVocabulary
from tests.conftest import random_cells


@given(lengths=st.lists(st.integers(0, 14), max_size=12), cut=st.integers(0, 12), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_frequency_and_rank_are_counted_as_one_by_one(
    special_vocabulary: GeneVocabulary, lengths: list[int], cut: int, seed: int
) -> None:
    vocabulary = special_vocabulary
    cells = random_cells(vocabulary, np.random.default_rng(seed), lengths)
    found = GeneOccurrence.count([cells[:cut], cells[cut:]], vocabulary)
    assert found.cells == len(cells)
    assert not found.held_V[sorted(vocabulary.special_ids)].any()
    tokens = np.array([vocabulary.tokens[gene] for gene in vocabulary.genes])
    for token, (frequency, rank) in zip(tokens, found.features(tokens), strict=True):
        ranks = []
        for cell in cells:
            genes = cell[1:-1].tolist()  # between <cls> and <eos>
            if token in genes:
                ranks.append(genes.index(token) / len(genes))
        assert found.held_V[token] == len(ranks)
        assert frequency == pytest.approx(len(ranks) / max(1, len(cells)))
        assert rank == pytest.approx(np.mean(ranks) if ranks else 1.0)


def cells_by_class(vocabulary: GeneVocabulary, *, informative: bool) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Cells; genes and their classes. Genes of the second class stand in more cells and further in front, or not."""
    rng = np.random.default_rng(0)
    genes = np.array([vocabulary.tokens[gene] for gene in vocabulary.genes])
    targets = np.arange(len(genes)) % 2
    cells = []
    for _ in range(200):
        weight = rng.normal(size=len(genes)) + (targets * 1.5 if informative else 0)
        cells.append(genes[np.argsort(-weight)[: rng.integers(5, 15)]])
    return cells, genes, targets


@pytest.mark.parametrize(("informative", "low", "high"), [(True, 0.95, 1.0), (False, 0.1, 0.9)])
def test_the_baseline_finds_what_frequency_and_rank_tell(
    vocabulary: GeneVocabulary, informative: bool, low: float, high: float
) -> None:
    cells, genes, targets = cells_by_class(vocabulary, informative=informative)
    features = GeneOccurrence.count([cells], vocabulary).features(genes)
    train = np.arange(len(genes)) % 4 < 2  # both classes on both sides
    odds = gene_baseline(features[train], targets[train], features[~train], 2)
    assert odds.shape == (20, 2)
    np.testing.assert_allclose(odds.sum(axis=1), 1)
    assert low <= roc_auc_score(targets[~train], odds[:, 1]) <= high


def test_a_class_without_training_genes_has_probability_0() -> None:
    rng = np.random.default_rng(0)
    odds = gene_baseline(rng.normal(size=(12, 2)), np.arange(12) % 2 * 2, rng.normal(size=(5, 2)), 4)
    assert odds.shape == (5, 4)
    assert not odds[:, [1, 3]].any() and (odds[:, [0, 2]] > 0).all()


def test_the_scale_of_a_feature_decides_nothing() -> None:
    rng = np.random.default_rng(1)
    train, others, targets = rng.normal(size=(30, 2)), rng.normal(size=(9, 2)), np.arange(30) % 2
    scale = np.array([1e-3, 50.0])
    np.testing.assert_allclose(
        gene_baseline(train, targets, others, 2), gene_baseline(train * scale, targets, others * scale, 2), atol=1e-6
    )
