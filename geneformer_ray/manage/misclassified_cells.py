"""The cells that a classifier gets wrong, as a table to read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from geneformer_ray.compute.scores import probabilities

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["MISCLASSIFIED", "misclassified_cells"]

MISCLASSIFIED = "misclassified.csv"


def misclassified_cells(
    cell_ids: Sequence[str],
    targets: NDArray[np.int64],
    logits: NDArray[np.floating],
    labels: Sequence[str],
    groups: Sequence[Any] | NDArray[Any] | None = None,
) -> pd.DataFrame:
    """List the cells whose predicted type is not their label, the most confident mistakes first.

    Parameters
    ----------
    cell_ids, targets, logits
        As predictions have them.
    labels
        Class names.
    groups
        Donor or library of each cell, where it is known.

    Returns
    -------
    Columns ``cell_id``, ``group`` (where known), ``true_label``, ``predicted_label``, ``probability_true``,
    ``probability_predicted``.
    """
    odds, predicted = probabilities(logits), logits.argmax(axis=1)
    everyone = np.arange(len(targets))
    names = np.array(labels, dtype=object)
    columns = {"cell_id": list(cell_ids)} | ({} if groups is None else {"group": list(groups)})
    table = pd.DataFrame(
        {
            **columns,
            "true_label": names[targets],
            "predicted_label": names[predicted],
            "probability_true": odds[everyone, targets],
            "probability_predicted": odds[everyone, predicted],
        }
    )
    wrong: pd.DataFrame = table[predicted != targets]
    return wrong.sort_values(["probability_predicted", "cell_id"], ascending=[False, True], ignore_index=True)
