"""Uploaded h5ad files, read by the real process: whole ones get the offline answer, the others one line."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import httpx
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from geneformer_ray.compute.embedding import cell_embeddings
from geneformer_ray.compute.encoder import Encoder
from geneformer_ray.data.counts import CountFile
from geneformer_ray.data.rank_value import RankValueEncoder
from geneformer_ray.data.vocabulary import GeneVocabulary
from serve.api import create_api
from serve.model import ServedModel
from serve.settings import ServeSettings
from serve.uploads import READER_ENVIRONMENT
from tests.unit.served import EXECUTION, LABELS, Direct, ask, make_islets, offline_odds, serve_directory

HDF5 = {"content-type": "application/x-hdf5"}
GENES = [f"GENE{number:02d}" for number in (3, 17, 9, 30, 21, 5, 11)] + ["NOSUCH1", "NOSUCH2"]
COUNTS = np.array(
    [
        [3, 0, 7, 1, 0, 2, 9, 4, 0],
        [0, 5, 0, 0, 8, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 6, 2],
        [1, 1, 2, 6, 3, 12, 0, 0, 5],
    ]
)


@pytest.fixture(scope="module")
def directory(model_directory: Path, vocabulary: GeneVocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "islets"
    make_islets(model_directory, vocabulary, path)
    return path


@pytest.fixture(scope="module")
def served(directory: Path) -> ServedModel:
    return serve_directory(directory)


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where uploads go, to see that nothing of them stays."""
    path = tmp_path / "scratch"
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    return path


@pytest.fixture
def service(served: ServedModel, scratch: Path) -> Direct:
    return Direct(served, ServeSettings(max_upload_bytes=1 << 20, max_upload_cells=50, max_genes=100, batch_tokens=16))


def write(path: Path, **parts: Any) -> Path:
    names = pd.DataFrame(index=[f"c{number}" for number in range(len(COUNTS))])
    parts = {"X": sparse.csr_matrix(COUNTS.astype(np.float32)), "obs": names, "var": pd.DataFrame(index=GENES)} | parts
    adata = anndata.AnnData(**parts)
    adata.write_h5ad(path)
    return path


def send(service: Direct, file: Path | bytes, path: str = "classify", **query: Any) -> httpx.Response:
    content = file if isinstance(file, bytes) else file.read_bytes()
    return ask(service, "POST", f"/v1/{path}", content=content, headers=HDF5, params=query)


def refused(service: Direct, file: Path | bytes, status: int, field: str, takes: str = "", **query: Any) -> str:
    found = send(service, file, **query)
    assert found.status_code == status, found.text
    error = found.json()["error"]
    assert error["field"] == field, error
    assert takes in f"{error['got']} {error['takes']}", error
    assert tempfile.gettempdir() not in found.text
    # The service lives on.
    assert ask(service, "GET", "/v1/model").status_code == 200
    return str(error["got"])


# ---------------------------------------------------------------------- whole files


LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "csr": ({}, {}),
    "csc": ({"X": sparse.csc_matrix(COUNTS.astype(np.float32))}, {}),
    "dense": ({"X": COUNTS.astype(np.float32)}, {}),
    "integers": ({"X": sparse.csr_matrix(COUNTS)}, {}),
    "layer": ({"X": np.log1p(COUNTS), "layers": {"counts": sparse.csr_matrix(COUNTS)}}, {"counts": "layers/counts"}),
    "raw": (
        {"X": np.log1p(COUNTS), "raw": {"X": sparse.csr_matrix(COUNTS), "var": pd.DataFrame(index=GENES)}},
        {"counts": "raw.X"},
    ),
    "column": (
        {"var": pd.DataFrame({"name": GENES}, index=[f"row{i}" for i in range(len(GENES))])},
        {"gene_column": "name"},
    ),
    "fractions": ({"X": sparse.csr_matrix(COUNTS * 1.5)}, {"allow_non_integer": "true"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_upload_gets_the_offline_answer(
    service: Direct, directory: Path, vocabulary: GeneVocabulary, tmp_path: Path, scratch: Path, layout: str
) -> None:
    parts, query = LAYOUTS[layout]
    path = write(tmp_path / "cells.h5ad", **parts)
    found = send(service, path, top=len(LABELS), return_input_ids=True, **query)
    assert found.status_code == 200, found.text
    content = found.json()
    encoded = RankValueEncoder(vocabulary, GENES).encode(COUNTS.astype(float), COUNTS.sum(axis=1))
    assert [cell["cell_id"] for cell in content["cells"]] == [f"c{number}" for number in range(len(COUNTS))]
    reasons = [None, None, "no counts", "no expressed gene that the vocabulary knows", None]
    assert [cell["reason"] for cell in content["cells"]] == reasons
    kept = [number for number, reason in enumerate(reasons) if reason is None]
    offline = offline_odds(directory, vocabulary, [encoded.cell(number) for number in kept])
    for odds, number in zip(offline, kept, strict=True):
        cell = content["cells"][number]
        assert cell["input_ids"] == encoded.cell(number).tolist()
        got = {one["label"]: one["probability"] for one in cell["top"]}
        np.testing.assert_allclose([got[label] for label in LABELS], odds, atol=1e-5)
        assert cell["label"] == LABELS[odds.argmax()]
    shares = [cell["unknown_share"] for cell in content["cells"]]
    np.testing.assert_allclose(shares, [1 / 6, 0, 0, 1, 1 / 7])
    for number in (2, 3):
        cell = content["cells"][number]
        assert (cell["label"], cell["probability"], cell["top"], cell["input_ids"]) == (None, None, [], [])
    assert content["model"]["digest"] == service.model.digest
    assert [path.name for path in scratch.iterdir() if "upload" in path.name] == []


def test_an_upload_is_embedded_as_json_is(service: Direct, directory: Path, tmp_path: Path) -> None:
    found = send(service, write(tmp_path / "cells.h5ad"), "embed", embedding="mean")
    assert found.status_code == 200, found.text
    cells = [{"values": COUNTS[number].tolist()} for number in (0, 1, 4)]
    by_json = ask(service, "POST", "/v1/embed", json={"genes": GENES, "cells": cells}).json()["cells"]
    vectors = [cell["embedding"] for cell in found.json()["cells"]]
    assert [vectors[2], vectors[3]] == [None, None]
    got = [vectors[number] for number in (0, 1, 4)]
    np.testing.assert_allclose(got, [cell["embedding"] for cell in by_json], atol=1e-6)
    encoder = Encoder.load(directory, layer=-1, execution=EXECUTION)
    sequences = [service.model.cells.accept(cell).input_ids for cell in _ids(service, tmp_path)]
    np.testing.assert_allclose(got, cell_embeddings(encoder, sequences, service.model.vocabulary), atol=1e-5)


def _ids(service: Direct, tmp_path: Path) -> list[list[int]]:
    found = send(service, tmp_path / "cells.h5ad", return_input_ids=True).json()["cells"]
    return [cell["input_ids"] for cell in found if cell["reason"] is None]


@pytest.mark.parametrize("pooling", ["cls", "first_gene"])
def test_special_tokens_come_with_the_model(
    special_model_directory: Path, special_vocabulary: GeneVocabulary, tmp_path: Path, scratch: Path, pooling: str
) -> None:
    own = make_islets(special_model_directory, special_vocabulary, tmp_path / "model", pooling)
    service = Direct(serve_directory(tmp_path / "model"), ServeSettings())
    found = send(service, write(tmp_path / "cells.h5ad"), top=4, return_input_ids=True).json()["cells"]
    encoded = RankValueEncoder(own, GENES).encode(COUNTS.astype(float), COUNTS.sum(axis=1))
    for number in (0, 1, 4):
        assert found[number]["input_ids"] == encoded.cell(number).tolist()
    assert [found[2]["input_ids"], found[2]["reason"]] == [[], "no counts"]


def test_the_experiment_s_own_columns_count_as_offline(service: Direct, tmp_path: Path, vocabulary: Any) -> None:
    obs = pd.DataFrame(
        {"n_counts": COUNTS.sum(axis=1) + 100.0, "filter_pass": [1, 0, 1, 1, 1]}, index=[f"c{i}" for i in range(5)]
    )
    path = write(tmp_path / "cells.h5ad", obs=obs)
    found = send(service, path, return_input_ids=True).json()["cells"]
    assert found[1]["reason"] == "filter_pass is not 1"
    with CountFile(str(path)) as file:
        block = file.block(0, 5)
        encoded = RankValueEncoder(vocabulary, file.genes).encode(block.counts, block.totals)
    assert found[4]["input_ids"] == encoded.cell(4).tolist()


def test_more_cells_than_are_read_at_once_keep_their_order(
    served: ServedModel, scratch: Path, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = rng.poisson(0.7, size=(1203, len(GENES)))
    names = pd.DataFrame(index=[f"n{number}" for number in range(len(counts))])
    service = Direct(served, ServeSettings())
    ids = {}
    for kind in (sparse.csr_matrix, sparse.csc_matrix):
        path = write(tmp_path / f"{kind.__name__}.h5ad", X=kind(counts.astype(np.float32)), obs=names)
        found = send(service, path, return_input_ids=True).json()["cells"]
        assert [cell["cell_id"] for cell in found] == list(names.index)
        ids[kind] = [cell["input_ids"] for cell in found]
    encoder = RankValueEncoder(served.vocabulary, GENES)
    encoded = encoder.encode(counts.astype(float), np.maximum(counts.sum(axis=1), 1))
    assert ids[sparse.csr_matrix] == ids[sparse.csc_matrix] == [encoded.cell(i).tolist() for i in range(len(counts))]


# ---------------------------------------------------------------------- files that are not whole, or not friendly


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.7, 0.95])
def test_truncated_files_are_refused(service: Direct, tmp_path: Path, share: float) -> None:
    content = write(tmp_path / "cells.h5ad").read_bytes()
    refused(service, content[: int(share * len(content))], 422, "body", "h5ad")


@pytest.mark.parametrize(
    "content", [b"gene,count\nINS,3\n", b"PK\x03\x04" + bytes(500), b"\x89HDF\r\n\x1a\n" + bytes(900)]
)
def test_other_files_are_refused(service: Direct, content: bytes) -> None:
    refused(service, content, 422, "body", "h5ad")


def _external_link(file: h5py.File, beside: Path) -> None:
    del file["X"]
    file["X"] = h5py.ExternalLink(str(beside), "X")


def _external_link_elsewhere(file: h5py.File, beside: Path) -> None:
    file["uns/more"] = h5py.ExternalLink(str(beside), "X")


def _soft_link(file: h5py.File, _: Path) -> None:
    file["layers/counts"] = h5py.SoftLink("/X")


def _values_elsewhere(file: h5py.File, beside: Path) -> None:
    del file["X/data"]
    n_values = file["X/indices"].shape[0]
    external = [(str(beside), 0, h5py.h5f.UNLIMITED)]
    file["X"].create_dataset("data", (n_values,), dtype="u1", external=external)


def _virtual(file: h5py.File, beside: Path) -> None:
    n_values = file["X/data"].shape[0]
    del file["X/data"]
    layout = h5py.VirtualLayout(shape=(n_values,), dtype="f4")
    layout[:] = h5py.VirtualSource(str(beside), "X/data", shape=(n_values,))
    file["X"].create_virtual_dataset("data", layout)


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (_external_link, "external link X"),
        (_external_link_elsewhere, "external link uns/more"),
        (_soft_link, "soft link layers/counts"),
        (_values_elsewhere, "dataset X/data, whose values lie elsewhere"),
        (_virtual, "dataset X/data, whose values lie elsewhere"),
    ],
)
def test_files_that_reach_beyond_themselves_are_refused(
    service: Direct, tmp_path: Path, change: Callable[[h5py.File, Path], None], got: str
) -> None:
    """Each of them is a file that the reader would answer from what lies beside it."""
    beside, path = write(tmp_path / "beside.h5ad"), write(tmp_path / "cells.h5ad")
    with h5py.File(path, "r+") as file:
        change(file, beside)
    assert refused(service, path, 422, "body", "without soft or external links") == got


