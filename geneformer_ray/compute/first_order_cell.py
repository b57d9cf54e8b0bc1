"""One cell of a first-order screen: some of its events exactly, the others by an estimate, and how far that is off."""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from geneformer_ray.compute.linear_trunk import Linearised, Point, passes_of
from geneformer_ray.compute.shifts import CellShifts
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from geneformer_ray.compute.cell_events import CellEvents
    from geneformer_ray.compute.reading import Reading
    from geneformer_ray.compute.trunk import Trunk

__all__ = ["FirstOrder", "FirstOrderCell", "FirstOrderShifts", "to_numpy"]


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
        the effects; the largest of the states. 0 where all is exact, infinite where no held-out gene is left to say.
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


class FirstOrderCell(ABC):
    """A cell's events of one kind, round by round; how they are estimated is a subclass's.

    Two draws of its events are measured exactly: those that are held out, to see the error, and, where that is worth
    it, scouts, of whose changes the estimate makes axes.

    Parameters
    ----------
    events
        Events of one gene each.
    reading, settings
        What is compared, and how well.
    trunk
        The layers up to the one that is read.
    """

    scouts_wanted: ClassVar[int] = 4
    scouts_first: ClassVar[bool] = False

    def __init__(self, events: CellEvents, reading: Reading, settings: FirstOrder, trunk: Trunk) -> None:
        self.events, self.reading, self.settings, self.trunk = events, reading, settings, trunk
        self.tokens = [event[0] for event in events.events]
        self.states_SD = torch.from_numpy(np.stack(list(reading.states.values()))).to(trunk.device)
        positions = np.flatnonzero(events.is_gene)
        self.front, self.genes = (int(positions[0]) if len(positions) else 0), len(positions)
        self.together = self.genes > 0 and int(positions[-1]) - self.front == self.genes - 1
        seed = [settings.seed, zlib.crc32(events.input_ids.astype("<i4").tobytes())]
        draw = np.random.default_rng(seed)
        order = self._order(draw)
        self.held_out, speaks_for = _one_a_stretch(order, settings.held_out, draw)
        self.speaks_for_H = np.array(speaks_for, dtype=np.float64)
        held_out = set(self.held_out)
        self.scouts = _one_a_stretch([token for token in order if token not in held_out], self.scouts_wanted, draw)[0]
        self.exact: dict[int, NDArray[np.float64]] = {}
        self.begun = self.done = False
        self.anchors = 0
        self.passes = 0.0
        self.error = math.inf

    @property
    def functions(self) -> int:
        """How many functions of what is read are followed back."""
        return len(self.states_SD)

    @property
    def first(self) -> list[int]:
        """The tokens whose events are measured in the first round."""
        return [*self.held_out, *self.scouts] if self.scouts_first else self.held_out

    @property
    def pays(self) -> bool:
        """Whether the least that is computed costs less than the exact engine, which takes any cell."""
        if not self.together or self.genes < 3 or not self.tokens:
            return False
        return 1 + len(self.first) + self._least_cost() < len(self.tokens)

    def points(self) -> list[Point]:
        """Say what is to be computed next."""
        if self.begun:
            return self._points()
        return [self._original(), *map(self._sequence, self.first)]

    def take(self, found: Sequence[Linearised]) -> None:
        """Take what was computed, and decide what is to come."""
        if self.begun:
            self._continue(found)
            return
        self.begun = True
        self.passes += len(found)
        self._begin(found[0], dict(zip(self.first, found[1:], strict=True)))

    def result(self) -> FirstOrderShifts:
        """Give the numbers of all events."""
        shifts = CellShifts(
            [tuple(event) for event in self.events.events],
            np.ascontiguousarray(self._with_exact(self._estimates()).T, dtype=np.float32),
            skipped=self.events.skipped,
        )
        exact_E = np.isin(self.tokens, list(self.exact))
        return FirstOrderShifts(shifts, exact_E, self.error, self.passes, self.anchors)

    @abstractmethod
    def _order(self, draw: np.random.Generator) -> list[int]:
        """Give the events' tokens, those first of which more are drawn."""

    @abstractmethod
    def _least_cost(self) -> float:
        """Say what comes on top of the first round, in passes."""

    @abstractmethod
    def _begin(self, original: Linearised, measured: Mapping[int, Linearised]) -> None:
        """Take the first round."""

    def _points(self) -> list[Point]:
        """Say what a later round needs; no subclass has one that is not done before it."""
        raise NotImplementedError

    def _continue(self, found: Sequence[Linearised]) -> None:
        """Take what a later round gave."""
        raise NotImplementedError

    @abstractmethod
    def _estimates(self) -> NDArray[np.float64]:
        """Estimate the shifts of all events, shape (states, events)."""

    def _original(self) -> Point:
        """Give the cell as it is."""
        return self._point(self.events.input_ids, slice(self.front, self.front + self.genes))

    def _sequence(self, token: int) -> Point:
        """Give the cell as the event of a gene leaves it."""
        (batch,) = replace(self.events, events=[(token,)]).batches(1)
        read = batch.kept_perturbed_EK if self.reading.comparison == "context" else batch.genes_perturbed_EN
        ranks = None if batch.ranks_EL is None else torch.from_numpy(batch.ranks_EL[0]).to(self.trunk.device)
        point = self._point(batch.input_ids_EL[0], slice(int(read[0, 0]), int(read[0, -1]) + 1))
        return replace(point, ranks_L=ranks)

    def _point(self, ids: NDArray[np.integer], read: slice) -> Point:
        none = np.empty(0, dtype=np.int64)
        return Point(self._on_device(ids), read, self._on_device(none), self._on_device(none))

    def _on_device(self, array: NDArray[np.integer]) -> torch.Tensor:
        return torch.from_numpy(np.asarray(array, dtype=np.int64)).to(self.trunk.device)

    def _cosines(self, read_XD: torch.Tensor) -> NDArray[np.float64]:
        """Give the cosine of each embedding with each state, shape (states, X)."""
        return to_numpy(cosine_similarity(read_XD.double()[None], self.states_SD.double()[:, None], dim=2))

    def _cost(self, alternates: int) -> float:
        """Say what a point costs that is followed back."""
        return passes_of(self.trunk, len(self.events.input_ids), alternates, self.functions)

    def _with_exact(self, shift_SE: NDArray[np.float64]) -> NDArray[np.float64]:
        """Give estimates with what was measured in its place."""
        shift_SE = shift_SE.copy()
        for number, token in enumerate(self.tokens):
            if token in self.exact:
                shift_SE[:, number] = self.exact[token]
        return shift_SE

    def _error(self, shift_SE: NDArray[np.float64], but: Iterable[int] = ()) -> float:
        """Compare estimates with the exact values of held-out events, but those with another part in them.

        Infinite where none is left to judge the others by: nobody knows.
        """
        number_of = {token: number for number, token in enumerate(self.tokens)}
        judging = [place for place, token in enumerate(self.held_out) if token not in set(but)]
        if not judging:
            return 0.0 if number_of.keys() <= self.exact.keys() else math.inf
        exact_SH = np.stack([self.exact[self.held_out[place]] for place in judging], axis=1)
        off_SH = shift_SE[:, [number_of[self.held_out[place]] for place in judging]] - exact_SH
        off_S = np.sqrt(np.average(off_SH**2, axis=1, weights=self.speaks_for_H[judging]))
        with np.errstate(divide="ignore", invalid="ignore"):
            # An estimate that was far too large, and has been measured since, is no spread of effects.
            return float(np.where(off_S > 0, off_S / self._with_exact(shift_SE).std(axis=1), 0.0).max())


def _one_a_stretch(order: Sequence[int], number: int, draw: np.random.Generator) -> tuple[list[int], list[int]]:
    """Draw one of each of so many stretches, and say how long these are: short at first, where most is missed."""
    shares = np.linspace(0, 1, min(number, len(order)) + 1)
    edges = np.maximum(np.round(len(order) * shares**2).astype(int), np.arange(len(shares)))
    drawn = draw.integers(edges[:-1], edges[1:])
    return [order[place] for place in drawn.tolist()], np.diff(edges).tolist()


def to_numpy(x: torch.Tensor) -> NDArray[np.float64]:
    """Bring a tensor's numbers here, in double precision."""
    return x.detach().cpu().numpy().astype(np.float64)
