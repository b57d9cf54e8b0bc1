"""The trunk: Geneformer's BERT encoder without any head, run up to the layer that is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from transformers import BertModel

from geneformer_ray.compute.execution import Execution, choose_execution
from geneformer_ray.compute.model_directory import load_weights
from geneformer_ray.compute.trunk import Trunk
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = ["LAYERS", "Encoder", "add_token", "attention_mask"]

LAYERS = (-1, 0)


def attention_mask(lengths_B: torch.Tensor, longest: int) -> torch.Tensor:
    """Mark real positions with 1 and padding with 0: shape (batch, longest), int64."""
    return (torch.arange(longest, device=lengths_B.device)[None, :] < lengths_B[:, None]).long()


class Encoder:
    """A BERT trunk that ends at the layer that is read.

    Parameters
    ----------
    bert
        The whole trunk. No layer beyond the one that is read is kept, no pooler and no head.
    layer
        ``-1`` reads the output of the layer before the last (upstream's default), ``0`` the last layer's.
    execution
        Device, dtype, threads.
    """

    def __init__(self, bert: BertModel, *, layer: int = -1, execution: Execution | None = None) -> None:
        if layer not in LAYERS:
            raise InputError("--layer", layer, "-1 (the layer before the last) or 0 (the last)")
        needed = bert.config.num_hidden_layers + layer
        if needed < 1:
            raise InputError("--layer", layer, f"0 for a model of {bert.config.num_hidden_layers} layers")
        self.execution = execution or choose_execution()
        self.config = bert.config
        self.trunk = Trunk(bert, needed, self.execution)

    @classmethod
    def load(cls, directory: Path, *, layer: int = -1, execution: Execution | None = None) -> Encoder:
        """Load the trunk of a model directory, whatever head lies on it."""
        bert = load_weights(BertModel, directory, add_pooling_layer=False)
        return cls(bert, layer=layer, execution=execution)

    @property
    def max_length(self) -> int:
        """The most tokens that the model takes."""
        return int(self.config.max_position_embeddings)

    def hidden(
        self,
        groups: Sequence[NDArray[np.integer]],
        *,
        ranks: Sequence[NDArray[np.integer] | None] | None = None,
        first_only: bool = False,
    ) -> list[torch.Tensor]:
        """Compute hidden states at the chosen layer.

        Parameters
        ----------
        groups
            Token ids without padding, each of shape (sequences, length): sequences of one length make a group. What
            the sequences of a group share at the same positions is computed once.
        ranks
            Which position embedding each token gets, of each group's shape; None for 0, 1, 2 and so on.
        first_only
            Give position 0 alone, as a ``<cls>`` is read: cheaper by most of a layer.

        Returns
        -------
        list of Tensor
            On the device, float32, each of shape (sequences, length or 1, width).
        """
        device = self.execution.device
        ids = [torch.from_numpy(np.asarray(group, dtype=np.int64)).to(device) for group in groups]
        held: list[torch.Tensor | None] | None = None
        if ranks is not None:
            held = [None if group is None else torch.from_numpy(np.asarray(group)).to(device) for group in ranks]
        return self.trunk.hidden(ids, ranks=held, first_only=first_only)


def add_token(bert: BertModel, vocabulary: GeneVocabulary) -> None:
    """Grow the embedding matrix by the tokens that an extended vocabulary adds behind the model's own.

    A new row starts at the mean of all rows plus noise of the model's initial scale, and is learned in fine-tuning.
    """
    old = bert.get_input_embeddings()
    missing = len(vocabulary) - old.num_embeddings
    if missing < 0:
        raise InputError("--vocabulary", f"{len(vocabulary)} tokens", f"at least the model's {old.num_embeddings}")
    if missing == 0:
        return
    new = nn.Embedding(len(vocabulary), old.embedding_dim, padding_idx=old.padding_idx)
    with torch.no_grad():
        new.weight[: old.num_embeddings] = old.weight
        noise = torch.randn(missing, old.embedding_dim) * bert.config.initializer_range
        new.weight[old.num_embeddings :] = old.weight.mean(dim=0) + noise
    bert.set_input_embeddings(new)
    bert.config.vocab_size = len(vocabulary)
