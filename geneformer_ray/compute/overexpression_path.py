"""Overexpression of one cell's genes, and of genes that it lacks: a path again, and a place that many genes take.

With gene k in front and with gene k + 1 in front a cell differs in two tokens: the one in front, and the one behind the
first k + 1 others. The second is a step of the path that deletions go; the first is one place that every gene takes in
its turn, and what it does there is a replacement, which each anchor gives for all genes near it. A gene that the cell
lacks takes that place too, and nothing else changes from one such gene to the next: they need one sequence.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from geneformer_ray.compute.first_order_cell import FirstOrderCell, to_numpy
from geneformer_ray.compute.path_cell import PathCell
from geneformer_ray.compute.tangent import Tangent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from geneformer_ray.compute.linear_trunk import Linearised, Point

__all__ = ["InsertedGenes", "MovedGenes"]

# Genes that take the place in front of one sequence at once, for each of its tokens.
ALTERNATES_A_TOKEN = 4


class MovedGenes(PathCell):
    """Overexpression of genes that the cell has: each is moved to the front."""

    alternates_a_step = 2

    @property
    def leaves(self) -> bool:
        """Whether what is read is a mean that the perturbed gene is no part of."""
        return super().leaves and self.reading.comparison == "context"

    def _lay_axes(self, scouts: Mapping[int, Linearised]) -> None:
        super()._lay_axes(scouts)
        self.apart_N = self.path.beside_FN[-1].copy()
        self.in_front: dict[int, NDArray[np.float64]] = {}

    def _alternates(self, anchor: int, steps: range) -> tuple[NDArray[np.int64], NDArray[np.integer]]:
        at, ids = super()._alternates(anchor, steps)
        near = np.arange(steps.start, steps.stop + 1)
        return np.append(at + 1, np.full(len(near), self.front)), np.append(ids, self.ids_N[near])

    def _add_anchor(self, anchor: int, steps: range, found: Linearised) -> None:
        super()._add_anchor(anchor, steps, found)
        self.in_front[anchor] = np.zeros((self.functions, self.genes))
        self.in_front[anchor][:, steps.start : steps.stop + 1] = to_numpy(found.replaced_SA)[:, len(steps) :]
        self.path.beside_FN = self._beside()
        self.path.beside_FN[-1] += self.apart_N

    def _beside(self) -> NDArray[np.float64]:
        """Give what each gene changes by being in front, against the first anchor's; between anchors what both say."""
        beside_FN = np.zeros((self.functions, self.genes))
        for a, b in pairwise(sorted(self.in_front)):
            near = slice(a, b + 1)
            share_Q = (np.arange(a, b + 1) - a) / (b - a)
            at_a_FQ = self.in_front[a][:, near]
            at_b_FQ = self.in_front[b][:, near] - self.in_front[b][:, a : a + 1]
            beside_FN[:, near] = beside_FN[:, a : a + 1] + (1 - share_Q) * at_a_FQ + share_Q * at_b_FQ
        return beside_FN


class InsertedGenes(FirstOrderCell):
    """Overexpression of genes that the cell lacks: each is inserted in front; at full length the last one falls out.

    The first scout is the one sequence in which the others take its place.
    """

    scouts_wanted = 5
    scouts_first = True

    @property
    def functions(self) -> int:
        """How many functions of what is read are followed back."""
        return super().functions + self.scouts_wanted - 1

    def _order(self, draw: np.random.Generator) -> list[int]:
        return [self.tokens[number] for number in draw.permutation(len(self.tokens))]

    def _least_cost(self) -> float:
        return sum(self._cost(len(part)) for part in self._parts())

    def _parts(self) -> list[list[int]]:
        """Cut the genes into those that take the place at once."""
        at_once = ALTERNATES_A_TOKEN * len(self.events.input_ids)
        return [self.tokens[start : start + at_once] for start in range(0, len(self.tokens), at_once)]

    def _original(self) -> Point:
        (batch,) = replace(self.events, events=self.events.events[:1]).batches(1)
        kept = np.setdiff1d(np.arange(len(self.events.input_ids)), batch.cut)
        genes = self.genes - len(batch.cut)
        return self._point(self.events.input_ids[kept], slice(self.front, self.front + genes))

    def _begin(self, original: Linearised, measured: Mapping[int, Linearised]) -> None:
        self.known_S = self._cosines(original.read_D[None])[:, 0]
        for token, found in measured.items():
            self.exact[token] = self._cosines(found.read_D[None])[:, 0] - self.known_S
        centre_D, *others = (measured[token].read_D for token in self.scouts)
        self.tangent = Tangent(centre_D, self.states_SD, [other_D - centre_D for other_D in others])

    def _points(self) -> list[Point]:
        point = replace(self._sequence(self.scouts[0]), functions=self.tangent)
        return [
            replace(point, at_A=self._on_device(np.full(len(part), self.front)), ids_A=self._on_device(np.array(part)))
            for part in self._parts()
        ]

    def _continue(self, found: Sequence[Linearised]) -> None:
        self.passes += self._least_cost()
        self.anchors = 1
        place_FE = torch.cat([mine.replaced_SA for mine in found], dim=1).double()
        place_GE = torch.cat([place_FE, place_FE.new_zeros(1, len(self.tokens))])
        self.shift_SE = to_numpy(self.tangent.cosines(place_GE)) - self.known_S[:, None]
        self.error = self._error(self.shift_SE)
        self.done = True

    def _estimates(self) -> NDArray[np.float64]:
        return self.shift_SE.copy()
