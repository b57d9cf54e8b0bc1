"""Freezing: parts of a pretrained trunk that fine-tuning leaves as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from transformers import BertConfig

    from geneformer_ray.compute.classifier import CellClassifier

__all__ = ["check_frozen_layers", "freeze"]


def check_frozen_layers(layers: int, config: BertConfig) -> None:
    """Refuse to freeze more layers than a model has."""
    if not 0 <= layers <= config.num_hidden_layers:
        raise InputError("--freeze-layers", layers, f"0 to {config.num_hidden_layers}, the layers that the model has")


def freeze(model: CellClassifier, *, layers: int = 0, embeddings: bool = False) -> None:
    """Freeze the first layers of the encoder, and the embeddings.

    What is frozen needs no gradient, so that neither the optimiser nor the exchange between workers knows of it.

    Parameters
    ----------
    model
        A fresh classifier, before it is wrapped for data-parallel training.
    layers
        How many layers, from the one behind the embeddings on.
    embeddings
        Of tokens and positions, and their LayerNorm.
    """
    check_frozen_layers(layers, model.config)
    frozen = [*model.bert.encoder.layer[:layers], *([model.bert.embeddings] if embeddings else [])]
    for module in frozen:
        module.requires_grad_(False)
