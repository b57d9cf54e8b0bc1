"""BERT's layers for inference: sequences of several lengths side by side, without padding and without a mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import layer_norm
from transformers.activations import ACT2FN

from geneformer_ray.compute.attention import attention
from geneformer_ray.compute.shared_attention import shared_attention

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn
    from transformers import BertModel
    from transformers.models.bert.modeling_bert import BertLayer

    from geneformer_ray.compute.execution import Execution

__all__ = ["Trunk"]

# Tokens that run through all layers together on a CPU.
TOKENS_A_TILE = 2_048


@dataclass(frozen=True)
class _Norm:
    """A LayerNorm in float32, and what is added behind it."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float

    @classmethod
    def of(cls, module: nn.LayerNorm, device: str, plus: torch.Tensor | float = 0.0) -> _Norm:
        return cls(module.weight.detach().to(device), (module.bias + plus).detach().to(device), module.eps)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class _Layer:
    """One layer's weights (in, out) in the dtype of products, with what can be multiplied ahead multiplied.

    Query, key and value are one product. The query's scale is in its weights. A key's bias adds the same to all scores
    of a query, which its softmax takes out again; a value's bias passes through the softmax, whose weights sum to one,
    and goes into the bias behind it. The last bias is added with the LayerNorm that its sum starts from, and taken out
    of what the product between them would make of it.
    """

    def __init__(self, layer: BertLayer, execution: Execution) -> None:
        attention, out, up, down = layer.attention.self, layer.attention.output, layer.intermediate.dense, layer.output
        device, scale = execution.device, attention.attention_head_size**-0.5

        def factor(*weights: torch.Tensor) -> torch.Tensor:
            return torch.cat(weights).detach().T.contiguous().to(device, execution.dtype)

        self.qkv = factor(attention.query.weight * scale, attention.key.weight, attention.value.weight)
        self.query_bias = (attention.query.bias * scale).detach().to(device, execution.dtype)
        self.out = factor(out.dense.weight)
        self.out_bias = (out.dense.bias + out.dense.weight @ attention.value.bias).detach().to(device)
        self.attention_norm = _Norm.of(out.LayerNorm, device, plus=down.dense.bias)
        self.up, self.down = factor(up.weight), factor(down.dense.weight)
        self.up_bias = (up.bias - up.weight @ down.dense.bias).detach().to(device, execution.dtype)
        self.norm = _Norm.of(down.LayerNorm, device)

    def queries_keys_values(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Give queries, scaled, keys and values, each of shape (tokens, width)."""
        q_TD, k_TD, v_TD = (x_TD.to(self.qkv.dtype) @ self.qkv).split(x_TD.shape[1], dim=1)
        q_TD += self.query_bias
        return q_TD, k_TD, v_TD


def _add_product(sum_TD: torch.Tensor, x_TX: torch.Tensor, weight_XD: torch.Tensor) -> torch.Tensor:
    """Add a product to what went past it, in place and in float32."""
    if weight_XD.dtype == torch.float32:
        return sum_TD.addmm_(x_TX, weight_XD)
    return sum_TD.add_(x_TX.to(weight_XD.dtype) @ weight_XD)


class Trunk:
    """The embeddings and the first layers of a BERT, for inference alone.

    Every product over tokens takes the tokens of all sequences at once; only attention goes sequence by sequence. What
    runs between products stays float32 whatever their dtype.

    Parameters
    ----------
    bert
        The whole trunk.
    layers
        How many of its layers are computed.
    execution
        Device, dtype, threads.
    """

    def __init__(self, bert: BertModel, layers: int, execution: Execution) -> None:
        embeddings, device = bert.embeddings, execution.device
        self.heads = bert.config.num_attention_heads
        self.activation = ACT2FN[bert.config.hidden_act]
        self.relu = bert.config.hidden_act == "relu"
        self.device = device
        self.tokens_VD = embeddings.word_embeddings.weight.detach().to(device)
        # A cell is one segment: its type is part of every position.
        kind_D = embeddings.token_type_embeddings.weight.detach()[0]
        self.positions_PD = (embeddings.position_embeddings.weight.detach() + kind_D).to(device)
        self.norm = _Norm.of(embeddings.LayerNorm, device)
        self.layers = [_Layer(layer, execution) for layer in bert.encoder.layer[:layers]]

    @torch.inference_mode()
    def hidden(
        self,
        groups: Sequence[torch.Tensor],
        *,
        ranks: Sequence[torch.Tensor | None] | None = None,
        first_only: bool = False,
    ) -> list[torch.Tensor]:
        """Compute the hidden states behind the last of the layers.

        Parameters
        ----------
        groups
            Token ids on the device, each int64 of shape (sequences, length).
        ranks
            Which position embedding each token gets, of each group's shape; None for 0, 1, 2 and so on.
        first_only
            Give position 0 alone, as a ``<cls>`` is read: the last layer then computes no other.

        Returns
        -------
        list of Tensor
            float32, each of shape (sequences, length or 1, width); position 0 of nothing is zeros.
        """
        width = self.tokens_VD.shape[1]
        results = [
            torch.zeros(len(ids_EL), 1 if first_only else ids_EL.shape[1], width, device=ids_EL.device)
            for ids_EL in groups
        ]
        fronts = [
            self._front(ids_EL, ranks_EL, first_only and len(self.layers) == 1)
            for ids_EL, ranks_EL in zip(groups, ranks or [None] * len(groups), strict=True)
        ]
        for tile in self._tiles(groups):
            shapes = [(rows.stop - rows.start, groups[group].shape[1]) for group, rows in tile]
            x_TD = torch.cat([fronts[group](rows) for group, rows in tile])
            for number, layer in enumerate(self.layers[1:], start=2):
                last = number == len(self.layers)
                x_TD = self._through(layer, x_TD, shapes, first_only=first_only and last)
            kept = [sequences * (1 if first_only else length) for sequences, length in shapes]
            for (group, rows), states_TD in zip(tile, x_TD.split(kept), strict=True):
                results[group][rows] = states_TD.view(rows.stop - rows.start, -1, width)
        return results

    def _tiles(self, groups: Sequence[torch.Tensor]) -> Iterator[list[tuple[int, slice]]]:
        """Put sequences together that run through all layers before the next ones do: each a group's number and rows.

        On a CPU a tile's states stay in the cache from product to product; on a GPU it is all one tile.
        """
        most = TOKENS_A_TILE if self.device == "cpu" else sum(ids_EL.numel() for ids_EL in groups)
        tile: list[tuple[int, slice]] = []
        tokens = 0
        for number, ids_EL in enumerate(groups):
            sequences, length = ids_EL.shape
            if not length:
                continue
            step = max(1, most // length)
            for start in range(0, sequences, step):
                rows = slice(start, min(start + step, sequences))
                if tile and tokens + (rows.stop - start) * length > most:
                    yield tile
                    tile, tokens = [], 0
                tile.append((number, rows))
                tokens += (rows.stop - start) * length
        if tile:
            yield tile

    def embed(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Give what enters the first layer."""
        return self.norm(self.tokens_VD[ids] + self.positions_PD[positions])

    def _front(
        self, ids_EL: torch.Tensor, ranks_EL: torch.Tensor | None, first_only: bool
    ) -> Callable[[slice], torch.Tensor]:
        """Give what computes the first layer of some of a group's sequences; what they share is computed here, once."""
        layer = self.layers[0]
        if ranks_EL is None:
            ranks_EL = torch.arange(ids_EL.shape[1], device=ids_EL.device).expand_as(ids_EL)
        shared = None
        if not first_only:
            project = layer.queries_keys_values
            shared = shared_attention(ids_EL, self.embed, project, self.heads, ranks_EL)
        if shared is not None:
            return lambda rows: self.feed_forward(layer, *shared(rows))

        def alone(rows: slice) -> torch.Tensor:
            x_TD = self.embed(ids_EL[rows].reshape(-1), ranks_EL[rows].reshape(-1))
            return self._through(layer, x_TD, [tuple(ids_EL[rows].shape)], first_only=first_only)

        return alone

    def _through(
        self, layer: _Layer, x_TD: torch.Tensor, shapes: Sequence[tuple[int, ...]], *, first_only: bool
    ) -> torch.Tensor:
        """Run one layer over all tokens; what it gives has fewer where only position 0 is wanted."""
        qkv = layer.queries_keys_values(x_TD)
        contexts, residuals, start = [], [], 0
        for sequences, length in shapes:
            stop = start + sequences * length
            q_EHLK, k_EHLK, v_EHLK = (
                part[start:stop].view(sequences, length, self.heads, -1).transpose(1, 2) for part in qkv
            )
            if first_only:
                q_EHLK = q_EHLK[:, :, :1]
                residuals.append(x_TD[start:stop:length])
            contexts.append(attention(q_EHLK, k_EHLK, v_EHLK))
            start = stop
        context_TD = contexts[0] if len(contexts) == 1 else torch.cat(contexts)
        return self.feed_forward(layer, torch.cat(residuals) if first_only else x_TD, context_TD)

    def feed_forward(self, layer: _Layer, x_TD: torch.Tensor, context_TD: torch.Tensor) -> torch.Tensor:
        """Run what comes behind attention."""
        y_TD = layer.attention_norm(_add_product(x_TD + layer.out_bias, context_TD, layer.out))
        up_TF = torch.addmm(layer.up_bias, y_TD.to(layer.up.dtype), layer.up)
        up_TF = up_TF.relu_() if self.relu else self.activation(up_TF)
        return layer.norm(_add_product(y_TD, up_TF, layer.down))
