"""How good predictions are, from one confusion matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["score"]


def score(targets: NDArray[np.int64], logits: NDArray[np.floating], labels: Sequence[str]) -> dict[str, Any]:
    """Score predictions: accuracy, macro F1, F1 and cells per class, confusion matrix.

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
        for a class that is not there would score the split, not the model.
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
    }
