"""One cell of a first-order screen: what it still needs to have computed, and the numbers that come of it."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from geneformer_ray.compute.deletion_path import DeletionPath, first_anchors
from geneformer_ray.compute.linear_trunk import Linearised, Point, cosines, passes_of
from geneformer_ray.compute.shifts import CellShifts
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from geneformer_ray.compute.cell_events import CellEvents
    from geneformer_ray.compute.reading import Reading
    from geneformer_ray.compute.trunk import Trunk

__all__ = ["FirstOrder", "FirstOrderCell", "FirstOrderShifts"]


@dataclass(frozen=True)
class FirstOrder:
    """How much is computed, and how well it must do.

    Parameters
    ----------
    tolerance
        A cell is done where the error at its held-out genes is no more than this share of its effects' standard
        deviation.
    most_cost
        Or where more would cost more than this share of the exact passes.
    anchors
        Genes of a cell at which the path is computed at first.
    held_out
        Random genes of each cell, more of its highest ranks, that are measured exactly to see the error.
    seed
        Draws them, from the cell's tokens and this: the same wherever a cell is computed.
    """

    tolerance: float = 0.1
    most_cost: float = 0.2
    anchors: int = 5
    held_out: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tolerance > 0:
            raise InputError("--tolerance", self.tolerance, "a share above 0")
        if not 0 < self.most_cost <= 1:
            raise InputError("--most-cost", self.most_cost, "a share above 0, at most 1")
        if self.anchors < 2:
            raise InputError("--anchors", self.anchors, "at least 2")
        if self.held_out < 2:
            raise InputError("--held-out", self.held_out, "at least 2 genes")


@dataclass(frozen=True)
class FirstOrderShifts:
    """What was found of one cell.

    Parameters
    ----------
    shifts
        As the exact engine gives them.
    exact_E
        Which events' values are exact, shape (events,).
    error
        Root mean square of what the values were off by, as the held-out genes say, over the standard deviation of
        the effects; the largest of the states. 0 where all is exact.
    passes
        What it cost, in forward passes of the cell.
    anchors
        At how many genes the path was computed.
    """

    shifts: CellShifts
    exact_E: NDArray[np.bool_]
    error: float
    passes: float
    anchors: int

    @classmethod
    def all_exact(cls, shifts: CellShifts) -> FirstOrderShifts:
        """Take over what the exact engine measured."""
        return cls(shifts, np.ones(len(shifts), dtype=bool), 0.0, len(shifts) + 1.0, 0)


class FirstOrderCell:
    """A cell's deletions, round by round.

    Parameters
    ----------
    events
        Deletions of one gene each.
    reading, settings
        What is compared, and how well.
    trunk
        The layers up to the one that is read.
    """

    def __init__(self, events: CellEvents, reading: Reading, settings: FirstOrder, trunk: Trunk) -> None:
        self.events, self.reading, self.settings, self.trunk = events, reading, settings, trunk
        positions = np.flatnonzero(events.is_gene)
        self.front, self.genes = (int(positions[0]) if len(positions) else 0), len(positions)
        self.together = self.genes > 0 and int(positions[-1]) - self.front == self.genes - 1
        self.held = events.plan.ranks == "hold"
        self.gene_E = np.array([events.position_of[event[0]] - self.front for event in events.events], dtype=np.int64)
        self.path = DeletionPath(max(1, self.genes), len(reading.states))
        self.held_out, self.speaks_for_H = self._drawn()
        self.judged_SH = np.empty((len(reading.states), 0))
        self.known_SN = self.gone_SN = np.empty((len(reading.states), 0))
        self.passes = 0.0
        self.error = math.inf
        self.done = False

    @property
    def pays(self) -> bool:
        """Whether the first round costs less than the exact engine, which also takes special tokens between genes."""
        if not self.together or self.genes < 3:
            return False
        first = self.settings.held_out + 2 + self._cost(0, removed=self.held)
        if not self.held:
            anchors = first_anchors(self.genes, self.settings.anchors)
            first += sum(self._cost(len(self.path.reach(anchor, anchors))) for anchor in anchors)
        return first < len(self.gene_E)

    def judge(self, shifts: CellShifts) -> None:
        """Take the exact shifts of the genes that were held out, in the order of `held_out`."""
        self.judged_SH = shifts.values_ES.T.astype(np.float64)
        self.passes += len(shifts) + 1

    def points(self) -> list[Point]:
        """Say what is to be computed next."""
        if not self.known_SN.size:
            nothing = np.empty(0, dtype=np.int64)
            original = self._point(self.events.input_ids, self.genes, nothing, nothing, removed=self.held)
            self.asked = [] if self.held else first_anchors(self.genes, self.settings.anchors)
            return [original, *map(self._anchor, self.asked)]
        return [self._anchor(anchor) for anchor in self.asked]

    def take(self, found: Sequence[Linearised]) -> None:
        """Take what was computed, and decide what is to come."""
        if not self.known_SN.size:
            self._take_original(found[0])
            found = found[1:]
        for anchor, mine in zip(self.asked, found, strict=True):
            steps = self._steps(anchor)
            # Behind the anchor the alternate is the gene of the next deletion, before it that of the one before.
            sign_Q = np.where(np.array(steps) >= anchor, 1.0, -1.0)
            self.path.add_anchor(anchor, _numpy(mine.values_S), steps.start, _numpy(mine.replaced_SA) * sign_Q)
            self.passes += self._cost(len(steps))
        if self.held:
            self._see_error(self.gone_SN)
            self.done = True
            return
        for gene, shift_S in zip(self._held_out_genes(), self.judged_SH.T, strict=True):
            self.path.add_exact(gene, shift_S + self.known_SN[:, gene])
        self._see_error(self.path.values(without=self._held_out_genes()))
        self.asked = self._next_anchors()
        self.done = self.error <= self.settings.tolerance or not self.asked

    def result(self) -> FirstOrderShifts:
        """Give the numbers of all events."""
        if self.held:
            shift_SN = self.gone_SN - self.known_SN
            exact = self._held_out_genes()
            shift_SN[:, exact] = self.judged_SH
        else:
            shift_SN = self.path.values() - self.known_SN
            exact = sorted(self.path.exact)
        shifts = CellShifts(
            [tuple(event) for event in self.events.events],
            np.ascontiguousarray(shift_SN[:, self.gene_E].T, dtype=np.float32),
            skipped=self.events.skipped,
        )
        return FirstOrderShifts(shifts, np.isin(self.gene_E, exact), self.error, self.passes, len(self.path.anchors))

    def _drawn(self) -> tuple[list[int], NDArray[np.float64]]:
        """Draw the tokens that are held out, whatever batch or worker the cell is in, and how many each speaks for.

        One of each stretch of ranks; the stretches are short at first, for there is most to go wrong.
        """
        seed = [self.settings.seed, zlib.crc32(self.events.input_ids.astype("<i4").tobytes())]
        shares = np.linspace(0, 1, min(self.settings.held_out, len(self.gene_E)) + 1)
        edges = np.maximum(np.round(len(self.gene_E) * shares**2).astype(int), np.arange(len(shares)))
        drawn = np.random.default_rng(seed).integers(edges[:-1], edges[1:])
        events = np.argsort(self.gene_E, kind="stable")[drawn]
        return [self.events.events[event][0] for event in events.tolist()], np.diff(edges).astype(np.float64)

    def _held_out_genes(self) -> list[int]:
        return [self.events.position_of[token] - self.front for token in self.held_out]

    def _cost(self, alternates: int, *, removed: bool = False) -> float:
        """Say what an anchor costs, or the original."""
        length, gradient = len(self.events.input_ids), removed or alternates > 0
        return passes_of(self.trunk, length, alternates, len(self.reading.states), gradient=gradient)

    def _steps(self, anchor: int) -> range:
        return self.path.reach(anchor, {*self.path.anchors, *self.asked})

    def _anchor(self, anchor: int) -> Point:
        """Make the cell without a gene; in each step's place stands the one gene, and may stand the other."""
        ids, position = self.events.input_ids, self.front + anchor
        step_Q = self.front + np.array(self._steps(anchor), dtype=np.int64)
        alternate_Q = np.where(step_Q >= position, ids[step_Q], ids[step_Q + 1])
        return self._point(np.delete(ids, position), self.genes - 1, step_Q, alternate_Q)

    def _point(
        self,
        ids: NDArray[np.integer],
        genes: int,
        at: NDArray[np.int64],
        alternates: NDArray[np.integer],
        *,
        removed: bool = False,
    ) -> Point:
        device = self.trunk.device
        ids_L, at_A, ids_A = (torch.from_numpy(array.astype(np.int64)).to(device) for array in (ids, at, alternates))
        return Point(ids_L, slice(self.front, self.front + genes), at_A, ids_A, removed=removed)

    def _take_original(self, found: Linearised) -> None:
        """Note what each deletion is compared with, and what f is with its gene gone and all ranks held."""
        everything_SN = _numpy(found.values_S)[:, None].repeat(self.genes, axis=1)
        without_SN, share = everything_SN, 1.0
        if self.reading.embedding == "mean":
            states_SD = (
                torch.from_numpy(np.stack(list(self.reading.states.values()))).to(found.hidden_LD.device).double()
            )
            hidden_ND = found.hidden_LD[self.front : self.front + self.genes].double()
            others_ND = (hidden_ND.sum(dim=0) - hidden_ND) / (self.genes - 1)
            without_SN = _numpy(cosine_similarity(others_ND[None], states_SD[:, None], dim=2))
            # A gene's leaving the mean is known, and no small thing beside its other effects: near a state, where the
            # gradient vanishes, what f's curvature makes of it counts.
            mean_D = hidden_ND.mean(dim=0)
            at_mean_S, gradient_SD = cosines(mean_D, states_SD)
            first_SN = at_mean_S[:, None] + gradient_SD @ (others_ND - mean_D).T
            self.path.curved_SN = without_SN - _numpy(first_SN)
            share = self.genes / (self.genes - 1)  # what f reads is a mean of one gene fewer
        self.known_SN = without_SN if self.reading.comparison == "context" else everything_SN
        if self.held:
            self.gone_SN = without_SN + share * _numpy(found.removed_SL)[:, self.front : self.front + self.genes]
        self.passes += self._cost(0, removed=self.held)

    def _see_error(self, value_SN: NDArray[np.float64]) -> None:
        """Compare with the exact values of genes that are no anchors: these are exact by themselves."""
        effect_SN = value_SN - self.known_SN
        genes = self._held_out_genes()
        judging = [number for number, gene in enumerate(genes) if gene not in self.path.anchors]
        if not judging:
            self.error = 0.0
            return
        off_SH = effect_SN[:, [genes[number] for number in judging]] - self.judged_SH[:, judging]
        off_S = np.sqrt(np.average(off_SH**2, axis=1, weights=self.speaks_for_H[judging]))
        spread_S = effect_SN.std(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            self.error = float(np.where(off_S > 0, off_S / spread_S, 0.0).max())

    def _next_anchors(self) -> list[int]:
        """Cut those stretches in two whose steps missed the next anchor by most, half of them at most."""
        gaps = self.path.gaps()
        longest = sorted((pair for pair in gaps if pair[1] - pair[0] > 1), key=lambda pair: (-gaps[pair], pair))
        new = sorted((a + b) // 2 for a, b in longest[: -(-len(gaps) // 2)])
        anchors = {*self.path.anchors, *new}
        cost = sum(self._cost(len(self.path.reach(anchor, anchors))) for anchor in new)
        return new if self.passes + cost <= self.settings.most_cost * len(self.gene_E) else []


def _numpy(x: torch.Tensor) -> NDArray[np.float64]:
    return x.detach().cpu().numpy().astype(np.float64)
