"""Rank value encoding: a cell as its expressed genes, in order of count / total * 10,000 / non-zero median.

The definition is Geneformer's (Theodoris et al. 2023, doi:10.1038/s41586-023-06139-9). Everything is computed in
float64, left to right, and sorted by value, then token: upstream's sort leaves equal values in any order.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from geneformer_ray.data.expression import TARGET_TOTAL
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = ["EncodedCells", "RankValueEncoder"]

UNKNOWN = -1
ENTRIES_AT_ONCE = 2**17


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
        self.matches = vocabulary.match(gene_names)
        usable = [key if key in vocabulary.medians else None for key in self.matches.keys]
        self.unmatched = [name for name, key in zip(gene_names, usable, strict=True) if key is None]
        self.matched = len(gene_names) - len(self.unmatched)
        columns_of = Counter(key for key in usable if key)
        self.duplicates = [key for key, columns in columns_of.items() if columns > 1]
        if self.matched == 0:
            examples = ", ".join(self.unmatched[:3])
            raise InputError(
                "--gene-column", f"no known gene (found {examples}, ...)", "names that the vocabulary knows"
            )
        self.vocabulary = vocabulary
        # Genes are numbered by token: equal values are then in order when their numbers are.
        distinct = sorted(columns_of, key=vocabulary.tokens.__getitem__)
        number_of = {key: number for number, key in enumerate(distinct)}
        self._gene_of_column = np.array([number_of[key] if key else UNKNOWN for key in usable], dtype=np.int32)
        self._all_known = self.matched == len(gene_names)
        self._tokens = np.array([vocabulary.tokens[key] for key in distinct], dtype=np.int32)
        self._medians = np.array([vocabulary.medians[key] for key in distinct])
        self._is_summed = np.array([*(columns_of[key] > 1 for key in distinct), False])
        self._number_bits = np.uint64(max(1, (len(distinct) - 1).bit_length()))

    @property
    def room(self) -> int:
        """How many genes of a cell fit into the input size, beside the special tokens."""
        vocabulary = self.vocabulary
        return vocabulary.max_length - (vocabulary.cls_id is not None) - (vocabulary.eos_id is not None)

    def encode(self, counts: sparse.sparray | NDArray[np.floating], totals: NDArray[np.floating]) -> EncodedCells:
        """Encode a block of cells.

        Parameters
        ----------
        counts
            Shape (cells, columns): raw counts, finite and not negative.
        totals
            Shape (cells,): each cell's total over *all* its genes, known to the vocabulary or not; above 0 where the
            cell has counts.

        Returns
        -------
        EncodedCells
            With ``<cls>`` in front and ``<eos>`` behind where the vocabulary has them, cut to its input size.

        Raises
        ------
        InputError
            If a normalised value is not finite or not above 0: such counts or totals have no rank.
        """
        matrix = sparse.csr_array(counts)
        if not matrix.has_canonical_format:
            # One entry stored in pieces is one count; summed in float64, for small integers would overflow.
            matrix = sparse.csr_array(matrix, dtype=np.float64, copy=True)
            matrix.sum_duplicates()
        per_cell = np.asarray(totals, dtype=np.float64)
        # A few cells at a time, so that what is computed on the way stays in the processor's cache.
        cuts = _cut_by_entries(matrix.indptr, ENTRIES_AT_ONCE)
        parts = [self._encode_rows(matrix, per_cell, start, stop) for start, stop in pairwise(cuts)]
        lengths = np.concatenate([part.lengths for part in parts]) if parts else np.zeros(0, np.int64)
        return EncodedCells(
            np.concatenate([part.ids for part in parts]) if parts else np.zeros(0, np.int32),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            np.concatenate([part.genes_before_cut for part in parts]) if parts else np.zeros(0, np.int64),
        )

    def _encode_rows(
        self, matrix: sparse.csr_array, totals: NDArray[np.float64], start: int, stop: int
    ) -> EncodedCells:
        offsets = matrix.indptr[start : stop + 1].astype(np.int64)
        entries = slice(offsets[0], offsets[-1])
        offsets -= offsets[0]
        # take(mode="clip") passes over numpy's own check of the indices, which a CSR matrix has made already.
        gene = self._gene_of_column.take(matrix.indices[entries], mode="clip")
        count = matrix.data[entries].astype(np.float64)
        if self.duplicates:
            self._sum_columns_of_a_gene(gene, count, offsets)
        keep = count != 0  # an explicit zero is no expression
        if not self._all_known:
            keep &= gene != UNKNOWN
        if not keep.all():
            gene, count = gene[keep], count[keep]
            offsets = np.concatenate([[0], np.cumsum(keep)])[offsets]
        value = count
        value /= np.repeat(totals[start:stop], np.diff(offsets))
        value *= TARGET_TOTAL
        value /= self._medians.take(gene, mode="clip")
        if len(value) and not (value.min() > 0 and np.isfinite(value.max())):
            raise InputError("counts", "values that are negative, infinite or NaN", "raw counts and totals above 0")
        return self._assemble(self._tokens.take(self._rank(value, gene, offsets), mode="clip"), offsets)

    def _sum_columns_of_a_gene(
        self, gene: NDArray[np.int32], count: NDArray[np.float64], offsets: NDArray[np.int64]
    ) -> None:
        """Put the sum of a gene's columns into the first of them and zeros into the others, in place."""
        which = np.flatnonzero(self._is_summed.take(gene, mode="wrap"))  # the last one stands for UNKNOWN
        if len(which) == 0:
            return
        cell = np.searchsorted(offsets, which, side="right")
        pair = cell * len(self._tokens) + gene[which]
        order = np.argsort(pair, kind="stable")
        which, pair = which[order], pair[order]
        first = np.flatnonzero(np.concatenate([[True], pair[1:] != pair[:-1]]))
        sums = np.add.reduceat(count[which], first)
        count[which] = 0
        count[which[first]] = sums

    def _rank(
        self, value: NDArray[np.float64], gene: NDArray[np.int32], offsets: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Give the genes of each cell by falling value, equal values by rising number; shape (entries,).

        numpy sorts plain integers several times faster than it sorts indices, so a value and its gene share 64 bits: a
        positive float64's bits rise with it, and its lowest bits make room for the gene's number. Cells in which those
        bits might have decided are sorted again in full.
        """
        bits = self._number_bits
        lowest = (np.uint64(1) << bits) - np.uint64(1)
        key = ~value.view(np.uint64)
        key &= ~lowest
        key |= gene.view(np.uint32)
        for start, stop in pairwise(offsets.tolist()):
            key[start:stop].sort()
        ranked = (key & lowest).astype(np.int64)
        alike = np.flatnonzero((key[1:] ^ key[:-1]) <= lowest) + 1
        if len(alike):
            self._settle(alike, ranked, value, gene, offsets)
        return ranked

    def _settle(
        self,
        alike: NDArray[np.int64],
        ranked: NDArray[np.int64],
        value: NDArray[np.float64],
        gene: NDArray[np.int32],
        offsets: NDArray[np.int64],
    ) -> None:
        """Sort the cells again, in place, that hold neighbours alike in their leading bits but not equal.

        Parameters
        ----------
        alike
            Positions of `ranked` whose leading bits are those of the position before.
        """
        cell = np.searchsorted(offsets, alike, side="right") - 1
        inside = alike > offsets[cell]  # neighbours of one cell, not the last of one and the first of the next
        alike, cell = alike[inside], cell[inside]
        value_of = np.empty(len(self._tokens))
        starts = np.flatnonzero(np.diff(cell, prepend=-1))
        for number, later in zip(cell[starts].tolist(), np.split(alike, starts[1:]), strict=False):
            entries = slice(offsets[number], offsets[number + 1])
            value_of[gene[entries]] = value[entries]
            if (value_of[ranked[later]] != value_of[ranked[later - 1]]).any():
                ranked[entries] = gene[entries][np.lexsort((gene[entries], -value[entries]))]

    def _assemble(self, ranked: NDArray[np.int32], offsets: NDArray[np.int64]) -> EncodedCells:
        """Cut the ranked tokens of each cell to size and put special tokens around them."""
        cls_id, eos_id = self.vocabulary.cls_id, self.vocabulary.eos_id
        front, behind = int(cls_id is not None), int(eos_id is not None)
        per_cell = np.diff(offsets)
        kept = np.minimum(per_cell, self.room)
        if (kept < per_cell).any():
            within = np.arange(len(ranked)) - np.repeat(offsets[:-1], per_cell)
            ranked = ranked[within < self.room]
        ends = np.concatenate([[0], np.cumsum(kept + front + behind)]).astype(np.int64)
        if not front and not behind:
            return EncodedCells(ranked, ends, per_cell)
        ids = np.empty(ends[-1], dtype=np.int32)
        is_gene = np.ones(ends[-1], dtype=bool)
        if cls_id is not None:
            ids[ends[:-1]] = cls_id
            is_gene[ends[:-1]] = False
        if eos_id is not None:
            ids[ends[1:] - 1] = eos_id
            is_gene[ends[1:] - 1] = False
        ids[is_gene] = ranked
        return EncodedCells(ids, ends, per_cell)


def _cut_by_entries(indptr: NDArray[np.integer], entries: int) -> list[int]:
    """Cut rows into runs of about so many entries, at least one row each."""
    cuts = [0]
    while cuts[-1] < len(indptr) - 1:
        fits = int(np.searchsorted(indptr, indptr[cuts[-1]] + entries, side="right")) - 1
        cuts.append(max(fits, cuts[-1] + 1))
    return cuts
