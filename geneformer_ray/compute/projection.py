"""Two-dimensional maps of embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from sklearn.decomposition import PCA

from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["compute_umap"]

PCA_DIMENSIONS = 50
NEIGHBOURS = 15
FEWEST_CELLS = 5


def compute_umap(embeddings: ArrayLike, seed: int = 0) -> NDArray[np.float32]:
    """Project embeddings to two dimensions with UMAP (McInnes, Healy and Melville 2018).

    Parameters
    ----------
    embeddings
        One row an embedding, shape (N, D), any float type.
    seed
        Seed of PCA and UMAP; the same seed gives the same map.

    Returns
    -------
    Coordinates, float32, shape (N, 2). Distances on the map have no unit, and those between clusters mean
    little.

    Raises
    ------
    InputError
        `embeddings` is not a matrix of finite numbers or has fewer than 5 rows, or umap-learn is missing.
    """
    matrix = np.asarray(embeddings, dtype=np.float32)
    if matrix.ndim != 2 or matrix.shape[0] < FEWEST_CELLS:
        raise InputError("embeddings", f"shape {matrix.shape}", f"a matrix of {FEWEST_CELLS} rows or more")
    if not np.isfinite(matrix).all():
        raise InputError("embeddings", "a number that is not finite", "finite numbers")
    # Here, because importing umap compiles for seconds, and only a report needs it.
    try:
        from umap import UMAP
    except ModuleNotFoundError as error:
        raise InputError("umap", "umap-learn is not installed", "the extra: geneformer-ray[demo]") from error

    if matrix.shape[1] > PCA_DIMENSIONS:
        components = min(PCA_DIMENSIONS, matrix.shape[0])
        matrix = PCA(n_components=components, random_state=seed).fit_transform(matrix)
    neighbours = min(NEIGHBOURS, matrix.shape[0] - 1)
    # A seed makes UMAP single-threaded in any case; n_jobs=1 says so, and spares its warning. The spectral
    # start needs more cells than the smallest inputs have.
    start = "spectral" if matrix.shape[0] > NEIGHBOURS else "random"
    reducer = UMAP(n_neighbors=neighbours, init=start, random_state=seed, n_jobs=1)
    return np.asarray(reducer.fit_transform(matrix), dtype=np.float32)
