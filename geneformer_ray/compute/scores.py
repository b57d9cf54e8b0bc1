"""How good predictions are, from one confusion matrix, and how far their probabilities can be believed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["CALIBRATION_BINS", "calibration", "probabilities", "score"]

CALIBRATION_BINS = 15


def score(targets: NDArray[np.int64], logits: NDArray[np.floating], labels: Sequence[str]) -> dict[str, Any]:
    """Score predictions: accuracy, macro F1, the same per class, confusion matrix, calibration.

    Written out rather than taken from scikit-learn, whose import costs every training worker a second; a test holds it
    to scikit-learn's numbers.

    Parameters
    ----------
    targets
        Class numbers, shape (cells,).
    logits
        Shape (cells, classes).
    labels
        Class names.

    Returns
    -------
    dict
        ``confusion_matrix`` has the truth in its rows. ``macro_f1`` averages over the classes that the cells have: a 0
        for a class that is not there would score the split, not the model. ``per_class`` has each class's precision,
        recall, F1 and cells (its support). ``calibration`` is what :func:`calibration` gives.
    """
    classes = len(labels)
    predicted = logits.argmax(axis=1)
    matrix = np.bincount(targets * classes + predicted, minlength=classes**2).reshape(classes, classes)
    right, true, said = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    f1 = 2 * right / np.maximum(1, true + said)
    precision, recall = right / np.maximum(1, said), right / np.maximum(1, true)
    per_class = {
        label: {
            "precision": float(precision[i]),
            "recall": float(recall[i]),
            "f1": float(f1[i]),
            "cells": int(true[i]),
        }
        for i, label in enumerate(labels)
    }
    return {
        "accuracy": float(right.sum() / max(1, len(targets))),
        "macro_f1": float(f1[true > 0].mean()) if len(targets) else 0.0,
        "cells": len(targets),
        "per_class": per_class,
        "confusion_matrix": matrix.tolist(),
        "calibration": calibration(targets, logits),
    }


def probabilities(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Give the softmax of logits, shape (cells, classes); log-probabilities give themselves."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    odds = np.exp(shifted)
    return np.asarray(odds / odds.sum(axis=1, keepdims=True))


def calibration(targets: NDArray[np.int64], logits: NDArray[np.floating]) -> dict[str, Any]:
    """Say how far probabilities agree with how often the prediction is right.

    Parameters
    ----------
    targets
        Class numbers, shape (cells,).
    logits
        Shape (cells, classes).

    Returns
    -------
    dict
        ``expected_calibration_error``: cells are put by confidence, the probability of the predicted class, in 15 bins
        of equal width (low, high]; the mean over cells of their bin's gap between accuracy and mean confidence (Guo et
        al. 2017). ``brier_score``: the mean over cells of the summed squared differences between the probabilities and
        the truth's ones and zeros, 0 to 2 (Brier 1950). ``bins``: ``low``, ``high``, ``cells``, mean ``confidence`` and
        ``accuracy`` of each, None where it has no cells. Without cells, both figures are 0.
    """
    odds = probabilities(logits)
    confidence, right = odds.max(axis=1), logits.argmax(axis=1) == targets
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    bin_of = np.searchsorted(edges[1:-1], confidence, side="left")
    cells, claimed, correct = (
        np.bincount(bin_of, weights=weights, minlength=CALIBRATION_BINS) for weights in (None, confidence, right)
    )
    count = max(1, len(targets))
    truth = odds[np.arange(len(targets)), targets]
    # The sum over classes of (p - y)^2, y being 1 for the truth alone.
    squares = (odds**2).sum(axis=1) - 2 * truth + 1
    return {
        "expected_calibration_error": float(np.abs(claimed - correct).sum() / count),
        "brier_score": float(squares.sum() / count),
        "bins": [
            {
                "low": float(edges[i]),
                "high": float(edges[i + 1]),
                "cells": int(cells[i]),
                "confidence": float(claimed[i] / cells[i]) if cells[i] else None,
                "accuracy": float(correct[i] / cells[i]) if cells[i] else None,
            }
            for i in range(CALIBRATION_BINS)
        ],
    }
