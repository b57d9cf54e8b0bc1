"""How a screen is cut into items of bounded work: a pure function of cells, plan and model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from geneformer_ray.compute.cell_events import cell_fault, count_events
from geneformer_ray.compute.perturbation import PerturbationPlan
from geneformer_ray.compute.screen_method import ScreenMethod
from geneformer_ray.compute.shifts import EVENTS_THAT_SHARE, SHARING_LENGTH
from geneformer_ray.compute.token_budget import MOST_TOKENS
from geneformer_ray.data.digests import code_digest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from transformers import BertConfig

    from geneformer_ray.data.cells import CellTable
    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = ["BATCH_PLAN", "CellCounts", "ScreenItems", "count_cells", "read_sequences", "screen_code"]

# About 100 s of a CPU core and a fraction of a second of a GPU: what a killed worker loses at most.
FLOPS_PER_ITEM = 1e13
# What a token costs at least, however small the model: it is compared, and written.
FLOPS_PER_TOKEN = 1e7
# An item's cells are in memory together.
CELLS_PER_ITEM = 4_096
# From each of so many items one cell is computed in float32 too, where a screen runs in lower precision.
ITEMS_TO_COMPARE = 4
CELLS_AT_ONCE = 4_096

# What decides, beside cells, plan, model and code, which numbers share a batch, and so their last bits.
BATCH_PLAN = {
    "flops_per_item": FLOPS_PER_ITEM,
    "flops_per_token": FLOPS_PER_TOKEN,
    "cells_per_item": CELLS_PER_ITEM,
    "sharing_length": SHARING_LENGTH,
    "events_that_share": EVENTS_THAT_SHARE,
    "most_tokens": MOST_TOKENS,
}
# The modules whose code decides the numbers, and what is written of them.
SCREEN_CODE = (
    *("attention", "cell_events", "embedding", "encoder", "execution", "gene_shift_summary", "model_directory"),
    *("model_runner", "perturbation", "precision_check", "reading", "screen_method", "shared_attention"),
    *("shift_tables", "shifts", "token_budget", "trunk"),
)
# And those that decide nothing in a screen of exact shifts as they are.
METHOD_CODE = (
    *("attention_influence", "decomposition", "deletion_path", "first_order", "first_order_cell"),
    *("first_order_figures", "held_ranks", "linear_trunk", "overexpression_path", "path_cell", "tangent"),
    *("verification", "verified_shifts"),
)
# What cuts a screen into items and does one; and chooses what a verified screen measures, and puts it in its place.
ITEM_CODE, VERIFIED_CODE = ("screen_items", "screen_worker"), ("screen_chosen", "screen_merge", "screen_verified")


def screen_code(method: ScreenMethod) -> str:
    """Hash the code that decides a screen's rows."""
    plain = method == ScreenMethod()
    compute = SCREEN_CODE if plain else (*SCREEN_CODE, *METHOD_CODE)
    distribute = ITEM_CODE if plain else (*ITEM_CODE, *VERIFIED_CODE)
    return code_digest(*(f"compute/{name}.py" for name in compute), *(f"distribute/{name}.py" for name in distribute))


@dataclass(frozen=True)
class CellCounts:
    """What the driver keeps of the cells to perturb: two numbers each, shape (cells,).

    Parameters
    ----------
    events, lengths
        Events, and tokens as the model takes them.
    unfit
        How many cells the model or the plan cannot take: they go to the workers all the same, which say why.
    """

    events: NDArray[np.int64]
    lengths: NDArray[np.int64]
    unfit: int


def read_sequences(
    table: CellTable, rows: NDArray[np.int64], vocabulary: GeneVocabulary
) -> Iterator[list[NDArray[np.int32]]]:
    """Give the token ids of cells as a model takes them, some thousands at a time."""
    for start in range(0, len(rows), CELLS_AT_ONCE):
        cells = table.read(rows[start : start + CELLS_AT_ONCE])
        yield [vocabulary.adapt(ids, table.vocabulary_digest) for ids in cells.input_ids]


def count_cells(
    table: CellTable,
    rows: NDArray[np.int64],
    plan: PerturbationPlan,
    vocabulary: GeneVocabulary,
    max_length: int,
) -> CellCounts:
    """Count events and tokens of cells in one pass over the table.

    Parameters
    ----------
    table, rows
        The table, and the numbers of its rows to perturb.
    plan, vocabulary, max_length
        What is done to them; the model's vocabulary and input size.
    """
    events = np.zeros(len(rows), dtype=np.int64)
    lengths = np.zeros(len(rows), dtype=np.int64)
    unfit = start = 0
    for sequences in read_sequences(table, rows, vocabulary):
        stop = start + len(sequences)
        events[start:stop] = count_events(sequences, plan, vocabulary)
        lengths[start:stop] = [len(ids) for ids in sequences]
        faults = [cell_fault(ids, plan, vocabulary, max_length) != "" for ids in sequences]
        events[start:stop][faults] = 0
        unfit += sum(faults)
        start = stop
    return CellCounts(events, lengths, unfit)


