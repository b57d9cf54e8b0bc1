"""The baseline beside every classifier: PCA and logistic regression on the very same encodings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = ["baseline_scores", "rank_features"]

COMPONENTS = 50


def rank_features(sequences: Sequence[NDArray[np.integer]], vocabulary: GeneVocabulary) -> sparse.csr_matrix:
    """Spread rank value encodings over genes: 1 for a cell's first gene falling to 0 behind its last, 0 where absent.

    Returns
    -------
    Sparse float32 matrix of shape (cells, vocabulary).
    """
    rows, columns, values = [], [], []
    special = np.fromiter(vocabulary.special_ids, dtype=np.int64)
    for row, ids in enumerate(sequences):
        genes = ids[~np.isin(ids, special)]
        rows.append(np.full(len(genes), row))
        columns.append(genes)
        values.append(1 - np.arange(len(genes)) / max(1, len(genes)))
    shape = (len(sequences), len(vocabulary))
    coordinates = (np.concatenate(rows), np.concatenate(columns))
    return sparse.csr_matrix((np.concatenate(values).astype(np.float32), coordinates), shape=shape)


def baseline_scores(
    train: Sequence[NDArray[np.integer]],
    targets: NDArray[np.int64],
    others: Sequence[Sequence[NDArray[np.integer]]],
    vocabulary: GeneVocabulary,
    classes: int,
    *,
    seed: int = 0,
) -> list[NDArray[np.float64]]:
    """Fit PCA + logistic regression on the training cells and score other cells.

    Parameters
    ----------
    train, targets
        The training cells' token ids, and their class numbers of shape (cells,).
    others
        Lists of cells to score.
    classes
        How many classes there are.

    Returns
    -------
    list of float64 arrays
        Log-probabilities of shape (cells, classes), one array a list in `others`.
    """
    features = rank_features(train, vocabulary)
    # ARPACK centres sparse features without spreading them: a dense matrix of many cells would not fit.
    components = min(COMPONENTS, min(features.shape) - 1)
    pca = PCA(components, svd_solver="arpack", random_state=seed)
    model = make_pipeline(pca, LogisticRegression(max_iter=2_000))
    model.fit(features, targets)
    results = []
    for sequences in others:
        scores = np.full((len(sequences), classes), -np.inf)
        scores[:, model.classes_] = model.predict_log_proba(rank_features(sequences, vocabulary))
        results.append(scores)
    return results
