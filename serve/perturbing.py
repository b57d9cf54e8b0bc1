"""Perturbing genes of one cell: its events in pieces that keep nobody else waiting long, and what they come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from geneformer_ray.compute.cell_events import CellEvents, cell_events
from geneformer_ray.compute.perturbation import PerturbationPlan
from geneformer_ray.compute.reading import Reading
from geneformer_ray.compute.shifts import shift_cells
from geneformer_ray.compute.token_budget import TokenBudget
from serve.model import ServedModel
from serve.request_log import note
from serve.service import Service

__all__ = ["CellPerturbation", "EventNumbers", "PerturbedCell", "perturb"]


@dataclass(frozen=True)
class EventNumbers:
    """What one event does to the cell.

    Parameters
    ----------
    genes
        The perturbed genes, as vocabulary keys.
    input_ids
        The perturbed cell, shape (length,).
    similarity
        Mean cosine similarity of the unperturbed genes' embeddings before and after.
    shifts
        State -> how far the unperturbed genes' mean moved towards it, for every state that the model knows.
    affected
        Token ids of the unperturbed genes in the cell's order, int32, shape (kept,).
    gene_similarity
        Their cosine similarities before and after, float32, shape (kept,).
    """

    genes: list[str]
    input_ids: NDArray[np.int64]
    similarity: float
    shifts: dict[str, float]
    affected: NDArray[np.int32]
    gene_similarity: NDArray[np.float32]

    def most_affected(self, number: int) -> NDArray[np.int64]:
        """Give the places of the genes that changed most, in `affected`; of equal ones, the higher-ranked first."""
        return np.argsort(self.gene_similarity, kind="stable")[:number]


@dataclass(frozen=True)
class PerturbedCell:
    """The numbers of one cell's events.

    Parameters
    ----------
    before
        Probabilities of the unperturbed cell, of all tasks side by side; shape (classes,).
    events
        In the order asked for.
    changes_EC
        The probabilities after each event, less those before; float32, shape (events, classes).
    absent
        Genes that the cell does not express: no event was made of them.
    without_comparison
        Events that leave no gene to compare.
    """

    before: NDArray[np.float32]
    events: list[EventNumbers]
    changes_EC: NDArray[np.float32]
    absent: list[str]
    without_comparison: list[list[str]]

    def ranking(self, goal: str | None) -> list[int]:
        """Order the events: by shift to the goal, highest first; without one by similarity, lowest first."""
        values = [event.similarity if goal is None else -event.shifts[goal] for event in self.events]
        return [int(number) for number in np.argsort(np.array(values), kind="stable")]


class CellPerturbation:
    """All events that are asked of one cell, measured piece by piece as the screen measures them.

    Parameters
    ----------
    served
        The model.
    input_ids
        The cell, shape (length,).
    genes
        Names of genes; each is one event. One that is named twice, by id and by symbol, is one gene.
    perturbation, rank_shift
        As :class:`PerturbationPlan` takes them.
    together
        Perturb all in one event.

    Raises
    ------
    UnknownGeneError
        With the gene's place and the nearest names.
    """

    def __init__(
        self,
        served: ServedModel,
        input_ids: NDArray[np.integer],
        genes: Sequence[str],
        *,
        perturbation: str = "delete",
        rank_shift: int = 1,
        together: bool = False,
    ) -> None:
        self.served, self.input_ids = served, np.asarray(input_ids)
        keys = [served.vocabulary.resolve(gene, f"genes[{i}]") for i, gene in enumerate(genes)]
        self._key_of = {served.vocabulary.tokens[key]: key for key in keys}
        self._plan = PerturbationPlan(perturbation, tuple(self._key_of), together, rank_shift=rank_shift)
        self._events = list(self._made(None).events)

    @property
    def absent(self) -> list[str]:
        """Genes that the cell does not express, where they would have to be in it."""
        present = set(self.input_ids.tolist())
        return [key for token, key in self._key_of.items() if token not in present and not self._plan.inserts]

    def parts(self, tokens: int) -> list[range]:
        """Cut the events into runs of about so many tokens, at least one event each."""
        size, events = max(1, tokens // len(self.input_ids)), len(self._events)
        return [range(start, min(start + size, events)) for start in range(0, events, size)]

    def measure(self, part: range, tokens: int) -> list[EventNumbers]:
        """Measure some of the events in one pass of the engine; those that leave no gene to compare give nothing.

        Parameters
        ----------
        part
            The events' numbers.
        tokens
            Computed at once.
        """
        served = self.served
        reading = Reading(states=served.states, gene_shifts=True)
        shifts = shift_cells(
            served.trunk,
            [self.input_ids],
            self._plan,
            reading,
            served.vocabulary,
            budget=TokenBudget(tokens),
            parts=[part],
        )[0]
        events = self._made(part)
        perturbed = {
            events.events[number]: ids
            for batch in events.batches(max(1, len(events)))
            for number, ids in zip(batch.numbers_E.tolist(), batch.input_ids_EL, strict=True)
        }
        return [
            EventNumbers(
                self._keys(event),
                perturbed[event],
                float(similarity_K.mean(dtype=np.float64)),
                dict(zip(served.states, map(float, values_S), strict=True)) if served.states else {},
                affected_K,
                similarity_K,
            )
            for event, values_S, affected_K, similarity_K in zip(
                shifts.genes, shifts.values_ES, shifts.affected or [], shifts.gene_values or [], strict=True
            )
        ]

    def without_comparison(self, measured: Sequence[EventNumbers]) -> list[list[str]]:
        """Give the genes of the events that have no numbers."""
        there = {tuple(event.genes) for event in measured}
        return [keys for keys in map(self._keys, self._events) if tuple(keys) not in there]

    def _made(self, part: range | None) -> CellEvents:
        return cell_events(self.input_ids, self._plan, self.served.vocabulary, self.served.trunk.max_length, part)

    def _keys(self, event: Sequence[int]) -> list[str]:
        return [self._key_of[token] for token in event]


async def perturb(service: Service, work: CellPerturbation) -> PerturbedCell:
    """Measure a cell's events in turn with other requests' work, which gets its turn between any two pieces.

    Parameters
    ----------
    service
        Computes.
    work
        What is asked.
    """
    tokens = service.settings.tokens_of_a_batch
    before = work.served.probabilities(await service.vectors(work.served, [work.input_ids], "logits"))
    events: list[EventNumbers] = []
    changes = [np.zeros((0, before.shape[1]), dtype=np.float32)]
    for part in work.parts(tokens):
        measured = await service.run(partial(work.measure, part, tokens))
        if measured:
            after = await service.vectors(work.served, [event.input_ids for event in measured], "logits")
            changes.append(work.served.probabilities(after) - before)
            events += measured
    note(events=len(events), model=work.served.name, version=work.served.version)
    return PerturbedCell(before[0], events, np.concatenate(changes), work.absent, work.without_comparison(events))
