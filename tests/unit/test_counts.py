"""Count matrices from real h5ad files: what is read, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from scipy import sparse

from geneformer_ray.data import cell_ids
from geneformer_ray.data.cell_ids import repeated_ids
from geneformer_ray.data.count_values import impossible_totals
from geneformer_ray.data.counts import CountFile
from geneformer_ray.errors import InputError

COUNTS = np.random.default_rng(0).poisson(0.7, (7, 5)).astype(np.float32)
COUNTS[3] = 0  # a cell without any count


def write(
    path: Path,
    matrix: Any,
    *,
    obs: dict[str, Any] | None = None,
    var: dict[str, Any] | None = None,
    layers: dict[str, Any] | None = None,
    raw: Any = None,
    cells: list[str] | None = None,
) -> str:
    """Write an h5ad file of cells CELL0, CELL1, ... over genes G0, G1, ..."""
    cells = [f"CELL{number}" for number in range(matrix.shape[0])] if cells is None else cells
    genes = [f"G{number}" for number in range(matrix.shape[1])]
    data = anndata.AnnData(matrix, obs=pd.DataFrame(obs or {}, index=cells), var=pd.DataFrame(var or {}, index=genes))
    if raw is not None:
        names = pd.DataFrame(index=[f"RAW{number}" for number in range(raw.shape[1])])
        data.raw = anndata.AnnData(raw, obs=data.obs, var=names)
    for name, layer in (layers or {}).items():
        data.layers[name] = layer
    data.write_h5ad(path)
    return str(path)


def whole(file: CountFile) -> NDArray[np.float64]:
    return file.block(0, len(file)).counts.toarray()


def refusal(path: str, **options: Any) -> InputError:
    """Open and read the whole file, and give the one-line error that this ends in."""
    with pytest.raises(InputError) as raised:
        file = CountFile(path, **options)
        file.block(0, len(file))
    assert len(str(raised.value).splitlines()) == 1
    return raised.value


@pytest.mark.parametrize("form", [sparse.csr_matrix, np.asarray], ids=["csr", "dense"])
@pytest.mark.parametrize("step", [1, 3, 7])
def test_blocks_put_together_are_the_matrix(tmp_path: Path, form: Any, step: int) -> None:
    file = CountFile(write(tmp_path / "cells.h5ad", form(COUNTS), obs={"type": list("aabbabb")}))
    blocks = [file.block(start, min(start + step, len(file)), ["type"]) for start in range(0, len(file), step)]
    np.testing.assert_array_equal(np.vstack([block.counts.toarray() for block in blocks]), COUNTS)
    np.testing.assert_array_equal(np.concatenate([block.totals for block in blocks]), COUNTS.sum(axis=1))
    assert [name for block in blocks for name in block.cell_ids] == [f"CELL{number}" for number in range(7)]
    assert [kind for block in blocks for kind in block.obs["type"].to_pylist()] == list("aabbabb")
    assert file.genes == [f"G{number}" for number in range(5)]


@pytest.mark.parametrize("form", [sparse.csr_matrix, np.asarray], ids=["csr", "dense"])
def test_raw_and_layers_are_read_where_asked(tmp_path: Path, form: Any) -> None:
    more = np.hstack([COUNTS, COUNTS[:, :2]])
    path = write(tmp_path / "cells.h5ad", form(COUNTS * 0.5), layers={"counts": form(COUNTS)}, raw=form(more))
    layer = CountFile(path, counts="layers/counts")
    np.testing.assert_array_equal(whole(layer), COUNTS)
    assert layer.genes == [f"G{number}" for number in range(5)]
    raw = CountFile(path, counts="raw.X")
    np.testing.assert_array_equal(whole(raw), more)
    assert raw.genes == [f"RAW{number}" for number in range(7)]


def test_totals_are_over_all_genes_before_any_were_left_out(tmp_path: Path) -> None:
    """``n_counts`` is each cell's total in the whole experiment, which the file may hold a part of."""
    n_counts = np.arange(100, 107)
    file = CountFile(write(tmp_path / "cells.h5ad", COUNTS, obs={"n_counts": n_counts}))
    np.testing.assert_array_equal(file.block(2, 5).totals, [102.0, 103.0, 104.0])


