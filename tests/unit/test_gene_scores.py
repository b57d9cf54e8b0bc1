"""ROC curves and areas, held to scikit-learn's; their mean over folds; and the figure."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import auc as area
from sklearn.metrics import f1_score, roc_auc_score, roc_curve

from geneformer_ray.compute import gene_scores
from geneformer_ray.compute.gene_scores import (
    RocCurve,
    TokenScores,
    class_curves,
    log_odds,
    mean_curve,
    mean_over_folds,
    overall_curve,
    score_genes,
    spread_over_folds,
)
from geneformer_ray.compute.scores import probabilities, score
from geneformer_ray.errors import InputError
from geneformer_ray.manage.figure_style import BLUE, VERMILLION
from geneformer_ray.manage.roc_plot import roc_figure

LABELS = ["insensitive", "sensitive", "unclear"]


def some_logits(items: int, classes: int, seed: int, decimals: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Targets with every class among them, and logits that know something of them, some of them equal."""
    rng = np.random.default_rng(seed)
    targets = np.r_[np.arange(classes), rng.integers(0, classes, items)]
    logits = rng.normal(size=(len(targets), classes)) + np.eye(classes)[targets]
    return targets, np.round(logits, decimals).astype(np.float32)


# ------------------------------------------------------------------ curves


@given(
    items=st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=1, max_size=40),
)
@settings(max_examples=80)
def test_a_curve_is_scikit_learns(items: list[tuple[bool, int]]) -> None:
    positive, scores = np.array([p for p, _ in items]), np.array([s / 7 for _, s in items])
    curve = RocCurve.from_scores(positive, scores)
    if positive.all() or not positive.any():
        assert curve is None
        return
    assert curve is not None
    false, true, _ = roc_curve(positive, scores, drop_intermediate=False)
    np.testing.assert_allclose(curve.false_positives, false)
    np.testing.assert_allclose(curve.true_positives, true)
    assert curve.auc == pytest.approx(roc_auc_score(positive, scores))
    pairs = [(a > b) + (a == b) / 2 for a in scores[positive] for b in scores[~positive]]
    assert curve.auc == pytest.approx(np.mean(pairs))


@given(seeds=st.lists(st.integers(0, 999), min_size=1, max_size=5))
@settings(max_examples=40)
def test_the_mean_curve_has_the_mean_area(seeds: list[int]) -> None:
    """Which a grid, upstream's of 100 points for one, does not give."""
    curves = []
    for seed in seeds:
        targets, logits = some_logits(6 + seed % 20, 2, seed)
        curves.append(RocCurve.from_scores(targets == 1, logits[:, 1]))
    mean = mean_curve(curves)  # type: ignore[arg-type]
    assert mean.curve.auc == pytest.approx(np.mean([curve.auc for curve in curves]))  # type: ignore[union-attr]
    x, y = mean.curve.false_positives, mean.curve.true_positives
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert (np.diff(x) >= 0).all() and (np.diff(y) >= -1e-12).all()
    # Between the bends of all of them, the plain mean of the curves.
    middles = np.random.default_rng(0).uniform(size=20)
    plain = np.mean([np.interp(middles, c.false_positives, c.true_positives) for c in curves], axis=0)  # type: ignore[union-attr]
    np.testing.assert_allclose(np.interp(middles, x, y), plain, atol=1e-9)


def test_the_deviation_is_that_of_the_curves() -> None:
    steep, diagonal = RocCurve(np.array([0.0, 0, 1]), np.array([0.0, 1, 1])), RocCurve(*np.array([[0.0, 1], [0.0, 1]]))
    mean = mean_curve([steep, diagonal])
    assert mean.curve.auc == 0.75
    assert mean.curve.false_positives.tolist() == [0, 0, 1, 1]
    assert mean.curve.true_positives.tolist() == [0, 0.5, 1, 1]
    np.testing.assert_allclose(mean.deviation, [0, np.std([0, 1], ddof=1), 0, 0])  # type: ignore[arg-type]
    assert mean_curve([steep]).deviation is None


def test_a_curve_written_down_is_whole_or_evenly_thinned() -> None:
    targets, logits = some_logits(50, 2, 3)
    curve = RocCurve.from_scores(targets == 1, logits[:, 1])
    assert curve is not None
    whole = curve.points()
    np.testing.assert_allclose(whole["true_positive_rate"], curve.true_positives, atol=1e-6)
    thinned = curve.points(at_most=10)
    pairs = set(zip(*whole.values(), strict=True))
    few = list(zip(*thinned.values(), strict=True))
    assert len(few) == 10 and set(few) < pairs
    assert (few[0], few[-1]) == ((0, 0), (1, 1))


# ------------------------------------------------------------------ genes


