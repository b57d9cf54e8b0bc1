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
    functions
        How many functions f there are.

    Attributes
    ----------
    beside_FN
        What each deletion changes by itself, where that is known, shape (functions, genes): no part of the steps.
    """

    def __init__(self, genes: int, functions: int) -> None:
        self.genes, self.functions = genes, functions
        self.exact: dict[int, NDArray[np.float64]] = {}
        self.beside_FN = np.zeros((functions, genes))
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

    def add_exact(self, gene: int, value_F: NDArray[np.floating]) -> None:
        """Note f with a gene deleted."""
        self.exact[gene] = np.asarray(value_F, dtype=np.float64)

    def add_anchor(self, gene: int, value_F: NDArray[np.floating], first: int, steps_FQ: NDArray[np.floating]) -> None:
        """Note f with a gene deleted, and f with gene q + 1 less f with gene q deleted for each q from `first` on."""
        self.add_exact(gene, value_F)
        self._steps[gene] = first, np.asarray(steps_FQ, dtype=np.float64)

    def values(self, without: Iterable[int] = ()) -> NDArray[np.float64]:
        """Give f with each gene deleted, shape (functions, genes).

        Parameters
        ----------
        without
            Genes whose exact values are left out of it, to see how well it does without them.
        """
        raw_FN, way_FN = self._raw()
        known = np.array(sorted(set(self.exact) - set(without)))
        missing_FX = np.stack([self.exact[int(gene)] for gene in known], axis=1) - raw_FN[:, known]
        spread = [np.interp(way_N, way_N[known], missing) for way_N, missing in zip(way_FN, missing_FX, strict=True)]
        path_FN: NDArray[np.float64] = raw_FN + np.stack(spread)
        return path_FN

    def gaps(self, functions: int) -> dict[tuple[int, int], float]:
        """Say how much the steps between two anchors miss the second one by, given the first: the largest over some f.

        Parameters
        ----------
        functions
            How many of the functions count, the first ones.
        """
        raw_FN, _ = self._raw()
        missing = {anchor: (self.exact[anchor] - raw_FN[:, anchor])[:functions] for anchor in self.anchors}
        return {(a, b): float(np.abs(missing[b] - missing[a]).max()) for a, b in pairwise(self.anchors)}

    def _raw(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Sum the steps from the first anchor on, and how far anchors disagree about them; both (functions, genes)."""
        step_FQ, doubt_FQ = np.zeros((2, self.functions, self.genes - 1))
        for a, b in pairwise(self.anchors):
            # In the middle of a step its neighbourhood is half of the one before and half of the one behind it.
            share_Q = (np.arange(a, b) + 0.5 - a) / (b - a)
            at_a_FQ, at_b_FQ = self._between(a, a, b), self._between(b, a, b)
            step_FQ[:, a:b] = (1 - share_Q) * at_a_FQ + share_Q * at_b_FQ
            doubt_FQ[:, a:b] = np.abs(at_b_FQ - at_a_FQ)
        doubt_FQ += LEAST_DOUBT * doubt_FQ.mean(axis=1, keepdims=True) + np.finfo(np.float64).tiny
        start_F1 = np.zeros((self.functions, 1))
        raw_FN, way_FN = (np.concatenate([start_F1, x.cumsum(axis=1)], axis=1) for x in (step_FQ, doubt_FQ))
        return raw_FN + self.beside_FN, way_FN

    def _between(self, anchor: int, start: int, stop: int) -> NDArray[np.float64]:
        first, steps_FQ = self._steps[anchor]
        return steps_FQ[:, start - first : stop - first]
