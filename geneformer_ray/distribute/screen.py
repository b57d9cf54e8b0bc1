"""A perturbation screen over a pool of actors: which cells and events, in which pieces, into which tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from geneformer_ray.compute.model_runner import ModelRunner
from geneformer_ray.compute.perturbation import PerturbationPlan
from geneformer_ray.compute.shifts import CellShifts, Reading, shift_cell
from geneformer_ray.data.cells import CellTable
from geneformer_ray.data.shards import mark_finished, write_shard
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = ["ScreenWorker", "expected_events", "genes_in_enough_cells", "screen_items"]

# Tokens of all perturbed sequences of one item: a bound on its work. A cell of 1,024 genes is an item of its own.
TOKENS_PER_ITEM = 2**20

CELL_SHIFTS = pa.schema(
    [
        ("cell_id", pa.string()),
        ("genes", pa.list_(pa.string())),
        ("measure", pa.string()),
        ("state", pa.string()),
        ("value", pa.float32()),
    ]
)
GENE_SHIFTS = pa.schema(
    [("cell_id", pa.string()), ("genes", pa.list_(pa.string())), ("affected", pa.string()), ("value", pa.float32())]
)


def expected_events(sequences: Sequence[NDArray[np.integer]], plan: PerturbationPlan, vocabulary: GeneVocabulary) -> NDArray[np.int64]:
    """Count each cell's events, shape (cells,), without making them."""
    special = np.fromiter(vocabulary.special_ids, dtype=np.int64)
    counts = []
    for ids in sequences:
        genes = ids[~np.isin(ids, special)]
        if plan.anchor is not None and plan.anchor not in genes:
            counts.append(0)
        elif plan.genes is None:
            counts.append(len(genes) - (plan.anchor is not None))
        else:
            listed = np.array([gene for gene in plan.genes if gene != plan.anchor])
            present = int(np.isin(listed, genes).sum())
            counts.append(int(present == len(listed)) if plan.together else present)
    return np.array(counts, dtype=np.int64)


def genes_in_enough_cells(sequences: Sequence[NDArray[np.integer]], vocabulary: GeneVocabulary, min_cells: int) -> tuple[int, ...]:
    """List the genes, by token, that at least `min_cells` of the cells hold."""
    cells = np.bincount(np.concatenate([np.unique(ids) for ids in sequences]), minlength=len(vocabulary))
    cells[list(vocabulary.special_ids)] = 0
    enough = np.flatnonzero(cells >= max(1, min_cells))
    if len(enough) == 0:
        raise InputError("--min-cells", min_cells, f"at most {cells.max()}, the cells that hold the commonest gene")
    return tuple(int(token) for token in enough)


def screen_items(rows: NDArray[np.integer], events: NDArray[np.integer], lengths: NDArray[np.integer]) -> list[dict[str, Any]]:
    """Cut cells into items of bounded work, in row order; a pure function of the cells and the plan."""
    items: list[dict[str, Any]] = []
    current: list[int] = []
    tokens = counted = 0
    for row, cell_events, length in zip(rows.tolist(), events.tolist(), lengths.tolist(), strict=True):
        cost = cell_events * length
        if current and tokens + cost > TOKENS_PER_ITEM:
            items.append({"item": len(items), "rows": current, "events": counted})
            current, tokens, counted = [], 0, 0
        current.append(row)
        tokens, counted = tokens + cost, counted + cell_events
    if current:
        items.append({"item": len(items), "rows": current, "events": counted})
    return items


class ScreenWorker:
    """Screens cells of a table.

    Parameters
    ----------
    cells
        The table's path.
    runner
        Options of :class:`ModelRunner`.
    plan
        Fields of :class:`PerturbationPlan`.
    reading
        Fields of :class:`Reading`, states as lists of floats.
    output
        The output directory.
    """

    def __init__(self, cells: str, runner: dict[str, Any], plan: dict[str, Any], reading: dict[str, Any], output: str) -> None:
        self.table = CellTable(cells)
        self.runner = ModelRunner(**runner)
        genes = plan["genes"]
        self.plan = PerturbationPlan(**{**plan, "genes": None if genes is None else tuple(genes)})
        states = {state: np.array(vector, dtype=np.float32) for state, vector in reading["states"].items()}
        self.reading = Reading(**{**reading, "states": states})
        self.output = output
        self._names = np.array(self.runner.vocabulary.names, dtype=object)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Screen one item's cells and write its shards."""
        cells = self.table.read(np.array(item["rows"]))
        sequences = self.runner.sequences(cells.input_ids, self.table.vocabulary_digest)
        shifts = [
            shift_cell(self.runner.encoder, ids, self.plan, self.reading, self.runner.vocabulary) for ids in sequences
        ]
        rows = self._cell_rows(cells.cell_ids, shifts)
        write_shard(self.output, "cell_shifts", item["item"], rows)
        counts = {"events": sum(map(len, shifts)), "rows": rows.num_rows, "cells": len(shifts)}
        if self.reading.gene_shifts:
            gene_rows = self._gene_rows(cells.cell_ids, shifts)
            write_shard(self.output, "gene_shifts", item["item"], gene_rows)
            counts["gene_rows"] = gene_rows.num_rows
        return mark_finished(self.output, item["item"], counts)

    def _cell_rows(self, cell_ids: list[str], shifts: list[CellShifts]) -> pa.Table:
        measure, states = ("shift", list(self.reading.states)) if self.reading.states else ("similarity", [""])
        events = [len(cell) for cell in shifts]
        values = np.concatenate([cell.values_ES for cell in shifts]) if shifts else np.empty((0, len(states)))
        total = sum(events)
        return pa.table(
            [
                pa.array(np.repeat(np.repeat(np.array(cell_ids, dtype=object), events), len(states)), pa.string()),
                self._gene_lists(shifts, len(states)),
                pa.array(np.full(total * len(states), measure, dtype=object), pa.string()),
                pa.array(np.tile(np.array(states, dtype=object), total), pa.string()),
                pa.array(values.astype(np.float32).ravel()),
            ],
            schema=CELL_SHIFTS,
        )

    def _gene_rows(self, cell_ids: list[str], shifts: list[CellShifts]) -> pa.Table:
        parts = []
        for cell_id, cell in zip(cell_ids, shifts, strict=True):
            if cell.affected_EK is None or cell.gene_values_EK is None:
                continue
            kept = cell.affected_EK.shape[1]
            parts.append(
                pa.table(
                    [
                        pa.array([cell_id] * (len(cell) * kept), pa.string()),
                        self._gene_lists([cell], kept),
                        pa.array(self._names[cell.affected_EK.ravel()], pa.string()),
                        pa.array(cell.gene_values_EK.ravel()),
                    ],
                    schema=GENE_SHIFTS,
                )
            )
        return pa.concat_tables(parts) if parts else GENE_SHIFTS.empty_table()

    def _gene_lists(self, shifts: list[CellShifts], repeats: int) -> pa.Array:
        """Name the perturbed genes of every event, each event `repeats` times."""
        if not shifts:
            return pa.array([], pa.list_(pa.string()))
        genes_EG = np.repeat(np.concatenate([cell.genes_EG for cell in shifts]), repeats, axis=0)
        offsets = np.arange(len(genes_EG) + 1, dtype=np.int32) * genes_EG.shape[1]
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(self._names[genes_EG.ravel()], pa.string()))
