"""Count matrices from real h5ad files: what is read, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy import sparse

from geneformer_ray.data.counts import CountFile
from geneformer_ray.errors import InputError, NotThereYetError

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
    assert [kind for block in blocks for kind in block.obs["type"]] == list("aabbabb")
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
    assert "gene_ids" in error.takes


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
    assert says in error.got
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


@pytest.mark.filterwarnings("ignore:Observation names are not unique:UserWarning")
def test_cell_ids_must_be_unique(tmp_path: Path) -> None:
    error = refusal(write(tmp_path / "cells.h5ad", COUNTS, cells=list("abcdefb")))
    assert "cell id b twice" in error.got


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


@pytest.mark.parametrize("name", ["cells.h5ad", "cells.loom", "cells.mtx"])
def test_what_is_not_there_yet_says_so(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, sparse.csc_matrix(COUNTS))
    assert isinstance(refusal(path), NotThereYetError)