@pytest.mark.parametrize("bad", [0.0, -3.0, np.nan, np.inf])
def test_a_total_that_cannot_be_is_refused(tmp_path: Path, bad: float) -> None:
    n_counts = np.full(7, 10.0)
    n_counts[0] = bad
    assert "n_counts" in refusal(write(tmp_path / "cells.h5ad", COUNTS, obs={"n_counts": n_counts})).got


def test_a_total_below_the_stored_counts_is_refused(tmp_path: Path) -> None:
    sums = np.full(7, 30.0)
    counts = np.full((7, 3), 10, np.float32)
    for name, wrong in (("log", np.log10(sums)), ("share", sums / sums.max()), ("other", sums - 1)):
        error = refusal(write(tmp_path / f"{name}.h5ad", counts, obs={"n_counts": wrong}))
        assert "add up to 30 (7 such of the 7 cells from 0 on)" in error.got
    n_counts = sums.copy()
    n_counts[[2, 5]] = [29, 12]
    path = write(tmp_path / "two.h5ad", counts, obs={"n_counts": n_counts})
    error = refusal(path)
    assert error.field == "--input"
    assert error.got == (
        f"{path} with the n_counts 29 for the cell CELL2, whose stored counts add up to 30 "
        "(2 such of the 7 cells from 0 on)"
    )
    assert "drop or rename it" in error.takes
    with CountFile(path) as file:
        assert file.block(3, 5).totals.tolist() == [30, 30]
        with pytest.raises(InputError, match=r"CELL5, .*\(1 such of the 4 cells from 3 on\)"):
            file.block(3, 7)


def test_totals_may_be_rounded() -> None:
    sums = np.array([1e6, 1e6, 0.0, 0.0])
    totals = np.array([1e6 - 0.5, 1e6 - 2, 0.0, -1.0])
    assert impossible_totals(totals, sums).tolist() == [False, True, False, True]
    assert impossible_totals(totals, sums, fractions_allowed=True).tolist() == [False, False, False, True]


def test_totals_of_cells_that_did_not_pass_are_not_asked_for(tmp_path: Path) -> None:
    sums = COUNTS.sum(axis=1)
    n_counts = sums + 5
    n_counts[[0, 1, 2]] = [np.nan, 0, np.inf]
    obs = {"n_counts": n_counts, "filter_pass": [0, 0, 0, 1, 1, 1, 1]}
    totals = CountFile(write(tmp_path / "cells.h5ad", COUNTS, obs=obs)).block(0, 7).totals
    np.testing.assert_array_equal(totals, [*sums[:3], *n_counts[3:]])
    passing = refusal(write(tmp_path / "passing.h5ad", COUNTS, obs=obs | {"filter_pass": [0, 1, 1, 1, 1, 1, 1]}))
    assert "n_counts 0 for the cell CELL1" in passing.got
    assert "2 such of the 7" in passing.got


def test_a_cell_without_counts_may_have_a_total_of_zero(tmp_path: Path) -> None:
    file = CountFile(write(tmp_path / "cells.h5ad", COUNTS, obs={"n_counts": COUNTS.sum(axis=1)}))
    assert file.block(0, 7).totals[3] == 0


def test_gene_names_come_from_the_first_column_there_is(tmp_path: Path) -> None:
    ensembl, ids, names = ([f"{kind}{number}" for number in range(5)] for kind in "EIN")
    both = write(tmp_path / "both.h5ad", COUNTS, var={"gene_ids": ids, "ensembl_id": ensembl, "feature_name": names})
    assert CountFile(both).genes == ensembl
    assert CountFile(both, gene_column="feature_name").genes == names
    assert CountFile(write(tmp_path / "ids.h5ad", COUNTS, var={"gene_ids": ids})).genes == ids
    assert CountFile(write(tmp_path / "none.h5ad", COUNTS)).genes == [f"G{number}" for number in range(5)]
    error = refusal(both, gene_column="symbol")
    assert error.field == "--gene-column"
    assert error.takes.endswith(": gene_ids, ensembl_id, feature_name, index")


