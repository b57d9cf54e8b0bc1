"""Sorting counts by cell: pieces of bounded size, put together again block by block."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.io
from pyarrow import ipc
from scipy import sparse

from geneformer_ray.data import counts as counts_module
from geneformer_ray.data import sorted_counts
from geneformer_ray.data.counts import CountFile, is_matrix_directory
from geneformer_ray.errors import InputError

COUNTS = np.random.default_rng(3).poisson(0.4, (53, 11)).astype(np.float32)
COUNTS[10:20] = 0  # a block without any count
CELLS = [f"CELL{number}" for number in range(53)]
GENES = [f"ENSG{number}" for number in range(11)]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorted_counts, "ENTRIES_PER_FILE", 16)
    monkeypatch.setattr(counts_module, "CELLS_PER_BLOCK", 10)


def csc(path: Path, matrix: Any = COUNTS) -> str:
    frame = pd.DataFrame(index=CELLS)
    anndata.AnnData(sparse.csc_matrix(matrix), obs=frame, var=pd.DataFrame(index=GENES)).write_h5ad(path)
    return str(path)


def directory(path: Path, *, field: str = "integer", packed: bool = True, types: list[str] | None = None) -> str:
    path.mkdir()
    scipy.io.mmwrite(path / "matrix.mtx", sparse.coo_matrix(COUNTS.T), field=field, comment="made\nhere")
    kinds = types or ["Gene Expression"] * len(GENES)
    rows = [f"{gene}\tSYMBOL{number}\t{kind}" for number, (gene, kind) in enumerate(zip(GENES, kinds, strict=True))]
    (path / "features.tsv").write_text("\n".join(rows) + "\n")
    (path / "barcodes.tsv").write_text("\n".join(CELLS) + "\n")
    for file in list(path.iterdir()) if packed else []:
        Path(f"{file}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    return str(path)


def sort(path: str, target: Path | str, **options: Any) -> CountFile:
    with CountFile(path, **options) as file:
        assert file.needs_sorting
        for part in json.loads(json.dumps(file.parts())):
            file.write_sorted(part, str(target))
    return CountFile(path, sorted_in=str(target), **options)


def together(file: CountFile, step: int) -> np.ndarray:
    blocks = [file.block(start, min(start + step, len(file))) for start in range(0, len(file), step)]
    assert [name for block in blocks for name in block.cell_ids] == CELLS
    np.testing.assert_array_equal(np.concatenate([block.totals for block in blocks]), COUNTS.sum(axis=1))
    return np.vstack([block.counts.toarray() for block in blocks])


@pytest.mark.parametrize("step", [1, 7, 10, 20, 53])
@pytest.mark.parametrize("make", [csc, directory], ids=["csc", "mtx"])
def test_blocks_of_any_size_are_the_matrix(tmp_path: Path, make: Any, step: int) -> None:
    file = sort(make(tmp_path / "cells.h5ad" if make is csc else tmp_path / "run"), tmp_path / "sorted")
    np.testing.assert_array_equal(together(file, step), COUNTS)
    assert file.genes == GENES
    assert file.block(10, 20).counts.nnz == 0


def test_values_keep_their_type(tmp_path: Path) -> None:
    for kind in (np.int32, np.float32, np.float64, np.uint16):
        path = csc(tmp_path / f"{np.dtype(kind)}.h5ad", COUNTS.astype(kind))
        assert sort(path, tmp_path / f"{np.dtype(kind)}").block(0, 5).counts.dtype == kind


@pytest.mark.parametrize("make", [csc, directory], ids=["csc", "mtx"])
def test_no_piece_is_larger_than_allowed_and_batch_k_is_block_k(tmp_path: Path, make: Any) -> None:
    path = make(tmp_path / "cells.h5ad" if make is csc else tmp_path / "run")
    sort(path, tmp_path / "sorted")
    files = sorted((tmp_path / "sorted").iterdir())
    assert len(files) == -(-np.count_nonzero(COUNTS) // 16)
    for name in files:
        with ipc.open_file(name) as file:
            assert file.num_record_batches == 6
            sizes = [file.get_batch(number).num_rows for number in range(6)]
            assert sum(sizes) <= 16
            assert sizes[1] == 0
    if make is csc:
        assert all(part["last"] - part["first"] <= 16 for part in CountFile(path).parts())


def test_a_part_done_again_changes_nothing(tmp_path: Path) -> None:
    path = csc(tmp_path / "cells.h5ad")
    sort(path, tmp_path / "sorted")
    before = {name.name: name.read_bytes() for name in (tmp_path / "sorted").iterdir()}
    file = sort(path, (tmp_path / "sorted").as_uri())
    assert {name.name: name.read_bytes() for name in (tmp_path / "sorted").iterdir()} == before
    np.testing.assert_array_equal(together(file, 10), COUNTS)


def test_a_missing_part_is_never_read_as_no_counts(tmp_path: Path) -> None:
    file = sort(csc(tmp_path / "cells.h5ad"), tmp_path / "sorted")
    (tmp_path / "sorted" / "part-000002.arrow").unlink()
    with pytest.raises(RuntimeError, match=r"part-000002.arrow is missing: write_sorted"):
        file.block(0, 10)


def test_an_unsorted_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="write_sorted its parts"):
        CountFile(csc(tmp_path / "cells.h5ad")).block(0, 10)


def test_duplicates_and_zeros_stay_as_stored(tmp_path: Path) -> None:
    matrix = sparse.csc_matrix(
        (np.array([1, 2, 0, 4], np.float32), np.array([3, 3, 1, 0], np.int32), np.array([0, 2, 3, 4] + [4] * 8)),
        shape=(53, 11),
    )
    block = sort(csc(tmp_path / "cells.h5ad", matrix), tmp_path / "sorted").block(0, 10)
    assert block.counts.data.tolist() == [4, 0, 1, 2]
    assert block.totals[3] == 3


def test_a_matrix_without_entries_has_blocks_too(tmp_path: Path) -> None:
    file = sort(csc(tmp_path / "cells.h5ad", np.zeros((53, 11), np.float32)), tmp_path / "sorted")
    assert file.parts() == []
    assert file.block(0, 53).totals.sum() == 0


# ---------------------------------------------------------------------- matrix directories


@pytest.mark.parametrize("field", ["integer", "real"])
@pytest.mark.parametrize("packed", [True, False])
def test_directories_packed_or_not(tmp_path: Path, field: str, packed: bool) -> None:
    path = directory(tmp_path / "run", field=field, packed=packed)
    assert is_matrix_directory(path)
    CountFile(path).check_sample()
    file = sort((tmp_path / "run").as_uri(), tmp_path / "sorted", gene_column="gene_symbols")
    np.testing.assert_array_equal(together(file, 10), COUNTS)
    assert file.genes == [f"SYMBOL{number}" for number in range(11)]
    assert file.cell_ids(20, 30) + file.cell_ids(5, 8) + file.cell_ids(8, 9) == CELLS[20:30] + CELLS[5:9]


def test_tags_are_no_genes(tmp_path: Path) -> None:
    types = ["Gene Expression", "Antibody Capture"] * 5 + ["Gene Expression"]
    file = sort(directory(tmp_path / "run", types=types), tmp_path / "sorted")
    assert file.genes == GENES[::2]
    assert file.features_left_out == [(gene, "Antibody Capture") for gene in GENES[1::2]]
    assert file.gene_columns() == {"gene_ids": GENES[::2], "gene_symbols": [f"SYMBOL{i}" for i in range(0, 11, 2)]}
    block = file.block(0, 53)
    np.testing.assert_array_equal(block.counts.toarray(), COUNTS[:, ::2])
    np.testing.assert_array_equal(block.totals, COUNTS[:, ::2].sum(axis=1))


def test_a_value_that_is_no_count_is_named_after_sorting_too(tmp_path: Path) -> None:
    wrong = COUNTS.copy()
    wrong[31, 4] = -2
    file = sort(csc(tmp_path / "cells.h5ad", wrong), tmp_path / "sorted")
    with pytest.raises(InputError, match=r"negative values \(-2 in cell CELL31, gene ENSG4\)"):
        file.block(30, 40)
    with pytest.raises(InputError, match=r"negative values \(-2\); takes raw counts, whole numbers from 0 up \(this"):
        file.check_sample()


def damage(path: Path, name: str, change: Any) -> None:
    file = path / f"{name}.gz"
    file.write_bytes(gzip.compress(change(gzip.decompress(file.read_bytes()).decode()).encode()))


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("matrix.mtx", lambda text: text.replace("general", "symmetric"), "integer symmetric"),
        ("matrix.mtx", lambda text: text.replace("integer", "pattern"), "coordinate pattern"),
        ("matrix.mtx", lambda text: "nothing\n" + text, "MatrixMarket"),
        ("matrix.mtx", lambda text: text[: len(text) // 2], "readable 10x matrix directory"),
        ("matrix.mtx", lambda text: text.rstrip().rsplit("\n", 1)[0], "entries and says"),
        ("matrix.mtx", lambda text: text.rstrip().rsplit("\n", 1)[0] + "\n12 1 1\n", "outside"),
        ("matrix.mtx", lambda text: text.rstrip().rsplit("\n", 1)[0] + "\n0 1 1\n", "outside"),
        ("matrix.mtx", lambda text: text.rstrip().rsplit("\n", 1)[0] + "\n1 54 1\n", "outside"),
        ("matrix.mtx", lambda text: text.rstrip().rsplit("\n", 1)[0] + "\n1 1 one\n", "readable"),
        ("matrix.mtx", lambda text: text.rstrip().rsplit("\n", 1)[0] + "\n1 1 -1\n", "negative"),
        ("matrix.mtx", lambda text: text.split("\n", 1)[0] + "\n", "three sizes"),
        ("barcodes.tsv", lambda text: text + "another\n", "barcodes"),
        ("barcodes.tsv", lambda text: text.rstrip().rsplit("\n", 1)[0], "barcodes"),
        ("features.tsv", lambda text: text + "another\n", "12 features"),
        ("features.tsv", lambda text: text.replace("Gene Expression", "Peaks"), "Peaks"),
    ],
)
def test_damaged_directories_end_in_one_line(tmp_path: Path, name: str, change: Any, says: str) -> None:
    path = tmp_path / "run"
    directory(path)
    damage(path, name, change)
    with pytest.raises(InputError, match=says) as raised:
        CountFile(str(path)).check_sample()
        sort(str(path), tmp_path / "sorted").block(0, 53)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["matrix.mtx", "barcodes.tsv", "features.tsv"])
def test_a_gzip_cut_short_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run"
    directory(path)
    file = path / f"{name}.gz"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InputError):
        CountFile(str(path)).check_sample()
        sort(str(path), tmp_path / "sorted").block(0, 53)


@pytest.mark.parametrize("name", ["barcodes.tsv", "features.tsv"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run"
    directory(path)
    (path / f"{name}.gz").unlink()
    with pytest.raises(InputError, match=name):
        CountFile(str(path))
