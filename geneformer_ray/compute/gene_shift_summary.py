"""Gene shifts summed up over cells: count, mean and deviation of every pair of perturbed and affected genes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from geneformer_ray.compute.shifts import CellShifts

__all__ = ["BUCKETS", "GENE_SHIFTS_SUMMARY", "PAIR_SUMS", "pair_sums", "summary_of_bucket"]

# Events are dealt out by their genes, so that each bucket can be summed up on its own, in a share of the memory.
BUCKETS = 64
_GENES = pa.list_(pa.string())
_LOSS = "loss"
PAIR_SUMS = pa.schema(
    {
        "bucket": pa.int8(),
        "genes": pa.list_(pa.int32()),
        "affected": pa.int32(),
        "count": pa.int64(),
        "loss_sum": pa.float64(),
        "loss_square_sum": pa.float64(),
    }
)
GENE_SHIFTS_SUMMARY = pa.schema(
    {"genes": _GENES, "affected": pa.string(), "count": pa.int64(), "mean": pa.float64(), "deviation": pa.float64()}
)


def pair_sums(shifts: Sequence[CellShifts]) -> pa.Table:
    """Sum the gene shifts of some cells by pair, in token ids, sorted by bucket.

    What is summed is 1 - similarity: similarities lie so near 1 that the deviation would drown in their squares.
    """
    parts = []
    events: dict[tuple[int, ...], int] = {}
    for cell in shifts:
        if cell.affected and cell.gene_values:
            codes = [events.setdefault(genes, len(events)) for genes in cell.genes]
            kept = [len(genes) for genes in cell.affected]
            parts.append(
                pd.DataFrame(
                    {
                        "event": np.repeat(np.array(codes), kept),
                        "affected": np.concatenate(cell.affected),
                        _LOSS: 1 - np.concatenate(cell.gene_values).astype(np.float64),
                    }
                )
            )
    if not parts:
        return PAIR_SUMS.empty_table()
    frame = pd.concat(parts)
    frame["square"] = frame[_LOSS] ** 2
    grouped = frame.groupby(["event", "affected"], sort=True)
    sums = grouped.agg(count=(_LOSS, "size"), loss_sum=(_LOSS, "sum"), square_sum=("square", "sum")).reset_index()
    names = list(events)
    bucket = np.array([_bucket(genes) for genes in names], dtype=np.int8)[sums["event"]]
    order = np.argsort(bucket, kind="stable")
    sums = sums.iloc[order]
    lists = pa.array([list(genes) for genes in names], pa.list_(pa.int32())).take(pa.array(sums["event"].to_numpy()))
    columns = [
        pa.array(bucket[order]),
        lists,
        pa.array(sums["affected"].to_numpy(), pa.int32()),
        pa.array(sums["count"].to_numpy(), pa.int64()),
        pa.array(sums["loss_sum"].to_numpy()),
        pa.array(sums["square_sum"].to_numpy()),
    ]
    return pa.table(columns, schema=PAIR_SUMS)


def summary_of_bucket(tables: Iterable[pa.Table], names: NDArray[np.object_]) -> pa.Table:
    """Merge the sums of one bucket, in the order given, into count, mean and deviation (over all cells, not a sample).

    Parameters
    ----------
    tables
        Rows of :func:`pair_sums`, all of one bucket.
    names
        Token names by id.
    """
    totals: dict[tuple[int, ...], pd.DataFrame] = {}
    for table in tables:
        frame = table.select(["affected", "count", "loss_sum", "loss_square_sum"]).to_pandas()
        events = table["genes"].to_pandas().map(tuple)
        for genes, rows in frame.groupby(events.to_numpy(), sort=False):
            sums = rows.set_index("affected")
            totals[genes] = totals[genes].add(sums, fill_value=0) if genes in totals else sums
    parts = []
    for genes in sorted(totals):
        sums = totals[genes].sort_index()
        loss = sums["loss_sum"] / sums["count"]
        variance = np.maximum(0.0, sums["loss_square_sum"] / sums["count"] - loss**2)
        event = pa.array([[names[token] for token in genes]], _GENES)
        columns = [
            event.take(pa.array(np.zeros(len(sums), dtype=np.int64))),
            pa.array(names[sums.index.to_numpy()], pa.string()),
            pa.array(sums["count"].to_numpy().astype(np.int64)),
            pa.array((1 - loss).to_numpy()),
            pa.array(np.sqrt(np.asarray(variance))),
        ]
        parts.append(pa.table(columns, schema=GENE_SHIFTS_SUMMARY))
    return pa.concat_tables(parts) if parts else GENE_SHIFTS_SUMMARY.empty_table()


def _bucket(genes: tuple[int, ...]) -> int:
    return sum(genes) % BUCKETS
