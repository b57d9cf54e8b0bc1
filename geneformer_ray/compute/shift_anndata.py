"""A screen as an AnnData of cells x genes."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa

from geneformer_ray.compute.paired_rows import codes_in
from geneformer_ray.compute.shift_rows import PARTS, read_measured_rows, read_shift_rows
from geneformer_ray.data import storage
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pyarrow.dataset as ds
    from numpy.typing import NDArray

    from geneformer_ray.compute.shift_rows import ShiftRows
    from geneformer_ray.data.cells import CellTable

__all__ = ["obs_of_cells", "shift_anndata", "write_anndata"]

# Cells x genes of one AnnData: 8 GiB as float32.
VALUES_AT_MOST = 2**31


def shift_anndata(
    shifts: pa.Table | ds.Dataset,
    statistics: pd.DataFrame,
    *,
    state: str | None = None,
    obs: pd.DataFrame | None = None,
    about: Mapping[str, Any] | None = None,
    measure: str = "shift",
) -> Any:
    """Lay out a screen as an AnnData of cells x genes.

    `X` is dense, and NaN where a gene was not perturbed in a cell: an implicit zero would read as "no effect" in a
    screen with states, and as "the opposite cell" in one without. NaN is also what tools around perturbation results,
    such as omicverse, take an absent gene for.

    Parameters
    ----------
    shifts
        The `cell_shifts` table.
    statistics
        A ranked table with the column `gene`; its genes and their order are those of `var`.
    state
        The state whose shifts are in `X`; None for the similarities of a screen without states.
    obs
        Columns of the cells, indexed by cell id. Its order is that of `obs`; other cells than the screened ones are
        left out. None for the ids alone.
    about
        What made the numbers; goes to `uns["screen"]` as JSON.
    measure
        What is in `X` of a screen with states: `shift`, or of a decomposed one `shift_gene` or `shift_rank`. The other
        two are in `layers`, under their names.

    Returns
    -------
    anndata.AnnData
        `X` float32, `layers` (of a decomposed screen), `obs`, `var` (`symbol`), `varm["statistics"]` (the ranked
        table; "/" in a column's name, which HDF5 cannot hold, is "_"), `uns["screen"]`.

    Raises
    ------
    InputError
        The table is broken, has no such rows, is too large, or a cell is missing in `obs`.
    """
    from anndata import AnnData  # takes a second, and is only needed for this

    rows = read_measured_rows(shifts, state, measure=measure)
    genes = statistics["gene"].tolist()
    others = _parts_beside(shifts, state, measure)
    if len(rows.cells) * len(genes) * (1 + len(others)) > VALUES_AT_MOST:
        takes = f"at most {VALUES_AT_MOST} values: fewer cells (--max-cells of the screen), or no AnnData"
        matrices = f" x {1 + len(others)} measures" if others else ""
        raise InputError("anndata", f"{len(rows.cells)} cells x {len(genes)} genes{matrices}", takes)
    about_cells = pd.DataFrame(index=pd.Index(rows.cells, dtype=object)) if obs is None else obs
    about_cells = about_cells[about_cells.index.isin(rows.cells)]
    if len(about_cells) < len(rows.cells):
        got = f"{len(about_cells)} of the {len(rows.cells)} screened cells"
        raise InputError("obs", got, "every cell of the screen")
    names = about_cells.index.tolist()
    layers = {name: _matrix(part, names, genes) for name, part in others.items()}
    table = statistics.set_index(pd.Index(genes, dtype=object)).drop(columns="gene")
    table.columns = [name.replace("/", "_") for name in table.columns]
    var = table[["symbol"]].copy()
    obs = about_cells.rename(columns=lambda name: name.replace("/", "_"))
    result = AnnData(_matrix(rows, names, genes), obs=obs, var=var, layers=layers or None)
    result.varm["statistics"] = table
    result.uns["screen"] = json.dumps(dict(about or {}))
    return result


def _parts_beside(shifts: pa.Table | ds.Dataset, state: str | None, measure: str) -> dict[str, ShiftRows]:
    """Read the measures of a decomposed screen other than the one that is asked for."""
    if state is None:
        return {}
    parts = {name: read_shift_rows(shifts, measure=name, states=[state]) for name in PARTS if name != measure}
    return {name: rows for name, rows in parts.items() if rows.value_N.size}


def _matrix(rows: ShiftRows, cells: Sequence[str], genes: Sequence[str]) -> NDArray[np.float32]:
    """Lay out values as cells x genes, those of other genes left out."""
    cell_N, gene_N = codes_in(rows.cells, cells)[rows.cell_N], codes_in(rows.genes, genes)[rows.gene_N]
    matrix = np.full((len(cells), len(genes)), np.nan, dtype=np.float32)
    known = gene_N >= 0
    matrix[cell_N[known], gene_N[known]] = rows.value_N[known]
    return matrix


def obs_of_cells(cells: CellTable) -> pd.DataFrame:
    """Give a table's obs columns, indexed by cell id; numbers and truth values as they are, all else as text.

    Columns of lists are left out, for AnnData cannot hold them.
    """
    columns = {}
    for field in cells.schema:
        if field.name in ("cell_id", "input_ids", "length") or pa.types.is_nested(field.type):
            continue
        values = cells.column(field.name, "--cells")
        columns[field.name] = values if values.dtype.kind in "biuf" else values.astype(str)
    return pd.DataFrame(columns, index=pd.Index(cells.cell_ids, dtype=object))


def write_anndata(result: Any, path: str) -> None:
    """Write an AnnData as compressed h5ad to a local path or URI."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "written.h5ad")
        result.write_h5ad(file, compression="gzip")
        storage.write_bytes(path, file.read_bytes())
