"""The baseline beside every gene classifier: logistic regression on how often a gene is found, and where it ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from geneformer_ray.data.vocabulary import gene_mask

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = ["FEATURES", "GeneOccurrence", "gene_baseline"]

FEATURES = ("frequency", "mean_rank")


@dataclass(frozen=True)
class GeneOccurrence:
    """In how many cells each token of a vocabulary stands, and where.

    Parameters
    ----------
    cells
        Cells counted.
    held_V
        How many of them hold each gene, shape (vocabulary,); 0 for special tokens.
    rank_sum_V
        The sum over these of the gene's relative rank: 0 for a cell's first gene, rising to 1 behind its last.
    """

    cells: int
    held_V: NDArray[np.int64]
    rank_sum_V: NDArray[np.float64]

    @classmethod
    def count(cls, blocks: Iterable[Sequence[NDArray[np.integer]]], vocabulary: GeneVocabulary) -> GeneOccurrence:
        """Read cells once, a block at a time.

        Parameters
        ----------
        blocks
            Lists of cells, as :func:`geneformer_ray.data.gene_folds.cell_blocks` gives them.
        vocabulary
            The one that they are encoded with.
        """
        cells, held_V, rank_sum_V = 0, np.zeros(len(vocabulary), dtype=np.int64), np.zeros(len(vocabulary))
        for sequences in blocks:
            cells += len(sequences)
            tokens = np.concatenate([np.zeros(0, dtype=np.int64), *sequences])
            is_gene = gene_mask(vocabulary, tokens)
            cell = np.repeat(np.arange(len(sequences)), [len(ids) for ids in sequences])[is_gene]
            genes_in = np.bincount(cell, minlength=len(sequences))
            # Genes of a cell lie one behind the other: count from where its first one is.
            ranks = (np.arange(len(cell)) - np.repeat(np.cumsum(genes_in) - genes_in, genes_in)) / genes_in[cell]
            held_V += np.bincount(tokens[is_gene], minlength=len(vocabulary))
            rank_sum_V += np.bincount(tokens[is_gene], weights=ranks, minlength=len(vocabulary))
        return cls(cells, held_V, rank_sum_V)

    def features(self, tokens: NDArray[np.integer]) -> NDArray[np.float64]:
        """Give the `FEATURES` of genes, shape (genes, 2): the share of cells that hold it, and its mean rank in those.

        A gene that no cell holds ranks last.
        """
        held = self.held_V[tokens]
        mean_rank = np.where(held > 0, self.rank_sum_V[tokens] / np.maximum(1, held), 1.0)
        return np.stack([held / max(1, self.cells), mean_rank], axis=1)


def gene_baseline(
    train_GF: NDArray[np.float64], targets: NDArray[np.integer], others_GF: NDArray[np.float64], classes: int
) -> NDArray[np.float64]:
    """Fit logistic regression on the training genes' standardised features, and predict other genes.

    Parameters
    ----------
    train_GF, targets
        Features of shape (genes, features), and class numbers of shape (genes,).
    others_GF
        Features of the genes to predict.
    classes
        How many classes there are.

    Returns
    -------
    Probabilities of shape (genes, classes).
    """
    # Here, for its import takes a second that no worker needs to spend.
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2_000))
    model.fit(train_GF, targets)
    odds = np.zeros((len(others_GF), classes))
    odds[:, model.classes_] = model.predict_proba(others_GF)
    return odds
