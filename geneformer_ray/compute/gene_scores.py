"""How well genes are told apart: ROC curves and their areas, for each gene, for each occurrence, and over folds."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = [
    "MeanRoc",
    "RocCurve",
    "TokenScores",
    "class_curves",
    "mean_curve",
    "mean_over_folds",
    "overall_curve",
    "score_genes",
    "spread_over_folds",
]

# Occurrences are counted by their log-odds, from -LIMIT to LIMIT in so many bins: 1,024 a unit.
BINS, LIMIT = 2**16, 32.0
SUMMARISED = ("auc", "macro_f1", "accuracy")
# Points of a curve that are written down: all of most genes' curves.
POINTS_AT_MOST = 400


@dataclass(frozen=True)
class RocCurve:
    """A receiver operating characteristic, from (0, 0) to (1, 1), with straight lines between its points.

    Parameters
    ----------
    false_positives, true_positives
        Rates at falling thresholds, shape (points,). Ties are one straight line, so that each counts half.
    """

    false_positives: NDArray[np.float64]
    true_positives: NDArray[np.float64]

    @classmethod
    def from_counts(cls, positives: NDArray[np.integer], negatives: NDArray[np.integer]) -> RocCurve | None:
        """Make the curve from how many positives and negatives have each score, scores rising; both of shape (scores,).

        None where either there are no positives or no negatives.
        """
        if not positives.sum() or not negatives.sum():
            return None
        there = (positives + negatives) > 0
        up, right = (np.cumsum(np.r_[0, counts[there][::-1]]) for counts in (positives, negatives))
        return cls(right / right[-1], up / up[-1])

    @classmethod
    def from_scores(cls, is_positive: NDArray[np.bool_], scores: NDArray[np.floating]) -> RocCurve | None:
        """Make the curve of items, from whether each is a positive and its score; both of shape (items,)."""
        values, place = np.unique(scores, return_inverse=True)
        counts = (np.bincount(place[side], minlength=len(values)) for side in (is_positive, ~is_positive))
        return cls.from_counts(*counts)

    @property
    def auc(self) -> float:
        """The area below: the chance that a positive scores above a negative, ties counting half."""
        return float(np.trapezoid(self.true_positives, self.false_positives))

    def between(self, x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Give the lowest and highest true positive rate at false positive rates `x`; they differ where it climbs."""
        high = np.interp(x, self.false_positives, self.true_positives)
        low = np.interp(-x, -self.false_positives[::-1], self.true_positives[::-1])
        return low, high

    def points(self, at_most: int = POINTS_AT_MOST) -> dict[str, list[float]]:
        """Give the curve to be written down: all of its points, or evenly chosen ones of many."""
        number = len(self.false_positives)
        chosen = np.unique(np.linspace(0, number - 1, min(number, at_most)).round().astype(np.int64))
        return {
            "false_positive_rate": self.false_positives[chosen].round(6).tolist(),
            "true_positive_rate": self.true_positives[chosen].round(6).tolist(),
        }


@dataclass(frozen=True)
class MeanRoc:
    """The mean of several curves at equal false positive rates.

    Parameters
    ----------
    curve
        The mean. Its area is the mean of the areas.
    deviation
        Standard deviation of the true positive rate at each of its points; None of a single curve.
    """

    curve: RocCurve
    deviation: NDArray[np.float64] | None


def mean_curve(curves: Sequence[RocCurve]) -> MeanRoc:
    """Average curves vertically, at every false positive rate where one of them bends.

    Nothing is interpolated on a grid, which would cut corners: where curves climb, the mean climbs too.
    """
    x = np.unique(np.concatenate([curve.false_positives for curve in curves]))
    # Twice each x: where the curves come from, and where they go.
    rates = np.stack([np.stack(curve.between(x), axis=1).ravel() for curve in curves])
    deviation = rates.std(axis=0, ddof=1) if len(curves) > 1 else None
    return MeanRoc(RocCurve(np.repeat(x, 2), rates.mean(axis=0)), deviation)


