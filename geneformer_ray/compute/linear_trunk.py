"""A sequence around which a model is made linear: what is read there, and how f of it changes where one token does.

A token that is replaced changes f in two ways. Its own hidden states change: those are computed, through all layers,
among the others as they were. And the others attend to it: what attention gives them changes by a closed form
(``attention_influence``), layer by layer, and a gradient says what that does to f. Neither supposes that the token or
its weight changes little, only that no single token does much to the others: what is left out shrinks with the square
of the number of genes. A plain gradient of the embeddings fails here, for those of adjacent positions lie far apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch

from geneformer_ray.compute.attention import attention
from geneformer_ray.compute.attention_influence import attend_in_place, attention_influence

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from geneformer_ray.compute.trunk import Trunk

__all__ = ["Linearised", "Point", "linearise", "passes_of", "vectors_a_token"]


@dataclass(frozen=True)
class Point:
    """One sequence around which f is made linear.

    Parameters
    ----------
    ids_L
        Token ids on the device, int64, shape (length,).
    genes
        The stretch of positions whose mean is read.
    at_A, ids_A
        Positions at which another token is put, and that token; shape (alternates,).
    functions
        Gives, for what is read, shape (width,), the values of f, shape (functions,), and their gradients, shape
        (functions, width): as many for all points. None where nothing is wanted but what is read.
    removed
        Whether to give the change without each key as well.
    inputs
        Whether to give the gradient of the embeddings as well.
    ranks_L
        Which position embedding each token gets, shape (length,); None for 0, 1, 2 and so on.
    """

    ids_L: torch.Tensor
    genes: slice
    at_A: torch.Tensor
    ids_A: torch.Tensor
    functions: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None
    removed: bool = False
    inputs: bool = False
    ranks_L: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids_L) + len(self.at_A)


@dataclass
class Linearised:
    """What is read at a point, and the changes of each of S functions f of it.

    Parameters
    ----------
    hidden_LD
        The hidden states; position 0 alone where that is all that is read.
    read_D
        What is read: position 0, or the mean of the genes.
    values_S
        f itself.
    replaced_SA
        Change of f when an alternate takes its place.
    gate_SL
        Gradient of f with respect to a bias on each key, the same in all layers and heads.
    removed_SL
        Change of f when no other token sees a key: through the others alone, not by its leaving the mean.
    inputs_SLD
        Gradient of f with respect to what enters the first layer; None where it was not wanted.
    """

    hidden_LD: torch.Tensor
    read_D: torch.Tensor
    values_S: torch.Tensor
    replaced_SA: torch.Tensor
    gate_SL: torch.Tensor
    removed_SL: torch.Tensor
    inputs_SLD: torch.Tensor | None = None


@torch.inference_mode(False)
@torch.no_grad()
def linearise(trunk: Trunk, points: Sequence[Point], *, first_only: bool = False) -> list[Linearised]:
    """Compute points side by side: products take the tokens of all of them at once, attention goes point by point.

    No gradient of a parameter is computed. Between the way forward and the way back each layer keeps two vectors a
    token; attention weights are made again, a block at a time.

    Parameters
    ----------
    trunk
        The layers up to the one that is read.
    points
        Sequences, each not empty.
    first_only
        Read position 0, a ``<cls>``, not the mean of the genes.
    """
    found: dict[int, Linearised] = {}
    for back in (False, True):
        numbers = [number for number, point in enumerate(points) if (point.functions is not None) == back]
        if numbers:
            passes = _Passes(trunk, [points[number] for number in numbers], first_only=first_only)
            found |= dict(zip(numbers, passes.run(back=back), strict=True))
    return [found[number] for number in range(len(points))]


def passes_of(trunk: Trunk, length: int, alternates: int, functions: int) -> float:
    """Say what a point costs in forward passes of its sequence: its products, counted."""
    layers, width, feed_forward = len(trunk.layers), trunk.tokens_VD.shape[1], trunk.layers[0].up.shape[1]
    linear, scores = width * (4 * width + 2 * feed_forward), length * width
    forward = layers * length * (linear + 2 * scores)
    # Forward; all but attention's second product again; and back, where the first layer's inputs are not asked for.
    again = layers * length * (linear + scores)
    back = functions * (layers * length * (linear + 4 * scores) - 3 * length * (width * width + scores))
    beside = layers * alternates * (linear + 2 * scores + 2 * width * width + (1 + functions) * scores)
    passes: float = (forward + again + back + beside) / forward
    return passes


def vectors_a_token(trunk: Trunk, functions: int) -> int:
    """Say how many vectors of the model's width a token has in memory at once, on the way back through a layer."""
    return 2 * len(trunk.layers) + 16 + 8 * functions


