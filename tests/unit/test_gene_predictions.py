"""Predictions of genes: every occurrence once, in bounded blocks, and the mean over cells."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.compute.gene_classifier import GeneClassifier, new_gene_classifier
from geneformer_ray.compute.gene_predictions import GenePredictions, Occurrences, predict_occurrences
from geneformer_ray.data.vocabulary import GeneVocabulary
from tests.conftest import random_cells, randomise
from tests.reference import Cell

EXECUTION = choose_execution(cpus=1)
LABELS = ["insensitive", "sensitive", "unclear"]


@pytest.fixture(scope="module")
def model(special_model_directory: Path) -> GeneClassifier:
    torch.manual_seed(1)
    model = new_gene_classifier(special_model_directory, LABELS)
    randomise(model.classifier, 0.5)
    return model.eval()


def genes_of(vocabulary: GeneVocabulary, number: int) -> np.ndarray:
    return np.random.default_rng(5).permutation([vocabulary.tokens[gene] for gene in vocabulary.genes])[:number]


def predict(
    model: GeneClassifier, blocks: list[list[Cell]], tokens: np.ndarray, tokens_per_batch: int = 16_384
) -> list[Occurrences]:
    return list(predict_occurrences(model, blocks, tokens, 0, execution=EXECUTION, tokens_per_batch=tokens_per_batch))


def slow_occurrences(model: GeneClassifier, cells: list[Cell], tokens: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
    """Cell, token and logits of every occurrence: one unpadded cell at a time."""
    found = []
    with torch.inference_mode():
        for number, ids in enumerate(cells):
            if len(ids):
                logits = model(torch.from_numpy(ids.astype(np.int64))[None])[0].numpy()
                found += [(number, t, logits[at]) for at, t in enumerate(ids.tolist()) if t in tokens.tolist()]
    return found


@given(
    lengths=st.lists(st.integers(0, 14), min_size=1, max_size=9),
    cuts=st.lists(st.integers(0, 9), max_size=3),
    genes=st.integers(1, 30),
    tokens_per_batch=st.sampled_from([1, 20, 50, 16_384]),
)
@settings(max_examples=30)
def test_every_occurrence_once_in_order(
    model: GeneClassifier,
    special_vocabulary: GeneVocabulary,
    lengths: list[int],
    cuts: list[int],
    genes: int,
    tokens_per_batch: int,
) -> None:
    """However the cells are cut into blocks and batches."""
    cells = random_cells(special_vocabulary, np.random.default_rng(sum(lengths)), lengths)
    tokens = genes_of(special_vocabulary, genes)
    edges = [0, *sorted(min(cut, len(cells)) for cut in cuts), len(cells)]
    blocks = [cells[start:stop] for start, stop in itertools.pairwise(edges)]
    parts = predict(model, blocks, tokens, tokens_per_batch)
    assert len(parts) == len(blocks)
    expected = slow_occurrences(model, cells, tokens)
    assert np.concatenate([part.cells for part in parts]).tolist() == [cell for cell, _, _ in expected]
    assert np.concatenate([part.tokens for part in parts]).tolist() == [token for _, token, _ in expected]
    logits = np.concatenate([part.logits for part in parts])
    assert (logits.dtype, logits.shape) == (np.float32, (len(expected), 3))
    if expected:
        np.testing.assert_allclose(logits, [row for _, _, row in expected], atol=1e-5)


def test_no_more_than_a_block_is_held(model: GeneClassifier, special_vocabulary: GeneVocabulary) -> None:
    """The next cells are read only once those before are predicted."""
    read = []

    def blocks() -> Iterator[list[Cell]]:
        for number in range(4):
            read.append(number)
            yield random_cells(special_vocabulary, np.random.default_rng(number), [5, 6])

    stream = predict_occurrences(model, blocks(), genes_of(special_vocabulary, 9), 0, execution=EXECUTION)
    for number, _ in enumerate(stream):
        assert read == list(range(number + 1))
    assert number == 3


def test_cells_without_a_gene_asked_for_are_not_computed(
    model: GeneClassifier, special_vocabulary: GeneVocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = random_cells(special_vocabulary, np.random.default_rng(0), [9, 8, 7, 6])
    token = next(token for token in cells[1] if sum(token in cell for cell in cells) == 1)
    seen, forward = [], model.bert.forward
    monkeypatch.setattr(model.bert, "forward", lambda **named: (seen.append(named["input_ids"]), forward(**named))[1])
    (found,) = predict(model, [cells], np.array([token]))
    assert [ids.tolist() for ids in seen] == [[cells[1].tolist()]]
    assert (found.cells.tolist(), found.tokens.tolist()) == ([1], [token])


# ------------------------------------------------------------------ over cells


@given(
    occurrences=st.lists(st.tuples(st.sampled_from([4, 7, 9]), st.integers(0, 10_000)), max_size=40),
    cut=st.integers(0, 40),
)
@settings(max_examples=60)
def test_a_gene_is_the_mean_of_its_cells(occurrences: list[tuple[int, int]], cut: int) -> None:
    tokens = np.array([token for token, _ in occurrences], dtype=np.int64)
    logits = np.array([np.random.default_rng(seed).normal(size=3) * 3 for _, seed in occurrences]).reshape(-1, 3)
    whole = GenePredictions(np.array([9, 4, 7, 12]), 3)
    whole.add(tokens, logits)
    first, second = (GenePredictions(np.array([4, 7, 9, 12]), 3) for _ in range(2))
    first.add(tokens[:cut], logits[:cut])
    second.add(tokens[cut:], logits[cut:])
    first.merge(second)
    for predictions in (whole, first):
        assert predictions.tokens.tolist() == [4, 7, 9, 12]
        for token, cells, odds in zip(
            predictions.tokens, predictions.cells_G, predictions.probabilities_GC, strict=True
        ):
            own = [np.exp(row) / np.exp(row).sum() for t, row in zip(tokens, logits, strict=True) if t == token]
            assert cells == len(own)
            if own:
                np.testing.assert_allclose(odds, np.mean(own, axis=0), rtol=1e-9)
                assert odds.sum() == pytest.approx(1)
            else:
                assert np.isnan(odds).all()


def test_one_cell_does_not_outvote_the_others() -> None:
    predictions = GenePredictions(np.array([5]), 2)
    predictions.add(np.full(10, 5), np.array([[2.0, 0.0]] * 9 + [[-500.0, 500.0]]))
    assert predictions.probabilities_GC[0].argmax() == 0


def test_what_was_not_asked_for_is_a_defect() -> None:
    predictions = GenePredictions(np.array([5, 8]), 2)
    for token in (4, 6, 9):
        with pytest.raises(ValueError, match="not asked for"):
            predictions.add(np.array([5, token]), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="other genes"):
        predictions.merge(GenePredictions(np.array([5, 9]), 2))


def test_the_table_names_genes_and_classes(vocabulary: GeneVocabulary) -> None:
    tokens, targets = np.array([10, 3, 6]), np.array([1, 0, 1])
    predictions = GenePredictions(tokens, 2)
    predictions.add(np.array([10, 3, 10]), np.log(np.array([[0.2, 0.8], [0.4, 0.6], [0.4, 0.6]])))
    table = predictions.table(tokens, targets, ["a", "b"], vocabulary)
    assert table["gene"].tolist() == ["GENE08", "GENE01", "GENE04"]
    assert table["symbol"].tolist() == table["gene"].tolist()
    assert table["cells"].tolist() == [2, 1, 0]
    assert table["true_class"].tolist() == ["b", "a", "b"]
    assert table["predicted_class"].tolist() == ["b", "b", ""]
    np.testing.assert_allclose(table["probability_b"], [0.7, 0.6, np.nan])
    np.testing.assert_allclose(table["probability_a"], [0.3, 0.4, np.nan])
