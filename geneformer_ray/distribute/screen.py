"""A perturbation screen over a pool of actors: which cells and events, in which pieces, into which tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.dataset as ds
import torch

from geneformer_ray.compute.cell_events import count_events
from geneformer_ray.compute.gene_shift_summary import BUCKETS, pair_sums, summary_of_bucket
from geneformer_ray.compute.perturbation import PerturbationPlan
from geneformer_ray.compute.precision_check import compare_precision, merge_precision
from geneformer_ray.compute.reading import Reading
from geneformer_ray.compute.shift_tables import cell_shift_rows, gene_shift_rows
from geneformer_ray.compute.shifts import shift_cells
from geneformer_ray.compute.token_budget import TokenBudget
from geneformer_ray.data import storage
from geneformer_ray.data.cells import CellTable
from geneformer_ray.data.shards import finished_items, mark_finished, write_shard
from geneformer_ray.distribute.fan_out import Pool, fan_out
from geneformer_ray.distribute.worker_model import open_runner
from geneformer_ray.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = ["Screen", "ScreenWorker", "SummaryWorker", "screen_items"]

# Tokens of all perturbed sequences of one item: a bound on its work. A cell of 1,024 genes is an item of its own.
TOKENS_PER_ITEM = 2**20
# From each of so many items one cell is computed in float32 too, where a screen runs in lower precision.
ITEMS_TO_COMPARE = 4
GENE_SHIFTS, GENE_SUMMARY, PAIR_SUMS = "gene_shifts", "gene_shifts_summary", "_pair_sums"
# Sums lie sorted by bucket: a small group of rows is read without its neighbours.
ROWS_OF_A_GROUP = 2**16


@dataclass(frozen=True)
class Screen:
    """A screen that is ready to run.

    Parameters
    ----------
    cells
        The table's path.
    rows
        The row numbers of the cells to perturb, shape (cells,).
    sequences
        Their token ids, as the model takes them.
    runner
        Options of :func:`open_runner`.
    plan, reading
        What is done, and what is compared.
    output
        The output directory.
    gene_rows, gene_summary
        What is kept of gene shifts: every one, and count, mean and deviation a pair.
    """

    cells: str
    rows: NDArray[np.int64]
    sequences: Sequence[NDArray[np.int32]]
    runner: dict[str, Any]
    plan: PerturbationPlan
    reading: Reading
    output: str
    gene_rows: bool = False
    gene_summary: bool = False

    @property
    def tables(self) -> list[str]:
        """The names of the tables that it writes."""
        gene_tables = {GENE_SHIFTS: self.gene_rows, GENE_SUMMARY: self.gene_summary}
        return ["cell_shifts", *(name for name, wanted in gene_tables.items() if wanted)]

    def run(self, pool: Pool, vocabulary: GeneVocabulary) -> dict[str, Any]:
        """Do every item that no earlier run finished; give the counts of all."""
        events = count_events(self.sequences, self.plan, vocabulary)
        lengths = np.array([len(ids) for ids in self.sequences])
        done = finished_items(self.output)
        todo = [item for item in screen_items(self.rows, events, lengths) if item["item"] not in done]
        reading = {
            **asdict(self.reading),
            "states": {state: vector.tolist() for state, vector in self.reading.states.items()},
        }
        options = {
            "cells": self.cells,
            "runner": self.runner,
            "plan": asdict(self.plan),
            "reading": reading,
            "output": self.output,
            "tables": self.tables,
        }
        with Progress("screen", int(events.sum()), "events") as progress:
            progress.advance(sum(counts["events"] for counts in done.values()))
            for counts in fan_out(ScreenWorker, options, todo, pool):
                done[counts["item"]] = counts
                progress.advance(counts["events"])
        if self.gene_summary:
            self._summarise(vocabulary)
        counted = ("events", "rows", "gene_rows", "events_skipped", "events_without_a_gene_to_compare")
        precision = merge_precision(counts["precision"] for counts in done.values() if counts["precision"])
        return {
            "cells": len(self.rows),
            **{name: sum(counts[name] for counts in done.values()) for name in counted},
            "cells_without_events": int((events == 0).sum()),
            **({"precision_error": precision} if precision else {}),
        }

    def _summarise(self, vocabulary: GeneVocabulary) -> None:
        """Merge the items' sums, bucket by bucket over the cluster."""
        options = {"names": vocabulary.names, "vocabulary": vocabulary.digest, "output": self.output}
        items = [{"bucket": bucket} for bucket in range(BUCKETS)]
        with Progress("gene shifts summary", BUCKETS, "parts") as progress:
            for _ in fan_out(SummaryWorker, options, items, Pool.of_cluster(model=False)):
                progress.advance(1)

    def discard_sums(self) -> None:
        """Delete what the summary was made of; until the output is finished a rerun needs it."""
        storage.remove(storage.join(self.output, PAIR_SUMS))


