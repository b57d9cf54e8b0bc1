"""How many of a screen's values are the exact engine's, and how many are first-order estimates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.dataset as ds

from geneformer_ray.compute.shift_rows import says_what_is_exact
from geneformer_ray.compute.shift_tables import EXACT

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["exact_sentence", "exact_share"]


def exact_share(shifts: pa.Table | ds.Dataset, state: str | None, measure: str = "shift") -> float | None:
    """Give the share of the values towards a state that are exact; None for a table that does not say, or without any.

    Parameters
    ----------
    shifts, state, measure
        As for :func:`geneformer_ray.compute.shift_rows.read_measured_rows`.
    """
    dataset = ds.dataset(shifts) if isinstance(shifts, pa.Table) else shifts
    if not says_what_is_exact(dataset):
        return None
    wanted = ds.field("measure") == ("similarity" if state is None else measure)
    wanted &= ds.field("state") == ("" if state is None else state)
    rows = dataset.count_rows(filter=wanted)
    return float(dataset.count_rows(filter=wanted & ds.field(EXACT)) / rows) if rows else None


def exact_sentence(share: float, table: pd.DataFrame | None = None) -> str:
    """Say in words how many values are exact.

    Parameters
    ----------
    share
        What :func:`exact_share` gave.
    table
        A ranked table with `exact_share` and `significant`: of how many genes all values are exact.
    """
    if share == 1:
        return "All values are exact."
    told = f"{share:.1%} of the values are exact; the others are first-order estimates."
    if table is None or "exact_share" not in table:
        return told
    all_exact = table["exact_share"] == 1
    hits = table["significant"]
    told += f" All values are exact of {int(all_exact.sum()):,} of {len(table):,} genes"
    return f"{told}, and of {int((all_exact & hits).sum()):,} of {int(hits.sum()):,} hits."
