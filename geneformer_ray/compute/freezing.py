"""Freezing: parts of a pretrained trunk that fine-tuning leaves as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from torch import nn
    from transformers import BertConfig, BertPreTrainedModel

__all__ = ["check_frozen_layers", "freeze"]


def check_frozen_layers(layers: int, config: BertConfig) -> None:
    """Refuse to freeze more layers than a model has."""
    if not 0 <= layers <= config.num_hidden_layers:
        raise InputError("--freeze-layers", layers, f"0 to {config.num_hidden_layers}, the layers that the model has")


def freeze(
    model: BertPreTrainedModel, *, layers: int = 0, embeddings: bool = False, new_tokens: int = 0
) -> list[nn.Parameter]:
    """Freeze the first layers of the encoder, and the embeddings.

    What is frozen needs no gradient, so that neither the optimiser nor the exchange between workers knows of it. Where
    a vocabulary was extended, the new tokens' rows are learned and all other rows of their matrix stay: these have a
    gradient of zero, which AdamW answers with no step at all as long as the matrix does not decay.

    Parameters
    ----------
    model
        A fresh classifier, of cells or genes, before it is wrapped for data-parallel training.
    layers
        How many layers, from the one behind the embeddings on.
    embeddings
        Of tokens and positions, and their LayerNorm.
    new_tokens
        How many of the last tokens start with random values: they are learned whatever is frozen.

    Returns
    -------
    list of Parameter
        Those frozen in part, which the optimiser must not let decay.
    """
    check_frozen_layers(layers, model.config)
    frozen = [*model.bert.encoder.layer[:layers], *([model.bert.embeddings] if embeddings else [])]
    for module in frozen:
        module.requires_grad_(False)
    if not embeddings or not new_tokens:
        return []
    tokens: nn.Parameter = model.bert.embeddings.word_embeddings.weight
    tokens.requires_grad_(True)

    def of_new_rows(gradient: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros_like(gradient[:-new_tokens]), gradient[-new_tokens:]])

    # Called before gradients are summed up on a worker, and so before they are averaged over workers.
    tokens.register_hook(of_new_rows)
    return [tokens]
