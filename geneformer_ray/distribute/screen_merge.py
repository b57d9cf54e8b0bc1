"""The table of a verified screen: estimates, item by item, with the exact values that were measured since."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from geneformer_ray.compute.verified_shifts import exact_values, put_in_place, rows_of, single_genes
from geneformer_ray.data.cells import CellTable
from geneformer_ray.data.shards import mark_finished, read_shard, write_shard
from geneformer_ray.distribute.screen_tables import CELL_SHIFTS, REJECTS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from geneformer_ray.distribute.screen_items import ScreenItems

__all__ = ["MergeWorker", "merge_items", "read_exact"]


def merge_items(
    estimates: ScreenItems, exact: Mapping[str, ScreenItems], rejected: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """Give what belongs to each item of estimates, in their order.

    Parameters
    ----------
    estimates
        The items of the estimates.
    exact
        Output of an exact screen -> its items, of rows in the same order.
    rejected
        Row number, as text -> why that cell was set aside, by whichever screen.
    """
    spans = {output: (items.rows, *_spans(items)) for output, items in exact.items()}
    done = 0
    for item in estimates:
        rows = item["rows"]
        shards = {}
        for output, (rows_R, first_I, last_I) in spans.items():
            # One of its items may reach over many of these, and have a cell of a few of them alone.
            mine = rows_R[np.searchsorted(rows_R, rows[0]) : np.searchsorted(rows_R, rows[-1], side="right")]
            start = np.searchsorted(last_I, mine[:1]).tolist()
            stop = np.searchsorted(first_I, mine[-1:], side="right").tolist()
            shards[output] = list(range(start[0], stop[0])) if start else []
        aside = {str(row): rejected[str(row)] for row in rows if str(row) in rejected}
        events = estimates.counts.events[done : done + len(rows)]
        lost = sum(number for row, number in zip(rows, events.tolist(), strict=True) if str(row) in aside)
        done += len(rows)
        yield {"item": item["item"], "exact": shards, "rejected": aside, "events_rejected": lost}


def _spans(items: ScreenItems) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Give the first and the last row of each item, both shape (items,)."""
    ends = np.array([(item["rows"][0], item["rows"][-1]) for item in items], dtype=np.int64).reshape(-1, 2)
    return ends[:, 0], ends[:, 1]


def read_exact(shards: Mapping[str, Sequence[int]]) -> pa.Table | None:
    """Read the rows of some items of exact screens, output -> items; None where there are no items."""
    tables = [read_shard(output, CELL_SHIFTS, number) for output, some in shards.items() for number in some]
    return pa.concat_tables(tables) if tables else None


class MergeWorker:
    """Makes one item's rows.

    Parameters
    ----------
    cells
        The path of the table of cells.
    estimates, output
        Where the estimates lie, and where the table goes.
    vocabulary
        The digest that the table carries.
    goal, controls
        The state whose shifts decide, and the names of the control genes: what was estimated of these and what was
        measured is summed up.
    rows_an_event
        How many rows each event has.
    """

    def __init__(
        self,
        cells: str,
        estimates: str,
        output: str,
        vocabulary: str,
        goal: str,
        controls: Sequence[str],
        rows_an_event: int,
    ) -> None:
        self.table = CellTable(cells)
        self.estimates, self.output, self.vocabulary = estimates, output, vocabulary
        self.goal, self.controls, self.rows_an_event = goal, pa.array(controls, pa.string()), rows_an_event

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Write one item's shards; its cells were counted when they were screened."""
        number, aside = item["item"], item["rejected"]
        estimates, exact = read_shard(self.estimates, CELL_SHIFTS, number), read_exact(item["exact"])
        ids = pa.array(self.table.ids_of(np.array(list(aside), dtype=np.int64)) if aside else [], pa.string())
        estimates = estimates.filter(pc.invert(pc.is_in(estimates["cell_id"], value_set=ids)))
        exact_N = exact_values(estimates, estimates.slice(0, 0) if exact is None else exact)
        table = put_in_place(estimates, exact_N)
        write_shard(self.output, CELL_SHIFTS, number, table, vocabulary=self.vocabulary)
        if aside:
            rejects = {"cell_id": ids, "reason": list(aside.values())}
            write_shard(self.output, REJECTS, number, pa.table(rejects))
        counts = {
            "cells": len(table["cell_id"].unique()),
            "events": table.num_rows // self.rows_an_event,
            "rows": table.num_rows,
            "gene_rows": 0,
            "events_skipped": 0,
            "events_without_a_gene_to_compare": 0,
            "events_rejected": item["events_rejected"],
            "rejected": aside,
            "precision": None,
            "control_genes": self._of_controls(estimates, exact_N),
        }
        mark_finished(self.output, number, counts)
        return {"item": number}

    def _of_controls(self, estimates: pa.Table, exact_N: np.ndarray[Any, Any]) -> dict[str, list[float]]:
        """Give rows, sum of estimates and sum of exact values of each control gene."""
        genes = single_genes(estimates)
        chosen = pc.and_(rows_of(estimates, "shift", self.goal), pc.is_in(genes, value_set=self.controls))
        rows = np.flatnonzero(chosen.to_numpy(zero_copy_only=False) & ~np.isnan(exact_N))
        if not len(rows):
            return {}
        code_R = pc.index_in(genes.take(pa.array(rows)), value_set=self.controls).to_numpy(zero_copy_only=False)
        values = [np.ones(len(rows)), estimates["value"].to_numpy()[rows], exact_N[rows]]
        sums = np.stack([np.bincount(code_R, weights=value_R.astype(np.float64)) for value_R in values], axis=1)
        return {self.controls[code].as_py(): sums[code].tolist() for code in np.unique(code_R).tolist()}
