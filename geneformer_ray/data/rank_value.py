"""Rank value encoding: a cell as its expressed genes, in order of count / total * 10,000 / non-zero median.

The definition is Geneformer's (Theodoris et al. 2023, doi:10.1038/s41586-023-06139-9). Everything is computed in
float64, left to right, and sorted by value, then token: upstream's sort leaves equal values in any order.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = ["EncodedCells", "RankValueEncoder", "non_zero_medians"]

TARGET_TOTAL = 10_000.0


@dataclass(frozen=True)
class EncodedCells:
    """Token sequences of several cells, one behind the other.

    Parameters
    ----------
    ids
        All token ids, int32, shape (tokens,).
    offsets
        Cell i is ``ids[offsets[i]:offsets[i + 1]]``; int64, shape (cells + 1,).
    genes_before_cut
        Known expressed genes of each cell before the cut at the input size; int64, shape (cells,).
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    genes_before_cut: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def cell(self, number: int) -> NDArray[np.int32]:
        """Give one cell's token ids."""
        return self.ids[self.offsets[number] : self.offsets[number + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens a cell."""
        return np.diff(self.offsets)


class RankValueEncoder:
    """Encode count matrices whose columns are named by `gene_names`.

    Parameters
    ----------
    vocabulary
        Tokens and medians.
    gene_names
        The name of each column; the vocabulary's own key, an Ensembl id with or without version, or a symbol.

    Raises
    ------
    InputError
        If the vocabulary has no medians, or knows none of the genes.
    """

    def __init__(self, vocabulary: GeneVocabulary, gene_names: Sequence[str]) -> None:
        if not vocabulary.medians:
            raise InputError("--vocabulary", "a vocabulary without medians", "one with medians, which encoding needs")
        keys = [vocabulary.find(name) for name in gene_names]
        usable = [key if key in vocabulary.medians else None for key in keys]
        self.unmatched = [name for name, key in zip(gene_names, usable, strict=True) if key is None]
        self.matched = len(gene_names) - len(self.unmatched)
        self.duplicates = [key for key, n in Counter(key for key in usable if key).items() if n > 1]
        if self.matched == 0:
            examples = ", ".join(self.unmatched[:3])
            raise InputError(
                "--gene-column", f"no known gene (found {examples}, ...)", "names that the vocabulary knows"
            )
        self.vocabulary = vocabulary
        # Columns of one gene are summed by a selection matrix: (columns x distinct genes), ordered by token.
        distinct = sorted({key for key in usable if key}, key=vocabulary.tokens.__getitem__)
        column_of = {key: number for number, key in enumerate(distinct)}
        rows = [i for i, key in enumerate(usable) if key]
        columns = [column_of[key] for key in usable if key]
        shape = (len(gene_names), len(distinct))
        self._select = sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=shape)
        self._tokens = np.array([vocabulary.tokens[key] for key in distinct], dtype=np.int32)
        self._medians = np.array([vocabulary.medians[key] for key in distinct])

    def encode(self, counts: sparse.sparray | NDArray[np.floating], totals: NDArray[np.floating]) -> EncodedCells:
        """Encode a block of cells.

        Parameters
        ----------
        counts
            Shape (cells, columns): raw counts.
        totals
            Shape (cells,): each cell's total over *all* its genes, known to the vocabulary or not.

        Returns
        -------
        EncodedCells
            With ``<cls>`` in front and ``<eos>`` behind where the vocabulary has them, cut to its input size.
        """
        known = sparse.csr_array(sparse.csr_array(counts, dtype=np.float64) @ self._select)
        known.sum_duplicates()
        known.eliminate_zeros()  # an explicit zero is no expression
        per_cell = np.diff(known.indptr).astype(np.int64)
        row = np.repeat(np.arange(known.shape[0]), per_cell)
        value = known.data / np.asarray(totals, dtype=np.float64)[row] * TARGET_TOTAL / self._medians[known.indices]
        order = np.lexsort((known.indices, -value, row))
        ranked = self._tokens[known.indices[order]]
        return self._assemble(ranked, per_cell)

    def _assemble(self, ranked: NDArray[np.int32], per_cell: NDArray[np.int64]) -> EncodedCells:
        cls_id, eos_id = self.vocabulary.cls_id, self.vocabulary.eos_id
        front, behind = int(cls_id is not None), int(eos_id is not None)
        kept = np.minimum(per_cell, self.vocabulary.max_length - front - behind)
        starts = np.concatenate([[0], np.cumsum(per_cell)])[:-1]
        offsets = np.concatenate([[0], np.cumsum(kept + front + behind)]).astype(np.int64)
        ids = np.empty(offsets[-1], dtype=np.int32)
        within = np.arange(kept.sum()) - np.repeat(np.cumsum(kept) - kept, kept)
        ids[np.repeat(offsets[:-1] + front, kept) + within] = ranked[np.repeat(starts, kept) + within]
        if cls_id is not None:
            ids[offsets[:-1]] = cls_id
        if eos_id is not None:
            ids[offsets[1:] - 1] = eos_id
        return EncodedCells(ids, offsets, per_cell)


def non_zero_medians(
    counts: sparse.csr_array, totals: NDArray[np.floating], gene_names: Sequence[str], *, min_cells: int = 1
) -> dict[str, float]:
    """Compute each gene's median of count / total * 10,000 over the cells that express it.

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
    csc = sparse.csc_array(counts, dtype=np.float64, copy=True)
    csc.sum_duplicates()
    csc.eliminate_zeros()
    normalised = csc.data / np.asarray(totals, dtype=np.float64)[csc.indices] * TARGET_TOTAL
    medians = {}
    for number, name in enumerate(gene_names):
        values = normalised[csc.indptr[number] : csc.indptr[number + 1]]
        if len(values) >= min_cells:
            medians[str(name)] = float(np.median(values))
    return medians
