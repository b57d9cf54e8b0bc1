"""Every format and layout of counts gives the cells that were written."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from geneformer_ray.data.counts import CountFile, count_files_in, is_zarr, passed_over
from geneformer_ray.errors import InputError

COUNTS = np.random.default_rng(0).poisson(0.7, (23, 6)).astype(np.float32)
COUNTS[3] = 0
CELLS = [f"CELL{number}" for number in range(23)]
GENES = [f"ENSG{number}" for number in range(6)]
LAYOUTS = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.asarray}
COLUMNS = {
    "type": pd.Categorical([None, "b", "a"] * 7 + ["a", "b"], categories=["b", "a", "never"]),
    "batch": pd.Categorical([1, 2, 3] * 7 + [1, 2]),
    "age": pd.array([None, 1, 2] * 7 + [3, 4], dtype="Int16"),
    "dead": pd.array([None, True, False] * 7 + [True, True], dtype="boolean"),
    "sick": np.arange(23) % 3 == 0,
    "donor": [f"donor {number} é" for number in range(23)],
    "score": np.where(np.arange(23) == 5, np.nan, np.arange(23)),
    "number": np.arange(23, dtype=np.int64),
}
TYPES = {
    "type": pa.string(),
    "batch": pa.int64(),
    "age": pa.int16(),
    "dead": pa.bool_(),
    "sick": pa.bool_(),
    "donor": pa.string(),
    "score": pa.float64(),
    "number": pa.int64(),
}


def data(form: Any = sparse.csr_matrix, dtype: Any = np.float32) -> anndata.AnnData:
    obs, var = pd.DataFrame(COLUMNS, index=CELLS), pd.DataFrame(index=GENES)
    written = anndata.AnnData(form(COUNTS.astype(dtype)), obs=obs, var=var)
    written.layers["twice"] = form(COUNTS * 2)
    written.raw = written
    return written


def save(path: Path, kind: str, form: Any, dtype: Any = np.float32) -> str:
    written = data(form, dtype)
    if kind.startswith("zarr"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of zarr and anndata, about what they will do by default one day
            with anndata.settings.override(zarr_write_format=int(kind[-1])):
                written.write_zarr(path)
    else:
        written.write_h5ad(path, compression="gzip" if kind == "gzip" else None)
    return str(path)


def readable(path: str, tmp_path: Path, **options: Any) -> CountFile:
    file = CountFile(path, **options)
    for part in file.parts():
        file.write_sorted(part, str(tmp_path / "sorted"))
    return CountFile(path, sorted_in=str(tmp_path / "sorted"), **options)


def check(file: CountFile, step: int, expected: Any = COUNTS, columns: dict[str, Any] | None = None) -> None:
    columns = COLUMNS if columns is None else columns
    blocks = [file.block(start, min(start + step, len(file)), list(columns)) for start in range(0, len(file), step)]
    np.testing.assert_array_equal(np.vstack([block.counts.toarray() for block in blocks]), expected)
    np.testing.assert_array_equal(np.concatenate([block.totals for block in blocks]), expected.sum(axis=1))
    assert [name for block in blocks for name in block.cell_ids] == CELLS
    assert all(block.passed.all() for block in blocks)
    types = file.column_types(list(columns))
    for name, values in columns.items():
        assert {block.obs[name].type for block in blocks} == {types[name]}
        found = [value for block in blocks for value in block.obs[name].to_pylist()]
        assert found == [None if pd.isna(value) else value for value in list(values)], name


@pytest.mark.parametrize("uri", [False, True], ids=["path", "uri"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("kind", ["h5ad", "gzip", "zarr2", "zarr3"])
def test_every_layout_gives_the_cells_that_were_written(tmp_path: Path, kind: str, layout: str, uri: bool) -> None:
    place = tmp_path / ("cells.zarr" if kind.startswith("zarr") else "cells.h5ad")
    save(place, kind, LAYOUTS[layout])
    path = place.as_uri() if uri else str(place)
    assert is_zarr(path) == kind.startswith("zarr")
    with readable(path, tmp_path) as file:
        assert file.needs_sorting == (layout == "csc")
        assert (file.genes, file.obs_names) == (GENES, list(COLUMNS))
        assert file.column_types(list(TYPES)) == TYPES
        assert (file.gene_columns(), file.features_left_out) == ({"index": GENES}, [])
        file.check_sample()
        check(file, 10)
    for counts, factor in (("raw.X", 1), ("layers/twice", 2)):
        if not uri:  # the same elements again, by the same door
            check(readable(path, tmp_path, counts=counts), 10, COUNTS * factor, {})


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.int64, np.uint8, np.uint16])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_values_keep_their_type(tmp_path: Path, layout: str, dtype: Any) -> None:
    file = readable(save(tmp_path / "cells.h5ad", "h5ad", LAYOUTS[layout], dtype), tmp_path)
    block = file.block(2, 9)
    assert block.counts.dtype == dtype
    np.testing.assert_array_equal(block.counts.toarray(), COUNTS[2:9])


@settings(max_examples=15)
@given(edges=st.lists(st.integers(0, 23), max_size=6), layout=st.sampled_from(list(LAYOUTS)))
def test_any_cut_gives_the_same_rows(tmp_path_factory: pytest.TempPathFactory, edges: list[int], layout: str) -> None:
    folder = tmp_path_factory.mktemp("cut")
    file = readable(save(folder / "cells.h5ad", "h5ad", LAYOUTS[layout]), folder)
    cuts = sorted({0, 23, *edges})
    blocks = [file.block(start, stop, ["type"]) for start, stop in itertools.pairwise(cuts)]
    np.testing.assert_array_equal(np.vstack([block.counts.toarray() for block in blocks]), COUNTS)
    assert file.block(4, 4, ["type"]).cell_ids == []


def test_entries_stay_as_stored(tmp_path: Path) -> None:
    """Duplicates, explicit zeros and unsorted columns are the encoder's to treat."""
    path = save(tmp_path / "cells.h5ad", "h5ad", sparse.csr_matrix)
    with h5py.File(path, "a") as file:
        del file["X"]
        group = file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": (23, 6)})
        group["data"], group["indices"] = np.array([3.0, 0.0, 1.0, 2.0]), np.array([5, 0, 2, 2])
        group["indptr"] = np.array([0, 2] + [4] * 22)
    block = CountFile(path).block(0, 2)
    assert block.counts.data.tolist() == [3, 0, 1, 2]
    assert block.counts.indices.tolist() == [5, 0, 2, 2]
    assert block.totals.tolist() == [3, 3]


