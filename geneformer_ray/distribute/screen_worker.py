"""What an actor does of a screen: one item of cells, into shards; cells that cannot be screened are set aside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import torch

from geneformer_ray.compute.cell_events import cell_events, cell_fault
from geneformer_ray.compute.first_order_figures import first_order_figures
from geneformer_ray.compute.gene_shift_summary import pair_sums, summary_of_bucket
from geneformer_ray.compute.perturbation import PerturbationPlan
from geneformer_ray.compute.precision_check import compare_precision
from geneformer_ray.compute.reading import Reading
from geneformer_ray.compute.screen_method import ScreenedCell, ScreenMethod
from geneformer_ray.compute.shift_tables import gene_shift_rows
from geneformer_ray.compute.token_budget import TokenBudget, out_of_memory
from geneformer_ray.data import storage
from geneformer_ray.data.cells import CellTable
from geneformer_ray.data.shards import begin_attempt, end_attempts, mark_finished, write_shard
from geneformer_ray.distribute.screen_tables import CELL_SHIFTS, GENE_SHIFTS, GENE_SUMMARY, PAIR_SUMS, REJECTS
from geneformer_ray.distribute.worker_model import open_runner
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["ScreenWorker", "SummaryWorker"]

# Sums lie sorted by bucket: a small group of rows is read without its neighbours.
ROWS_OF_A_GROUP = 2**16
# An item that took its process with it so often is screened cell by cell, and a cell that then did so this often is set
# aside. Nodes come and go: once or twice is no cell's fault.
LOST_TOGETHER, LOST_ALONE = 3, 2


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
    method
        How cells are measured; by default exactly, as they are.
    """

    def __init__(
        self,
        cells: str,
        runner: dict[str, Any],
        plan: dict[str, Any],
        reading: dict[str, Any],
        output: str,
        tables: Sequence[str],
        method: ScreenMethod | None = None,
    ) -> None:
        self.table = CellTable(cells)
        self.runner = open_runner(runner)
        self.plan = PerturbationPlan(**plan)
        states = {state: np.array(vector, dtype=np.float32) for state, vector in reading["states"].items()}
        self.reading = Reading(**{**reading, "states": states})
        self.output, self.tables, self.method = output, tables, method or ScreenMethod()
        self.names = np.array(self.runner.vocabulary.names, dtype=object)
        # Of this worker: what one item found too much is not tried again by the next.
        self.budget = TokenBudget.of_free_memory(self.runner.encoder.execution, self.runner.encoder.config)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Screen one item's cells and write its shards.

        An item that gives a ``reason`` is a part of a cell whose other parts failed: it is set aside with them.
        """
        attempt = f"{item['item']:06d}"
        lost = begin_attempt(self.output, attempt)
        if lost > LOST_TOGETHER + LOST_ALONE * len(item["rows"]):
            got = f"rows {item['rows'][0]} to {item['rows'][-1]}, which ended their process {lost} times"
            takes = (
                "cells whose tables fit a worker's memory: fewer workers a node (--max-workers), or no --gene-shifts"
            )
            raise InputError("--cells", f"{got}, though each was screened alone", takes)
        cells = self.table.read(np.array(item["rows"]))
        vocabulary = self.runner.vocabulary
        sequences = [vocabulary.adapt(ids, self.table.vocabulary_digest) for ids in cells.input_ids]
        part = range(*item["part"]) if "part" in item else None
        if "reason" in item:
            found: list[ScreenedCell | str] = [item["reason"]]
        elif lost < LOST_TOGETHER:
            found = self._screen(sequences, part)
        else:
            found = self._one_by_one(attempt, item["rows"], sequences, part)
        kept = [number for number, one in enumerate(found) if isinstance(one, ScreenedCell)]
        screened = [one for one in found if isinstance(one, ScreenedCell)]
        reasons = {number: one for number, one in enumerate(found) if isinstance(one, str)}
        cell_ids = [cells.cell_ids[number] for number in kept]
        lengths = [len(sequences[number]) for number in kept]
        counts = {
            "cells": len(kept) if part is None or part.start == 0 else 0,  # a cell in parts is one cell
            "tokens": sum(cell.events_measured * length for cell, length in zip(screened, lengths, strict=True)),
            "events": sum(map(len, screened)),
            "events_skipped": sum(cell.shifts.skipped for cell in screened),
            "events_without_a_gene_to_compare": sum(cell.shifts.empty for cell in screened),
            "events_rejected": sum(self._events(sequences[number], part) for number in reasons),
            "rejected": {str(item["rows"][number]): reason for number, reason in reasons.items()},
            "precision": self._precision([sequences[number] for number in kept[:1]]) if item.get("compare") else None,
        }
        if (settings := self.method.first_order) is not None:
            estimated = [item["rows"][number] for number, cell in zip(kept, screened, strict=True) if cell.estimated]
            counts |= {"first_order": first_order_figures(screened, settings.tolerance), "estimated": estimated}
        counts |= self._write(item["item"], cell_ids, screened)
        if reasons and (part is None or part.start == 0):  # of a cell in parts the first one tells
            rejects = {"cell_id": [cells.cell_ids[number] for number in reasons], "reason": list(reasons.values())}
            write_shard(self.output, REJECTS, item["item"], pa.table(rejects))
        finished = mark_finished(self.output, item["item"], counts)
        end_attempts(self.output, attempt, lost)
        return finished

    def _write(self, number: int, cell_ids: Sequence[str], cells: Sequence[ScreenedCell]) -> dict[str, int]:
        """Write an item's shards; count their rows."""
        digest, shifts = self.runner.vocabulary.digest, [cell.shifts for cell in cells]
        rows = self.method.rows(cell_ids, cells, list(self.reading.states), self.names)
        write_shard(self.output, CELL_SHIFTS, number, rows, vocabulary=digest)
        gene_rows = 0
        if GENE_SUMMARY in self.tables:
            sums = pair_sums(shifts)
            write_shard(self.output, PAIR_SUMS, number, sums, vocabulary=digest, row_group_size=ROWS_OF_A_GROUP)
        if GENE_SHIFTS in self.tables:
            table = gene_shift_rows(cell_ids, shifts, self.names)
            write_shard(self.output, GENE_SHIFTS, number, table, vocabulary=digest)
            gene_rows = table.num_rows
        return {"rows": rows.num_rows, "gene_rows": gene_rows}

    def _precision(self, sequences: Sequence[NDArray[np.int32]]) -> dict[str, float] | None:
        """Compare a cell's numbers with float32's, where they are not float32 themselves."""
        encoder = self.runner.encoder
        if not sequences or encoder.execution.dtype == torch.float32:
            return None
        exact = self.runner.exact_encoder()
        vocabulary, settings = self.runner.vocabulary, self.method.first_order
        return compare_precision(encoder, exact, sequences, self.plan, self.reading, vocabulary, settings)

    def _events(self, ids: NDArray[np.int32], part: range | None) -> int:
        """Count the events that a cell set aside would have had; none where it has no events at all."""
        if self._fault(ids):
            return 0
        return len(cell_events(ids, self.plan, self.runner.vocabulary, self.runner.encoder.max_length, part))

    def _fault(self, ids: NDArray[np.int32]) -> str:
        return cell_fault(ids, self.plan, self.runner.vocabulary, self.runner.encoder.max_length)

    def _one_by_one(
        self, attempt: str, rows: Sequence[int], sequences: Sequence[NDArray[np.int32]], part: range | None
    ) -> list[ScreenedCell | str]:
        """Screen cells each on its own, noted down before: one of them ends the process that screens it."""
        found: list[ScreenedCell | str] = []
        for row, ids in zip(rows, sequences, strict=True):
            lost = begin_attempt(self.output, f"{attempt}.{row}")
            if lost >= LOST_ALONE:
                found.append(f"ended the process that screened it, {LOST_ALONE} times alone")
                continue
            found += self._screen([ids], part)
            end_attempts(self.output, f"{attempt}.{row}", lost)
        return found

    def _screen(self, sequences: Sequence[NDArray[np.int32]], part: range | None) -> list[ScreenedCell | str]:
        """Give each cell's numbers, or the reason why it has none."""
        found: list[ScreenedCell | str] = [self._fault(ids) for ids in sequences]
        fit = [number for number, fault in enumerate(found) if not fault]
        for number, one in zip(fit, self._measured([sequences[number] for number in fit], part), strict=True):
            found[number] = one
        return found

    def _measured(self, sequences: Sequence[NDArray[np.int32]], part: range | None) -> list[ScreenedCell | str]:
        """Measure cells together; where that fails one by one, so that only those that fail alone are set aside."""
        runner = self.runner
        try:
            cells = self.method.screen(
                runner.encoder,
                sequences,
                self.plan,
                self.reading,
                runner.vocabulary,
                budget=self.budget,
                parts=[part] * len(sequences),
            )
        except Exception as error:
            if not _is_of_a_cell(error):
                raise
            if len(sequences) == 1:
                return [f"{type(error).__name__}: {' '.join(str(error).split())}"]
            return [one for ids in sequences for one in self._measured([ids], part)]
        return [_unless_finite(cell) or cell for cell in cells]


def _unless_finite(cell: ScreenedCell) -> str:
    events = cell.not_finite()
    return f"{events} of {len(cell)} events gave a value that is not a finite number" if events else ""


def _is_of_a_cell(error: Exception) -> bool:
    """Whether an error may come of what a cell holds: not of short memory, of a plan, or of a device that is gone."""
    if isinstance(error, InputError):
        return error.field == "--cells" and not out_of_memory(error.__cause__ or error)
    return not (isinstance(error, OSError) or out_of_memory(error) or "CUDA error" in str(error))


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