def _claim_cells(file: h5py.File) -> None:
    del file["X"], file["obs/_index"]
    file.create_dataset("X", (2**40, len(GENES)), dtype="f4", chunks=(1024, len(GENES)))
    file["obs"].create_dataset("_index", (2**40,), dtype="S4", chunks=(1024,))


def _claim_genes(file: h5py.File) -> None:
    del file["X"], file["var/_index"]
    file.create_dataset("X", (len(COUNTS), 2**40), dtype="f4", chunks=(1, 1024))
    file["var"].create_dataset("_index", (2**40,), dtype="S4", chunks=(1024,))


def _claim_entries(file: h5py.File) -> None:
    for name in ("data", "indices"):
        kind = file[f"X/{name}"].dtype
        del file[f"X/{name}"]
        file["X"].create_dataset(name, (2**33,), dtype=kind, chunks=(1 << 20,), fillvalue=1)
    pointers = np.full(len(COUNTS) + 1, 2**33, dtype=np.int64)
    pointers[0] = 0
    del file["X/indptr"]
    file["X/indptr"] = pointers


@pytest.mark.parametrize(
    ("claim", "takes"),
    [(_claim_cells, "up to 50"), (_claim_genes, "MiB of memory"), (_claim_entries, "MiB of memory")],
)
def test_huge_claims_end_at_the_limits(
    served: ServedModel, scratch: Path, tmp_path: Path, claim: Callable[[h5py.File], None], takes: str
) -> None:
    service = Direct(served, ServeSettings(max_upload_cells=50, upload_memory_bytes=2**29))
    path = write(tmp_path / "cells.h5ad")
    with h5py.File(path, "r+") as file:
        claim(file)
    assert path.stat().st_size < 1 << 20
    refused(service, path, 413, "body", takes)
    refused(service, path, 413, "body", "ray_jobs.tokenize")