@given(items=st.integers(0, 40), classes=st.integers(2, 4), seed=st.integers(0, 999))
@settings(max_examples=40)
def test_scores_of_genes_are_scikit_learns(items: int, classes: int, seed: int) -> None:
    targets, logits = some_logits(items, classes, seed)
    odds, labels = probabilities(logits), [*LABELS, "other"][:classes]
    found = score_genes(targets, odds, labels)
    each = [roc_auc_score(targets == number, odds[:, number]) for number in range(classes)]
    assert [found["per_class"][label]["auc"] for label in labels] == pytest.approx(each)
    assert found["auc"] == pytest.approx(each[1] if classes == 2 else np.mean(each))
    assert found["macro_f1"] == pytest.approx(f1_score(targets, odds.argmax(axis=1), average="macro", zero_division=0))
    # The same figures as cells', where both have them.
    cells = score(targets, logits, labels)
    assert (found["accuracy"], found["macro_f1"]) == (cells["accuracy"], cells["macro_f1"])
    assert found["confusion_matrix"] == cells["confusion_matrix"]
    for label in labels:
        for name in ("precision", "recall", "f1"):
            assert found["per_class"][label][name] == cells["per_class"][label][name]
        assert found["per_class"][label]["genes"] == cells["per_class"][label]["cells"]
    assert found["genes"] == len(targets)
    written = json.loads(json.dumps(found))["roc"]
    assert area(*written.values()) == pytest.approx(found["auc"], abs=1e-5)


def test_the_first_of_two_classes_has_the_same_area() -> None:
    targets, logits = some_logits(30, 2, 1)
    first, second = class_curves(targets, probabilities(logits))
    assert first is not None and second is not None
    assert first.auc == pytest.approx(second.auc)
    assert overall_curve([first, second]) is second


def test_genes_without_cells_are_left_out_and_counted() -> None:
    targets, logits = some_logits(20, 3, 1)
    odds = probabilities(logits)
    holes = np.r_[odds, np.full((2, 3), np.nan)]
    found = score_genes(np.r_[targets, [0, 1]], holes, LABELS)
    assert found == {**score_genes(targets, odds, LABELS), "genes_without_cells": 2}


def test_a_class_that_is_not_there_has_no_area() -> None:
    targets, logits = some_logits(20, 3, 1)
    there = targets < 2
    found = score_genes(targets[there], probabilities(logits[there]), LABELS)
    assert found["per_class"]["unclear"]["auc"] is None
    assert found["macro_f1"] == score(targets[there], logits[there], LABELS)["macro_f1"]
    assert found["auc"] == pytest.approx(np.mean([found["per_class"][label]["auc"] for label in LABELS[:2]]))
    for empty in (np.zeros((0, 3)), np.full((3, 3), np.nan)):
        nothing = score_genes(np.zeros(len(empty), dtype=np.int64), empty, LABELS)
        assert (nothing["auc"], nothing["roc"], nothing["accuracy"], nothing["genes"]) == (None, None, 0.0, 0)


# ------------------------------------------------------------------ occurrences


@given(items=st.integers(0, 60), classes=st.integers(2, 4), seed=st.integers(0, 999), cut=st.integers(0, 60))
@settings(max_examples=40)
def test_occurrences_are_scored_as_if_they_were_kept(items: int, classes: int, seed: int, cut: int) -> None:
    """But for what falls into one bin, and that is stated."""
    targets, logits = some_logits(items, classes, seed, decimals=6)
    labels = [*LABELS, "other"][:classes]
    first, second = TokenScores(labels), TokenScores(labels)
    first.add(targets[:cut], logits[:cut])
    second.add(targets[cut:], logits[cut:])
    first.merge(second)
    found, kept = first.scores(), score_genes(targets, probabilities(logits), labels)
    assert found["auc"] == pytest.approx(kept["auc"], abs=found["auc_error_at_most"] + 1e-9)
    assert found["auc_error_at_most"] < 0.05
    assert found["tokens"] == kept["genes"]
    for name in ("accuracy", "macro_f1", "confusion_matrix"):
        assert found[name] == kept[name]


def test_the_error_of_an_area_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """With bins so coarse that it shows."""
    monkeypatch.setattr(gene_scores, "BINS", 64)
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, 400)
    logits = rng.normal(size=(400, 2)) + np.eye(2)[targets]
    counted = TokenScores(LABELS[:2])
    counted.add(targets, logits)
    found, exact = counted.scores(), roc_auc_score(targets, logits[:, 1] - logits[:, 0])
    assert 1e-4 < abs(found["auc"] - exact) <= found["auc_error_at_most"] < 0.2


