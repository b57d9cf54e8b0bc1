"""Deletions of one cell as a path: anchors on it, exact, and first-order steps between them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from geneformer_ray.compute.deletion_path import DeletionPath, first_anchors
from geneformer_ray.compute.first_order_cell import FirstOrderCell, to_numpy
from geneformer_ray.compute.tangent import Tangent

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from geneformer_ray.compute.cell_events import CellEvents
    from geneformer_ray.compute.first_order_cell import FirstOrder
    from geneformer_ray.compute.linear_trunk import Linearised, Point
    from geneformer_ray.compute.reading import Reading
    from geneformer_ray.compute.trunk import Trunk

__all__ = ["PathCell"]


class PathCell(FirstOrderCell):
    """A cell's deletions, others moving up.

    What goes along the path are coordinates of what is read (``tangent``): they add up where cosines bend.
    """

    alternates_a_step: ClassVar[int] = 1

    def __init__(self, events: CellEvents, reading: Reading, settings: FirstOrder, trunk: Trunk) -> None:
        self.scouting = self.scouted = False
        super().__init__(events, reading, settings, trunk)
        self.path = DeletionPath(max(1, self.genes), self.functions)
        self.reads: dict[int, torch.Tensor] = {}

    @property
    def functions(self) -> int:
        """How many functions of what is read are followed back."""
        return super().functions + 1 + self.scouts_wanted * self.scouted

    @property
    def leaves(self) -> bool:
        """Whether what is read is a mean that the perturbed gene is no part of."""
        return self.reading.embedding == "mean"

    def _order(self, draw: np.random.Generator) -> list[int]:
        return sorted(self.tokens, key=lambda token: self.events.position_of[token])

    def _gene(self, token: int) -> int:
        return self.events.position_of[token] - self.front

    def _least_cost(self) -> float:
        return self._cost_of_anchors(anchors := first_anchors(self.genes, self.settings.anchors), anchors)

    def _begin(self, original: Linearised, measured: Mapping[int, Linearised]) -> None:
        self.ids_N = self.events.input_ids[self.front : self.front + self.genes]
        self.original_D = original.read_D
        self.before_ND = original.read_D.double().expand(self.genes, -1)
        if self.leaves:
            # A gene's leaving the mean is known, and no small thing beside its other effects.
            hidden_ND = original.hidden_LD[self.front : self.front + self.genes].double()
            self.before_ND = (hidden_ND.sum(dim=0) - hidden_ND) / (self.genes - 1)
        compared = self.before_ND if self.reading.comparison == "context" else original.read_D[None]
        self.known_SN = np.broadcast_to(self._cosines(compared), (len(self.states_SD), self.genes))
        for token, found in measured.items():
            self._note(self._gene(token), found)
        self._lay_axes({})
        self.asked = first_anchors(self.genes, self.settings.anchors)

    def _note(self, gene: int, found: Linearised) -> None:
        """Note what was read in a gene's event."""
        self.reads[gene] = found.read_D
        self.exact[int(self.ids_N[gene])] = self._cosines(found.read_D[None])[:, 0] - self.known_SN[:, gene]

    def _lay_axes(self, scouts: Mapping[int, Linearised]) -> None:
        """Begin a path in the coordinates that states and scouts span."""
        changes = [found.read_D - self.before_ND[self._gene(token)] for token, found in scouts.items()]
        self.tangent = Tangent(self.original_D, self.states_SD, changes)
        self.path = DeletionPath(self.genes, self.functions)
        self.path.beside_FN[-1] = to_numpy(self.tangent.place(self.before_ND))[-1]
        for gene, read_D in self.reads.items():
            self.path.add_exact(gene, self._place(read_D))

    def _place(self, read_D: torch.Tensor) -> NDArray[np.float64]:
        return to_numpy(self.tangent.place(read_D[None]))[:, 0]

    def _points(self) -> list[Point]:
        if self.scouting:
            return [self._sequence(token) for token in self.scouts]
        anchors = sorted({*self.path.anchors, *self.asked})
        points = []
        for anchor in self.asked:
            at, ids = self._alternates(anchor, self.path.reach(anchor, anchors))
            functions = partial(self.tangent.with_beyond, apart_D=self.before_ND[anchor])
            point = replace(self._sequence(int(self.ids_N[anchor])), functions=functions)
            points.append(replace(point, at_A=self._on_device(at), ids_A=self._on_device(ids)))
        return points

    def _alternates(self, anchor: int, steps: range) -> tuple[NDArray[np.int64], NDArray[np.integer]]:
        """Say which tokens take which places around an anchor."""
        step_Q = np.array(steps, dtype=np.int64)
        return self.front + step_Q, np.where(step_Q >= anchor, self.ids_N[step_Q], self.ids_N[step_Q + 1])

    def _continue(self, found: Sequence[Linearised]) -> None:
        if self.scouting:
            self._take_scouts(dict(zip(self.scouts, found, strict=True)))
            return
        anchors = sorted({*self.path.anchors, *self.asked})
        self.passes += self._cost_of_anchors(self.asked, anchors)
        for anchor, mine in zip(self.asked, found, strict=True):
            self._add_anchor(anchor, self.path.reach(anchor, anchors), mine)
        self.anchors = len(anchors)
        at_anchors = self.ids_N[anchors].tolist()
        place_FN = self._places(set(self.held_out) - set(at_anchors))
        self.error = self._error(self._shifts(place_FN), but=at_anchors)
        if self.error <= self.settings.tolerance:
            self.done = True
            return
        # If it were known how far from the axes held-out events go, would that be the better half of it?
        for gene in map(self._gene, self.held_out):
            place_FN[-1, gene] = self.path.exact[gene][-1]
        self.scouting = not self.scouted and self._error(self._shifts(place_FN), but=at_anchors) < self.error / 2
        self.scouted = self.scouted or self.scouting
        again = self._cost_of_anchors(anchors, anchors) + len(self.scouts)
        if self.scouting and not self._affords(again):
            self.scouting = self.scouted = False
        self.asked = anchors if self.scouting else self._next_anchors()
        self.done = not self.asked

    def _take_scouts(self, found: Mapping[int, Linearised]) -> None:
        self.scouting = False
        self.passes += len(found)
        for token, mine in found.items():
            self._note(self._gene(token), mine)
        self._lay_axes(found)

    def _add_anchor(self, anchor: int, steps: range, found: Linearised) -> None:
        self._note(anchor, found)
        # Behind the anchor the alternate is the gene of the next event, before it that of the one before.
        sign_Q = np.where(np.array(steps) >= anchor, 1.0, -1.0)
        step_FQ = to_numpy(found.replaced_SA)[:, : len(steps)] * sign_Q
        self.path.add_anchor(anchor, self._place(found.read_D), steps.start, step_FQ)

    def _estimates(self) -> NDArray[np.float64]:
        return self._shifts(self._places())

    def _places(self, without: Iterable[int] = ()) -> NDArray[np.float64]:
        """Say where each gene's event leads, as if those of these tokens had not been measured."""
        return self.path.values(without=[self._gene(token) for token in without])

    def _shifts(self, place_FN: NDArray[np.float64]) -> NDArray[np.float64]:
        cosine_SN = to_numpy(self.tangent.cosines(torch.from_numpy(place_FN).to(self.trunk.device)))
        return (cosine_SN - self.known_SN)[:, [self._gene(token) for token in self.tokens]]

    def _affords(self, cost: float) -> bool:
        return self.passes + cost <= self.settings.most_cost * len(self.tokens)

    def _cost_of_anchors(self, some: Iterable[int], anchors: Sequence[int]) -> float:
        return sum(self._cost(self.alternates_a_step * len(self.path.reach(anchor, anchors))) for anchor in some)

    def _next_anchors(self) -> list[int]:
        """Cut those stretches in two whose steps missed the next anchor by most, half of them at most."""
        gaps = self.path.gaps(functions=len(self.states_SD))
        longest = sorted((pair for pair in gaps if pair[1] - pair[0] > 1), key=lambda pair: (-gaps[pair], pair))
        new = sorted((a + b) // 2 for a, b in longest[: -(-len(gaps) // 2)])
        cost = self._cost_of_anchors(new, sorted({*self.path.anchors, *new}))
        return new if self._affords(cost) else []
