"""Deletions of one cell that leave the other genes at their ranks: one point, the original, gives them all.

The estimate orders genes well, and is furthest off where a single gene turns the whole cell: what a random draw seldom
sees. So the front gene and the largest estimates are measured, and more of them where the held-out genes ask for it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from geneformer_ray.compute.first_order_cell import FirstOrderCell, to_numpy
from geneformer_ray.compute.tangent import Tangent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from numpy.typing import NDArray

    from geneformer_ray.compute.linear_trunk import Linearised, Point

__all__ = ["HeldRanks"]

# Of the largest estimates towards each state, how many are measured in any case, and how many more at once.
LARGEST, MORE = 1, 4


class HeldRanks(FirstOrderCell):
    """A cell's deletions, ranks held: what others get from each gene, by the closed form of attention without it.

    No scouts: they would cost as much as all else.
    """

    scouts_wanted = 0
    largest = 0

    def _order(self, draw: np.random.Generator) -> list[int]:
        return sorted(self.tokens, key=lambda token: self.events.position_of[token])

    def _least_cost(self) -> float:
        return self._cost(0) + LARGEST * len(self.states_SD)  # the first round has the original, this the front gene

    def _original(self) -> Point:
        return replace(super()._original(), functions=self._from_there, removed=True)

    def _from_there(self, read_D: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the functions of what is read, as seen from it."""
        return Tangent(read_D, self.states_SD)(read_D)

    def _begin(self, original: Linearised, measured: Mapping[int, Linearised]) -> None:
        self.passes += self._cost(0) - 1
        genes = slice(self.front, self.front + self.genes)
        without_ND, share = original.read_D.double()[None], 1.0
        if self.reading.embedding == "mean":
            hidden_ND = original.hidden_LD[genes].double()
            without_ND = (hidden_ND.sum(dim=0) - hidden_ND) / (self.genes - 1)
            share = self.genes / (self.genes - 1)  # what is read is a mean of one gene fewer
        tangent = Tangent(original.read_D, self.states_SD)
        known_ND = without_ND if self.reading.comparison == "context" else original.read_D[None]
        place_FN = tangent.place(without_ND).expand(-1, self.genes).clone()
        place_FN[:-1] += share * original.removed_SL[:, genes]
        self.shift_SN = to_numpy(tangent.cosines(place_FN)) - self._cosines(known_ND)
        self.known_SN = np.broadcast_to(self._cosines(known_ND), self.shift_SN.shape)
        self._note(measured)
        self._ask(LARGEST)

    def _points(self) -> list[Point]:
        return [self._sequence(token) for token in self.asked]

    def _continue(self, found: Sequence[Linearised]) -> None:
        self.passes += len(found)
        self._note(dict(zip(self.asked, found, strict=True)))
        self._judge()

    def _note(self, measured: Mapping[int, Linearised]) -> None:
        for token, found in measured.items():
            self.exact[token] = self._cosines(found.read_D[None])[:, 0] - self.known_SN[:, self._gene(token)]

    def _ask(self, more: int) -> None:
        """Ask for so many more of the largest estimates; held-out genes are known where they are among them."""
        self.largest += more
        self.asked = [token for token in self._of_largest() if token not in self.exact]
        if not self.asked:
            self._judge()

    def _judge(self) -> None:
        """See what the others are off by, and whether more is to be measured; the largest speak for no other gene."""
        largest = self._of_largest()
        rest = 1 - len(largest) / len(self.tokens)
        self.error = math.sqrt(rest) * self._error(self._estimates(), but=largest)
        affordable = self.passes + MORE * len(self.states_SD) <= self.settings.most_cost * len(self.tokens)
        self.done = self.error <= self.settings.tolerance or not affordable
        if not self.done:
            self._ask(MORE)

    def _of_largest(self) -> list[int]:
        """Give the tokens of the front gene and of the largest estimates towards each state."""
        order_SE = np.argsort(-np.abs(self._estimates()), axis=1, kind="stable")
        front = min(range(len(self.tokens)), key=lambda number: self._gene(self.tokens[number]))
        return [
            self.tokens[number] for number in dict.fromkeys([front, *order_SE[:, : self.largest].T.ravel().tolist()])
        ]

    def _gene(self, token: int) -> int:
        return self.events.position_of[token] - self.front

    def _estimates(self) -> NDArray[np.float64]:
        return self.shift_SN[:, [self._gene(token) for token in self.tokens]]