@dataclass(frozen=True)
class ScreenItems:
    """The items of a screen in row order, made one at a time.

    Small cells are joined; a cell whose events exceed the bound is split, where its method can. A pass costs what the
    model multiplies for the cell's tokens, attention included, so that items take about as long whatever the length of
    their cells.

    Parameters
    ----------
    rows, counts
        Row numbers of the cells, shape (cells,), and what was counted of them.
    layers, width, feed_forward
        Of the trunk as far as it is computed.
    method, plan, states
        How cells are measured, what is done to them, and towards how many states: what a cell costs.
    """

    rows: NDArray[np.int64]
    counts: CellCounts
    layers: int
    width: int
    feed_forward: int
    method: ScreenMethod = field(default_factory=ScreenMethod)
    plan: PerturbationPlan = field(default_factory=PerturbationPlan)
    states: int = 0

    @classmethod
    def of_model(
        cls, rows: NDArray[np.int64], counts: CellCounts, config: BertConfig, layer: int, **how: Any
    ) -> ScreenItems:
        """Take the shape of a model whose `layer` is read."""
        shape = config.num_hidden_layers + layer, config.hidden_size, config.intermediate_size
        return cls(rows, counts, *shape, **how)

    def flops(self, lengths: NDArray[np.int64]) -> NDArray[np.float64]:
        """Give what one pass costs in cells of these lengths: multiplications and additions."""
        a_layer = 4 * self.width**2 + 2 * self.width * self.feed_forward + 2 * self.width * lengths
        tokens = np.maximum(1, lengths)
        return np.asarray(tokens * np.maximum(FLOPS_PER_TOKEN, 2 * self.layers * a_layer), dtype=np.float64)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, item in enumerate(self._cut()):
            yield {"item": number, **item}

    def _cut(self) -> Iterator[dict[str, Any]]:
        """Give each item's rows; its share of the events, where that is a part of one cell's; whether to compare."""
        compared = {number * len(self.rows) // ITEMS_TO_COMPARE for number in range(ITEMS_TO_COMPARE)}
        waiting: list[int] = []
        cost, compare = 0.0, False

        def joined() -> dict[str, Any]:
            return {"rows": waiting, **({"compare": True} if compare else {})}

        for position, row, events, passes, a_pass in self._cells():
            whole = passes * a_pass
            if waiting and (cost + whole > FLOPS_PER_ITEM or len(waiting) == CELLS_PER_ITEM):
                yield joined()
                waiting, cost, compare = [], 0.0, False
            if whole <= FLOPS_PER_ITEM or not self.method.cuts_cells:
                waiting.append(row)
                cost += whole
                compare |= position in compared
                continue
            for start, stop in _parts(events, self.method.times * a_pass):
                first = {"compare": True} if position in compared and start == 0 else {}
                yield {"rows": [row], "part": [start, stop], **first}
        if waiting:
            yield joined()

    def _cells(self) -> Iterator[tuple[int, int, int, float, float]]:
        """Give position, row, events, passes and the cost of one pass of each cell, in plain numbers."""
        for start in range(0, len(self.rows), CELLS_AT_ONCE):
            some = slice(start, start + CELLS_AT_ONCE)
            events_C = self.counts.events[some]
            # The original is computed as well, even of a cell without events.
            passes = self.method.most_passes(events_C, self.plan, self.states).tolist()
            flops = self.flops(self.counts.lengths[some]).tolist()
            numbers = zip(self.rows[some].tolist(), events_C.tolist(), passes, flops, strict=True)
            for position, (row, events, some_passes, a_pass) in enumerate(numbers, start):
                yield position, row, events, some_passes, a_pass


def _parts(events: int, an_event: float) -> list[tuple[int, int]]:
    """Cut a cell's events into parts of about one size, of whole groups of events that share their first layer."""
    most = max(1, int(FLOPS_PER_ITEM / an_event / EVENTS_THAT_SHARE)) * EVENTS_THAT_SHARE
    number = max(1, -(-events // most))
    size = max(1, -(-events // (number * EVENTS_THAT_SHARE))) * EVENTS_THAT_SHARE
    return [(start, min(start + size, events)) for start in range(0, max(1, events), size)]