def test_the_index_of_genes_can_be_asked_for(tmp_path: Path) -> None:
    index, ids = [f"G{number}" for number in range(5)], [f"I{number}" for number in range(5)]
    path = write(tmp_path / "cells.h5ad", COUNTS, var={"gene_ids": ids})
    assert CountFile(path, gene_column="index").genes == index
    named = write(tmp_path / "named.h5ad", COUNTS, var={"gene_ids": ids, "index": ids})
    assert CountFile(named, gene_column="index").genes == ids


def test_gene_columns_show_what_could_name_the_genes(tmp_path: Path) -> None:
    ids = [f"I{number}" for number in range(300)]
    var = {"gene_ids": ids, "length": range(300), "kind": pd.Categorical(["a", None, "b"] * 100)}
    path = write(tmp_path / "cells.h5ad", np.ones((2, 300), np.float32), var=var, raw=np.ones((2, 4), np.float32))
    with CountFile(path) as file:
        columns = file.gene_columns()
        assert list(columns) == ["index", "gene_ids", "kind"]
        assert columns["index"] == [f"G{number}" for number in range(200)]
        assert columns["gene_ids"] == ids[:200]
        assert columns["kind"][:3] == ["a", "", "b"]
    assert CountFile(path, counts="raw.X").gene_columns() == {"index": ["RAW0", "RAW1", "RAW2", "RAW3"]}


# ---------------------------------------------------------------------- what is refused


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    error = refusal(str(tmp_path / "nowhere.h5ad"))
    assert error.field == "--input"
    assert "nowhere.h5ad" in error.got


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_file_cut_short_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "cells.h5ad"
    content = Path(write(path, sparse.csr_matrix(COUNTS))).read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "readable h5ad" in refusal(str(path)).takes


@pytest.mark.parametrize("part", ["obs", "var", "X"])
def test_a_file_without_a_part_is_refused(tmp_path: Path, part: str) -> None:
    path = write(tmp_path / "cells.h5ad", COUNTS)
    with h5py.File(path, "a") as file:
        del file[part]
    refusal(path)


def test_columns_and_genes_must_be_equally_many(tmp_path: Path) -> None:
    path = write(tmp_path / "cells.h5ad", COUNTS)
    with h5py.File(path, "a") as file:
        del file["X"]
        file["X"] = COUNTS[:, :4]
    assert "4 columns and 5 genes" in refusal(path).got


@pytest.mark.parametrize(
    ("value", "says"),
    [(np.nan, "not finite"), (np.inf, "not finite"), (-1.0, "negative"), (0.5, "fractions")],
)
@pytest.mark.parametrize("form", [sparse.csr_matrix, np.asarray], ids=["csr", "dense"])
def test_what_is_no_count_is_refused(tmp_path: Path, form: Any, value: float, says: str) -> None:
    counts = COUNTS.copy()
    counts[5, 2] = value
    path = write(tmp_path / "cells.h5ad", form(counts))
    error = refusal(path)
    assert error.field == "--counts"
    assert error.got.endswith(f"({value:g} in cell CELL5, gene G2)")
    assert says in error.got
    # The flag lets fractions pass and nothing else; and this file has no layers to point to.
    flag = ", or --allow-non-integer for corrected counts" if says == "fractions" else ""
    assert error.takes == f"raw counts, whole numbers from 0 up{flag} (this file has no other matrix)"
    CountFile(path).block(0, 5)  # the cells before it are counts


def test_corrected_counts_are_read_when_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "cells.h5ad", COUNTS + np.float32(0.25))
    assert "--allow-non-integer" in refusal(path).takes
    np.testing.assert_array_equal(whole(CountFile(path, allow_non_integer=True)), COUNTS + np.float32(0.25))
    negative = write(tmp_path / "negative.h5ad", COUNTS - np.float32(0.25))
    assert "negative" in refusal(negative, allow_non_integer=True).got


