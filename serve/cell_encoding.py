"""From counts or token ids to the sequences that a model takes, with the code that encodes files.

It runs in the process that parses uploads as well, which loads neither torch nor a web server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from geneformer_ray.data.count_values import impossible_totals, row_sums
from geneformer_ray.data.rank_value import EncodedCells, RankValueEncoder
from geneformer_ray.data.vocabulary import GeneVocabulary, gene_mask
from geneformer_ray.errors import InputError

__all__ = ["CellEncoder", "EncodedCell", "ListedCounts", "unknown_shares"]

LISTS_REMEMBERED = 4


@dataclass(frozen=True)
class EncodedCell:
    """A cell as the model takes it.

    Parameters
    ----------
    input_ids
        Token ids, int32, shape (length,); empty where `reason` says why.
    unknown_share
        The share of its expressed genes that the vocabulary does not know.
    cell_id
        What its answer is called.
    reason
        Why it cannot be encoded, for a cell of a file: the others of the file are answered all the same.
    """

    input_ids: NDArray[np.int32]
    unknown_share: float = 0.0
    cell_id: str = ""
    reason: str | None = None


@dataclass(frozen=True)
class ListedCounts:
    """A cell's counts, by their places in a list of genes.

    Parameters
    ----------
    columns
        Places in the list, each once, int64, shape (genes,).
    values
        The raw counts there, float64, shape (genes,), finite and not negative.
    total
        The cell's total over all its genes; by default the sum of `values`.
    whole
        Refuse counts that are not whole numbers.
    field
        Named in errors.
    """

    columns: NDArray[np.int64]
    values: NDArray[np.float64]
    total: float | None = None
    whole: bool = True
    field: str = "counts"

    @property
    def sum(self) -> float:
        """The total that ranks are made with."""
        return float(self.values.sum()) if self.total is None else self.total

    def check(self) -> None:
        """Refuse what has no ranks, or ranks that mean nothing."""
        if self.whole and not np.equal(np.floor(self.values), self.values).all():
            raise InputError(self.field, "fractions", "raw counts, or allow_non_integer for corrected ones")
        if not (self.values > 0).any():
            raise InputError(self.field, "no count above 0", "a cell with at least one expressed gene")
        sums = self.values.sum()
        if impossible_totals(np.array([self.sum]), np.array([sums]), fractions_allowed=not self.whole)[0]:
            got = f"a total of {self.sum:.10g} for counts that add up to {sums:.10g}"
            raise InputError(self.field, got, "the total over all genes, never below the sum over some of them")


class CellEncoder:
    """Encodes cells for one model.

    Parameters
    ----------
    vocabulary
        The model's, whose `max_length` is the model's input size.
    """

    def __init__(self, vocabulary: GeneVocabulary) -> None:
        self.vocabulary = vocabulary
        self._remembered = lru_cache(LISTS_REMEMBERED)(partial(RankValueEncoder, vocabulary))

    def check_encodes_counts(self, field: str) -> None:
        """Refuse counts where the vocabulary cannot encode them."""
        if not self.vocabulary.medians:
            takes = "input_ids only: this model's vocabulary has no medians, which encoding needs"
            raise InputError(field, "counts", takes)

    def encode(
        self, genes: Sequence[str], cells: Sequence[ListedCounts], field: str = "genes", *, remember: bool = False
    ) -> list[EncodedCell]:
        """Encode cells whose counts refer to one list of genes, which is looked up once.

        Parameters
        ----------
        genes
            Names: the vocabulary's key, an Ensembl id or a symbol.
        cells
            Their counts.
        field
            Where the list stands, for errors.
        remember
            Keep what was found for the next request: a client's requests mostly name the same genes.
        """
        if not cells:
            return []
        self.check_encodes_counts(cells[0].field)
        for cell in cells:
            cell.check()
        try:
            encoder = self._remembered(tuple(genes)) if remember else RankValueEncoder(self.vocabulary, genes)
        except InputError as error:
            raise InputError(field, error.got, error.takes) from error
        sizes = [len(cell.columns) for cell in cells]
        parts = (
            np.concatenate([cell.values for cell in cells]),
            np.concatenate([cell.columns for cell in cells]),
            np.concatenate([[0], np.cumsum(sizes)]),
        )
        matrix = sparse.csr_array(parts, shape=(len(cells), len(genes)))
        encoded = self._encode_rows(encoder, matrix, cells)
        shares = unknown_shares(encoder, matrix)
        for cell, known in zip(cells, encoded.genes_before_cut.tolist(), strict=True):
            if known == 0:
                raise InputError(cell.field, "no expressed gene that the vocabulary knows", "at least one")
        return [EncodedCell(encoded.cell(number), float(shares[number])) for number in range(len(cells))]

    @staticmethod
    def _encode_rows(
        encoder: RankValueEncoder, matrix: sparse.csr_array, cells: Sequence[ListedCounts]
    ) -> EncodedCells:
        totals = np.array([cell.sum for cell in cells])
        try:
            return encoder.encode(matrix, totals)
        except InputError:
            # One cell's counts have no ranks: whose they are is found out now, and not for every good request.
            for number, cell in enumerate(cells):
                try:
                    encoder.encode(matrix[[number]], totals[[number]])
                except InputError as error:
                    raise InputError(cell.field, error.got, error.takes) from error
            raise

    def accept(self, input_ids: Sequence[int], *, field: str = "input_ids") -> EncodedCell:
        """Check a cell given as token ids, and adapt it where it was encoded with the vocabulary that this one extends.

        A wrong sequence would get an answer that looks like any other, so it is refused here.
        """
        vocabulary, ids = self.vocabulary, np.asarray(input_ids, dtype=np.int64)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(vocabulary):
            wrong = ids[(ids < 0) | (ids >= len(vocabulary))][0]
            raise InputError(
                field, f"token id {wrong}", f"ids from 0 and below {len(vocabulary)}, the vocabulary's size"
            )
        if len(ids) > vocabulary.max_length:
            raise InputError(field, f"{len(ids)} tokens", f"up to {vocabulary.max_length}, the model's input size")
        try:
            adapted = vocabulary.adapt(ids, vocabulary.parent_digest)
        except InputError as error:
            raise InputError(field, error.got, error.takes) from error
        self._check_order(adapted, field)
        return EncodedCell(adapted)

    def _check_order(self, ids: NDArray[np.int32], field: str) -> None:
        vocabulary = self.vocabulary
        is_gene = gene_mask(vocabulary, ids)
        genes = ids[is_gene]
        if len(genes) == 0:
            raise InputError(field, "no gene", "at least one")
        if len(np.unique(genes)) < len(genes):
            values, times = np.unique(genes, return_counts=True)
            raise InputError(field, f"token id {values[times > 1][0]} twice", "each gene once")
        front = int(vocabulary.cls_id is not None)
        behind = int(vocabulary.eos_id is not None and ids[-1] == vocabulary.eos_id)
        if len(genes) != len(ids) - front - behind:
            misplaced = np.flatnonzero(~is_gene[front:]) + front
            name = vocabulary.names[int(ids[misplaced[0]])]
            raise InputError(f"{field}[{misplaced[0]}]", name, "a gene: special tokens only at the ends, no padding")


def unknown_shares(encoder: RankValueEncoder, counts: sparse.csr_array) -> NDArray[np.float64]:
    """Give the share of each cell's expressed genes that the vocabulary does not encode, shape (cells,).

    Genes are counted as the matrix names them; a cell without any has none that is unknown.
    """
    medians = encoder.vocabulary.medians
    unknown = np.array([key is None or key not in medians for key in encoder.matches.keys], dtype=np.float64)
    expressed = (counts.data > 0).astype(np.float64)
    parts = (counts.indices, counts.indptr)
    of_all = row_sums(sparse.csr_array((expressed, *parts), shape=counts.shape))
    of_unknown = row_sums(sparse.csr_array((expressed * unknown[counts.indices], *parts), shape=counts.shape))
    return np.asarray(of_unknown / np.maximum(of_all, 1.0))
