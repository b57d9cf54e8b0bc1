"""Predicted classes of genes: for each occurrence in a cell, and over all cells for each gene."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from geneformer_ray.compute.encoder import attention_mask
from geneformer_ray.compute.scores import probabilities
from geneformer_ray.data.batching import length_batches, pad

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from geneformer_ray.compute.execution import Execution
    from geneformer_ray.compute.gene_classifier import GeneClassifier
    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = ["GenePredictions", "Occurrences", "predict_occurrences"]


@dataclass(frozen=True)
class Occurrences:
    """Genes as they stand in some cells, with what was predicted there.

    Parameters
    ----------
    cells
        The number of each one's cell among those given, rising; shape (occurrences,).
    tokens
        Its token id, shape (occurrences,).
    logits
        Shape (occurrences, classes).
    """

    cells: NDArray[np.int64]
    tokens: NDArray[np.int64]
    logits: NDArray[np.float32]


def predict_occurrences(
    model: GeneClassifier,
    blocks: Iterable[Sequence[NDArray[np.integer]]],
    tokens: NDArray[np.integer],
    pad_id: int,
    *,
    execution: Execution,
    tokens_per_batch: int = 16_384,
) -> Iterator[Occurrences]:
    """Predict the classes of genes wherever they occur, a block of cells at a time: no more is held at once.

    Parameters
    ----------
    model
        The classifier, on its device.
    blocks
        Lists of cells, as :func:`geneformer_ray.data.gene_folds.cell_blocks` gives them.
    tokens
        The genes asked for, shape (genes,). Cells without any of them cost nothing.
    pad_id
        The padding token's id.
    execution
        Device, dtype, threads.
    tokens_per_batch
        Padded tokens of a batch.

    Yields
    ------
    Occurrences
        One a block, in the order of its cells and, within each, of its genes.
    """
    model.eval()
    first = 0
    for sequences in blocks:
        holding = [number for number, ids in enumerate(sequences) if np.isin(ids, tokens).any()]
        parts = [
            _batch(model, sequences, batch, tokens, pad_id, execution)
            for batch in _batches(sequences, holding, tokens_per_batch)
        ]
        none = (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros((0, model.config.num_labels)))
        cells, found, logits = (np.concatenate(each) for each in zip(none, *parts, strict=True))
        order = np.argsort(cells, kind="stable")
        yield Occurrences(first + cells[order], found[order], logits[order].astype(np.float32))
        first += len(sequences)


def _batches(
    sequences: Sequence[NDArray[np.integer]], holding: list[int], tokens_per_batch: int
) -> Iterator[NDArray[np.int64]]:
    numbers = np.array(holding, dtype=np.int64)
    lengths = np.array([len(sequences[number]) for number in holding], dtype=np.int64)
    for batch in length_batches(lengths, tokens_per_batch):
        yield numbers[batch]


@torch.inference_mode()
def _batch(
    model: GeneClassifier,
    sequences: Sequence[NDArray[np.integer]],
    batch: NDArray[np.int64],
    tokens: NDArray[np.integer],
    pad_id: int,
    execution: Execution,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    ids, real = pad([sequences[number] for number in batch], pad_id)
    at = np.isin(ids, tokens) & (np.arange(ids.shape[1]) < real[:, None])
    ids_BL = torch.from_numpy(ids).to(execution.device)
    mask_BL = attention_mask(torch.from_numpy(real).to(execution.device), ids_BL.shape[1])
    with execution.autocast():
        logits_PC = model(ids_BL, mask_BL, torch.from_numpy(at).to(execution.device))
    return batch[np.nonzero(at)[0]], ids[at], logits_PC.float().cpu().numpy()


class GenePredictions:
    """Classes predicted for genes over all cells that hold them.

    A gene's probabilities are the mean over its occurrences of the probabilities there. Each cell has one bounded vote,
    and the mean is the probability that a cell drawn at random gives. The mean of log-probabilities would take cells
    for independent witnesses, and a single one that is sure and wrong would outvote all others. (Upstream does not
    aggregate: it scores occurrences, among which a gene counts as often as cells hold it.)

    Parameters
    ----------
    tokens
        The genes, each once; shape (genes,).
    classes
        How many classes there are.
    """

    def __init__(self, tokens: NDArray[np.integer], classes: int) -> None:
        self.tokens = np.sort(np.asarray(tokens, dtype=np.int64))
        self.cells_G = np.zeros(len(self.tokens), dtype=np.int64)
        self.sums_GC = np.zeros((len(self.tokens), classes))

    def add(self, tokens: NDArray[np.integer], logits: NDArray[np.floating]) -> None:
        """Add occurrences: token ids of shape (occurrences,), each of a gene, and logits (occurrences, classes)."""
        gene = np.searchsorted(self.tokens, tokens)
        if not np.array_equal(self.tokens[np.minimum(gene, len(self.tokens) - 1)], tokens):
            raise ValueError("an occurrence of a gene that was not asked for")
        self.cells_G += np.bincount(gene, minlength=len(self.tokens))
        for number, column in enumerate(probabilities(logits).T):
            self.sums_GC[:, number] += np.bincount(gene, weights=column, minlength=len(self.tokens))

    def merge(self, other: GenePredictions) -> None:
        """Add what another worker has of the same genes."""
        if not np.array_equal(self.tokens, other.tokens):
            raise ValueError("predictions of other genes")
        self.cells_G += other.cells_G
        self.sums_GC += other.sums_GC

    @property
    def probabilities_GC(self) -> NDArray[np.float64]:
        """Each gene's probabilities, shape (genes, classes); NaN for one that no cell holds."""
        with np.errstate(invalid="ignore"):
            return np.asarray(self.sums_GC / self.cells_G[:, None])

    def table(
        self,
        tokens: NDArray[np.integer],
        targets: NDArray[np.integer],
        labels: Sequence[str],
        vocabulary: GeneVocabulary,
    ) -> pd.DataFrame:
        """Give the predictions of genes as a table, in the order of `tokens`.

        Parameters
        ----------
        tokens, targets
            The genes and their class numbers, as a :class:`geneformer_ray.data.gene_folds.GeneSplit` has them.
        labels
            The class names.
        vocabulary
            The model's.

        Returns
        -------
        Columns ``gene``, ``symbol``, ``cells``, ``true_class``, ``predicted_class`` (empty where no cell holds the
        gene), and ``probability_CLASS`` of each class.
        """
        at = np.searchsorted(self.tokens, tokens)
        odds, cells = self.probabilities_GC[at], self.cells_G[at]
        genes = [vocabulary.names[token] for token in tokens]
        best = np.where(cells > 0, np.nan_to_num(odds).argmax(axis=1), -1)
        return pd.DataFrame(
            {
                "gene": genes,
                "symbol": [vocabulary.symbol(gene) for gene in genes],
                "cells": cells,
                "true_class": [labels[target] for target in targets],
                "predicted_class": [labels[number] if number >= 0 else "" for number in best],
                **{f"probability_{label}": odds[:, number] for number, label in enumerate(labels)},
            }
        )