def test_a_file_within_the_memory_is_read_and_the_same_one_beyond_it_is_not(
    served: ServedModel, scratch: Path, tmp_path: Path
) -> None:
    """Twenty-four million stored zeros of one cell: 192 MB and what is computed of them, in a few kilobytes."""
    path = write(tmp_path / "cells.h5ad")
    entries = 24_000_000
    with h5py.File(path, "r+") as file:
        pointers = file["X/indptr"][:].astype(np.int64)
        values, columns = file["X/data"][:], file["X/indices"][:]
        for name, first in (("data", values), ("indices", columns)):
            del file[f"X/{name}"]
            stored = file["X"].create_dataset(name, (entries,), dtype=first.dtype, chunks=(1 << 20,))
            stored[: len(first)] = first
        pointers[-1] = entries
        del file["X/indptr"]
        file["X/indptr"] = pointers
    small = Direct(served, ServeSettings(upload_memory_bytes=2**29, upload_seconds=120))
    refused(small, path, 413, "body", "512 MiB of memory")
    large = Direct(served, ServeSettings(upload_seconds=120))
    found = send(large, path)
    assert found.status_code == 200, found.text
    assert found.json()["cells"][0]["label"] == send(large, write(tmp_path / "b.h5ad")).json()["cells"][0]["label"]


def test_a_file_that_takes_too_long_is_given_up(served: ServedModel, scratch: Path, tmp_path: Path) -> None:
    """Ten million cells without counts, in a file of a few kilobytes."""
    path, cells = write(tmp_path / "cells.h5ad"), 10_000_000
    with h5py.File(path, "r+") as file:
        for name, kind, size in (("obs/_index", "S4", cells), ("X/indptr", "i8", cells + 1), ("X/data", "f4", 0)):
            del file[name]
            file.create_dataset(name, (size,), dtype=kind, chunks=(1 << 20,) if size else None)
        del file["X/indices"]
        file.create_dataset("X/indices", (0,), dtype="i4")
        file["X"].attrs["shape"] = [cells, len(GENES)]
    service = Direct(served, ServeSettings(upload_seconds=3, max_upload_cells=cells))
    started = time.monotonic()
    refused(service, path, 422, "body", "could not finish")
    assert 3 < time.monotonic() - started < 30


def test_other_faults_of_a_file_are_named(service: Direct, tmp_path: Path) -> None:
    path = write(tmp_path / "cells.h5ad", layers={"counts": COUNTS})
    refused(service, path, 422, "counts", "X, layers/counts", counts="layers/other")
    refused(service, path, 422, "gene_column", "index", gene_column="symbol")
    refused(service, path, 422, "query.counts", counts="obs")
    refused(service, path, 422, "query.top", top=0)
    refused(service, path, 422, "query.tops", tops=1)
    logs = write(tmp_path / "logs.h5ad", X=np.log1p(COUNTS), layers={"counts": COUNTS})
    refused(service, logs, 422, "counts", "counts=layers/counts")
    rows = pd.DataFrame({"name": GENES}, index=[f"row{i}" for i in range(len(GENES))])
    refused(service, write(tmp_path / "rows.h5ad", var=rows), 422, "gene_column", "gene_column=name")
    long = pd.DataFrame(index=["c" * 300, *"abcd"])
    refused(service, write(tmp_path / "long.h5ad", obs=long), 422, "body", "up to 200")
    genes = pd.DataFrame(index=[f"GENE{number:02d}" for number in range(120)])
    wide = write(tmp_path / "wide.h5ad", X=sparse.csr_matrix(np.ones((5, 120), np.float32)), var=genes)
    refused(service, wide, 413, "body", "up to 100")


