"""Which sequences a perturbation makes of a cell, and which positions compare: pure numpy, no model in it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from geneformer_ray.compute.perturbation import QUARTILES
from geneformer_ray.data.vocabulary import gene_mask
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from geneformer_ray.compute.perturbation import PerturbationPlan
    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = ["CellEvents", "EventBatch", "cell_events", "cell_fault", "count_events"]


@dataclass(frozen=True)
class EventBatch:
    """Some events of one cell, all of one shape.

    Parameters
    ----------
    numbers_E
        Which of the cell's events these are, shape (events,).
    genes_EG
        The perturbed token ids of each event, the anchor first; int32, shape (events, genes).
    input_ids_EL
        The perturbed sequences; int64, shape (events, length).
    cut
        Positions of the original that do not fit beside inserted genes: left out of both sides; shape (cut,).
    kept_original_EK
        Positions, in the original without `cut`, of the genes that no one perturbed; int64, shape (events, kept).
    kept_perturbed_EK
        Positions of the same genes, in the same order, in the perturbed sequence.
    genes_perturbed_EN
        Positions of all genes in the perturbed sequence.
    ranks_EL
        Which position embedding each token of the perturbed sequence gets; int64, shape (events, length). None: the one
        of its position, as always but where ranks are held.
    """

    numbers_E: NDArray[np.int64]
    genes_EG: NDArray[np.int32]
    input_ids_EL: NDArray[np.int64]
    cut: NDArray[np.int64]
    kept_original_EK: NDArray[np.int64]
    kept_perturbed_EK: NDArray[np.int64]
    genes_perturbed_EN: NDArray[np.int64]
    ranks_EL: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.numbers_E)

    def halves(self) -> tuple[EventBatch, EventBatch]:
        """Cut the events in two."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        cut = {name: np.array_split(array, 2) for name, array in named.items() if array is not None and name != "cut"}
        first, second = ({name: parts[i] for name, parts in cut.items()} for i in (0, 1))
        return EventBatch(**first, cut=self.cut), EventBatch(**second, cut=self.cut)


