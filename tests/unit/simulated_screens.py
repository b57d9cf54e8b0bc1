"""Small `cell_shifts` tables for the tests of statistics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

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