@pytest.mark.parametrize("shape", [(0, 5), (7, 0)])
def test_a_file_without_cells_or_genes_is_refused(tmp_path: Path, shape: tuple[int, int]) -> None:
    error = refusal(write(tmp_path / "cells.h5ad", sparse.csr_matrix(shape, dtype=np.float32)))
    assert f"{shape[0]} cells and {shape[1]} genes" in error.got


def test_an_obs_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    file = CountFile(write(tmp_path / "cells.h5ad", COUNTS, obs={"donor": range(7), "type": range(7)}))
    file.check_columns(["type", "donor"])
    with pytest.raises(InputError, match=r"--obs-columns: got tissue; takes .*: donor, type") as raised:
        file.check_columns(["type", "tissue"])
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("counts", ["layers/nothing", "raw.X", "obs", "nothing"])
def test_counts_that_are_not_there_are_named(tmp_path: Path, counts: str) -> None:
    error = refusal(write(tmp_path / "cells.h5ad", COUNTS, layers={"spliced": COUNTS}), counts=counts)
    assert error.field == "--counts"
    assert error.got == counts
    assert "layers/" in error.takes


@pytest.mark.parametrize("name", ["cells.csv", "matrix.mtx", "folder"])
def test_what_holds_no_counts_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.mkdir() if name == "folder" else path.touch()
    assert ".h5ad, .h5, .loom, .zarr" in refusal(str(path)).takes


def test_a_matrix_of_something_else_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "cells.h5ad", COUNTS)
    with h5py.File(path, "a") as file:
        file["layers/words"] = [[b"a"]]
    error = refusal(path, counts="layers/words")
    assert error.field == "--counts"
    assert "which holds values of the type object and no counts" in error.got
    assert error.takes == "raw counts, integers or floats (this file also holds X)"


@pytest.mark.parametrize("form", [sparse.csr_matrix, np.asarray], ids=["csr", "dense"])
def test_a_matrix_of_truth_values_is_no_counts(tmp_path: Path, form: Any) -> None:
    path = write(tmp_path / "cells.h5ad", form(COUNTS > 0), layers={"counts": form(COUNTS)})
    error = refusal(path)
    assert error.field == "--counts"
    assert error.got == f"X of {path}, which holds truth values and no counts"
    assert error.takes == "raw counts, integers or floats (this file also holds layers/counts)"
    assert "has no other matrix" in refusal(write(tmp_path / "alone.h5ad", form(COUNTS > 0))).takes
    # Marks written as numbers may be counts of a shallow sample.
    CountFile(write(tmp_path / "marks.h5ad", form((COUNTS > 0).astype(np.float32)))).check_sample()


def test_rows_and_cells_must_be_equally_many(tmp_path: Path) -> None:
    path = write(tmp_path / "cells.h5ad", COUNTS)
    with h5py.File(path, "a") as file:
        del file["X"]
        file["X"] = COUNTS[:6]
    assert "6 rows and 7 cells" in refusal(path).got


# ---------------------------------------------------------------------- where counts may be instead


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix, np.asarray], ids=["csr", "csc", "dense"])
def test_a_normalised_matrix_is_refused_with_the_place_that_looks_like_counts(tmp_path: Path, form: Any) -> None:
    normal = np.log1p(COUNTS)
    path = write(tmp_path / "raw.h5ad", form(normal), raw=form(COUNTS), layers={"scaled": form(normal - 1)})
    with pytest.raises(InputError) as raised:
        CountFile(path).check_sample()
    assert raised.value.takes == "raw counts: raw.X looks like counts: --counts raw.X"
    path = write(tmp_path / "layers.h5ad", form(normal), layers={"a": form(COUNTS), "b": form(COUNTS * 3)})
    with pytest.raises(InputError, match=r"layers/a and layers/b look like counts: --counts layers/a"):
        CountFile(path).check_sample()
    path = write(tmp_path / "none.h5ad", form(normal), layers={"marks": form((COUNTS > 0).astype(np.float32))})
    with pytest.raises(InputError, match=r"--allow-non-integer .*layers/marks of this file: no counts either"):
        CountFile(path).check_sample()
    CountFile(path, allow_non_integer=True).check_sample()


