"""How well hidden genes are named: a masked-gene model beside a baseline that only knows which genes are frequent.

Of every cell 15 % of its genes, drawn by seed and the cell's number, are replaced by ``<mask>``: all of them, without
the swapped and the kept genes of training, which a model could name by copying. Special tokens are never drawn. What is
hidden thus depends neither on batches nor on workers, and model and baseline answer for the same positions of the same
cells.

- *Accuracy* is the share of hidden genes that are named first, *top-10 accuracy* the share among the ten named first.
  The model ranks the whole vocabulary: nothing keeps it from naming what stands elsewhere in the cell.
- The *frequency baseline* ranks genes by the number of training cells that have them, and leaves out those that the
  cell shows. It names the same genes for every hidden position of a cell.
- Ties go to the lower token id.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from geneformer_ray.compute.encoder import attention_mask
from geneformer_ray.compute.pretraining import masked_genes
from geneformer_ray.data.batching import length_batches, pad
from geneformer_ray.data.vocabulary import gene_mask

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from geneformer_ray.compute.execution import Execution
    from geneformer_ray.compute.pretraining import MaskedGeneModel
    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = ["NAMED", "MaskedSums", "count_genes", "frequency_ranking", "hidden_positions", "score_masked_genes"]

NAMED = 10
# Rows of logits that are ranked at once: each is as wide as the vocabulary.
ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class MaskedSums:
    """Counts over some cells; those of other cells and other workers can be added."""

    cells: int = 0
    hidden: int = 0
    first: int = 0
    among: int = 0
    baseline_first: int = 0
    baseline_among: int = 0

    def __add__(self, other: MaskedSums) -> MaskedSums:
        return MaskedSums(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def scores(self) -> dict[str, float]:
        """Give the shares of hidden genes, and of how many; all 0 where no gene was hidden."""
        hidden = max(1, self.hidden)
        return {
            "masked_accuracy": self.first / hidden,
            "masked_top10_accuracy": self.among / hidden,
            "baseline_accuracy": self.baseline_first / hidden,
            "baseline_top10_accuracy": self.baseline_among / hidden,
            "masked_genes": self.hidden,
            "cells": self.cells,
        }


def count_genes(cells: Iterable[NDArray[np.integer]], vocabulary: GeneVocabulary) -> NDArray[np.int64]:
    """Count the cells that have each token, shape (vocabulary,); counts of several parts of the cells can be added."""
    counts = np.zeros(len(vocabulary), dtype=np.int64)
    for ids in cells:
        counts[ids] += 1  # once, however often a token stands there
    return counts


def frequency_ranking(counts: NDArray[np.int64], vocabulary: GeneVocabulary) -> NDArray[np.int64]:
    """Rank the genes by how many training cells have them, the most frequent first; special tokens are left out."""
    genes = np.flatnonzero(gene_mask(vocabulary, np.arange(len(counts))))
    return genes[np.argsort(-counts[genes], kind="stable")]


def hidden_positions(ids: NDArray[np.integer], number: int, vocabulary: GeneVocabulary, seed: int) -> NDArray[np.int64]:
    """Draw the positions of a cell that are hidden, in order: a function of its genes, its number and the seed."""
    genes = np.flatnonzero(gene_mask(vocabulary, ids))
    if not len(genes):
        return genes
    return np.sort(np.random.default_rng([seed, number]).choice(genes, masked_genes(len(genes)), replace=False))


@torch.inference_mode()
def score_masked_genes(
    model: MaskedGeneModel,
    cells: Sequence[NDArray[np.integer]],
    numbers: Sequence[int] | NDArray[np.int64],
    ranking: NDArray[np.int64],
    vocabulary: GeneVocabulary,
    *,
    seed: int,
    execution: Execution,
    tokens_per_batch: int = 8_192,
) -> MaskedSums:
    """Hide genes of some cells, and count how many are named.

    What is held at once does not grow with the cells: give them some thousands at a time, and add up.

    Parameters
    ----------
    model
        On the device of `execution`.
    cells, numbers
        Token ids, and what tells a cell from all others in every call: its row number.
    ranking
        What :func:`frequency_ranking` gives.
    vocabulary
        The model's.
    seed
        Of what is hidden.
    execution
        Device, dtype, threads.
    tokens_per_batch
        Padded tokens computed at once.
    """
    model.eval()
    sums = MaskedSums()
    for batch in length_batches(np.array([len(ids) for ids in cells]), tokens_per_batch):
        ids, lengths = pad([cells[i] for i in batch], vocabulary.pad_id)
        hidden_BL = np.zeros(ids.shape, dtype=bool)
        for row, i in enumerate(batch):
            hidden_BL[row, hidden_positions(cells[i], int(numbers[i]), vocabulary, seed)] = True
        seen = np.where(hidden_BL, vocabulary.mask_id, ids)
        ids_BL, seen_BL, masked_BL = (torch.from_numpy(one).to(execution.device) for one in (ids, seen, hidden_BL))
        mask_BL = attention_mask(torch.from_numpy(lengths).to(execution.device), ids.shape[1])
        with execution.autocast():
            logits_MV = model(seen_BL, mask_BL, masked_BL)
        parts = zip(logits_MV.split(ROWS_AT_ONCE), ids_BL[masked_BL].split(ROWS_AT_ONCE), strict=True)
        place_M = torch.cat([_places(*part) for part in parts])
        baseline = [_named_by_frequency(*row, ranking) for row in zip(ids, seen, hidden_BL, strict=True)]
        first, among = np.sum(baseline, axis=0).tolist()
        sums += MaskedSums(
            len(batch), int(hidden_BL.sum()), int((place_M == 0).sum()), int((place_M < NAMED).sum()), first, among
        )
    return sums


def _places(logits_MV: torch.Tensor, truth_M: torch.Tensor) -> torch.Tensor:
    """Count the tokens named before the truth, shape (positions,); all of them where the logits are no numbers."""
    truth_M1 = truth_M[:, None]
    own_M1 = logits_MV.gather(1, truth_M1)
    behind_MV = torch.arange(logits_MV.shape[1], device=logits_MV.device)[None, :] >= truth_M1
    # What is not known to come after it comes before it: a nan must not pass for the best.
    after_MV = (logits_MV < own_M1) | ((logits_MV == own_M1) & behind_MV)
    return (~after_MV).sum(dim=1)


def _named_by_frequency(
    ids_L: NDArray[np.int64], seen_L: NDArray[np.int64], hidden_L: NDArray[np.bool_], ranking: NDArray[np.int64]
) -> tuple[int, int]:
    """Count a cell's hidden genes that the baseline names first, and among the first ten."""
    # No more of the ranking is needed than what the cell shows could take out of it.
    front = ranking[: len(seen_L) + NAMED]
    named = front[~np.isin(front, seen_L)][:NAMED]
    truth = ids_L[hidden_L]
    return int(np.isin(truth, named[:1]).sum()), int(np.isin(truth, named).sum())
