"""Normalised expression: count / total * 10,000, and its median over the cells that express a gene."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from geneformer_ray.data.median_sketch import MedianSketch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["TARGET_TOTAL", "expressed_values", "non_zero_medians"]

TARGET_TOTAL = 10_000.0


def expressed_values(
    counts: sparse.csr_array, totals: NDArray[np.floating], gene_of_column: NDArray[np.integer], genes: int
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Give what a median is taken of: count / total * 10,000 of every gene that a cell expresses.

    Parameters
    ----------
    counts
        Shape (cells, columns): raw counts; entries stored twice are one count, and a stored zero is no expression.
    totals
        Shape (cells,): each cell's total over all its genes.
    gene_of_column
        Shape (columns,): the gene of each column, -1 for none; columns of one gene are summed within a cell.
    genes
        How many genes there are.

    Returns
    -------
    tuple
        Gene and value, shape (values,) each; float64, left to right, as cells are encoded.
    """
    columns = np.flatnonzero(gene_of_column >= 0)
    select = sparse.csr_array(
        (np.ones(len(columns)), (columns, gene_of_column[columns])), shape=(len(gene_of_column), genes)
    )
    summed = sparse.csr_array(sparse.csr_array(counts, dtype=np.float64) @ select)
    row = np.repeat(np.arange(summed.shape[0]), np.diff(summed.indptr))
    expressed = summed.data != 0  # scipy's product happens to leave zeros out, but promises nothing
    gene = summed.indices[expressed].astype(np.int32)
    return gene, summed.data[expressed] / np.asarray(totals, dtype=np.float64)[row[expressed]] * TARGET_TOTAL


def non_zero_medians(
    counts: sparse.csr_array, totals: NDArray[np.floating], gene_names: Sequence[str], *, min_cells: int = 1
) -> dict[str, float]:
    """Compute each gene's median of count / total * 10,000 over the cells that express it, of cells in memory.

    Parameters
    ----------
    counts
        Shape (cells, genes), raw counts.
    totals
        Shape (cells,): totals over all genes.
    gene_names
        The genes' names, each once.
    min_cells
        Leave out genes expressed in fewer cells.
    """
    sketch = MedianSketch(len(gene_names), exact_values=counts.nnz)  # all of them: the cells are in memory anyway
    sketch.add(*expressed_values(counts, totals, np.arange(len(gene_names)), len(gene_names)))
    cells, medians = sketch.medians()
    enough = cells >= max(1, min_cells)
    return {str(name): float(medians[number]) for number, name in enumerate(gene_names) if enough[number]}
