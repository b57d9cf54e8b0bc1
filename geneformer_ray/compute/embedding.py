"""Cell and gene embeddings at a chosen layer, and the mean embedding of a cell state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
import torch

from geneformer_ray.data.batching import length_batches
from geneformer_ray.data.vocabulary import gene_mask
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from geneformer_ray.compute.encoder import Encoder
    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = [
    "EMBEDDINGS",
    "cell_embeddings",
    "check_embedding",
    "check_states",
    "gene_embedding_sums",
    "state_embeddings",
    "sum_by_state",
]

EMBEDDINGS = ("mean", "cls")
TOKENS_PER_BATCH = 16_384
# How many cells, and the sum of their embeddings.
StateSum: TypeAlias = "tuple[int, NDArray[np.float64]]"


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


def sum_by_state(embeddings: NDArray[np.floating], states: NDArray[Any]) -> dict[str, StateSum]:
    """Sum the embeddings of each state's cells; sums add up over shards of a data set.

    Parameters
    ----------
    embeddings
        Shape (cells, width).
    states
        Each cell's state, compared whole (upstream matches substrings), shape (cells,). A cell without one belongs to
        none.

    Returns
    -------
    dict
        State -> how many cells, and their sum, float64 of shape (width,).
    """
    known = ~pd.isna(states)
    names, values = states[known].astype(str), embeddings[known].astype(np.float64)
    return {str(state): (int((names == state).sum()), values[names == state].sum(axis=0)) for state in np.unique(names)}


def state_embeddings(parts: Iterable[Mapping[str, StateSum]]) -> dict[str, NDArray[np.float32]]:
    """Average the embeddings of each state's cells: float32 of shape (width,), states in order.

    Parameters
    ----------
    parts
        Sums by state. Their order matters in the last digits, for sums of floats depend on it.
    """
    totals: dict[str, StateSum] = {}
    for part in parts:
        for state, (count, total) in part.items():
            before = totals.get(state, (0, np.zeros(len(total))))
            totals[state] = (before[0] + count, before[1] + total)
    return {state: (total / count).astype(np.float32) for state, (count, total) in sorted(totals.items())}


def check_states(states: Mapping[str, object], width: int, wanted: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """Check state embeddings that came from a file: every wanted state there, each a list of `width` numbers."""
    checked = {}
    for state in wanted:
        if state not in states:
            there = ", ".join(states) or "none"
            raise InputError("--state-embeddings", f"no state {state!r}", f"a file that holds it (it has {there})")
        try:
            vector = np.asarray(states[state], dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise InputError("--state-embeddings", f"{state} as no list of numbers", "lists of floats") from error
        if vector.shape != (width,) or not np.isfinite(vector).all():
            raise InputError(
                "--state-embeddings", f"{state} of shape {vector.shape}", f"{width} finite numbers, the model's width"
            )
        checked[state] = vector
    return checked