def test_dense_slices_meet_without_seams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "cells.h5ad", "gzip", np.asarray)
    for size in (1, 50, 100, 300):
        monkeypatch.setattr("geneformer_ray.data.formats.stored_matrix.DENSE_SLICE_BYTES", size)
        check(CountFile(path), 7)


def test_files_of_old_are_read(tmp_path: Path) -> None:
    """AnnData before 0.7 named sparse formats otherwise, and before 0.8 kept categories apart from their codes."""
    path = save(tmp_path / "cells.h5ad", "h5ad", sparse.csr_matrix)
    with h5py.File(path, "a") as file:
        del file["X"].attrs["encoding-type"], file["X"].attrs["shape"]
        file["X"].attrs.update({"h5sparse_format": "csr", "h5sparse_shape": (23, 6)})
        codes, categories = file["obs/type/codes"][:], file["obs/type/categories"][:]
        del file["obs/type"]
        file["obs/type"], file["obs/__categories/type"] = codes, categories
    file = CountFile(path)
    assert file.obs_names == list(COLUMNS)
    check(file, 5)


@pytest.mark.parametrize("missing", ["data", "indices", "indptr"])
def test_a_store_that_lacks_a_chunk_is_not_read_as_zeros(tmp_path: Path, missing: str) -> None:
    path = Path(save(tmp_path / "cells.zarr", "zarr3", sparse.csr_matrix))
    next(name for name in (path / "X" / missing / "c").rglob("*") if name.is_file()).unlink()
    with pytest.raises(InputError, match="readable zarr store"):
        CountFile(str(path)).check_sample()