def test_a_sample_is_spread_over_the_file(tmp_path: Path) -> None:
    counts = np.ones((5000, 2), np.float32)
    CountFile(write(tmp_path / "good.h5ad", sparse.csr_matrix(counts))).check_sample()
    counts[-1, 0] = 0.5
    with pytest.raises(InputError, match="fractions"):
        CountFile(write(tmp_path / "bad.h5ad", sparse.csr_matrix(counts))).check_sample()


# ---------------------------------------------------------------------- cells that count


def test_cells_that_did_not_pass_are_marked(tmp_path: Path) -> None:
    passed = [1, 0, 1, 1, 0, 2, 1]
    block = CountFile(write(tmp_path / "cells.h5ad", COUNTS, obs={"filter_pass": passed})).block(1, 7)
    assert block.passed.tolist() == [False, True, True, False, False, True]
    assert CountFile(write(tmp_path / "all.h5ad", COUNTS)).block(1, 7).passed.all()
    truths = write(tmp_path / "truths.h5ad", COUNTS, obs={"filter_pass": np.array(passed) == 1})
    assert CountFile(truths).block(0, 3).passed.tolist() == [True, False, True]
    as_text = ["True", "0", "true", "1", "FALSE", "False", "TRUE"]
    for name, column in (("text", as_text), ("categories", pd.Categorical(as_text))):
        file = CountFile(write(tmp_path / f"{name}.h5ad", COUNTS, obs={"filter_pass": column}))
        assert file.block(0, 7).passed.tolist() == [True, False, True, True, False, False, True]
    missing = write(tmp_path / "missing.h5ad", COUNTS, obs={"filter_pass": pd.Categorical(["1", None, *"01101"])})
    assert CountFile(missing).block(0, 3).passed.tolist() == [True, False, False]


def test_marks_that_mean_nothing_are_named(tmp_path: Path) -> None:
    words = write(tmp_path / "words.h5ad", COUNTS, obs={"filter_pass": ["yes", "no", "true", "yes", "1", "0", "?"]})
    error = refusal(words)
    assert error.got == f"{words} with an obs column filter_pass that holds 'yes', 'no', '?'"
    assert "1/0 or true/false" in error.takes
    assert refusal(write(tmp_path / "many.h5ad", COUNTS, obs={"filter_pass": list("abcdefg")})).got.endswith("'e', ...")
    empty = write(tmp_path / "empty.h5ad", COUNTS, obs={"filter_pass": pd.Categorical([None] * 7)})
    assert "filter_pass without values" in refusal(empty).got


# ---------------------------------------------------------------------- columns without values


@pytest.mark.parametrize("legacy", [False, True])
def test_categories_that_there_are_none_of_go_with_every_type(tmp_path: Path, legacy: bool) -> None:
    path = write(tmp_path / "cells.h5ad", COUNTS, obs={"type": pd.Categorical([None] * 7)})
    if legacy:
        with h5py.File(path, "a") as file:
            codes, categories = file["obs/type/codes"][:], file["obs/type/categories"][:]
            del file["obs/type"]
            file["obs/type"], file["obs/__categories/type"] = codes, categories
    with CountFile(path) as file:
        assert file.column_types(["type"]) == {"type": pa.null()}
        column = file.block(2, 5, ["type"]).obs["type"]
    for kind in (pa.null(), pa.string(), pa.int64(), pa.bool_(), pa.float64()):
        assert column.cast(kind).to_pylist() == [None] * 3
    schemas = [pa.schema([("type", kind)]) for kind in (pa.string(), pa.null())]
    assert pa.unify_schemas(schemas, promote_options="permissive").field("type").type == pa.string()
    with h5py.File(path, "a") as raw:
        raw["obs/type" if legacy else "obs/type/codes"][4] = 0
    with pytest.raises(InputError, match="codes and no categories"):
        CountFile(path).block(0, 7, ["type"])