@dataclass(frozen=True)
class CellEvents:
    """All events of one cell, or a part of them, made in batches when asked for.

    Parameters
    ----------
    input_ids
        The original cell, shape (length,).
    is_gene
        Which of its positions hold genes, shape (length,).
    plan
        What is done to it.
    events
        The perturbed token ids of each event, the anchor first.
    skipped
        How many events of the plan the cell does not have, because it lacks their genes. The first part counts them.
    max_length
        The model's input size.
    """

    input_ids: NDArray[np.int32]
    is_gene: NDArray[np.bool_]
    plan: PerturbationPlan
    events: Sequence[tuple[int, ...]]
    skipped: int
    max_length: int

    def __len__(self) -> int:
        return len(self.events)

    @cached_property
    def position_of(self) -> dict[int, int]:
        """Where each gene of the cell lies."""
        return {int(self.input_ids[position]): int(position) for position in np.flatnonzero(self.is_gene)}

    def sample(self, most: int | None) -> CellEvents:
        """Keep so many of the events, spread evenly; all of them where there are no more."""
        if most is None or len(self) <= most:
            return self
        return replace(self, events=[self.events[i * len(self) // most] for i in range(most)])

    def batches(self, events: int) -> Iterator[EventBatch]:
        """Make the perturbed sequences of up to `events` events at a time, those of one shape together."""
        if self.plan.perturbation == "delete":
            for size, numbers in self._by_size().items():
                for start in range(0, len(numbers), events):
                    yield self._delete(np.array(numbers[start : start + events]), size)
            return
        alike: dict[tuple[int, tuple[int, ...], int], list[tuple[int, NDArray[np.int64]]]] = {}
        for number, event in enumerate(self.events):
            order, cut = self._order(event)
            shape = (len(event), tuple(cut.tolist()), len(order))
            alike.setdefault(shape, []).append((number, order))
            if len(alike[shape]) == events:
                yield self._ordered(alike.pop(shape), cut)
        for (_, left_out, _), rest in alike.items():
            yield self._ordered(rest, np.array(left_out, dtype=np.int64))

    def _by_size(self) -> dict[int, list[int]]:
        sizes: dict[int, list[int]] = {}
        for number, event in enumerate(self.events):
            sizes.setdefault(len(event), []).append(number)
        return sizes

    def _delete(self, numbers_E: NDArray[np.int64], size: int) -> EventBatch:
        """Make deletions of so many genes each, all at once."""
        events, length = len(numbers_E), len(self.input_ids)
        genes_EG = np.array([self.events[number] for number in numbers_E], dtype=np.int32).reshape(events, size)
        positions_EG = np.array([[self.position_of[gene] for gene in event] for event in genes_EG.tolist()])
        stays_EL = np.ones((events, length), dtype=bool)
        np.put_along_axis(stays_EL, positions_EG, False, axis=1)
        remaining_EL = np.nonzero(stays_EL)[1].reshape(events, length - size)
        # Special tokens keep their places and are never compared; a position moves up by the deleted ones before it.
        new_position_EL = np.cumsum(stays_EL, axis=1) - 1
        kept = int(self.is_gene.sum()) - size
        rows, kept_original = np.nonzero(stays_EL & self.is_gene)
        kept_perturbed_EK = new_position_EL[rows, kept_original].reshape(events, kept).astype(np.int64)
        return EventBatch(
            numbers_E,
            genes_EG,
            self.input_ids[remaining_EL].astype(np.int64),
            np.zeros(0, dtype=np.int64),
            kept_original.reshape(events, kept).astype(np.int64),
            kept_perturbed_EK,
            kept_perturbed_EK,
            remaining_EL if self.plan.ranks == "hold" else None,
        )

    def _order(self, event: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Give the perturbed sequence as positions of the cell, inserted genes as numbers beyond it; and the cut."""
        genes, length = np.flatnonzero(self.is_gene), len(self.input_ids)
        first, last = (int(genes[0]), int(genes[-1])) if len(genes) else (min(1, length), min(1, length) - 1)
        front, behind = np.arange(first), np.arange(last + 1, length)
        perturbed = [self.position_of.get(gene, len(self.input_ids) + i) for i, gene in enumerate(event)]
        others = genes[~np.isin(genes, perturbed)]
        if self.plan.perturbation == "overexpress":
            room = self.max_length - len(front) - len(behind) - len(perturbed)
            kept, cut = np.split(others, [max(0, room)])
            return np.concatenate([front, perturbed, kept, behind]).astype(np.int64), cut
        ranked = _moved(genes, perturbed, others, self._target)
        return np.concatenate([front, ranked, behind]).astype(np.int64), others[:0]

    def _target(self, rank: int, genes: int) -> int:
        """Say which rank a gene moves to: the middle of a higher quartile (activate) or a lower one (inhibit)."""
        quartile = QUARTILES * rank // genes + 1
        if self.plan.perturbation == "activate":
            quartile -= self.plan.rank_shift
            if quartile < 1:
                return 0
        else:
            quartile += self.plan.rank_shift
            if quartile > QUARTILES:
                return genes - 1
        return int((quartile - 0.5) * genes / QUARTILES)

    def _ordered(self, events: Sequence[tuple[int, NDArray[np.int64]]], cut: NDArray[np.int64]) -> EventBatch:
        """Put events of one shape together."""
        numbers_E = np.array([number for number, _ in events])
        order_EL = np.stack([order for _, order in events])
        genes = [self.events[number] for number in numbers_E]
        width = max(map(len, genes))
        # Inserted genes stand behind the cell's own; every event has its own.
        source_EX = np.concatenate(
            [np.tile(self.input_ids, (len(events), 1)), np.array(genes, dtype=np.int32).reshape(len(events), width)],
            axis=1,
        )
        input_ids_EL = np.take_along_axis(source_EX, order_EL, axis=1).astype(np.int64)
        length = len(self.input_ids)
        is_gene_EL = (order_EL >= length) | np.append(self.is_gene, True)[np.minimum(order_EL, length)]
        perturbed_EL = (input_ids_EL[:, :, None] == np.array(genes)[:, None, :]).any(axis=2) & is_gene_EL
        kept_perturbed_EK = _positions(is_gene_EL & ~perturbed_EL)
        # Those that no one perturbed, in the order of the cell: moves never change it.
        kept_original_EK = np.take_along_axis(order_EL, kept_perturbed_EK, axis=1)
        return EventBatch(
            numbers_E,
            np.array(genes, dtype=np.int32),
            input_ids_EL,
            cut,
            kept_original_EK,
            kept_perturbed_EK,
            _positions(is_gene_EL),
        )


def _positions(chosen_EL: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Give the chosen positions of each row, as many in each."""
    return np.nonzero(chosen_EL)[1].reshape(len(chosen_EL), -1).astype(np.int64)


def _moved(
    genes: NDArray[np.int64],
    perturbed: Sequence[int],
    others: NDArray[np.int64],
    target: Callable[[int, int], int],
) -> NDArray[np.int64]:
    """Put perturbed genes at their new ranks and the others, in order, around them.

    Where two genes want one rank the first named has it, and the next takes the nearest free rank below, else above.
    """
    rank_of = {int(position): rank for rank, position in enumerate(genes)}
    ranked = np.full(len(genes), -1, dtype=np.int64)
    for position in perturbed:
        wanted = target(rank_of[position], len(genes))
        free = np.flatnonzero(ranked < 0)
        below = free[free >= wanted]
        ranked[below[0] if len(below) else free[-1]] = position
    ranked[ranked < 0] = others
    return ranked


def cell_events(
    input_ids: NDArray[np.integer],
    plan: PerturbationPlan,
    vocabulary: GeneVocabulary,
    max_length: int | None = None,
    part: range | None = None,
) -> CellEvents:
    """List a cell's events.

    Deletions, moves and events with an anchor exist where the cell holds all of their genes; an overexpression exists
    in every cell.

    Parameters
    ----------
    input_ids
        The cell's token ids, shape (length,).
    plan
        What is done to it.
    vocabulary
        Tells genes from special tokens.
    max_length
        The model's input size; by default the vocabulary's.
    part
        The numbers of the events to list; by default all of them.

    Raises
    ------
    InputError
        If the cell holds a gene twice, or a special token among its genes, where a move would have to pass it.
    """
    ids = np.asarray(input_ids, dtype=np.int32)
    is_gene = gene_mask(vocabulary, ids)
    if fault := _fault_of_order(ids, is_gene, plan, vocabulary):
        raise InputError("--cells", f"a cell with {fault}", "each gene once, special tokens at the ends")
    events, skipped = plan.events(_held(ids, is_gene), part)
    if part is not None and part.start > 0:
        skipped = 0
    return CellEvents(ids, is_gene, plan, events, skipped, max_length or vocabulary.max_length)


def cell_fault(
    input_ids: NDArray[np.integer], plan: PerturbationPlan, vocabulary: GeneVocabulary, max_length: int
) -> str:
    """Say why a cell cannot be perturbed at all; nothing where it can."""
    ids = np.asarray(input_ids)
    if len(ids) > max_length:
        return f"{len(ids)} tokens, more than {max_length}, the model's input size"
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(vocabulary):
        return f"token ids from {ids.min()} to {ids.max()}, of a vocabulary of {len(vocabulary)}"
    return _fault_of_order(ids, gene_mask(vocabulary, ids), plan, vocabulary)


def count_events(
    sequences: Iterable[NDArray[np.integer]], plan: PerturbationPlan, vocabulary: GeneVocabulary
) -> NDArray[np.int64]:
    """Count each cell's events without making them: int64, shape (cells,)."""
    counts = (plan.count(_held(ids, gene_mask(vocabulary, ids))) for ids in sequences)
    return np.fromiter(counts, dtype=np.int64)


def _held(ids: NDArray[np.integer], is_gene: NDArray[np.bool_]) -> Collection[int]:
    """Give the genes of a cell in order, so that asking for one takes no search."""
    return dict.fromkeys(ids[is_gene].tolist())


def _fault_of_order(
    ids: NDArray[np.integer], is_gene: NDArray[np.bool_], plan: PerturbationPlan, vocabulary: GeneVocabulary
) -> str:
    """Say which gene stands twice, as in some of upstream's files, or whether a special token stands inside."""
    inside = np.flatnonzero(is_gene)
    genes, counts = np.unique(ids[inside], return_counts=True)
    if len(genes) < len(inside):
        return f"the gene {vocabulary.names[int(genes[counts.argmax()])]} {counts.max()} times"
    if plan.perturbation != "delete" and len(inside) and not is_gene[inside[0] : inside[-1] + 1].all():
        return "a special token between genes"
    return ""