# ---------------------------------------------------------------------- 10x


def tenx(path: Path, *, version: int = 3, types: list[str] | None = None, genomes: int = 1) -> str:
    matrix = sparse.csr_matrix(COUNTS.astype(np.int32))
    symbols, barcodes = [f"SYMBOL{number}" for number in range(6)], np.array(CELLS, "S")
    with h5py.File(path, "w") as file:
        for name in ["matrix"] if version == 3 else [f"GRCh{number}" for number in range(genomes)]:
            group = file.create_group(name)
            group["data"], group["indices"] = matrix.data, matrix.indices.astype(np.int64)
            group["indptr"], group["shape"], group["barcodes"] = matrix.indptr.astype(np.int64), (6, 23), barcodes
            if version == 3:
                group["features/id"], group["features/name"] = np.array(GENES, "S"), np.array(symbols, "S")
                group["features/feature_type"] = np.array(types or ["Gene Expression"] * 6, "S")
                group["features/genome"], group["features/_all_tag_keys"] = np.array(["g"] * 6, "S"), [b"genome"]
            else:
                group["genes"], group["gene_names"] = np.array(GENES, "S"), np.array(symbols, "S")
    return str(path)


@pytest.mark.parametrize("version", [2, 3])
def test_10x_files_of_both_versions(tmp_path: Path, version: int) -> None:
    path = tenx(tmp_path / "cells.h5", version=version)
    for where in (path, Path(path).as_uri()):
        file = CountFile(where)
        file.check_sample()
        check(file, 5, columns={})
        assert (file.genes, file.obs_names) == (GENES, [])
    assert CountFile(path, gene_column="gene_symbols").genes[2] == "SYMBOL2"
    with pytest.raises(InputError, match="gene_ids, gene_symbols") as raised:
        CountFile(path, gene_column="nothing")
    assert raised.value.field == "--gene-column"
    with pytest.raises(InputError, match="takes X"):
        CountFile(path, counts="raw.X")


def test_only_gene_expression_is_counted(tmp_path: Path) -> None:
    types = [
        "Antibody Capture",
        "Gene Expression",
        "Peaks",
        "Gene Expression",
        "Gene Expression",
        "CRISPR Guide Capture",
    ]
    file = CountFile(tenx(tmp_path / "cells.h5", types=types))
    assert file.genes == [GENES[1], GENES[3], GENES[4]]
    assert file.features_left_out == [(GENES[number], types[number]) for number in (0, 2, 5)]
    symbols = CountFile(tenx(tmp_path / "again.h5", types=types), gene_column="gene_symbols")
    assert symbols.features_left_out[0] == ("SYMBOL0", "Antibody Capture")
    columns = symbols.gene_columns()
    assert columns["gene_ids"] == [GENES[1], GENES[3], GENES[4]]
    assert columns["gene_symbols"] == ["SYMBOL1", "SYMBOL3", "SYMBOL4"]
    assert "feature_type" not in columns
    assert CountFile(tenx(tmp_path / "genes.h5")).features_left_out == []
    check(file, 5, COUNTS[:, [1, 3, 4]], {})
    with pytest.raises(InputError, match="types Peaks"):
        CountFile(tenx(tmp_path / "peaks.h5", types=["Peaks"] * 6))


def test_two_genomes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="GRCh0, GRCh1"):
        CountFile(tenx(tmp_path / "cells.h5", version=2, genomes=2))


# ---------------------------------------------------------------------- loom


def loom(path: Path, *, names: str = "Gene", ids: str | None = "CellID", **columns: Any) -> str:
    with h5py.File(path, "w") as file:
        file.create_dataset("matrix", data=COUNTS.T, chunks=(4, 4), compression="gzip")
        file.create_dataset("layers/spliced", data=COUNTS.T * 3)
        file[f"row_attrs/{names}"] = np.array(GENES, object)
        file["row_attrs/Square"] = np.zeros((6, 2))
        file.create_group("col_attrs")
        for name, values in (({ids: np.array(CELLS, object)} if ids else {}) | columns).items():
            file[f"col_attrs/{name}"] = values
    return str(path)


