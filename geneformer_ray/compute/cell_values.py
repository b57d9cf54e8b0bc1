"""The values of single cells, one row each, and what they come to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from geneformer_ray.compute.bootstrap import group_codes
from geneformer_ray.compute.shift_rows import mean_column, read_measured_rows

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pyarrow as pa
    import pyarrow.dataset as ds

__all__ = ["aggregate_tables"]


def aggregate_tables(
    shifts: pa.Table | ds.Dataset,
    *,
    state: str | None = None,
    symbols: Mapping[str, str] | None = None,
    groups: Mapping[str, str] | None = None,
    measure: str = "shift",
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Give every cell's value, and what they come to.

    Parameters
    ----------
    shifts
        The `cell_shifts` table of a screen of one gene or set of genes, or of a few.
    state
        The state whose shifts are read; None for the similarities of a screen without states.
    symbols
        Symbol of each vocabulary key. A key without one stands for itself.
    groups
        Group of each cell.
    measure
        What is read of a screen with states: `shift`, or of a decomposed one `shift_gene` or `shift_rank`.

    Returns
    -------
    summary
        One row a gene or set. Columns: `gene`, `symbol`, `mean`, `deviation` (of all cells, not of a sample), `median`,
        `minimum`, `maximum`, `cells`. Shifts come highest first, similarities lowest first.
    cells
        One row a gene and cell. Columns: `cell_id`, with groups `group`, `gene`, `symbol`, `similarity` or
        `shift_to_STATE` (`shift_gene_to_STATE`, ...), and `exact` where the screen says which values are; by gene in
        the order of the summary, then by cell.

    Raises
    ------
    InputError
        The table is broken or has no such rows, or a cell has no group.
    """
    rows = read_measured_rows(shifts, state, symbols, measure=measure)
    value = pd.Series(rows.value_N).groupby(rows.gene_N)
    summary = pd.DataFrame({"gene": list(rows.genes), "symbol": list(rows.symbols)})
    summary["mean"], summary["deviation"], summary["median"] = value.mean(), value.std(ddof=0), value.median()
    summary["minimum"], summary["maximum"], summary["cells"] = value.min(), value.max(), value.size()
    summary = summary.sort_values(["mean", "gene"], ascending=[state is None, True])
    place_G = np.empty(len(summary), dtype=np.int64)
    place_G[summary.index] = np.arange(len(summary))
    order = np.argsort(place_G[rows.gene_N], kind="stable")
    cells = pd.DataFrame({"cell_id": _named(rows.cells, rows.cell_N[order])})
    if groups is not None:
        group_codes(rows.cells, groups)  # refuses a cell without a group
        cells["group"] = _named([groups[cell] for cell in rows.cells], rows.cell_N[order])
    cells["gene"] = _named(rows.genes, rows.gene_N[order])
    cells["symbol"] = _named(rows.symbols, rows.gene_N[order])
    cells["similarity" if state is None else mean_column(measure, state)] = rows.value_N[order]
    if rows.exact_N is not None:
        cells["exact"] = rows.exact_N[order]
    return summary.reset_index(drop=True), cells


def _named(names: Any, code_N: Any) -> Any:
    return np.array(names, dtype=object)[code_N]