def test_the_bins_are_fine() -> None:
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, 20_000)
    logits = (rng.normal(size=(20_000, 2)) + np.eye(2)[targets]).astype(np.float32)
    counted = TokenScores(LABELS[:2])
    counted.add(targets, logits)
    found = counted.scores()
    assert found["auc_error_at_most"] < 2e-4
    assert found["auc"] == pytest.approx(roc_auc_score(targets, logits[:, 1] - logits[:, 0]), abs=1e-5)
    assert len(found["roc"]["true_positive_rate"]) == 400


def test_counts_stand_for_occurrences() -> None:
    targets, logits = some_logits(10, 3, 4)
    counts = np.arange(len(targets))
    short, long = TokenScores(LABELS), TokenScores(LABELS)
    short.add(targets, logits, counts)
    long.add(np.repeat(targets, counts), np.repeat(logits, counts, axis=0))
    assert short.scores() == long.scores()


def test_log_odds_of_logits_and_of_probabilities() -> None:
    _, logits = some_logits(30, 3, 5)
    odds = probabilities(logits)
    expected = np.log(odds / (1 - odds))
    np.testing.assert_allclose(log_odds(logits), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(log_odds(np.log(odds)), expected, rtol=1e-6, atol=1e-6)
    with np.errstate(divide="ignore"):
        sure = log_odds(np.log(np.array([[0.0, 1.0], [0.5, 0.5]])))
    assert np.isfinite(sure).all() and sure[0, 0] < -100 and sure[1].tolist() == [0, 0]


# ------------------------------------------------------------------ folds


def folds_of(seeds: list[int]) -> list[dict[str, object]]:
    found = []
    for seed in seeds:
        targets, logits = some_logits(15 + seed, 2, seed)
        found.append(score_genes(targets, probabilities(logits), LABELS[:2]))
    return found


def test_the_spread_is_over_folds_each_counting_once() -> None:
    folds = folds_of([1, 2, 30])
    spread = spread_over_folds(folds)
    for name in ("auc", "macro_f1", "accuracy"):
        values = [fold[name] for fold in folds]
        assert spread[name] == pytest.approx(np.mean(values))
        assert spread[f"{name}_std"] == pytest.approx(np.std(values, ddof=1))
    assert spread_over_folds(folds[:1])["auc_std"] is None
    assert spread_over_folds([{**folds[0], "auc": None}])["auc"] is None
    mean = mean_over_folds(folds)
    assert mean is not None
    assert mean.curve.auc == pytest.approx(spread["auc"], abs=1e-5)
    assert mean_over_folds([{"roc": None}]) is None


def test_the_figure_shows_folds_mean_band_and_baseline() -> None:
    folds, baseline = folds_of([1, 2, 3]), folds_of([7, 8, 9])
    figure = roc_figure(folds, baseline, "Dosage $sensitivity$")
    (axes,) = figure.axes
    said = [text.get_text() for text in axes.get_legend().get_texts()]  # type: ignore[union-attr]
    spread, other = spread_over_folds(folds), spread_over_folds(baseline)
    assert f"model, AUC {spread['auc']:.3f} ± {spread['auc_std']:.3f}" in said
    assert f"baseline, AUC {other['auc']:.3f} ± {other['auc_std']:.3f}" in said
    assert "one fold" in said
    assert axes.get_title(loc="left") == "Dosage $sensitivity$"
    lines = {line.get_color(): np.asarray(line.get_xydata()) for line in axes.lines}
    for colour, scores in ((BLUE, folds), (VERMILLION, baseline)):
        curve = mean_over_folds(scores).curve  # type: ignore[union-attr]
        np.testing.assert_allclose(lines[colour], np.stack([curve.false_positives, curve.true_positives], axis=1))
    assert len(axes.lines) == 6  # chance, three folds, their mean, the baseline
    assert len(axes.collections) == 1


def test_the_band_stays_between_0_and_1() -> None:
    """A fold that is always right and one that is always wrong: half, give or take 0.7."""
    targets, right = np.array([0, 0, 1, 1]), np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.2, 0.8]])
    folds = [score_genes(targets, odds, LABELS[:2]) for odds in (right, right[::-1])]
    assert [fold["auc"] for fold in folds] == [1, 0]
    (band,) = roc_figure(folds).axes[0].collections
    edges = np.asarray(band.get_paths()[0].vertices)
    assert (edges[:, 1].min(), edges[:, 1].max()) == (0, 1)


def test_a_single_fold_has_no_band() -> None:
    (axes,) = roc_figure(folds_of([3])).axes
    assert not axes.collections
    assert len(axes.lines) == 3
    assert "±" not in axes.get_legend().get_texts()[0].get_text()  # type: ignore[union-attr]


def test_no_curve_is_refused() -> None:
    with pytest.raises(InputError, match="ROC curve"):
        roc_figure([{"roc": None}])