class _Passes:
    """The way forward and the way back, with what the one leaves for the other."""

    def __init__(self, trunk: Trunk, points: Sequence[Point], *, first_only: bool) -> None:
        self.trunk, self.points, self.first_only = trunk, points, first_only
        self.tokens = _stretches(len(point.ids_L) for point in points)
        self.alternates = _stretches(len(point.at_A) for point in points)
        self.starts = torch.tensor([stretch.start for stretch in self.tokens], device=trunk.device)
        self.entered: list[torch.Tensor] = []
        self.alternates_entered: list[torch.Tensor] = []
        self.contexts: list[torch.Tensor] = []

    def run(self, *, back: bool) -> list[Linearised]:
        """Go through all layers, and back where changes are wanted."""
        ranks = [
            torch.arange(len(point.ids_L), device=point.ids_L.device) if point.ranks_L is None else point.ranks_L
            for point in self.points
        ]
        x_TD = self.trunk.embed(torch.cat([point.ids_L for point in self.points]), torch.cat(ranks))
        y_UD = self.trunk.embed(
            torch.cat([point.ids_A for point in self.points]), torch.cat([point.at_A for point in self.points])
        )
        for number in range(len(self.trunk.layers)):
            x_TD, y_UD = self._forward(number, x_TD, y_UD)
        found, gradient_STD = self._read(x_TD, y_UD)
        for number in reversed(range(len(self.trunk.layers)) if back else ()):
            gradient_STD = self._back(number, gradient_STD, found)
        return found

    def _first_row(self, number: int) -> bool:
        """Say whether a layer computes position 0 alone."""
        return self.first_only and number == len(self.trunk.layers) - 1

    def _heads(self, part_TD: torch.Tensor, stretch: slice) -> torch.Tensor:
        """Give one sequence's part of a product, head by head: shape (heads, length, width of a head)."""
        width = part_TD.shape[1] // self.trunk.heads
        return part_TD[stretch].reshape(stretch.stop - stretch.start, self.trunk.heads, width).transpose(0, 1)

    def _forward(self, number: int, x_TD: torch.Tensor, y_UD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one layer over all tokens, and over all alternates, each among the tokens of its sequence."""
        layer, first_row = self.trunk.layers[number], self._first_row(number)
        self.entered.append(x_TD)
        self.alternates_entered.append(y_UD)
        parts, others = layer.queries_keys_values(x_TD), layer.queries_keys_values(y_UD)
        contexts, beside = [], []
        for point, stretch, alternates in zip(self.points, self.tokens, self.alternates, strict=True):
            q_HLK, k_HLK, v_HLK = (self._heads(part, stretch) for part in parts)
            contexts.append(attention(q_HLK[None, :, : 1 if first_row else None], k_HLK[None], v_HLK[None]))
            if not first_row:
                own = [_wide(self._heads(part, alternates)) for part in others]
                beside.append(attend_in_place(own, _wide(k_HLK), _wide(v_HLK), point.at_A))
        self.contexts.append(_wide(torch.cat(contexts)))
        if first_row:
            return self.trunk.feed_forward(layer, x_TD[self.starts], self.contexts[-1]), y_UD
        y_UD = self.trunk.feed_forward(layer, y_UD, torch.cat(beside))
        return self.trunk.feed_forward(layer, x_TD, self.contexts[-1]), y_UD

    def _read(self, x_TD: torch.Tensor, y_UD: torch.Tensor) -> tuple[list[Linearised], torch.Tensor]:
        """Take f, its gradient with respect to the last states, and what alternates change by their own states."""
        found, gradients = [], []
        for number, (point, stretch) in enumerate(zip(self.points, self.tokens, strict=True)):
            hidden_LD = x_TD[number : number + 1] if self.first_only else x_TD[stretch]
            read_D = hidden_LD[0] if self.first_only else hidden_LD[point.genes].mean(dim=0)
            nothing = read_D.new_zeros(0), read_D.new_zeros(0, len(read_D))
            values_S, gradient_SD = nothing if point.functions is None else point.functions(read_D)
            gradients.append(gradient_SD)
            gate_SL, removed_SL = (values_S.new_zeros(len(values_S), len(point.ids_L)) for _ in range(2))
            replaced_SA = values_S.new_zeros(len(values_S), len(point.at_A))
            if not self.first_only:
                own_AD = y_UD[self.alternates[number]] - hidden_LD[point.at_A]
                read_A = (point.at_A >= point.genes.start) & (point.at_A < point.genes.stop)
                replaced_SA = gradient_SD @ own_AD.T * read_A / (point.genes.stop - point.genes.start)
            found.append(Linearised(hidden_LD, read_D, values_S, replaced_SA, gate_SL, removed_SL))
        gradient_STD = x_TD.new_zeros(len(gradients[0]), *x_TD.shape)
        for number, (point, stretch) in enumerate(zip(self.points, self.tokens, strict=True)):
            if self.first_only:
                gradient_STD[:, number] = gradients[number]
            else:
                genes = point.genes.stop - point.genes.start
                gradient_STD[:, stretch][:, point.genes] = gradients[number][:, None] / genes
        return found, gradient_STD

    def _back(self, number: int, gradient_STD: torch.Tensor, found: list[Linearised]) -> torch.Tensor:
        """Go back through one layer: add what changes in its attention, give the gradient of what entered it.

        Nobody asks for that of the first layer, but where it is said; then it is zeros.
        """
        layer, first_row = self.trunk.layers[number], self._first_row(number)
        x_TD, y_UD = self.entered.pop(), self.alternates_entered.pop()
        context_QD = self.contexts.pop()
        residual_QD = x_TD[self.starts] if first_row else x_TD
        past_SQD, gradient_SQD = self._through_feed_forward(number, residual_QD, context_QD, gradient_STD)
        parts, others = layer.queries_keys_values(x_TD), layer.queries_keys_values(y_UD)
        product_STX = x_TD.new_zeros(len(gradient_STD), len(x_TD), 3 * x_TD.shape[1])
        for point, mine, stretch, alternates in zip(self.points, found, self.tokens, self.alternates, strict=True):
            rows = self._rows(stretch, first_row=first_row)
            q_HLK, k_HLK, v_HLK = (_wide(self._heads(part, stretch)) for part in parts)
            wanted = number > 0 or point.inputs
            influence = attention_influence(
                (q_HLK[:, : rows.stop - rows.start], k_HLK, v_HLK),
                self._heads(context_QD, rows),
                torch.stack([self._heads(gradient_QD, rows) for gradient_QD in gradient_SQD]),
                [_wide(self._heads(part, alternates)) for part in others[1:]],
                point.at_A,
                removed=point.removed,
                inputs=wanted,
            )
            mine.gate_SL += influence.gate_SL
            mine.removed_SL += influence.removed_SL
            mine.replaced_SA += influence.replaced_SA
            if influence.inputs_SLX is not None:
                product_STX[:, stretch] = influence.inputs_SLX
        before_STD = _wide(product_STX.to(layer.qkv.dtype) @ layer.qkv.T)
        if first_row:
            before_STD[:, self.starts] += past_SQD
        else:
            before_STD += past_SQD
        for point, mine, stretch in zip(self.points, found, self.tokens, strict=True):
            if number == 0 and point.inputs:
                mine.inputs_SLD = before_STD[:, stretch]
        return before_STD

    def _rows(self, stretch: slice, *, first_row: bool) -> slice:
        """Give a sequence's rows among those that a layer computes."""
        if not first_row:
            return stretch
        number = self.tokens.index(stretch)
        return slice(number, number + 1)

    def _through_feed_forward(
        self, number: int, residual_QD: torch.Tensor, context_QD: torch.Tensor, gradient_SQD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Go back through what comes behind attention: the gradients of what went past it, and of what it gave."""
        with torch.enable_grad():
            given = [tensor.detach().requires_grad_() for tensor in (residual_QD, context_QD)]
            out_QD = self.trunk.feed_forward(self.trunk.layers[number], *given)
            pairs = [torch.autograd.grad(out_QD, given, g_QD, retain_graph=True) for g_QD in gradient_SQD]
        return torch.stack([past for past, _ in pairs]), torch.stack([context for _, context in pairs])


def _stretches(lengths: Iterable[int]) -> list[slice]:
    """Say where each of several sequences lies when they lie one behind the other."""
    return [slice(start, stop) for start, stop in pairwise(accumulate(lengths, initial=0))]


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Give float32 where products are of lower precision: what is summed over a whole sequence is not rounded."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
