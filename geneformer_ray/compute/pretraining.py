"""Masked-gene modelling: hide some of a cell's genes and learn to name them from the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from geneformer_ray.compute.training import BatchLoss
    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = ["MaskedGeneModel", "count_masked", "masked_genes", "masked_loss", "new_model"]

MASKED_SHARE = 0.15


class MaskedGeneModel(BertForMaskedLM):
    """``BertForMaskedLM`` whose head runs only where a gene was masked, not at every position."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, masked_BL: torch.Tensor) -> torch.Tensor:
        """Compute logits of shape (masked positions, vocabulary), in row-major order of the positions."""
        hidden_BLD = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits_MV: torch.Tensor = self.cls(hidden_BLD[masked_BL])
        return logits_MV


def new_model(
    vocabulary: GeneVocabulary,
    *,
    layers: int,
    width: int,
    heads: int,
    feed_forward: int,
    initializer_range: float = 0.02,
) -> MaskedGeneModel:
    """Make a Geneformer-shaped BERT with random weights.

    Parameters
    ----------
    vocabulary
        Gives the vocabulary's size and the number of positions.
    layers, width, heads, feed_forward
        Its shape.
    initializer_range
        Standard deviation of the initial weights.
    """
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=feed_forward,
        hidden_act="relu",
        initializer_range=initializer_range,
        hidden_dropout_prob=0.02,
        # Drawing a random number per attention weight dominates a step on CPU.
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=vocabulary.max_length,
        pad_token_id=vocabulary.pad_id,
    )
    config._attn_implementation = "sdpa"
    return MaskedGeneModel(config)


def masked_genes(genes: int) -> int:
    """Say how many of a cell's genes are masked: a fixed share, so that every worker knows every other's count."""
    return max(1, round(MASKED_SHARE * genes))


def choose_masked(
    ids_BL: torch.Tensor, mask_BL: torch.Tensor, vocabulary: GeneVocabulary
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the positions to predict and what is seen there: 80 % mask, 10 % another gene, 10 % the gene itself.

    Special tokens are never chosen (upstream's collator masks ``<cls>`` and ``<eos>`` as well).

    Returns
    -------
    seen_BL, masked_BL
        The altered token ids, and a boolean mask of the chosen positions; both of shape (batch, length).
    """
    special = torch.tensor(sorted(vocabulary.special_ids), device=ids_BL.device)
    genes_BL = mask_BL.bool() & ~torch.isin(ids_BL, special)
    number_B = torch.tensor([masked_genes(int(n)) if n else 0 for n in genes_BL.sum(dim=1)], device=ids_BL.device)
    draw_BL = torch.rand(ids_BL.shape, device=ids_BL.device).masked_fill(~genes_BL, 2.0)
    rank_BL = draw_BL.argsort(dim=1).argsort(dim=1)
    masked_BL = (rank_BL < number_B[:, None]) & genes_BL
    kind_BL = torch.rand(ids_BL.shape, device=ids_BL.device)
    gene_ids = torch.tensor([vocabulary.tokens[gene] for gene in vocabulary.genes], device=ids_BL.device)
    other_BL = gene_ids[torch.randint(len(gene_ids), ids_BL.shape, device=ids_BL.device)]
    seen_BL = ids_BL.clone()
    seen_BL[masked_BL & (kind_BL < 0.8)] = vocabulary.mask_id
    swapped_BL = masked_BL & (kind_BL >= 0.9)
    seen_BL[swapped_BL] = other_BL[swapped_BL]
    return seen_BL, masked_BL


def masked_loss(vocabulary: GeneVocabulary) -> BatchLoss:
    """Give the summed cross entropy at masked genes."""

    def loss_of(
        model: nn.Module, ids_BL: torch.Tensor, mask_BL: torch.Tensor, batch: NDArray[np.int64]
    ) -> tuple[torch.Tensor, int]:
        seen_BL, masked_BL = choose_masked(ids_BL, mask_BL, vocabulary)
        target_M = ids_BL[masked_BL]
        logits_MV = model(seen_BL, mask_BL, masked_BL).float()
        loss = nn.functional.cross_entropy(logits_MV, target_M, reduction="sum")
        return loss, int((logits_MV.argmax(dim=1) == target_M).sum())

    return loss_of


def count_masked(sequences: Sequence[NDArray[np.integer]], vocabulary: GeneVocabulary) -> NDArray[np.int64]:
    """Count each cell's masked genes ahead, shape (cells,)."""
    special = np.fromiter(vocabulary.special_ids, dtype=np.int64)
    genes = [int((~np.isin(ids, special)).sum()) for ids in sequences]
    return np.array([masked_genes(n) if n else 0 for n in genes], dtype=np.int64)