def class_curves(targets: NDArray[np.integer], probabilities: NDArray[np.floating]) -> list[RocCurve | None]:
    """Give each class's curve against all others, ranked by its probability.

    Parameters
    ----------
    targets
        Class numbers, shape (items,).
    probabilities
        Shape (items, classes).
    """
    return [
        RocCurve.from_scores(targets == number, probabilities[:, number]) for number in range(probabilities.shape[1])
    ]


def overall_curve(curves: Sequence[RocCurve | None]) -> RocCurve | None:
    """Give the one curve of a classifier: of two classes the second one's, of more the mean over classes (macro).

    The curve of the first of two classes is the same one seen from the other corner, and has the same area.
    """
    there = [curve for curve in curves if curve is not None]
    if len(curves) == 2:
        return curves[1]
    return mean_curve(there).curve if there else None


def score_genes(
    targets: NDArray[np.integer], probabilities: NDArray[np.floating], labels: Sequence[str]
) -> dict[str, Any]:
    """Score the predictions of genes, each of which counts once.

    Parameters
    ----------
    targets
        Class numbers, shape (genes,).
    probabilities
        Shape (genes, classes). Genes without any (NaN: no cell holds them) are left out, and counted.
    labels
        Class names.

    Returns
    -------
    dict
        ``auc`` (of two classes, the second one's; of more the mean over classes), ``accuracy``, ``macro_f1``,
        ``genes``, ``genes_without_cells``, ``per_class`` (precision, recall, F1, AUC against the rest, genes),
        ``confusion_matrix`` (the truth in its rows), and ``roc``, the overall curve's points. An AUC is None where a
        class or its rest is empty.
    """
    there = ~np.isnan(probabilities).any(axis=1)
    targets, probabilities = np.asarray(targets)[there], np.asarray(probabilities)[there]
    classes = len(labels)
    predicted = probabilities.argmax(axis=1) if len(targets) else np.zeros(0, dtype=np.int64)
    matrix_CC = np.bincount(targets * classes + predicted, minlength=classes**2).reshape(classes, classes)
    scores = _scores(matrix_CC, class_curves(targets, probabilities), labels, "genes")
    return {**scores, "genes_without_cells": int((~there).sum())}


class TokenScores:
    """Scores of occurrences, counted rather than kept: memory does not grow with the cells.

    Each occurrence counts once, so that a gene counts as often as cells hold it (what upstream scores). Its log-odds of
    every class are counted in fine bins; within a bin occurrences are taken for ties. Every point of such a curve is a
    point of the exact one, and the area is off by half of the pairs within bins at most, which ``auc_error_at_most``
    states.

    Parameters
    ----------
    labels
        Class names.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = list(labels)
        classes = len(self.labels)
        self.matrix_CC = np.zeros((classes, classes), dtype=np.int64)
        self.positives_CB, self.negatives_CB = (np.zeros((classes, BINS), dtype=np.int64) for _ in range(2))

    def add(
        self, targets: NDArray[np.integer], logits: NDArray[np.floating], counts: NDArray[np.integer] | None = None
    ) -> None:
        """Count occurrences.

        Parameters
        ----------
        targets
            Class numbers, shape (occurrences,).
        logits
            Shape (occurrences, classes).
        counts
            How many occurrences each of them stands for; once each by default.
        """
        classes = len(self.labels)
        counts = np.ones(len(targets), dtype=np.int64) if counts is None else counts
        np.add.at(self.matrix_CC, (targets, logits.argmax(axis=1)), counts)
        odds = log_odds(logits)
        bins = np.floor((np.clip(odds, -LIMIT, LIMIT) + LIMIT) / (2 * LIMIT) * BINS).astype(np.int64)
        bins = np.minimum(bins, BINS - 1)
        for number in range(classes):
            is_positive = targets == number
            np.add.at(self.positives_CB[number], bins[is_positive, number], counts[is_positive])
            np.add.at(self.negatives_CB[number], bins[~is_positive, number], counts[~is_positive])

    def merge(self, other: TokenScores) -> None:
        """Add what another worker has counted."""
        self.matrix_CC += other.matrix_CC
        self.positives_CB += other.positives_CB
        self.negatives_CB += other.negatives_CB

    @property
    def curves(self) -> list[RocCurve | None]:
        """Each class's curve against all others."""
        return [RocCurve.from_counts(*sides) for sides in zip(self.positives_CB, self.negatives_CB, strict=True)]

    def scores(self) -> dict[str, Any]:
        """Give what :func:`score_genes` gives, of occurrences (``tokens``), and ``auc_error_at_most``."""
        return {
            **_scores(self.matrix_CC, self.curves, self.labels, "tokens"),
            "auc_error_at_most": self._error(),
        }

    def _error(self) -> float:
        """Bound how far the overall area is from the exact one."""
        errors = []
        for positives, negatives in zip(self.positives_CB, self.negatives_CB, strict=True):
            pairs = float(positives.sum()) * float(negatives.sum())
            tied = float((positives.astype(np.float64) * negatives).sum())
            errors.append(tied / pairs / 2 if pairs else 0.0)
        return errors[1] if len(errors) == 2 else float(np.mean(errors))


