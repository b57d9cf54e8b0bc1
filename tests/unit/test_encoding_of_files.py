"""From files to tokens: how a matrix is stored, ordered and cut makes no difference to any cell."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy import sparse

from geneformer_ray.data.counts import CountFile
from geneformer_ray.data.rank_value import RankValueEncoder
from geneformer_ray.data.vocabulary import GeneVocabulary

GENES = [f"ENSG{number:011d}" for number in range(8)]
VOCABULARY = GeneVocabulary.from_medians(
    dict(zip(GENES, [1.0, 2.0, 0.3, 4.0, 1.0, 2.5, 0.7, 1.9], strict=True)), max_length=6
)
STORED = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.asarray}
matrices = hnp.arrays(np.float32, st.tuples(st.integers(1, 7), st.just(len(GENES))), elements=st.integers(0, 4))


def encode(path: str, directory: str, step: int = 3) -> dict[str, list[int]]:
    """Encode a file as the job does: sorted first where need be, then in blocks."""
    with CountFile(path) as file:
        for part in file.parts() if file.needs_sorting else []:
            file.write_sorted(part, directory)
    cells: dict[str, list[int]] = {}
    with CountFile(path, sorted_in=directory) as file:
        encoder = RankValueEncoder(VOCABULARY, file.genes)
        for start in range(0, len(file), step):
            block = file.block(start, min(start + step, len(file)))
            encoded = encoder.encode(block.counts, block.totals)
            cells |= {name: encoded.cell(number).tolist() for number, name in enumerate(block.cell_ids)}
    return cells


def write(path: Path, matrix: object, genes: list[str], first: int = 0) -> str:
    obs = pd.DataFrame(index=[f"CELL{first + number}" for number in range(matrix.shape[0])])  # type: ignore[attr-defined]
    anndata.AnnData(matrix, obs=obs, var=pd.DataFrame({"ensembl_id": genes}, index=genes)).write_h5ad(path)
    return str(path)


@settings(max_examples=25)
@given(
    counts=matrices,
    kind=st.sampled_from(sorted(STORED)),
    order=st.permutations(range(len(GENES))),
    factor=st.sampled_from([1, 2, 8]),
    step=st.integers(1, 7),
)
def test_form_order_of_genes_scale_and_cut_change_nothing(
    counts: NDArray[np.float32], kind: str, order: list[int], factor: int, step: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = encode(write(folder / "plain.h5ad", sparse.csr_matrix(counts), GENES), str(folder / "plain"))
        stored = STORED[kind]((counts * factor)[:, order])
        path = write(folder / "other.h5ad", stored, [GENES[column] for column in order])
        assert encode(path, str(folder / "other"), step) == plain


@settings(max_examples=15)
@given(counts=matrices, cuts=st.lists(st.integers(0, 7), max_size=3), kind=st.sampled_from(sorted(STORED)))
def test_one_file_or_many_change_nothing(counts: NDArray[np.float32], cuts: list[int], kind: str) -> None:
    edges = sorted({0, len(counts), *(cut for cut in cuts if cut < len(counts))})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = encode(write(folder / "whole.h5ad", sparse.csr_matrix(counts), GENES), str(folder / "whole"))
        parts: dict[str, list[int]] = {}
        for start, stop in itertools.pairwise(edges):
            path = write(folder / f"{start}.h5ad", STORED[kind](counts[start:stop]), GENES, start)
            parts |= encode(path, str(folder / str(start)))
        assert parts == whole
        assert list(parts) == list(whole)


@pytest.mark.parametrize("kind", ["csr", "csc"])
def test_explicit_zeros_in_a_file_are_no_expression(tmp_path: Path, kind: str) -> None:
    counts = np.random.default_rng(0).poisson(0.8, (6, len(GENES))).astype(np.float32)
    rows, columns = np.indices(counts.shape)
    stored = sparse.csr_matrix((counts.ravel(), (rows.ravel(), columns.ravel())), shape=counts.shape)
    assert stored.nnz == counts.size > np.count_nonzero(counts)
    plain = encode(write(tmp_path / "plain.h5ad", sparse.csr_matrix(counts), GENES), str(tmp_path / "plain"))
    path = write(tmp_path / "zeros.h5ad", stored if kind == "csr" else stored.tocsc(), GENES)
    assert encode(path, str(tmp_path / "zeros")) == plain