@pytest.mark.parametrize("names", ["ensembl_id", "gene_ids", "Accession", "Gene"])
def test_loom_files(tmp_path: Path, names: str) -> None:
    columns = {"type": np.array(["a", "b"] * 11 + ["c"], object), "age": np.arange(23)}
    path = loom(tmp_path / "cells.loom", names=names, tsne=np.zeros((23, 2)), **columns)
    before = Path(path).read_bytes()
    for where in (path, Path(path).as_uri()):
        file = CountFile(where)
        file.check_sample()
        check(file, 5, columns=columns)
        assert file.genes == GENES
        assert sorted(file.obs_names) == ["CellID", "age", "type"]
    np.testing.assert_array_equal(CountFile(path, counts="layers/spliced").block(0, 23).counts.toarray(), COUNTS * 3)
    assert Path(path).read_bytes() == before


def test_loom_cells_without_ids_are_numbered(tmp_path: Path) -> None:
    assert CountFile(loom(tmp_path / "cells.loom", ids=None)).cell_ids(3, 5) == ["3", "4"]
    passed = np.arange(23) % 2
    marked = CountFile(loom(tmp_path / "marked.loom", filter_pass=passed, n_counts=np.full(23, 99.0)))
    assert marked.block(0, 23).passed.tolist() == (passed == 1).tolist()
    assert set(marked.block(0, 23).totals) == {99.0}


def test_loom_names_and_layers_that_are_not_there_are_named(tmp_path: Path) -> None:
    path = loom(tmp_path / "cells.loom", names="Other")
    assert CountFile(path, gene_column="Other").genes == GENES
    with pytest.raises(InputError, match=r"--gene-column: .* a row attribute of .*: Other"):
        CountFile(path)
    with CountFile(path, gene_column="Other") as file:
        assert (file.gene_columns(), file.features_left_out) == ({"Other": GENES}, [])
    with pytest.raises(InputError, match="X, layers/spliced"):
        CountFile(path, counts="raw.X", gene_column="Other")
    with h5py.File(path, "a") as raw:
        raw["layers/marks"] = COUNTS.T > 0
    with pytest.raises(InputError, match=r"--counts: got layers/marks of .* truth values .*also holds X, layers/spl"):
        CountFile(path, counts="layers/marks", gene_column="Other")
    with h5py.File(path, "a") as file:
        file["col_attrs/short"] = np.arange(4)
    with pytest.raises(InputError, match="4 values of short"):
        CountFile(path, gene_column="Other")


@pytest.mark.parametrize("name", ["cells.h5", "cells.loom", "cells.zarr", "cells.h5ad"])
def test_what_is_not_what_its_name_says_ends_in_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("zarr"):
        path.mkdir()
    else:
        with h5py.File(path, "w") as file:
            file["something"] = [1]
    with pytest.raises(InputError) as raised:
        CountFile(str(path))
    assert len(str(raised.value).splitlines()) == 1


# ---------------------------------------------------------------------- directories of files


def test_a_directory_lists_what_can_be_read(tmp_path: Path) -> None:
    save(tmp_path / "b.zarr", "zarr2", np.asarray)
    tenx(tmp_path / "c.h5")
    loom(tmp_path / "a.loom")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "matrix.mtx.gz").touch()
    (tmp_path / "notes").mkdir()
    for name in ("d.h5ad", "readme.txt", "._d.h5ad", "_SUCCESS", "counts.h5ad.gz"):
        (tmp_path / name).touch()
    found = count_files_in(str(tmp_path))
    assert [Path(name).name for name in found] == ["a.loom", "b.zarr", "c.h5", "d.h5ad", "run"]
    assert count_files_in(tmp_path.as_uri()) == [f"{tmp_path.as_uri()}/{Path(name).name}" for name in found]
    assert passed_over(str(tmp_path)) == passed_over(tmp_path.as_uri()) == ["counts.h5ad.gz", "notes", "readme.txt"]
    assert passed_over(str(tmp_path / "nowhere")) == []