# ---------------------------------------------------------------------- damage


@pytest.mark.parametrize(
    ("name", "at", "value"),
    [
        ("indices", 2, 5),
        ("indices", 2, -1),
        ("indptr", 3, 0),
        ("indptr", 3, 10_000),
        ("indptr", 3, -4),
        ("indptr", 7, 10_000),
        ("indptr", 0, 1),
    ],
)
@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix], ids=["csr", "csc"])
def test_pointers_that_lead_astray_are_refused(tmp_path: Path, form: Any, name: str, at: int, value: int) -> None:
    path = write(tmp_path / "cells.h5ad", form(np.ones((7, 7), np.float32)))
    if form is sparse.csc_matrix and value == 5:
        value = 7
    with h5py.File(path, "a") as file:
        file[f"X/{name}"][at] = value if (name, value) != ("indices", 5) else 7
    with pytest.raises(InputError, match="a readable h5ad file"):
        file = CountFile(path)
        for part in file.parts():
            file.write_sorted(part, str(tmp_path / "sorted"))
        CountFile(path, sorted_in=str(tmp_path / "sorted")).block(0, 7)


def test_pointers_beyond_the_entries_are_refused_in_every_block(tmp_path: Path) -> None:
    path = write(tmp_path / "cells.h5ad", sparse.csr_matrix(COUNTS))
    with h5py.File(path, "a") as file:
        file["X/indptr"][3] = 10_000
    CountFile(path).block(5, 7)
    with pytest.raises(InputError, match="indptr leaves the"):
        CountFile(path).block(0, 3)


def test_a_code_without_a_category_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "cells.h5ad", COUNTS, obs={"type": pd.Categorical(list("aabbabb"))})
    with h5py.File(path, "a") as file:
        file["obs/type/codes"][4] = 2
    CountFile(path).block(0, 4, ["type"])
    with pytest.raises(InputError, match="readable h5ad"):
        CountFile(path).block(4, 7, ["type"])


@pytest.mark.parametrize("column", ["frame", "square", "complex"])
def test_columns_that_no_table_can_carry_are_named(tmp_path: Path, column: str) -> None:
    path = write(tmp_path / "cells.h5ad", COUNTS, obs={"donor": range(7)})
    with h5py.File(path, "a") as file:
        file["obs/square"] = np.zeros((7, 2))
        file["obs/complex"] = np.zeros(7, np.complex64)
        file.create_group("obs/frame").attrs["encoding-type"] = "dataframe"
        file["obs"].attrs["column-order"] = ["donor", column]
    file = CountFile(path)
    file.block(0, 7, ["donor"])
    with pytest.raises(InputError, match="columns of text, numbers, truth values or categories") as raised:
        file.check_columns([column], "--label")
    assert raised.value.field == "--label"


def test_a_table_of_old_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = write(tmp_path / "cells.h5ad", COUNTS)
    with h5py.File(path, "a") as file:
        del file["obs"]
        file["obs"] = np.zeros(7, [("index", "S5"), ("n", "i4")])
    assert "save it with a current anndata" in refusal(path).takes


def read_all(path: Path) -> NDArray[np.float64] | None:
    """Read every cell; None if that ends in the one error that it may end in."""
    try:
        with CountFile(str(path)) as file:
            file.block(0, len(file), [name for name in file.obs_names if name == "type"])
            return whole(file)
    except InputError as error:
        assert len(str(error).splitlines()) == 1
        return None


