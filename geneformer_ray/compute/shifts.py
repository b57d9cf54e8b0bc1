"""Perturbing cells: events in batches through the model, and the numbers of each cell's events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from geneformer_ray.compute.cell_events import cell_events
from geneformer_ray.compute.embedding import check_embedding
from geneformer_ray.compute.reading import Original, read_shifts
from geneformer_ray.compute.token_budget import TokenBudget, out_of_memory
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from geneformer_ray.compute.cell_events import CellEvents, EventBatch
    from geneformer_ray.compute.encoder import Encoder
    from geneformer_ray.compute.perturbation import PerturbationPlan
    from geneformer_ray.compute.reading import Reading
    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = ["EVENTS_THAT_SHARE", "SHARING_LENGTH", "CellShifts", "shift_cell", "shift_cells"]

# From this length on it pays to compute the first layer of several events together, up to so many.
SHARING_LENGTH = 256
EVENTS_THAT_SHARE = 32


@dataclass(frozen=True)
class CellShifts:
    """The numbers of one cell's events, in the order of the plan.

    Parameters
    ----------
    genes
        The perturbed token ids of each event, the anchor first.
    values_ES
        float32: one column a state in the order of the reading's states, or one column of similarities.
    affected
        Token ids of the unperturbed genes of each event, int32; None unless gene shifts were asked for.
    gene_values
        Their cosine similarities before and after, float32, one array an event.
    skipped
        Events of the plan that the cell lacks the genes for.
    empty
        Events that leave no gene to compare.
    """

    genes: list[tuple[int, ...]]
    values_ES: NDArray[np.float32]
    affected: list[NDArray[np.int32]] | None = None
    gene_values: list[NDArray[np.float32]] | None = None
    skipped: int = 0
    empty: int = 0

    def __len__(self) -> int:
        return len(self.genes)

    def not_finite(self) -> int:
        """Count the events with a value that is not a finite number."""
        genes_finite = [bool(np.isfinite(values).all()) for values in self.gene_values or ()]
        finite_E = np.logical_and(np.isfinite(self.values_ES).all(axis=1), genes_finite or True)
        return int((~finite_E).sum())


def shift_cell(
    encoder: Encoder,
    input_ids: NDArray[np.integer],
    plan: PerturbationPlan,
    reading: Reading,
    vocabulary: GeneVocabulary,
    *,
    budget: TokenBudget | None = None,
) -> CellShifts:
    """Perturb one cell and measure every event; as :func:`shift_cells` does with many."""
    return shift_cells(encoder, [input_ids], plan, reading, vocabulary, budget=budget)[0]


@torch.inference_mode()
def shift_cells(
    encoder: Encoder,
    sequences: Sequence[NDArray[np.integer]],
    plan: PerturbationPlan,
    reading: Reading,
    vocabulary: GeneVocabulary,
    *,
    budget: TokenBudget | None = None,
    most_events: int | None = None,
    parts: Sequence[range | None] | None = None,
) -> list[CellShifts]:
    """Perturb cells and measure every event; small cells share a batch.

    Parameters
    ----------
    encoder
        The trunk, which ends at the layer that is read.
    sequences
        Each cell's token ids, shape (length,).
    plan, reading
        What is done, and what is compared. The formulas stand in the architecture's "Two comparisons".
    budget
        How many tokens make a batch; by default as many as the free memory holds. Halved where it is too much.
    most_events
        Measure no more than so many of each cell's events, spread over all of them; None measures all.
    parts
        The numbers of the events to measure of each cell, None for all: how a large cell is shared among workers.

    Returns
    -------
    list of CellShifts
        One row an event; none for events that leave no gene to compare.

    Raises
    ------
    InputError
        If the memory does not hold a single perturbed sequence.
    """
    check_embedding(reading.embedding, vocabulary)
    budget = budget or TokenBudget.of_free_memory(encoder.execution, encoder.config)
    made = [
        cell_events(ids, plan, vocabulary, encoder.max_length, part)
        for ids, part in zip(sequences, parts or [None] * len(sequences), strict=True)
    ]
    cells = [_CellInWork(events.sample(most_events), reading) for events in made]
    waiting: list[_Batch] = []
    tokens = 0
    for cell in cells:
        for batch in cell.batches(budget):
            if waiting and tokens + batch.input_ids_EL.size > budget.tokens:
                _measure(encoder, waiting, reading, budget)
                waiting, tokens = [], 0
            waiting.append((cell, batch))
            tokens += batch.input_ids_EL.size + len(cell.events.input_ids) * (not cell.originals)
    if waiting:
        _measure(encoder, waiting, reading, budget)
    return [cell.shifts() for cell in cells]


class _CellInWork:
    """A cell's events, its hidden states while they are needed, and the numbers so far."""

    def __init__(self, events: CellEvents, reading: Reading) -> None:
        self.events, self.reading = events, reading
        self.originals: dict[tuple[int, ...], Original] = {}
        self.empty = 0
        self.values: dict[int, NDArray[np.float32]] = {}
        self.affected: dict[int, NDArray[np.int32]] = {}
        self.gene_values: dict[int, NDArray[np.float32]] = {}

    def batches(self, budget: TokenBudget) -> Iterator[EventBatch]:
        """Make the events that have genes to compare, as many at once as share their first layer well."""
        length = max(1, len(self.events.input_ids))
        events = budget.tokens // length
        if length >= SHARING_LENGTH:
            events = min(events, EVENTS_THAT_SHARE)
        for batch in self.events.batches(max(1, events)):
            if batch.kept_original_EK.shape[1]:
                yield batch
            else:
                self.empty += len(batch)

    def original(self, batch: EventBatch) -> NDArray[np.int32] | None:
        """Give the unperturbed sequence that a batch is compared with, None where it has been computed."""
        cut = tuple(batch.cut.tolist())
        return None if cut in self.originals else self.events.input_ids[self._stays(cut)]

    def _stays(self, cut: tuple[int, ...]) -> NDArray[np.bool_]:
        return ~np.isin(np.arange(len(self.events.input_ids)), cut)

    def keep_original(self, batch: EventBatch, hidden_LD: torch.Tensor) -> None:
        """Keep the unperturbed cell's hidden states for the batches to come."""
        cut = tuple(batch.cut.tolist())
        self.originals[cut] = Original(hidden_LD, self.events.is_gene[self._stays(cut)], self.reading)

    def measure(self, batch: EventBatch, hidden_ELD: torch.Tensor) -> None:
        """Take a batch's numbers from its hidden states."""
        original, numbers = self.originals[tuple(batch.cut.tolist())], batch.numbers_E.tolist()
        values_ES, similarity_EK = read_shifts(batch, hidden_ELD, original, self.reading)
        self.values |= dict(zip(numbers, values_ES, strict=True))
        if similarity_EK is not None:
            self.affected |= dict(zip(numbers, self.events.input_ids[batch.kept_original_EK], strict=True))
            self.gene_values |= dict(zip(numbers, similarity_EK, strict=True))

    def forget(self) -> None:
        """Let go of the hidden states once every event has its numbers."""
        if len(self.values) + self.empty == len(self.events):
            self.originals.clear()

    def shifts(self) -> CellShifts:
        """Put the numbers in the order of the events."""
        numbers, gene_shifts = sorted(self.values), self.reading.gene_shifts
        return CellShifts(
            [tuple(self.events.events[number]) for number in numbers],
            np.array([self.values[number] for number in numbers], np.float32).reshape(
                -1, max(1, len(self.reading.states))
            ),
            [self.affected[number] for number in numbers] if gene_shifts else None,
            [self.gene_values[number] for number in numbers] if gene_shifts else None,
            self.events.skipped,
            self.empty,
        )


