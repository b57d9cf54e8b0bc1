"""A cell's deletions as a path: f with gene k gone, for every k, from exact values at some k and first-order steps.

With gene k deleted and with gene k + 1 deleted a cell differs in one token: position k holds gene k + 1 or gene k. So
f is a path over k, and its steps are what the replacement of one token changes. At an anchor f is computed, with the
changes of all steps near it as they are among the tokens of that anchor. From anchor to anchor that neighbourhood moves
on gene by gene: a step between two anchors is taken between what they say, and what is then still missing at the next
exact value is spread over the steps, most of it where the two disagree most, so that every exact value is met.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

__all__ = ["DeletionPath", "first_anchors"]

# What every step is doubted by, as a share of the mean: so that no two deletions are at one place.
LEAST_DOUBT = 1e-3


def first_anchors(genes: int, anchors: int) -> list[int]:
    """Choose anchors, both ends among them, closer together at the highest ranks: there the path bends most."""
    if anchors >= genes:
        return list(range(genes))
    return sorted({round((genes - 1) * share**2) for share in np.linspace(0, 1, max(2, anchors))})


class DeletionPath:
    """The path of one cell.

    Parameters
    ----------
    genes
        How many genes the cell has, at least one.
    states
        How many functions f there are.

    Attributes
    ----------
    curved_SN
        What each deletion changes beyond first order, where that is known, shape (states, genes): no part of the steps.
    """

    def __init__(self, genes: int, states: int) -> None:
        self.genes, self.states = genes, states
        self.exact: dict[int, NDArray[np.float64]] = {}
        self.curved_SN = np.zeros((states, genes))
        self._steps: dict[int, tuple[int, NDArray[np.float64]]] = {}

    @property
    def anchors(self) -> list[int]:
        """The genes at which steps are known."""
        return sorted(self._steps)

    def reach(self, anchor: int, anchors: Iterable[int]) -> range:
        """Say which steps an anchor has to give: those up to the anchors beside it."""
        below = max((other for other in anchors if other < anchor), default=0)
        above = min((other for other in anchors if other > anchor), default=self.genes - 1)
        return range(below, above)

    def add_exact(self, gene: int, value_S: NDArray[np.floating]) -> None:
        """Note f with a gene deleted."""
        self.exact[gene] = np.asarray(value_S, dtype=np.float64)

    def add_anchor(self, gene: int, value_S: NDArray[np.floating], first: int, steps_SQ: NDArray[np.floating]) -> None:
        """Note f with a gene deleted, and f with gene q + 1 less f with gene q deleted for each q from `first` on."""
        self.add_exact(gene, value_S)
        self._steps[gene] = first, np.asarray(steps_SQ, dtype=np.float64)

    def values(self, without: Iterable[int] = ()) -> NDArray[np.float64]:
        """Give f with each gene deleted, shape (states, genes).

        Parameters
        ----------
        without
            Genes whose exact values are left out of it, to see how well it does without them.
        """
        raw_SN, way_SN = self._raw()
        known = np.array(sorted(set(self.exact) - set(without)))
        missing_SX = np.stack([self.exact[int(gene)] for gene in known], axis=1) - raw_SN[:, known]
        spread = [np.interp(way_N, way_N[known], missing) for way_N, missing in zip(way_SN, missing_SX, strict=True)]
        path_SN: NDArray[np.float64] = raw_SN + np.stack(spread)
        return path_SN

    def gaps(self) -> dict[tuple[int, int], float]:
        """Say how much the steps between two anchors miss the second one by, given the first: the largest over f."""
        raw_SN, _ = self._raw()
        missing = {anchor: self.exact[anchor] - raw_SN[:, anchor] for anchor in self.anchors}
        return {(a, b): float(np.abs(missing[b] - missing[a]).max()) for a, b in pairwise(self.anchors)}

    def _raw(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Sum the steps from the first anchor on, and how far anchors disagree about them; both (states, genes)."""
        step_SQ, doubt_SQ = np.zeros((2, self.states, self.genes - 1))
        for a, b in pairwise(self.anchors):
            # In the middle of a step its neighbourhood is half of the one before and half of the one behind it.
            share_Q = (np.arange(a, b) + 0.5 - a) / (b - a)
            at_a_SQ, at_b_SQ = self._between(a, a, b), self._between(b, a, b)
            step_SQ[:, a:b] = (1 - share_Q) * at_a_SQ + share_Q * at_b_SQ
            doubt_SQ[:, a:b] = np.abs(at_b_SQ - at_a_SQ)
        doubt_SQ += LEAST_DOUBT * doubt_SQ.mean(axis=1, keepdims=True) + np.finfo(np.float64).tiny
        start_S1 = np.zeros((self.states, 1))
        raw_SN, way_SN = (np.concatenate([start_S1, x.cumsum(axis=1)], axis=1) for x in (step_SQ, doubt_SQ))
        return raw_SN + self.curved_SN, way_SN

    def _between(self, anchor: int, start: int, stop: int) -> NDArray[np.float64]:
        first, steps_SQ = self._steps[anchor]
        return steps_SQ[:, start - first : stop - first]
