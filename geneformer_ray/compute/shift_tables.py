"""Cell and gene shifts as rows of the screen's tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from geneformer_ray.compute.shifts import CellShifts

__all__ = ["CELL_SHIFTS", "EXACT", "GENE_SHIFTS", "cell_shift_rows", "gene_shift_rows"]

_GENES = pa.list_(pa.string())
CELL_SHIFTS = pa.schema(
    {"cell_id": pa.string(), "genes": _GENES, "measure": pa.string(), "state": pa.string(), "value": pa.float32()}
)
# The column that tells what the exact engine measured, in tables that hold estimates as well.
EXACT = "exact"
GENE_SHIFTS = pa.schema({"cell_id": pa.string(), "genes": _GENES, "affected": pa.string(), "value": pa.float32()})


def cell_shift_rows(
    cell_ids: Sequence[str],
    shifts: Sequence[CellShifts],
    states: Sequence[str],
    names: NDArray[np.object_],
    *,
    measure: str = "shift",
    exact: Sequence[NDArray[np.bool_]] | None = None,
) -> pa.Table:
    """Give one row an event and state, or one row of similarity an event without states.

    Parameters
    ----------
    cell_ids, shifts
        Of the same cells.
    states
        The reading's states, in the order of the values' columns.
    names
        Token names by id, shape (vocabulary,).
    measure
        What the values towards states are called; without states they are similarities.
    exact
        Where some values are estimates: which of each cell's events are not, shape (events,). They become a column.
    """
    measure, states = (measure, states) if states else ("similarity", [""])
    events = [len(cell) for cell in shifts]
    values = [cell.values_ES.ravel() for cell in shifts]
    rows = sum(events) * len(states)
    columns = [
        pa.array(np.repeat(np.repeat(np.array(cell_ids, dtype=object), events), len(states)), pa.string()),
        _gene_lists(shifts, [len(states)] * sum(events), names),
        pa.array(np.full(rows, measure, dtype=object), pa.string()),
        pa.array(np.tile(np.array(states, dtype=object), sum(events)), pa.string()),
        pa.array(np.concatenate(values) if values else np.empty(0, np.float32)),
    ]
    table = pa.table(columns, schema=CELL_SHIFTS)
    if exact is None:
        return table
    exact_E = np.concatenate([np.empty(0, dtype=bool), *exact])
    return table.append_column(EXACT, pa.array(np.repeat(exact_E, len(states))))


def gene_shift_rows(cell_ids: Sequence[str], shifts: Sequence[CellShifts], names: NDArray[np.object_]) -> pa.Table:
    """Give one row an event and unperturbed gene: their similarity before and after."""
    parts = []
    for cell_id, cell in zip(cell_ids, shifts, strict=True):
        if not cell.affected or not cell.gene_values:
            continue
        kept = [len(genes) for genes in cell.affected]
        columns = [
            pa.array(np.full(sum(kept), cell_id, dtype=object), pa.string()),
            _gene_lists([cell], kept, names),
            pa.array(names[np.concatenate(cell.affected)], pa.string()),
            pa.array(np.concatenate(cell.gene_values)),
        ]
        parts.append(pa.table(columns, schema=GENE_SHIFTS))
    return pa.concat_tables(parts) if parts else GENE_SHIFTS.empty_table()


def _gene_lists(shifts: Sequence[CellShifts], repeats: Sequence[int], names: NDArray[np.object_]) -> Any:
    """Name the perturbed genes of every event, each event as many times as `repeats` says."""
    events = [genes for cell in shifts for genes in cell.genes]
    lists = pa.array([names[list(genes)].tolist() for genes in events], _GENES)
    return lists.take(pa.array(np.repeat(np.arange(len(events)), repeats)))
