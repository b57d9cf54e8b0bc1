"""Small `cell_shifts` tables for the tests of statistics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from geneformer_ray.compute.shift_rows import PARTS
from geneformer_ray.compute.shift_tables import CELL_SHIFTS

Row = tuple[str, Sequence[str], str, float]


def shift_table(rows: Iterable[Row], measure: str = "shift") -> pa.Table:
    records = [
        {"cell_id": cell, "genes": list(genes), "measure": measure, "state": state, "value": value}
        for cell, genes, state, value in rows
    ]
    return pa.Table.from_pylist(records, schema=CELL_SHIFTS)


def similarities(seed: int = 0, cells: int = 12, genes: int = 15, seen: float = 0.7, loss: float = 1e-3) -> pa.Table:
    """Genes 3 and 5 with a loss five times as large as the others'; each gene in some cells only."""
    rng = np.random.default_rng(seed)
    return shift_table(
        [
            (f"cell{cell}", [f"GENE{gene}"], "", 1 - loss * (5 if gene in (3, 5) else 1) * rng.uniform(0.5, 1.5))
            for cell in range(cells)
            for gene in np.flatnonzero(rng.random(genes) < seen)
        ],
        measure="similarity",
    )


def frame_of(shifts: pa.Table) -> Any:
    """The rows as a data frame, with `gene` the event's keys sorted and joined, and values in float64."""
    frame: Any = shifts.to_pandas()
    frame["gene"] = ["+".join(sorted(genes)) for genes in frame["genes"]]
    return frame.astype({"value": float})


def decomposed(seed: int = 0, cells: int = 14, genes: int = 15, seen: float = 0.8) -> pa.Table:
    """Shifts to beta and alpha with both parts: gene 3 acts by itself, gene 5 by its rank, each gene in some cells."""
    rng = np.random.default_rng(seed)
    rows: dict[str, list[Row]] = {measure: [] for measure in PARTS}
    for cell in range(cells):
        for gene in np.flatnonzero(rng.random(genes) < seen):
            for state, direction in (("beta", 1.0), ("alpha", -1.0)):
                own, rank = (np.float32(direction * 0.03 * (gene == hit) + rng.normal(scale=0.005)) for hit in (3, 5))
                for measure, value in zip(PARTS, (own + rank, own, rank), strict=True):
                    rows[measure].append((f"cell{cell}", [f"GENE{gene}"], state, float(value)))
    return pa.concat_tables(shift_table(rows[measure], measure=measure) for measure in PARTS)


def only(shifts: pa.Table, measure: str, called: str | None = None) -> pa.Table:
    """The rows of one measure, under its own name or another."""
    rows = shifts.filter(pa.compute.equal(shifts["measure"], measure))
    column = rows.schema.get_field_index("measure")
    return rows.set_column(column, rows.schema.field(column), pa.array([called or measure] * len(rows)))
