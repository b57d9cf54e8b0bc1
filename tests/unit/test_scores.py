"""Scores, held to scikit-learn's; and the baseline beside every classifier."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_score, recall_score

from geneformer_ray.compute.baseline import baseline_scores, rank_features
from geneformer_ray.compute.scores import CALIBRATION_BINS, calibration, probabilities, score
from geneformer_ray.data.vocabulary import GeneVocabulary

LABELS = ["alpha", "beta", "delta", "pp"]


def logits_for(predicted: list[int]) -> NDArray[np.float64]:
    return np.eye(len(LABELS))[predicted] * 3 - 1


@given(pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
@settings(max_examples=40)
def test_equals_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    targets, predicted = (list(side) for side in zip(*pairs, strict=True))
    found = score(np.array(targets), logits_for(predicted), LABELS)
    present = sorted(set(targets))
    assert found["accuracy"] == pytest.approx(accuracy_score(targets, predicted))
    macro = f1_score(targets, predicted, labels=present, average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx(macro)
    assert found["confusion_matrix"] == confusion_matrix(targets, predicted, labels=range(4)).tolist()
    each = f1_score(targets, predicted, labels=range(4), average=None, zero_division=0)
    assert [found["per_class"][label]["f1"] for label in LABELS] == pytest.approx(each.tolist())
    assert [found["per_class"][label]["precision"] for label in LABELS] == pytest.approx(
        precision_score(targets, predicted, labels=range(4), average=None, zero_division=0).tolist()
    )
    assert [found["per_class"][label]["recall"] for label in LABELS] == pytest.approx(
        recall_score(targets, predicted, labels=range(4), average=None, zero_division=0).tolist()
    )
    assert [found["per_class"][label]["cells"] for label in LABELS] == [targets.count(i) for i in range(4)]
    assert found["cells"] == len(targets)
    json.dumps(found)  # it goes into tables and summaries as it is


def test_the_truth_is_in_the_rows() -> None:
    matrix = np.array(score(np.array([0, 0, 0]), logits_for([0, 1, 1]), LABELS)["confusion_matrix"])
    assert matrix[0].tolist() == [1, 2, 0, 0]
    assert matrix[1:].sum() == 0


def test_a_class_that_no_cell_has_does_not_lower_the_mean() -> None:
    assert score(np.array([0, 1, 1]), logits_for([0, 1, 1]), LABELS)["macro_f1"] == 1.0


def test_no_cells_score_nothing() -> None:
    found = score(np.array([], dtype=np.int64), np.zeros((0, 4)), LABELS)
    assert (found["calibration"]["expected_calibration_error"], found["calibration"]["brier_score"]) == (0.0, 0.0)
    assert (found["accuracy"], found["macro_f1"], found["cells"]) == (0.0, 0.0, 0)


# ---------------------------------------------------------------------- calibration


def slow_calibration(targets: list[int], odds: NDArray[np.float64]) -> tuple[float, float, list[int]]:
    """Expected calibration error, Brier score and cells per bin, cell by cell as their definitions say."""
    error, counts = 0.0, []
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    for low, high in itertools.pairwise(edges):
        inside = [i for i in range(len(targets)) if low < max(odds[i]) <= high]
        counts.append(len(inside))
        if inside:
            accuracy = sum(int(np.argmax(odds[i])) == targets[i] for i in inside) / len(inside)
            confidence = sum(max(odds[i]) for i in inside) / len(inside)
            error += len(inside) / len(targets) * abs(accuracy - confidence)
    brier = 0.0
    for row, target in zip(odds, targets, strict=True):
        brier += sum((p - (number == target)) ** 2 for number, p in enumerate(row)) / len(targets)
    return error, brier, counts


@given(seed=st.integers(0, 10_000), cells=st.integers(1, 60), scale=st.sampled_from([0.0, 0.3, 2.0, 30.0]))
@settings(max_examples=60)
def test_calibration_equals_its_definition(seed: int, cells: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(cells, 4)).astype(np.float32) * np.float32(scale)
    targets = rng.integers(0, 4, cells)
    found = calibration(targets, logits)
    error, brier, counts = slow_calibration(targets.tolist(), probabilities(logits))
    assert found["expected_calibration_error"] == pytest.approx(error)
    assert found["brier_score"] == pytest.approx(brier)
    assert [one["cells"] for one in found["bins"]] == counts
    assert score(targets, logits, LABELS)["calibration"] == found


def test_calibration_of_known_cells() -> None:
    """Eight of ten right at a confidence of 0.8 is calibrated; the same cells at 0.95 are off by 0.15."""
    targets = np.array([0] * 8 + [1] * 2)
    for confidence, error in ((0.8, 0.0), (0.95, 0.15)):
        logits = np.log(np.tile([confidence, 1 - confidence], (10, 1)))
        found = calibration(targets, logits)
        assert found["expected_calibration_error"] == pytest.approx(error)
        (one,) = (one for one in found["bins"] if one["cells"])
        assert (one["cells"], one["accuracy"]) == (10, 0.8)
        assert one["low"] < confidence <= one["high"]
        assert one["confidence"] == pytest.approx(confidence)


def test_the_brier_score_runs_from_0_to_2() -> None:
    sure = np.array([[50.0, -50.0], [50.0, -50.0]])
    assert calibration(np.array([0, 0]), sure)["brier_score"] == pytest.approx(0)
    assert calibration(np.array([1, 1]), sure)["brier_score"] == pytest.approx(2)


def test_probabilities_of_log_probabilities_are_themselves() -> None:
    odds = np.array([[0.2, 0.8, 0.0], [0.5, 0.25, 0.25]])
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(probabilities(np.log(odds)), odds)


# ---------------------------------------------------------------------- baseline


def separable_cells(
    vocabulary: GeneVocabulary, count: int, seed: int
) -> tuple[list[NDArray[np.int32]], NDArray[np.int64]]:
    """Cells of three types, each of which ranks genes of its own first."""
    rng = np.random.default_rng(seed)
    genes = np.array([vocabulary.tokens[gene] for gene in vocabulary.genes], dtype=np.int32)
    types = rng.integers(0, 3, count)
    cells = []
    for kind in types:
        own = genes[kind * 5 : kind * 5 + 5]
        cells.append(np.concatenate([rng.permutation(own), rng.permutation(genes[15:])[: rng.integers(3, 9)]]))
    return cells, types.astype(np.int64)


def test_rank_features_fall_from_the_first_gene(special_vocabulary: GeneVocabulary) -> None:
    cells = [np.array([2, 9, 5, 7, 8, 3]), np.array([2, 3]), np.array([2, 4, 3])]
    features = rank_features(cells, special_vocabulary).toarray()
    assert features.shape == (3, len(special_vocabulary))
    assert features[0, [9, 5, 7, 8]].tolist() == [1.0, 0.75, 0.5, 0.25]
    assert (features[0] > 0).sum() == 4  # neither special tokens nor absent genes
    assert not features[1].any()
    assert features[2, 4] == 1.0


def test_the_baseline_tells_separable_cells_apart(vocabulary: GeneVocabulary) -> None:
    train, targets = separable_cells(vocabulary, 90, seed=1)
    first, truth = separable_cells(vocabulary, 60, seed=2)
    second, _ = separable_cells(vocabulary, 7, seed=3)
    scores = baseline_scores(train, targets, [first, second], vocabulary, classes=4)
    assert [found.shape for found in scores] == [(60, 4), (7, 4)]
    assert score(truth, scores[0], LABELS)["accuracy"] > 0.9
    np.testing.assert_allclose(np.exp(scores[0]).sum(axis=1), 1.0, rtol=1e-5)
    assert np.isneginf(scores[0][:, 3]).all()  # no training cell was of the fourth class


def test_the_baseline_knows_nothing_of_shuffled_labels(vocabulary: GeneVocabulary) -> None:
    """No gain without a signal: nothing of the cells scored leaks into the fit."""
    train, targets = separable_cells(vocabulary, 90, seed=1)
    others, truth = separable_cells(vocabulary, 300, seed=2)
    shuffled = np.random.default_rng(4).permutation(targets)
    (scores,) = baseline_scores(train, shuffled, [others], vocabulary, classes=3)
    assert score(truth, scores, LABELS[:3])["accuracy"] < 0.6


def test_the_baseline_is_reproducible(vocabulary: GeneVocabulary) -> None:
    train, targets = separable_cells(vocabulary, 60, seed=1)
    one, two = (baseline_scores(train, targets, [train], vocabulary, classes=3, seed=5)[0] for _ in range(2))
    # Not to the bit: how BLAS sums depends on where in memory an array lies.
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(one.argmax(axis=1), two.argmax(axis=1))
