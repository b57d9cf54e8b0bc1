"""What is done to cells: which genes are perturbed together, and how."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from numpy.typing import NDArray

    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = ["PERTURBATIONS", "QUARTILES", "RANKS", "PerturbationPlan", "genes_in_enough_cells"]

PERTURBATIONS = ("delete", "overexpress", "inhibit", "activate")
QUARTILES = 4
RANKS = ("shift", "hold")


@dataclass(frozen=True)
class PerturbationPlan:
    """What is done to every cell.

    Parameters
    ----------
    perturbation
        ``delete``: the genes leave the cell, and all behind them move up. ``overexpress``: they move to the front, or
        are inserted there. ``inhibit`` and ``activate``: they move down or up by quartiles of the cell's ranks.
    genes
        Token ids to perturb; None for every gene of the cell.
    together
        Perturb all of `genes` in one event rather than one at a time.
    anchor
        A token id that is perturbed in every event as well, before the others.
    combine
        Perturb this many of `genes` in one event: every combination.
    sets
        Token ids to perturb in one event, for several events; instead of `genes`.
    rank_shift
        Quartiles that `inhibit` and `activate` move a gene by.
    ranks
        What a deletion does to the ranks of the genes that stay. ``shift``: all behind a deleted gene move up by one,
        and get other position embeddings. ``hold``: they keep their ranks; the deleted gene alone is gone.
    insert
        Whether an overexpression of listed genes inserts those that a cell lacks; else it skips them.
    """

    perturbation: str = "delete"
    genes: tuple[int, ...] | None = None
    together: bool = False
    anchor: int | None = None
    combine: int = 1
    sets: tuple[tuple[int, ...], ...] | None = None
    rank_shift: int = 1
    ranks: str = "shift"
    insert: bool = True

    def __post_init__(self) -> None:
        if self.perturbation not in PERTURBATIONS:
            raise InputError("--perturbation", self.perturbation, f"one of {', '.join(PERTURBATIONS)}")
        if self.genes is not None:
            object.__setattr__(self, "genes", tuple(dict.fromkeys(self.genes)))  # a gene is perturbed once
        if self.sets is not None:
            object.__setattr__(self, "sets", tuple(tuple(dict.fromkeys(group)) for group in self.sets))
            if self.genes is not None or self.together or self.combine != 1:
                raise InputError("--gene-sets", "sets beside --genes, --together or --combine", "sets alone")
        if self.together and self.genes is None:
            raise InputError("--together", "all genes together", "a list of genes in --genes")
        if self.combine != 1:
            if self.genes is None or self.together:
                raise InputError("--combine", self.combine, "a list of genes in --genes, without --together")
            there = len([gene for gene in self.genes if gene != self.anchor])
            if not 1 <= self.combine <= there:
                raise InputError("--combine", self.combine, f"1 to {there}, the genes of --genes")
        if not 1 <= self.rank_shift < QUARTILES:
            raise InputError("--rank-shift", self.rank_shift, "1, 2 or 3 quartiles")
        if self.ranks not in RANKS:
            raise InputError("--ranks", self.ranks, f"one of {', '.join(RANKS)}")
        if self.ranks == "hold" and self.perturbation != "delete":
            raise InputError("--ranks", f"hold with --perturbation {self.perturbation}", "hold with deletions alone")

    @property
    def inserts(self) -> bool:
        """Whether an event also exists in cells that lack its genes."""
        return self.perturbation == "overexpress" and self.anchor is None and self.insert

    def events(self, held: Collection[int], part: range | None = None) -> tuple[list[tuple[int, ...]], int]:
        """Give the genes of each event of a cell, the anchor first, and how many events it skips for lack of genes.

        Parameters
        ----------
        held
            The genes of the cell, in order.
        part
            The numbers of the events to give; by default all of them.
        """
        events, number, wanted = self._events(held)
        chosen = events if part is None else itertools.islice(events, part.start, part.stop)
        return list(chosen), wanted - number

    def count(self, held: Collection[int]) -> int:
        """Count the events of a cell without making them."""
        return self._events(held)[1]

    def _events(self, held: Collection[int]) -> tuple[Iterator[tuple[int, ...]], int, int]:
        """Give a cell's events one by one, how many they are, and how many they were if it lacked no gene."""
        front = () if self.anchor is None else (self.anchor,)
        if self.sets is not None:
            sets = [tuple(gene for gene in group if gene != self.anchor) for group in self.sets]
            wanted = [front + group for group in sets if group]
            there = [group for group in wanted if self.inserts or all(gene in held for gene in group)]
            return iter(there), len(there), len(wanted)
        listed = [gene for gene in (held if self.genes is None else self.genes) if gene != self.anchor]
        size = len(listed) if self.together else self.combine
        present = [gene for gene in listed if self.inserts or gene in held]
        if self.anchor is not None and self.anchor not in held:
            present = []
        if size == 0:
            return iter(()), 0, 0
        events = (front + group for group in itertools.combinations(present, size))
        return events, math.comb(len(present), size), math.comb(len(listed), size)


def genes_in_enough_cells(
    sequences: Iterable[NDArray[np.integer]], vocabulary: GeneVocabulary, min_cells: int
) -> tuple[int, ...]:
    """List the genes, as token ids, that at least `min_cells` of the cells hold; the cells pass by one at a time."""
    cells = np.zeros(len(vocabulary), dtype=np.int64)
    for ids in sequences:
        known = ids[(ids >= 0) & (ids < len(vocabulary))]  # a cell with others is set aside later, with the reason
        cells[np.unique(known)] += 1
    cells[list(vocabulary.special_ids)] = 0
    enough = np.flatnonzero(cells >= max(1, min_cells))
    if len(enough) == 0:
        raise InputError("--min-cells", min_cells, f"at most {cells.max()}, the cells that hold the commonest gene")
    return tuple(int(token) for token in enough)
