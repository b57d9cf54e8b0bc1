"""Embedding as a job, on real Ray: the copy of an h5ad, gene embeddings, and a kill on the way."""

from __future__ import annotations

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
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import sparse

from geneformer_ray.compute.model_directory import save_model
from geneformer_ray.compute.pretraining import new_model
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError, OutputExistsError
from ray_jobs import embed, tokenize
from ray_jobs.command_line import build
from tests.integration.small_data import SmallData

pytestmark = [pytest.mark.integration]
REPOSITORY = Path(__file__).resolve().parents[2]


def run(**flags: Any) -> dict[str, Any]:
    return embed.run(build(embed.EmbedConfig, {name: value for name, value in flags.items() if value is not None}))


def save_small_model(vocabulary: GeneVocabulary, directory: Path) -> str:
    save_model(new_model(vocabulary, layers=2, width=16, heads=2, feed_forward=32), vocabulary, directory)
    return str(directory)


@pytest.fixture(scope="module")
def model(small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_small_model(GeneVocabulary.load(small_data.vocabulary), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def two_files(small_data: SmallData, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> dict[str, str]:
    """Two files that share barcodes, in one table: the first in another order and with a cell that is rejected."""
    folder = tmp_path_factory.mktemp("two")
    data = anndata.read_h5ad(small_data.h5ad)
    first, second = data[::-1].copy(), data[:40].copy()
    counts = first.X.toarray()
    counts[7] = 0
    first.X = sparse.csr_matrix(counts)
    first.obsm["X_pca"] = np.arange(180, dtype=np.float32).reshape(90, 2)
    first.uns["study"] = {"name": "Ω"}
    first.layers["counts"] = first.X.copy()
    paths = {"first": str(folder / "first.h5ad"), "second": str(folder / "second.h5ad"), "cells": str(folder / "cells")}
    first.write_h5ad(paths["first"])
    second.write_h5ad(paths["second"])
    tokenize.run(build(tokenize.TokenizeConfig, {
        "input": [paths["first"], paths["second"]], "vocabulary": small_data.vocabulary, "output": paths["cells"],
        "cell_id_prefix": ["", "b_"], "obs_columns": ["donor", "cell_type"],
    }))  # fmt: skip
    return paths


def vectors(output: Path) -> dict[str, list[float]]:
    table = pq.read_table(output / "embeddings")
    return dict(zip(table["cell_id"].to_pylist(), table["embedding"].to_pylist(), strict=True))


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("which", "prefix", "without"), [("first", "", 1), ("second", "b_", 0)])
def test_embeddings_go_into_a_copy_of_the_h5ad(
    two_files: dict[str, str], model: str, tmp_path: Path, which: str, prefix: str, without: int
) -> None:
    before = Path(two_files[which]).read_bytes()
    flags = {"cells": two_files["cells"], "model": model, "output": str(tmp_path / "out"), "h5ad": two_files[which]}
    summary = run(**flags, cell_id_prefix=prefix)
    assert Path(two_files[which]).read_bytes() == before
    original, copy = anndata.read_h5ad(two_files[which]), anndata.read_h5ad(summary["h5ad"]["path"])
    assert Path(summary["h5ad"]["path"]) == tmp_path / "out" / f"{which}.h5ad"
    embedded = vectors(tmp_path / "out")
    values = np.asarray(copy.obsm["X_geneformer"])
    assert values.dtype == np.float32
    assert values.shape == (original.n_obs, 16)
    assert list(copy.obs_names) == list(original.obs_names)
    for name, row in zip(copy.obs_names, values, strict=True):
        if prefix + name in embedded:
            np.testing.assert_array_equal(row, np.array(embedded[prefix + name], np.float32))
        else:
            assert np.isnan(row).all()
    counts = {key: summary["h5ad"][key] for key in ("cells", "embedded", "not_embedded", "elsewhere")}
    inside = original.n_obs - without
    assert counts == {
        "cells": original.n_obs, "embedded": inside, "not_embedded": without, "elsewhere": 129 - inside
    }  # fmt: skip
    assert int(np.isnan(values).all(axis=1).sum()) == without
    plan = json.loads((tmp_path / "out" / "_manifest.json").read_text())["plan"]
    about = copy.uns.pop("X_geneformer")
    assert {key: plan[key] for key in about} == about
    assert about.keys() >= {"model", "vocabulary", "layer", "embedding"}
    # All the rest is as it was.
    del copy.obsm["X_geneformer"]
    assert copy.uns == original.uns
    assert copy.obsm.keys() == original.obsm.keys()
    assert copy.layers.keys() == original.layers.keys()
    pd.testing.assert_frame_equal(copy.obs, original.obs)
    assert (copy.X != original.X).nnz == 0


@pytest.mark.usefixtures("ray_cluster")
def test_only_the_chosen_cells_have_values(two_files: dict[str, str], model: str, tmp_path: Path) -> None:
    """Also where the file has such a matrix from before."""
    data = anndata.read_h5ad(two_files["second"])
    data.obsm["X_geneformer"] = np.zeros((40, 3))
    data.write_h5ad(tmp_path / "again.h5ad")
    flags = {"cells": two_files["cells"], "model": model, "h5ad": str(tmp_path / "again.h5ad"), "cell_id_prefix": "b_"}
    summary = run(**flags, output=str(tmp_path / "out"), filter={"donor": ["donor2"]}, state_column="cell_type")
    copy = anndata.read_h5ad(summary["h5ad"]["path"])
    there = np.isfinite(np.asarray(copy.obsm["X_geneformer"])).all(axis=1)
    np.testing.assert_array_equal(there, (copy.obs["donor"] == "donor2").to_numpy())
    states = json.loads((tmp_path / "out" / "states.json").read_text())["states"]
    table = pq.read_table(two_files["cells"]).to_pandas().set_index("cell_id")["cell_type"]
    embedded = vectors(tmp_path / "out")
    for state in ("alpha", "beta"):
        mine = [vector for cell_id, vector in embedded.items() if table[cell_id] == state]
        np.testing.assert_allclose(states[state], np.mean(mine, axis=0), atol=1e-6)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"h5ad": "/nowhere.h5ad"}, "--h5ad: got /nowhere.h5ad; takes an h5ad file that exists"),
        ({"h5ad": "BROKEN"}, "--h5ad.*a readable h5ad file"),
        ({"h5ad": "OTHER"}, "--h5ad.*holds none of the embedded cells; .*its ids are like other0, the cells' like"),
        ({"h5ad": "second", "filter": {"part": ["b"]}}, "--h5ad.*--cell-id-prefix 'b_' beside it"),
        ({"h5ad": "second", "cell_id_prefix": "c_"}, "--h5ad.*none of the embedded cells with the prefix c_"),
        ({"h5ad": "TWICE"}, "--h5ad.*share a name.*unique names in obs"),
        ({"h5ad": "first", "embedding": "gene"}, "--h5ad.*--embedding gene; takes mean or cls"),
        ({"cell_id_prefix": "b_"}, "--cell-id-prefix.*without --h5ad"),
    ],
)
def test_a_file_that_does_not_belong_to_the_cells_is_refused(
    two_files: dict[str, str], model: str, tmp_path: Path, flags: dict[str, Any], text: str
) -> None:
    cells = two_files["cells"]
    if flags.get("filter") == {"part": ["b"]}:
        table = pq.read_table(cells)
        chosen = pa.compute.starts_with(table["cell_id"], "b_")
        pq.write_table(table.filter(chosen), tmp_path / "cells.parquet")
        cells, flags = str(tmp_path / "cells.parquet"), {"h5ad": flags["h5ad"]}
    (tmp_path / "broken.h5ad").write_bytes(b"no HDF5")
    empty = sparse.csr_matrix((2, 1), dtype=np.float32)
    anndata.AnnData(empty, obs=pd.DataFrame(index=["other0", "other1"])).write_h5ad(tmp_path / "other.h5ad")
    with pytest.warns(UserWarning, match="not unique"):
        anndata.AnnData(empty, obs=pd.DataFrame(index=["cell001", "cell001"])).write_h5ad(tmp_path / "twice.h5ad")
    files = {name.upper(): str(tmp_path / f"{name}.h5ad") for name in ("broken", "other", "twice")} | two_files
    given = flags | ({"h5ad": files.get(flags["h5ad"], flags["h5ad"])} if "h5ad" in flags else {})
    with pytest.raises(InputError, match=text):
        run(cells=cells, model=model, output=str(tmp_path / "out"), **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_gene_embeddings_hold_genes_only_and_outlive_a_break_while_they_are_merged(
    small_data: SmallData, tmp_path: Path
) -> None:
    plain = GeneVocabulary.load(small_data.vocabulary)
    names = ["<pad>", "<mask>", "<cls>", "<eos>", *plain.genes]
    tokens = {name: number for number, name in enumerate(names)}
    special = GeneVocabulary(tokens, medians=plain.medians, max_length=34)
    special.save(str(tmp_path / "vocabulary"))
    tokenize.run(build(tokenize.TokenizeConfig, {
        "input": [small_data.h5ad], "vocabulary": str(tmp_path / "vocabulary"), "output": str(tmp_path / "cells"),
    }))  # fmt: skip
    flags = {"cells": str(tmp_path / "cells"), "model": save_small_model(special, tmp_path / "model")}
    output = tmp_path / "genes"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed, "discard_gene_sums", lambda _: None)
        run(**flags, embedding="gene", output=str(output))
    whole = pq.read_table(output / "embeddings")
    assert set(whole["gene"].to_pylist()) <= set(plain.genes)
    manifest = json.loads((output / "_manifest.json").read_text())
    (output / "_manifest.json").write_text(json.dumps({"finished": False, "plan": manifest["plan"]}))
    (output / "embeddings" / "part-000000.parquet").write_bytes(b"half a file")
    run(**flags, embedding="gene", output=str(output))
    assert pq.read_table(output / "embeddings").equals(whole)
    assert not (output / "gene_sums").exists()


