"""Cell and gene embeddings at a chosen layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from geneformer_ray.data.batching import length_batches
from geneformer_ray.data.vocabulary import gene_mask
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from geneformer_ray.compute.encoder import Encoder
    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = ["EMBEDDINGS", "cell_embeddings", "check_embedding", "gene_embedding_sums"]

EMBEDDINGS = ("mean", "cls")
TOKENS_PER_BATCH = 16_384


def check_embedding(embedding: str, vocabulary: GeneVocabulary) -> str:
    """Check that a vocabulary's cells have the embedding asked for."""
    if embedding not in EMBEDDINGS:
        raise InputError("--embedding", embedding, f"one of {', '.join(EMBEDDINGS)}")
    if embedding == "cls" and vocabulary.cls_id is None:
        raise InputError("--embedding", "cls for a model without a <cls> token", "mean")
    return embedding


def cell_embeddings(
    encoder: Encoder,
    sequences: Sequence[NDArray[np.integer]],
    vocabulary: GeneVocabulary,
    *,
    embedding: str = "mean",
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> NDArray[np.float32]:
    """Embed cells.

    Parameters
    ----------
    encoder
        The trunk, which ends at the layer that is read.
    sequences
        Token ids a cell.
    embedding
        ``mean``: the mean of the gene positions' hidden states, without special tokens; ``cls``: position 0's.

    Returns
    -------
    float32 array of shape (cells, width), in the order given.
    """
    check_embedding(embedding, vocabulary)
    result = np.empty((len(sequences), encoder.config.hidden_size), dtype=np.float32)
    for batch in length_batches(np.array([len(ids) for ids in sequences]), tokens_per_batch):
        cells = [sequences[i] for i in batch]
        hidden = encoder.hidden([ids[None] for ids in cells], first_only=embedding == "cls")
        vectors = [
            states_1LD[0, 0] if embedding == "cls" else _mean_over_genes(states_1LD[0], ids, vocabulary)
            for ids, states_1LD in zip(cells, hidden, strict=True)
        ]
        result[batch] = torch.stack(vectors).cpu().numpy()
    return result


def _mean_over_genes(hidden_LD: torch.Tensor, ids: NDArray[np.integer], vocabulary: GeneVocabulary) -> torch.Tensor:
    """Average one cell's hidden states over its genes, shape (width,); zeros where it has none."""
    genes = np.flatnonzero(gene_mask(vocabulary, ids))
    if len(genes) < len(ids):
        hidden_LD = hidden_LD[torch.from_numpy(genes).to(hidden_LD.device)]
    return hidden_LD.sum(dim=0) / max(1, len(genes))


def gene_embedding_sums(
    encoder: Encoder, sequences: Sequence[NDArray[np.integer]], vocabulary: GeneVocabulary
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Sum the contextual embeddings of every token over cells.

    Returns
    -------
    sums, cells
        float64 of shape (vocabulary, width), and how many cells hold each token, int64 of shape (vocabulary,).
        A gene's embedding is its sum over its cells. Sums add up over shards of a data set.
    """
    sums = np.zeros((len(vocabulary), encoder.config.hidden_size))
    cells = np.zeros(len(vocabulary), dtype=np.int64)
    for batch in length_batches(np.array([len(ids) for ids in sequences]), TOKENS_PER_BATCH):
        tokens = np.concatenate([sequences[i] for i in batch])
        hidden = encoder.hidden([sequences[i][None] for i in batch])
        states_TD = torch.cat([states_1LD[0] for states_1LD in hidden]).cpu().numpy()
        np.add.at(sums, tokens, states_TD.astype(np.float64))
        np.add.at(cells, tokens, 1)
    return sums, cells