@pytest.mark.parametrize("form", [sparse.csr_matrix, np.asarray], ids=["csr", "dense"])
def test_a_file_cut_anywhere_is_refused_or_whole(tmp_path: Path, form: Any) -> None:
    path = tmp_path / "cells.h5ad"
    content = Path(write(path, form(COUNTS), obs={"type": list("aabbabb")})).read_bytes()
    refused = 0
    for cut in np.random.default_rng(1).integers(0, len(content), 100):
        path.write_bytes(content[:cut])
        found = read_all(path)
        refused += found is None
        assert found is None or np.array_equal(found, COUNTS)
    assert refused > 90


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_bytes_turned_over_end_in_one_line_or_in_a_matrix(tmp_path: Path, compression: str | None) -> None:
    """HDF5 keeps no checksums of plain numbers, so a count may change; nothing may crash, nor give another shape.

    Its heaps of text are spared: damage in them can send the HDF5 library itself round and round, which no code of
    ours can see or end.
    """
    path = tmp_path / "cells.h5ad"
    data = anndata.AnnData(
        sparse.csr_matrix(COUNTS), obs=pd.DataFrame({"type": list("aabbabb")}, index=list("abcdefg"))
    )
    data.write_h5ad(path, compression=compression)
    content = path.read_bytes()
    heaps = {heap.start() + at for heap in re.finditer(b"GCOL", content) for at in range(4096)}
    places = sorted(set(range(len(content))) - heaps)
    random = np.random.default_rng(2)
    refused = equal = 0
    for _ in range(150):
        damaged = bytearray(content)
        for at in random.choice(places, 8):
            damaged[at] ^= int(random.integers(1, 256))
        path.write_bytes(damaged)
        found = read_all(path)
        refused += found is None
        equal += found is not None and np.array_equal(found, COUNTS)
        assert found is None or found.shape[0] * found.shape[1] > 0
    assert refused > 5
    assert equal > 5


# ---------------------------------------------------------------------- ids that occur twice


@pytest.mark.filterwarnings("ignore:Observation names are not unique:UserWarning")
def test_an_id_that_occurs_twice_is_found(tmp_path: Path) -> None:
    first = write(tmp_path / "first.h5ad", COUNTS, cells=list("abcdefg"))
    second = write(tmp_path / "second.h5ad", COUNTS, cells=list("hijklmc"))
    twice = write(tmp_path / "twice.h5ad", COUNTS, cells=list("1234562"))
    assert repeated_ids([(first, "")], CountFile) is None
    assert repeated_ids([(first, ""), (second, "")], CountFile) == ("c", first, second)
    assert repeated_ids([(first, "1-"), (second, "2-")], CountFile) is None
    assert repeated_ids([(first, ""), (twice, "x")], CountFile) == ("x2", twice, twice)
    assert repeated_ids([(first, ""), (first, "")], CountFile) is not None
    assert repeated_ids([], CountFile) is None


@pytest.mark.parametrize("held", [1, 5, 50, 4_000_000])
def test_ids_are_compared_in_ranges_of_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int) -> None:
    monkeypatch.setattr(cell_ids, "HASHES_HELD", held)
    monkeypatch.setattr(cell_ids, "IDS_PER_READ", 7)
    counts = np.ones((40, 2), np.float32)
    path = write(tmp_path / "cells.h5ad", counts)
    other = write(tmp_path / "other.h5ad", counts, cells=[f"X{number}" for number in range(39)] + ["CELL17"])
    assert repeated_ids([(path, "")], CountFile) is None
    assert repeated_ids([(path, ""), (other, "")], CountFile) == ("CELL17", path, other)


def test_equal_hashes_of_different_ids_are_not_taken_for_equal_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cell_ids, "hash_ids", lambda ids, prefix: np.array([len(name) for name in ids], np.uint64))
    good = write(tmp_path / "good.h5ad", COUNTS, cells=["a", "b", "c", "dd", "ee", "f", "g"])
    assert repeated_ids([(good, "")], CountFile) is None
    other = write(tmp_path / "other.h5ad", COUNTS, cells=["h", "i", "j", "ff", "ee", "k", "l"])
    assert repeated_ids([(good, ""), (other, "")], CountFile) == ("ee", good, other)