def screen_items(
    rows: NDArray[np.int64], events: NDArray[np.int64], lengths: NDArray[np.int64]
) -> list[dict[str, Any]]:
    """Cut cells into items of bounded work, in row order: a pure function of the cells and the plan.

    Parameters
    ----------
    rows, events, lengths
        Row number, number of events and of tokens of each cell, shape (cells,).
    """
    items: list[dict[str, Any]] = []
    current: list[int] = []
    tokens = 0
    for row, cost in zip(rows.tolist(), (events * lengths).tolist(), strict=True):
        if current and tokens + cost > TOKENS_PER_ITEM:
            items.append({"item": len(items), "rows": current})
            current, tokens = [], 0
        current.append(row)
        tokens += cost
    if current:
        items.append({"item": len(items), "rows": current})
    for i in range(min(ITEMS_TO_COMPARE, len(items))):
        items[i * len(items) // ITEMS_TO_COMPARE]["compare"] = True
    return items


class ScreenWorker:
    """Screens cells of a table.

    Parameters
    ----------
    cells
        The table's path.
    runner
        Options of :func:`open_runner`.
    plan
        Fields of :class:`PerturbationPlan`.
    reading
        Fields of :class:`Reading`, states as lists of floats.
    output
        The output directory.
    tables
        The tables to write.
    """

    def __init__(
        self,
        cells: str,
        runner: dict[str, Any],
        plan: dict[str, Any],
        reading: dict[str, Any],
        output: str,
        tables: Sequence[str],
    ) -> None:
        self.table = CellTable(cells)
        self.runner = open_runner(runner)
        self.plan = PerturbationPlan(**plan)
        states = {state: np.array(vector, dtype=np.float32) for state, vector in reading["states"].items()}
        self.reading = Reading(**{**reading, "states": states})
        self.output, self.tables = output, tables
        self.names = np.array(self.runner.vocabulary.names, dtype=object)
        # Of this worker: what one item found too much is not tried again by the next.
        self.budget = TokenBudget.of_free_memory(self.runner.encoder.execution, self.runner.encoder.config)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Screen one item's cells and write its shards."""
        cells = self.table.read(np.array(item["rows"]))
        sequences = self.runner.sequences(cells.input_ids, self.table.vocabulary_digest)
        encoder, vocabulary = self.runner.encoder, self.runner.vocabulary
        shifts = shift_cells(encoder, sequences, self.plan, self.reading, vocabulary, budget=self.budget)
        precision = None
        if item.get("compare") and encoder.execution.dtype != torch.float32:
            exact = self.runner.exact_encoder()
            precision = compare_precision(encoder, exact, sequences[:1], self.plan, self.reading, vocabulary)
        rows = cell_shift_rows(cells.cell_ids, shifts, list(self.reading.states), self.names)
        digest = vocabulary.digest
        write_shard(self.output, "cell_shifts", item["item"], rows, vocabulary=digest)
        gene_rows = 0
        if GENE_SUMMARY in self.tables:
            sums = pair_sums(shifts)
            write_shard(self.output, PAIR_SUMS, item["item"], sums, vocabulary=digest, row_group_size=ROWS_OF_A_GROUP)
        if GENE_SHIFTS in self.tables:
            table = gene_shift_rows(cells.cell_ids, shifts, self.names)
            write_shard(self.output, GENE_SHIFTS, item["item"], table, vocabulary=digest)
            gene_rows = table.num_rows
        counts = {
            "events": sum(map(len, shifts)),
            "events_skipped": sum(cell.skipped for cell in shifts),
            "events_without_a_gene_to_compare": sum(cell.empty for cell in shifts),
            "rows": rows.num_rows,
            "gene_rows": gene_rows,
            "cells": len(shifts),
            "precision": precision,
        }
        return mark_finished(self.output, item["item"], counts)


class SummaryWorker:
    """Merges the gene shifts of one bucket of events.

    Parameters
    ----------
    names, vocabulary
        Token names by id, and the vocabulary's digest.
    output
        The screen's output directory.
    """

    def __init__(self, names: Sequence[str], vocabulary: str, output: str) -> None:
        self.names = np.array(names, dtype=object)
        self.vocabulary, self.output = vocabulary, output

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Merge one bucket, item by item in their order, and write its shard."""
        files = storage.list_files(storage.join(self.output, PAIR_SUMS), ".parquet")
        tables = (
            ds.dataset(inside, filesystem=filesystem, format="parquet").to_table(
                filter=ds.field("bucket") == item["bucket"]
            )
            for filesystem, inside in map(storage.locate, files)
        )
        table = summary_of_bucket(tables, self.names)
        write_shard(self.output, GENE_SUMMARY, item["bucket"], table, vocabulary=self.vocabulary)
        return item
