"""Encoding as a job, on real Ray: every format, what is reported, and a kill on the way."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from scipy import io, sparse

from geneformer_ray.data.cells import CellTable
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError, OutputExistsError
from ray_jobs import tokenize
from ray_jobs.command_line import build
from tests.integration.small_data import SmallData

pytestmark = [pytest.mark.integration]
REPOSITORY = Path(__file__).resolve().parents[2]


def encode(small_data: SmallData, output: Path, inputs: list[Path | str], **flags: Any) -> dict[str, Any]:
    values = {"input": [str(path) for path in inputs], "vocabulary": small_data.vocabulary, "output": str(output)}
    return tokenize.run(build(tokenize.TokenizeConfig, {**values, **flags}))


def digests(output: Path) -> dict[str, str]:
    """Hash every file of a finished output, apart from the manifest, which names its own directory."""
    files = [path for path in sorted(output.rglob("*")) if path.is_file()]
    assert any(path.suffix == ".parquet" for path in files)
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name != "_manifest.json"
    }


def write_10x_directory(directory: Path, data: anndata.AnnData) -> Path:
    directory.mkdir()
    with gzip.open(directory / "matrix.mtx.gz", "wb") as stream:
        io.mmwrite(stream, sparse.coo_matrix(data.X.T.astype(int)), field="integer")
    rows = [f"{name}\t{name}\tGene Expression" for name in data.var_names]
    (directory / "features.tsv.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    (directory / "barcodes.tsv.gz").write_bytes(gzip.compress("\n".join(data.obs_names).encode()))
    return directory


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.filterwarnings("ignore:Writing zarr v2 data will no longer be the default:UserWarning")
def test_every_format_gives_the_same_cells(small_data: SmallData, tmp_path: Path) -> None:
    """Also those that lie gene by gene, which are sorted on the way."""
    data = anndata.read_h5ad(small_data.h5ad)
    inputs = [Path(small_data.h5ad), tmp_path / "csc.h5ad", tmp_path / "cells.zarr"]
    by_gene = data.copy()
    by_gene.X = sparse.csc_matrix(by_gene.X)
    by_gene.write_h5ad(inputs[1])
    data.write_zarr(inputs[2])
    inputs.append(write_10x_directory(tmp_path / "tenx", data))
    prefixes = ["csr:", "csc:", "zarr:", "tenx:"]
    output = tmp_path / "cells"
    summary = encode(small_data, output, inputs, cell_id_prefix=prefixes)
    assert summary["cells"] == 4 * small_data.cells
    cells = CellTable(str(output)).read(np.arange(4 * small_data.cells))
    each = [[(cell_id.split(":")[1], ids.tolist()) for cell_id, ids in zip(cells.cell_ids, cells.input_ids, strict=True)
             if cell_id.startswith(prefix)] for prefix in prefixes]  # fmt: skip
    assert len(each[0]) == small_data.cells
    assert each[0] == each[1] == each[2] == each[3]
    assert not (output / "_sorted").exists()


@pytest.mark.usefixtures("ray_cluster")
def test_one_file_or_many_are_the_same_cells(small_data: SmallData, tmp_path: Path) -> None:
    data = anndata.read_h5ad(small_data.h5ad)
    parts = tmp_path / "parts"
    parts.mkdir()
    for number, (start, stop) in enumerate([(0, 1), (1, 40), (40, 90)]):
        data[start:stop].copy().write_h5ad(parts / f"{number}.h5ad")
    encode(small_data, tmp_path / "one", [small_data.h5ad], obs_columns=["donor"])
    encode(small_data, tmp_path / "many", [parts], obs_columns=["donor"])
    one, many = (pq.read_table(tmp_path / name) for name in ("one", "many"))
    assert many.equals(one, check_metadata=True)


@pytest.mark.usefixtures("ray_cluster")
def test_nothing_is_dropped_without_being_said(small_data: SmallData, tmp_path: Path) -> None:
    data = anndata.read_h5ad(small_data.h5ad)
    names = list(data.var_names)
    names[58], names[59] = names[0], "NOT_A_GENE"  # a gene twice, and one that nobody knows
    counts = data.X.toarray()
    counts[3], counts[4, :59] = 0, 0  # a cell without counts, and one with counts of the unknown gene only
    counts[4, 59] = 5
    obs = data.obs.assign(filter_pass=np.where(np.arange(90) < 80, 1, 0))
    var = pd.DataFrame({"ensembl_id": names}, index=[f"row{number}" for number in range(60)])
    anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=var).write_h5ad(tmp_path / "odd.h5ad")
    output = tmp_path / "cells"
    summary = encode(small_data, output, [tmp_path / "odd.h5ad"], max_length=12)
    assert (summary["cells_in"], summary["cells"], summary["rejected"]) == (90, 78, 12)
    because = {"filter_pass is not 1": 10, "no counts": 1, "no expressed gene that the vocabulary knows": 1}
    assert summary["rejected_because"] == because
    rejects = pq.read_table(output / "_rejects").to_pandas().set_index("cell_id")["reason"]
    assert rejects["cell003"] == "no counts"
    assert rejects["cell004"].startswith("no expressed gene")
    assert rejects.value_counts().to_dict() == because
    report = json.loads((output / "_report.json").read_text())
    genes = report["genes"][0]
    assert (genes["genes"], genes["matched"], genes["unmatched"]) == (60, 59, 1)
    assert genes["unmatched_examples"] == {"unknown": ["NOT_A_GENE"]}
    assert genes["genes_of_several_columns_examples"] == [names[0]]
    said = pd.read_csv(output / "_genes.csv", keep_default_na=False).set_index("name")
    assert said.loc["NOT_A_GENE"].tolist() == [str(tmp_path / "odd.h5ad"), "", "unknown"]
    lengths = pq.read_table(output, columns=["length"])["length"].to_numpy()
    assert lengths.max() == 12
    assert report["truncated"] == (lengths == 12).sum() - (np.sum(counts[:80, :58] > 0, axis=1) == 12).sum()
    assert report["tokens_per_cell"]["q50"] == np.quantile(lengths, 0.5, method="inverted_cdf")
    assert report["tokens_per_cell"]["q05"] == np.quantile(lengths, 0.05, method="inverted_cdf")
    assert GeneVocabulary.load(str(output / "_vocabulary")).max_length == 12


@pytest.mark.usefixtures("ray_cluster")
def test_the_same_barcodes_in_two_files_need_prefixes(small_data: SmallData, tmp_path: Path) -> None:
    again = tmp_path / "again.h5ad"
    anndata.read_h5ad(small_data.h5ad)[10:20].copy().write_h5ad(again)
    with pytest.raises(InputError, match=r"--cell-id-prefix: got the cell id cell01\d in "):
        encode(small_data, tmp_path / "cells", [small_data.h5ad, again])
    assert not (tmp_path / "cells").exists()
    summary = encode(small_data, tmp_path / "cells", [small_data.h5ad, again], cell_id_prefix=["a_", "b_"])
    assert summary["cells"] == 100
    assert "b_cell010" in pq.read_table(tmp_path / "cells")["cell_id"].to_pylist()
    with pytest.raises(InputError, match="--cell-id-prefix: got 3 of them; takes 2"):
        encode(small_data, tmp_path / "more", [small_data.h5ad, again], cell_id_prefix=["a", "b", "c"])


@pytest.mark.usefixtures("ray_cluster")
def test_a_column_of_two_kinds_is_refused(small_data: SmallData, tmp_path: Path) -> None:
    data = anndata.read_h5ad(small_data.h5ad)
    data.obs["donor"] = np.arange(90)
    data.write_h5ad(tmp_path / "numbers.h5ad")
    inputs = [small_data.h5ad, tmp_path / "numbers.h5ad"]
    with pytest.raises(InputError, match=r"--obs-columns: got donor, which is string in .* and int64 in .*numbers"):
        encode(small_data, tmp_path / "cells", inputs, cell_id_prefix=["a", "b"], obs_columns=["donor"])


@pytest.mark.usefixtures("ray_cluster")
def test_names_that_lie_in_another_column_are_pointed_out(small_data: SmallData, tmp_path: Path) -> None:
    data = anndata.read_h5ad(small_data.h5ad)
    data.var["gene_ids"] = [f"row {number}" for number in range(60)]
    data.write_h5ad(tmp_path / "odd.h5ad")
    with pytest.raises(
        InputError, match=r"--gene-column: .*odd.h5ad; takes index, where 60 of 60 .*--gene-column index"
    ):
        encode(small_data, tmp_path / "cells", [tmp_path / "odd.h5ad"])
    assert encode(small_data, tmp_path / "cells", [tmp_path / "odd.h5ad"], gene_column="index")["cells"] == 90


@pytest.mark.usefixtures("ray_cluster")
def test_a_changed_file_is_not_resumed(small_data: SmallData, tmp_path: Path) -> None:
    file, output = tmp_path / "cells.h5ad", tmp_path / "cells"
    anndata.read_h5ad(small_data.h5ad).write_h5ad(file)
    encode(small_data, output, [file])
    manifest = json.loads((output / "_manifest.json").read_text())
    (output / "_manifest.json").write_text(json.dumps({"finished": False, "plan": manifest["plan"]}))
    os.utime(file)
    with pytest.raises(OutputExistsError, match="contents was"):
        encode(small_data, output, [file])


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_the_same(small_data: SmallData, tmp_path: Path) -> None:
    genes = list(anndata.read_h5ad(small_data.h5ad, backed="r").var_names)
    counts = sparse.random(300_000, 60, 0.3, "csr", np.float32, np.random.default_rng(0))
    counts.data = np.ceil(counts.data * 9).astype(np.float32)
    cells = anndata.AnnData(counts, obs=pd.DataFrame(index=[f"c{number}" for number in range(300_000)]))
    cells.var_names = genes
    cells.write_h5ad(tmp_path / "many.h5ad")
    flags = ["--input", str(tmp_path / "many.h5ad"), "--vocabulary", small_data.vocabulary, "--output"]
    command = [sys.executable, "-m", "ray_jobs.tokenize", *flags]

    def start(output: Path) -> subprocess.Popen[str]:
        return subprocess.Popen([*command, str(output)], cwd=REPOSITORY, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with start(killed) as process:
        deadline = time.monotonic() + 120
        while len(list(killed.glob("_progress/*.json"))) < 20 and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    half = len(list(killed.glob("_progress/*.json")))
    assert 20 <= half < 150
    assert json.loads((killed / "_manifest.json").read_text())["finished"] is False
    for output in (killed, whole):
        with start(output) as process:
            said, complaints = process.communicate(timeout=200)
        assert process.returncode == 0, complaints
        assert json.loads(said)["cells"] == 300_000 - json.loads(said)["rejected"]
    assert digests(killed) == digests(whole)
