"""Cells with the sparsity of real ones, written to h5ad a few at a time."""

from __future__ import annotations

import json
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
from anndata.io import write_elem
from scipy import sparse

from geneformer_ray.data.vocabulary import CLS, EOS, MASK, PAD, GeneVocabulary

CELLS_AT_ONCE = 1_000
TRANSCRIPTS = 2_900  # a cell in the median: about 2,000 of 20,000 genes are then expressed
SPREAD_OF_GENES = 1.75  # sigma of the log-normal expression of genes
SPREAD_OF_CELLS = 0.35  # sigma of the log-normal totals of cells


def gene_names(genes: int) -> list[str]:
    """Give names in the form of Ensembl ids."""
    return [f"ENSG{number:011d}" for number in range(genes)]


def expression(genes: int) -> np.ndarray:
    """Give each gene's share of a cell's transcripts."""
    share = np.random.default_rng(0).lognormal(0, SPREAD_OF_GENES, genes)
    return share / share.sum()


def simulate_cells(start: int, stop: int, genes: int) -> sparse.csr_matrix:
    """Draw Poisson counts of cells; cell i is the same however many are drawn."""
    random = np.random.default_rng([1, start])
    totals = TRANSCRIPTS * random.lognormal(0, SPREAD_OF_CELLS, stop - start)
    return sparse.csr_matrix(random.poisson(totals[:, None] * expression(genes)).astype(np.float32))


def write_h5ad(path: Path, cells: int, genes: int, compression: str | None = None) -> None:
    """Write simulated cells as anndata does, CSR and uncompressed unless told otherwise."""
    template = anndata.AnnData(
        sparse.csr_matrix((0, genes), dtype=np.float32), var=pd.DataFrame(index=gene_names(genes))
    )
    template.write_h5ad(path)
    with h5py.File(path, "a") as file:
        del file["X"], file["obs"]
        group = file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": (cells, genes)})
        options = {"maxshape": (None,), "chunks": (2**18,), "compression": compression}
        data = group.create_dataset("data", (0,), np.float32, **options)
        indices = group.create_dataset("indices", (0,), np.int32, **options)
        indptr = np.zeros(cells + 1, dtype=np.int64)
        for start in range(0, cells, CELLS_AT_ONCE):
            block = simulate_cells(start, min(start + CELLS_AT_ONCE, cells), genes)
            behind = len(data)
            for dataset, values in ((data, block.data), (indices, block.indices)):
                dataset.resize((behind + len(values),))
                dataset[behind:] = values
            indptr[start + 1 : start + 1 + block.shape[0]] = behind + block.indptr[1:]
        group.create_dataset("indptr", data=indptr)
        kinds = pd.Categorical.from_codes(np.arange(cells) % 7, [f"type {number}" for number in range(7)])
        names = [f"cell{number:09d}" for number in range(cells)]
        write_elem(file, "obs", pd.DataFrame({"cell_type": kinds}, index=names))


def write_vocabulary(directory: Path, genes: int) -> None:
    """Write a vocabulary in V2's form: special tokens and a median for each gene, none of them alike."""
    names = gene_names(genes)
    tokens = {name: number for number, name in enumerate([PAD, MASK, CLS, EOS, *names])}
    medians = np.random.default_rng(2).lognormal(1, 1, genes)
    vocabulary = GeneVocabulary(tokens, medians=dict(zip(names, medians.tolist(), strict=True)), max_length=4_096)
    vocabulary.save(str(directory))


def describe(path: Path) -> dict[str, float]:
    """Say what a file came to."""
    with h5py.File(path) as file:
        cells, genes = (int(number) for number in file["X"].attrs["shape"])
        return {"cells": cells, "genes": genes, "genes_per_cell": round(len(file["X/data"]) / cells, 1)}


if __name__ == "__main__":
    import sys

    target = Path(sys.argv[1])
    write_h5ad(target, int(sys.argv[2]), 20_000)
    print(json.dumps(describe(target)))
