"""Which sequences an edit makes of a cell, and which positions compare: pure numpy, no model in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from geneformer_ray.data.vocabulary import gene_mask
from geneformer_ray.errors import InputError, NotThereYetError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = [
    "PERTURBATIONS",
    "CellEvents",
    "EventBatch",
    "PerturbationPlan",
    "cell_events",
    "count_events",
    "genes_in_enough_cells",
]

PERTURBATIONS = ("delete", "overexpress", "inhibit", "activate")


@dataclass(frozen=True)
class PerturbationPlan:
    """What is done to every cell.

    Parameters
    ----------
    perturbation
        ``delete``: the genes leave the cell, and all behind them move up.
    genes
        Token ids to perturb; None for every gene of the cell.
    together
        Perturb all of `genes` in one event rather than one at a time.
    anchor
        A token id that is perturbed in every event as well.
    """

    perturbation: str = "delete"
    genes: tuple[int, ...] | None = None
    together: bool = False
    anchor: int | None = None

    def __post_init__(self) -> None:
        if self.perturbation not in PERTURBATIONS:
            raise InputError("--perturbation", self.perturbation, f"one of {', '.join(PERTURBATIONS)}")
        if self.perturbation != "delete":
            raise NotThereYetError.flag("--perturbation", self.perturbation, "delete so far")
        if self.genes is not None:
            object.__setattr__(self, "genes", tuple(dict.fromkeys(self.genes)))  # a gene can leave a cell once
        if self.together and self.genes is None:
            raise InputError("--together", "all genes together", "a list of genes in --genes")


@dataclass(frozen=True)
class EventBatch:
    """Some events of one cell, all of one sequence length.

    Parameters
    ----------
    genes_EG
        The perturbed token ids of each event, the anchor first; int32, shape (events, genes).
    input_ids_EL
        The perturbed sequences; int64, shape (events, length).
    kept_original_EK
        Positions, in the original cell, of the genes that no one perturbed; int64, shape (events, kept).
    kept_perturbed_EK
        Positions of the same genes, in the same order, in the perturbed sequence.
    """

    genes_EG: NDArray[np.int32]
    input_ids_EL: NDArray[np.int64]
    kept_original_EK: NDArray[np.int64]
    kept_perturbed_EK: NDArray[np.int64]


@dataclass(frozen=True)
class CellEvents:
    """All events of one cell, made in batches when asked for.

    Parameters
    ----------
    input_ids
        The original cell, shape (length,).
    is_gene
        Which of its positions hold genes, shape (length,).
    positions_EG
        The perturbed positions of each event; int64, shape (events, genes).
    """

    input_ids: NDArray[np.int32]
    is_gene: NDArray[np.bool_]
    positions_EG: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.positions_EG)

    def batches(self, events: int) -> Iterator[EventBatch]:
        """Make the perturbed sequences of up to `events` events at a time."""
        for start in range(0, len(self), events):
            yield self._delete(self.positions_EG[start : start + events])

    def _delete(self, positions_EG: NDArray[np.int64]) -> EventBatch:
        events, length = len(positions_EG), len(self.input_ids)
        stays_EL = np.ones((events, length), dtype=bool)
        np.put_along_axis(stays_EL, positions_EG, False, axis=1)
        remaining_EL = np.nonzero(stays_EL)[1].reshape(events, length - positions_EG.shape[1])
        # Special tokens keep their places and are never compared; a position moves up by the deleted ones before it.
        new_position_EL = np.cumsum(stays_EL, axis=1) - 1
        compared_EL = stays_EL & self.is_gene
        kept = int(self.is_gene.sum()) - positions_EG.shape[1]
        rows, kept_original = np.nonzero(compared_EL)
        return EventBatch(
            self.input_ids[positions_EG].astype(np.int32),
            self.input_ids[remaining_EL].astype(np.int64),
            kept_original.reshape(events, kept).astype(np.int64),
            new_position_EL[rows, kept_original].reshape(events, kept).astype(np.int64),
        )


def cell_events(input_ids: NDArray[np.integer], plan: PerturbationPlan, vocabulary: GeneVocabulary) -> CellEvents:
    """List a cell's events: those whose genes it holds all.

    Parameters
    ----------
    input_ids
        The cell's token ids, shape (length,).
    plan
        What is done to it.
    vocabulary
        Tells genes from special tokens.
    """
    ids = np.asarray(input_ids, dtype=np.int32)
    is_gene = gene_mask(vocabulary, ids)
    where = {int(ids[position]): int(position) for position in np.flatnonzero(is_gene)}
    wanted = list(where) if plan.genes is None else [gene for gene in plan.genes if gene != plan.anchor]
    groups = [tuple(wanted)] if plan.together else [(gene,) for gene in wanted if gene != plan.anchor]
    front = () if plan.anchor is None else (plan.anchor,)
    events = [front + group for group in groups if all(gene in where for gene in front + group)]
    width = len(front) + (len(groups[0]) if groups else 1)
    positions = np.array([[where[gene] for gene in event] for event in events], dtype=np.int64)
    return CellEvents(ids, is_gene, positions.reshape(len(events), width))


def count_events(
    sequences: Sequence[NDArray[np.integer]], plan: PerturbationPlan, vocabulary: GeneVocabulary
) -> NDArray[np.int64]:
    """Count each cell's events without making them: int64, shape (cells,)."""
    counts = []
    for ids in sequences:
        genes = ids[gene_mask(vocabulary, ids)]
        if plan.anchor is not None and plan.anchor not in genes:
            counts.append(0)
        elif plan.genes is None:
            counts.append(len(genes) - (plan.anchor is not None))
        else:
            listed = np.array([gene for gene in plan.genes if gene != plan.anchor])
            present = int(np.isin(listed, genes).sum())
            counts.append(int(present == len(listed)) if plan.together else present)
    return np.array(counts, dtype=np.int64)


def genes_in_enough_cells(
    sequences: Sequence[NDArray[np.integer]], vocabulary: GeneVocabulary, min_cells: int
) -> tuple[int, ...]:
    """List the genes, as token ids, that at least `min_cells` of the cells hold."""
    cells = np.bincount(np.concatenate([np.unique(ids) for ids in sequences]), minlength=len(vocabulary))
    cells[list(vocabulary.special_ids)] = 0
    enough = np.flatnonzero(cells >= max(1, min_cells))
    if len(enough) == 0:
        raise InputError("--min-cells", min_cells, f"at most {cells.max()}, the cells that hold the commonest gene")
    return tuple(int(token) for token in enough)