_Batch: TypeAlias = "tuple[_CellInWork, EventBatch]"


def _measure(encoder: Encoder, batches: Sequence[_Batch], reading: Reading, budget: TokenBudget) -> None:
    """Compute batches of events together; half of them at a time where the memory does not hold all."""
    try:
        _compute(encoder, batches, reading)
        return
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        halves = _halves(batches)
        if halves is None:
            got = f"a cell of {batches[0][1].input_ids_EL.shape[1]} tokens"
            raise InputError("--cells", got, "memory for one sequence of it, which is not there") from error
    # Outside the handler, whose traceback holds what was computed.
    budget.halve(sum(batch.input_ids_EL.size for _, batch in batches))
    for half in halves:
        _measure(encoder, half, reading, budget)


def _compute(encoder: Encoder, batches: Sequence[_Batch], reading: Reading) -> None:
    """Compute batches of events and the originals that they still lack; in a frame of its own, to be let go whole."""
    new: dict[tuple[int, tuple[int, ...]], tuple[_CellInWork, EventBatch, NDArray[np.int32]]] = {}
    for cell, batch in batches:
        original = cell.original(batch)
        if original is not None:
            new.setdefault((id(cell), tuple(batch.cut.tolist())), (cell, batch, original))
    groups: list[NDArray[np.integer]] = [original[None] for _, _, original in new.values()]
    groups += [batch.input_ids_EL for _, batch in batches]
    held = [None] * len(new) + [batch.ranks_EL for _, batch in batches]
    ranks = {} if all(group is None for group in held) else {"ranks": held}
    hidden = encoder.hidden(groups, **ranks, first_only=reading.first_only)
    for (cell, batch, _), hidden_1LD in zip(new.values(), hidden, strict=False):
        cell.keep_original(batch, hidden_1LD[0])
    for (cell, batch), hidden_ELD in zip(batches, hidden[len(new) :], strict=True):
        cell.measure(batch, hidden_ELD)
    for cell, _ in batches:
        cell.forget()


def _halves(batches: Sequence[_Batch]) -> tuple[Sequence[_Batch], Sequence[_Batch]] | None:
    middle = len(batches) // 2
    if middle:
        return batches[:middle], batches[middle:]
    cell, batch = batches[0]
    if len(batch) == 1:
        return None
    first, second = batch.halves()
    return [(cell, first)], [(cell, second)]