@pytest.mark.usefixtures("ray_cluster")
def test_another_plan_is_not_resumed(two_files: dict[str, str], model: str, tmp_path: Path) -> None:
    flags = {"cells": two_files["cells"], "model": model, "output": str(tmp_path / "out"), "h5ad": two_files["first"]}
    run(**flags)
    with pytest.raises(OutputExistsError, match=r"a finished run.*--overwrite"):
        run(**flags)
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    unfinished = json.dumps({"finished": False, "plan": manifest["plan"]})
    for changed in ({"layer": 0}, {"filter": {"donor": ["donor1"]}}, {"h5ad": None}, {"state_column": "donor"}):
        (tmp_path / "out" / "_manifest.json").write_text(unfinished)
        with pytest.raises(OutputExistsError, match=f"{next(iter(changed))} was"):
            run(**{**flags, **changed})
    run(**flags)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_the_same(small_data: SmallData, model: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    counts = sparse.random(10_000, 60, 0.5, "csr", np.float32, rng)
    counts.data = np.ceil(counts.data * 9).astype(np.float32)
    obs = pd.DataFrame({"type": rng.choice(["a", "b"], 10_000)}, index=[f"c{number}" for number in range(10_000)])
    genes = list(anndata.read_h5ad(small_data.h5ad, backed="r").var_names)
    anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=genes)).write_h5ad(tmp_path / "many.h5ad")

    def start(job: str, *flags: str | Path) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-m", f"ray_jobs.{job}", *map(str, flags)], cwd=REPOSITORY, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ))  # fmt: skip

    def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
        with process:
            said, complaints = process.communicate(timeout=300)
        assert process.returncode == 0, complaints
        summary: dict[str, Any] = json.loads(said.splitlines()[-1])
        return summary

    finish(start("tokenize", "--input", tmp_path / "many.h5ad", "--vocabulary", small_data.vocabulary,
                 "--output", tmp_path / "cells", "--obs-columns", "type"))  # fmt: skip
    flags: list[str | Path] = ["--cells", tmp_path / "cells", "--model", model, "--state-column", "type"]
    flags += ["--h5ad", tmp_path / "many.h5ad", "--output"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with start("embed", *flags, killed) as process:
        deadline = time.monotonic() + 120
        while len(list(killed.glob("_progress/*.json"))) < 5 and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    kept = {path: path.stat().st_mtime_ns for path in killed.glob("_progress/*.json")}
    assert 5 <= len(kept) < 40
    assert json.loads((killed / "_manifest.json").read_text())["finished"] is False
    with start("embed", *flags, killed, "--layer", "0") as process:
        _, complaints = process.communicate(timeout=100)
    assert process.returncode == 2
    assert "layer was -1, is 0" in complaints
    assert finish(start("embed", *flags, killed))["cells"] == finish(start("embed", *flags, whole))["cells"]
    # What was done before the kill was not done again; a file that was being written then may have been.
    assert sum(path.stat().st_mtime_ns == time_ns for path, time_ns in kept.items()) >= len(kept) - 2
    shards = sorted(path.relative_to(whole) for path in [*whole.glob("embeddings/*"), whole / "states.json"])
    assert len(shards) == 41
    for shard in shards:
        assert (killed / shard).read_bytes() == (whole / shard).read_bytes(), shard
    ours, theirs = (
        np.asarray(anndata.read_h5ad(output / "many.h5ad").obsm["X_geneformer"]) for output in (killed, whole)
    )
    np.testing.assert_array_equal(ours, theirs)