def log_odds(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Give log(p / (1 - p)) of every class from logits or log-probabilities, both of shape (items, classes)."""
    # A probability of 0 becomes one that no bin tells from it.
    values = np.maximum(logits.astype(np.float64), logits.max(axis=1, keepdims=True) - 4 * LIMIT)
    columns = [
        values[:, number] - np.logaddexp.reduce(np.delete(values, number, axis=1), axis=1)
        for number in range(values.shape[1])
    ]
    return np.stack(columns, axis=1)


def _scores(
    matrix_CC: NDArray[np.integer], curves: Sequence[RocCurve | None], labels: Sequence[str], unit: str
) -> dict[str, Any]:
    """Give all scores of a confusion matrix and the classes' curves; `unit` names what is counted."""
    right, true, said = np.diag(matrix_CC), matrix_CC.sum(axis=1), matrix_CC.sum(axis=0)
    f1 = 2 * right / np.maximum(1, true + said)
    precision, recall = right / np.maximum(1, said), right / np.maximum(1, true)
    aucs = [None if curve is None else curve.auc for curve in curves]
    overall = overall_curve(curves)
    return {
        "auc": None if overall is None else overall.auc,
        "accuracy": float(right.sum() / max(1, true.sum())),
        # Over the classes that are there, as compute/scores.py has it.
        "macro_f1": float(f1[true > 0].mean()) if true.any() else 0.0,
        unit: int(true.sum()),
        "per_class": {
            label: {
                "precision": float(precision[number]),
                "recall": float(recall[number]),
                "f1": float(f1[number]),
                "auc": aucs[number],
                unit: int(true[number]),
            }
            for number, label in enumerate(labels)
        },
        "confusion_matrix": matrix_CC.tolist(),
        "roc": None if overall is None else overall.points(),
    }


def mean_over_folds(scores: Sequence[dict[str, Any]]) -> MeanRoc | None:
    """Average the overall curves of folds' scores, as they were written down; None where no fold has one."""
    curves = [
        RocCurve(*(np.array(one["roc"][axis]) for axis in ("false_positive_rate", "true_positive_rate")))
        for one in scores
        if one["roc"] is not None
    ]
    return mean_curve(curves) if curves else None


def spread_over_folds(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Give AUC, macro F1 and accuracy over folds (and seeds): mean, and standard deviation as ``NAME_std``.

    Every fold counts the same, whatever its size. The deviation says how far a fold's result lies from another's; it is
    no standard error, for folds share training genes. None where there is no value, or a single one's deviation.
    """
    found: dict[str, Any] = {}
    for name in SUMMARISED:
        values = [float(one[name]) for one in scores if one[name] is not None]
        found[name] = statistics.fmean(values) if values else None
        found[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
    return found