def test_a_vocabulary_without_medians_takes_no_file(
    directory: Path, vocabulary: GeneVocabulary, tmp_path: Path, scratch: Path
) -> None:
    import dataclasses

    (tmp_path / "model").mkdir()
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "model" / file).write_bytes((directory / file).read_bytes())
    dataclasses.replace(vocabulary, medians={}).save(str(tmp_path / "model"))
    service = Direct(serve_directory(tmp_path / "model"), ServeSettings())
    refused(service, write(tmp_path / "cells.h5ad"), 422, "body", "no medians")


# ---------------------------------------------------------------------- bodies


def test_large_bodies_are_refused_whether_or_not_they_say_so(service: Direct, scratch: Path) -> None:
    read = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(100):
            read += 1
            yield bytes(100_000)

    for content in (bytes(2_000_000), pieces()):
        found = ask(service, "POST", "/v1/classify", content=content, headers=HDF5)
        assert (found.status_code, found.json()["error"]["field"]) == (413, "body"), found.text
        assert "1,048,576 bytes" in found.json()["error"]["takes"]
        assert "ray_jobs.tokenize" in found.json()["error"]["takes"]
    assert read < 100  # it was not read to its end
    assert [path.name for path in scratch.iterdir() if "upload" in path.name] == []


@pytest.mark.parametrize(
    ("path", "kind"),
    [("classify", "text/csv"), ("classify", "multipart/form-data"), ("perturb", "application/x-hdf5"), ("embed", "")],
)
def test_other_kinds_of_body_are_refused(service: Direct, tmp_path: Path, path: str, kind: str) -> None:
    content = write(tmp_path / "cells.h5ad").read_bytes()
    found = ask(service, "POST", f"/v1/{path}", content=content, headers={"content-type": kind})
    assert found.status_code == 415, found.text
    assert set(found.json()["error"]) == {"field", "got", "takes"}


def test_both_kinds_of_file_type_are_taken(service: Direct, tmp_path: Path) -> None:
    content = write(tmp_path / "cells.h5ad").read_bytes()
    for kind in ("application/octet-stream", "Application/X-HDF5; charset=binary"):
        found = ask(service, "POST", "/v1/classify", content=content, headers={"content-type": kind})
        assert found.status_code == 200, found.text


def test_a_request_that_is_given_up_ends_its_reader(
    served: ServedModel, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Seen(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Seen)
    service = Direct(served, ServeSettings())
    content = write(tmp_path / "cells.h5ad").read_bytes()

    async def give_up() -> None:
        transport = httpx.ASGITransport(create_api(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            asked = asyncio.create_task(client.post("/v1/classify", content=content, headers=HDF5))
            while not started:
                await asyncio.sleep(0.01)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked

    asyncio.run(give_up())
    assert started[0].wait(timeout=5) == -9
    assert [path.name for path in scratch.iterdir() if "upload" in path.name] == []


def test_a_reader_that_fails_is_a_fault_of_the_service(
    service: Direct, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(READER_ENVIRONMENT, "PYTHONHOME", "/nowhere")
    found = send(service, write(tmp_path / "cells.h5ad"))
    assert (found.status_code, found.json()["error"]["field"]) == (500, "server")


# ---------------------------------------------------------------------- the process


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-P", "-c", code], env=READER_ENVIRONMENT, capture_output=True, text=True)


def test_the_reader_loads_little() -> None:
    code = "import sys, serve.h5ad_reader; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = set(run_python(code).stdout.split())
    assert {"h5py", "geneformer_ray", "serve"} <= loaded
    assert not loaded & {"torch", "ray", "fastapi", "mlflow", "transformers", "anndata", "pandas", "zarr"}


@pytest.mark.skipif(sys.platform != "linux", reason="system calls are refused by Linux")
@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.socket()",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import subprocess; subprocess.run(['/bin/true'])",
        "import os; os.execv('/bin/true', ['true'])",
        "bytearray(2**29)",
        "import threading\ndef work():\n import socket\n socket.socket()\n"
        "import concurrent.futures as c; c.ThreadPoolExecutor(1).submit(work).result()",
    ],
)
def test_a_confined_process_reaches_nothing(code: str) -> None:
    before = "from serve.confinement import confine; confine(2**29, 20, 2**20)\n"
    assert run_python(code.replace("bytearray(2**29)", "1")).stderr.count("Operation not permitted") == 0
    failed = run_python(before + code)
    assert failed.returncode == 1
    assert "Operation not permitted" in failed.stderr or "MemoryError" in failed.stderr


def test_a_confined_process_computes_for_so_long() -> None:
    ended = run_python("from serve.confinement import confine; confine(2**30, 1, 2**20)\nwhile True: pass")
    assert ended.returncode < 0
