"""The client against a real server on loopback: what it writes into an AnnData is what the library computes offline."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from scipy import sparse
from starlette.types import ASGIApp

from geneformer_ray.client import Client, ServiceError
from geneformer_ray.compute.embedding import cell_embeddings
from geneformer_ray.data.rank_value import RankValueEncoder
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError
from serve.api import create_api
from serve.keys import ApiKeys
from serve.model import ServedModel
from serve.settings import ServeSettings
from tests.unit.served import (
    LABELS,
    TASKS,
    Direct,
    make_islets,
    make_multitask,
    offline_odds,
    offline_odds_by_task,
    serve_directory,
)

KEY = "a-key-that-is-long-enough"
CELLS = 23
EMPTY = 7


@contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """Serve an application on a free port of loopback."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", ws="none", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def model(model_directory: Path, vocabulary: GeneVocabulary, tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    directory = tmp_path_factory.mktemp("served") / "islets"
    make_islets(model_directory, vocabulary, directory, "cls")
    return serve_directory(directory)


@pytest.fixture(scope="module")
def service(model: ServedModel) -> Direct:
    # So small that the cells need many requests, some of them cut by bytes.
    limits = {"max_cells": 5, "max_body_bytes": 1_500, "max_candidate_genes": 4}
    return Direct(model, ServeSettings.read({"model": str(model.directory), **limits}))


@pytest.fixture(scope="module")
def url(service: Direct) -> Iterator[str]:
    with serving(create_api(service)) as url:
        yield url


@pytest.fixture
def adata(vocabulary: GeneVocabulary, rng: np.random.Generator) -> anndata.AnnData:
    """Cells of very different sizes, one of them empty, genes in an order of their own, two of them unknown."""
    names = [*rng.permutation(vocabulary.genes), "NOSUCH1", "NOSUCH2"]
    counts = rng.poisson(rng.gamma(0.4, 4.0, size=(CELLS, len(names)))).astype(np.float32)
    counts[EMPTY] = 0
    obs = pd.DataFrame(index=[f"cell{number}" for number in range(CELLS)])
    return anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=names))


def sequences(adata: anndata.AnnData, model: ServedModel, vocabulary: GeneVocabulary) -> list[np.ndarray]:
    """The cells that express something, as the offline jobs encode them."""
    counts = adata.X.toarray()[[number for number in range(CELLS) if number != EMPTY]].astype(float)
    encoded = RankValueEncoder(vocabulary, list(adata.var_names)).encode(counts, counts.sum(axis=1))
    return [model.vocabulary.adapt(encoded.cell(number), vocabulary.digest) for number in range(len(counts))]


def test_cells_are_classified_as_offline(
    url: str, adata: anndata.AnnData, model: ServedModel, vocabulary: GeneVocabulary
) -> None:
    with Client(url) as client:
        client.classify(adata, probabilities=True)
    odds = offline_odds(model.directory, model.vocabulary, sequences(adata, model, vocabulary))
    answered = np.arange(CELLS) != EMPTY
    got = adata.obsm["class_probabilities"]
    assert list(got.columns) == LABELS and list(got.index) == list(adata.obs_names)
    np.testing.assert_allclose(got.to_numpy()[answered], odds, atol=1e-5)
    assert odds.std(axis=0).max() > 1e-3  # cells that were mixed up would show
    labels = np.array(LABELS)[odds.argmax(axis=1)]
    assert adata.obs["predicted_labels"][answered].tolist() == labels.tolist()
    np.testing.assert_allclose(adata.obs["conf_score"][answered], odds.max(axis=1), atol=1e-5)
    assert adata.obs["predicted_labels"].isna().tolist() == (~answered).tolist()
    assert np.isnan(adata.obs["conf_score"].iloc[EMPTY])
    assert adata.uns["geneformer_ray"]["predicted_labels"]["digest"] == model.digest


@pytest.mark.parametrize("form", ["dense", "csc", "layer", "raw", "column", "backed", "one at a time"])
def test_counts_may_lie_anywhere(url: str, adata: anndata.AnnData, tmp_path: Path, form: str) -> None:
    expected, options, at_once = adata.copy(), dict[str, Any](), 4
    with Client(url) as client:
        client.classify(expected)
    if form == "dense":
        adata.X = adata.X.toarray()
    elif form == "csc":
        adata.X = sparse.csc_matrix(adata.X)
    elif form == "layer":
        adata.layers["raw counts"], adata.X = adata.X.copy(), adata.X * 0.5
        options = {"counts": "layers/raw counts"}
    elif form == "raw":
        adata.raw = adata.copy()
        adata = adata[:, :3].copy()
        options = {"counts": "raw.X"}
    elif form == "column":
        adata.var["names"] = adata.var_names
        adata.var_names = [f"row{number}" for number in range(adata.n_vars)]
        options = {"gene_column": "names"}
    elif form == "backed":
        adata.write_h5ad(tmp_path / "cells.h5ad")
        adata = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    else:
        at_once = 1
    with Client(url, requests_at_once=at_once) as client:
        client.classify(adata, key_added="remote", **options)
    assert adata.obs["remote_predicted_labels"].tolist() == expected.obs["predicted_labels"].tolist()
    np.testing.assert_allclose(adata.obs["remote_conf_score"], expected.obs["conf_score"], atol=1e-6)
    if adata.isbacked:
        adata.file.close()
    else:
        adata.write_h5ad(tmp_path / "answered.h5ad")  # what was noted can be stored


def test_embeddings_are_the_offline_ones(
    url: str, adata: anndata.AnnData, model: ServedModel, vocabulary: GeneVocabulary
) -> None:
    cells = sequences(adata, model, vocabulary)
    with Client(url) as client:
        client.embed(adata)
        client.embed(adata, embedding="cls", key_added="X_cls")
    for name, kind in (("X_geneformer", "mean"), ("X_cls", "cls")):
        offline = cell_embeddings(model.trunk, cells, model.vocabulary, embedding=kind)
        got = adata.obsm[name]
        assert got.dtype == np.float32 and np.isnan(got[EMPTY]).all()
        np.testing.assert_allclose(np.delete(got, EMPTY, axis=0), offline, atol=1e-5)


def test_perturbations_come_as_a_ranked_table(url: str, adata: anndata.AnnData) -> None:
    expressed = [name for name in adata.var_names[np.argsort(-adata.X[3].toarray()[0])] if name.startswith("GENE")][:3]
    with Client(url) as client:
        table = client.perturb(adata, "cell3", [*expressed, expressed[0].lower()], goal="beta", affected_genes=2)
        joint = client.perturb(adata, "cell3", expressed[:2], "inhibit", rank_shift=2, together=True)
        with pytest.raises(ServiceError) as refused:
            client.perturb(adata, "cell3", ["GENE4"])
        with pytest.raises(ServiceError, match=r"ray_jobs\.screen"):
            client.perturb(adata, "cell3", [f"GENE0{number}" for number in range(5)])
        with pytest.raises(InputError, match="the name of 0 cells"):
            client.perturb(adata, "cell99", expressed)
    assert (refused.value.status, refused.value.field) == (422, "genes[0]")
    assert sorted(table["gene"]) == sorted(expressed)
    assert table["shift_to_beta"].is_monotonic_decreasing
    assert set(table.columns) >= {"similarity", "shift_to_alpha", *(f"change_{label}" for label in LABELS)}
    assert [len(affected) for affected in table["affected_genes"]] == [2, 2, 2]
    assert sum(table.attrs["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert [set(genes.split("+")) for genes in joint["gene"]] == [set(expressed[:2])]


def test_a_refusal_names_the_field(url: str, adata: anndata.AnnData) -> None:
    adata.X = adata.X * 0.5
    with Client(url) as client:
        with pytest.raises(ServiceError) as refused:
            client.classify(adata)
        client.classify(adata, allow_non_integer=True)
    assert refused.value.status == 422
    assert refused.value.field.startswith("cells[") and "fractions" in refused.value.got
    assert "raw counts" in refused.value.takes


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda adata: {"counts": "layers/none"}, "counts: got layers/none"),
        (lambda adata: {"counts": "raw.X"}, "counts: got raw.X"),
        (lambda adata: {"gene_column": "none"}, "gene_column: got none"),
        (lambda adata: adata.X.data.__setitem__(0, -1.0), "finite, not negative"),
        (lambda adata: adata.X.data.__setitem__(0, np.nan), "finite, not negative"),
    ],
)
def test_what_is_no_counts_is_not_sent(
    url: str, adata: anndata.AnnData, change: Callable[[anndata.AnnData], dict[str, str] | None], match: str
) -> None:
    options = change(adata) or {}
    with Client(url) as client, pytest.raises(InputError, match=match):
        client.classify(adata, **options)
    assert "predicted_labels" not in adata.obs


def test_a_cell_that_fits_no_request_is_named(service: Direct, adata: anndata.AnnData) -> None:
    settings = service.settings.model_copy(update={"max_genes": 3})
    with (
        serving(create_api(Direct(service.model, settings))) as url,
        Client(url) as client,
        pytest.raises(InputError, match="cells of up to 3 genes"),
    ):
        client.classify(adata)


def test_a_key_is_shown_where_one_is_needed(service: Direct, adata: anndata.AnnData) -> None:
    with serving(create_api(service, keys=ApiKeys(KEY))) as url:
        with Client(url, api_key=KEY) as client:
            client.classify(adata)
        with Client(url) as client, pytest.raises(ServiceError) as refused:
            client.model()
    assert (refused.value.status, refused.value.field) == (401, "Authorization")


def test_nobody_there_is_one_error(adata: anndata.AnnData) -> None:
    with serving(FastAPI()) as url:
        pass
    with Client(url) as client, pytest.raises(ServiceError, match="url: got no answer"):
        client.classify(adata)


# ---------------------------------------------------------------------- a service under load, and one that changes


def before(service: Direct, answer: Callable[[int, bytes], Response | None]) -> FastAPI:
    """The service's application behind a gate that may answer a classify request itself: by its number and body."""
    api = create_api(service)
    seen: list[float] = []

    @api.middleware("http")
    async def gate(request: Request, call_next: Any) -> Any:
        if request.url.path == "/v1/classify":
            seen.append(time.monotonic())
            gated = answer(len(seen) - 1, await request.body())
            if gated is not None:
                return gated
        return await call_next(request)

    api.state.seen = seen
    return api


def test_a_busy_service_is_asked_again_after_the_pause(service: Direct, adata: anndata.AnnData) -> None:
    busy = before(
        service, lambda number, _: Response("busy", (503, 429)[number], {"Retry-After": "1"}) if number < 2 else None
    )
    with serving(busy) as url, Client(url, requests_at_once=1) as client:
        client.classify(adata[:3].copy())
        first, second, third = busy.state.seen[:3]
        assert 1 <= second - first < 3 and 1 <= third - second < 3
    always = before(service, lambda *_: Response("busy", 503))
    with serving(always) as url, Client(url, retries=1) as client, pytest.raises(ServiceError) as refused:
        client.classify(adata[:3].copy())
    assert (refused.value.status, refused.value.field) == (503, "service")
    assert len(always.state.seen) == 2
    long = before(service, lambda *_: Response("busy", 503, {"Retry-After": "3600"}))
    with serving(long) as url, Client(url) as client, pytest.raises(ServiceError):
        client.classify(adata[:3].copy())
    assert len(long.state.seen) == 1


def test_answers_of_two_models_are_not_mixed(service: Direct, adata: anndata.AnnData) -> None:
    def other(body: bytes) -> Response:
        cells = [{"label": "x", "probability": 1.0, "top": []} for _ in json.loads(body)["cells"]]
        model = {"name": "islets", "version": 2, "digest": "another"}
        return Response(json.dumps({"cells": cells, "model": model}), media_type="application/json")

    swapped = before(service, lambda number, body: other(body) if number < 2 else None)
    with serving(swapped) as url, Client(url) as client:
        client.classify(adata)
    assert "x" not in adata.obs["predicted_labels"].cat.categories
    assert adata.uns["geneformer_ray"]["predicted_labels"]["digest"] == service.model.digest
    flickering = before(service, lambda number, body: other(body) if number % 2 else None)
    with (
        serving(flickering) as url,
        Client(url) as client,
        pytest.raises(ServiceError, match="a service whose model stays"),
    ):
        client.classify(adata)


# ---------------------------------------------------------------------- several tasks


@pytest.fixture(scope="module")
def several(model_directory: Path, vocabulary: GeneVocabulary, tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    directory = tmp_path_factory.mktemp("several") / "islets"
    make_multitask(model_directory, vocabulary, directory)
    return serve_directory(directory)


def columns(adata: anndata.AnnData) -> list[str]:
    return [*adata.obs.columns, *adata.obsm]


def test_every_task_has_its_columns(
    service: Direct, several: ServedModel, adata: anndata.AnnData, vocabulary: GeneVocabulary, tmp_path: Path
) -> None:
    cells = sequences(adata, several, vocabulary)
    odds = offline_odds_by_task(several.directory, several.vocabulary, cells)
    answered = np.arange(CELLS) != EMPTY
    with serving(create_api(Direct(several, service.settings))) as url, Client(url) as client:
        client.classify(adata, probabilities=True, key_added="remote")
        plain = adata[:3].copy()
        client.classify(plain, key_added="plain")
        nothing = adata[[EMPTY]].copy()
        client.classify(nothing, key_added="nothing")
        expressed = [name for name in adata.var_names[adata.X[3].toarray()[0] > 0] if name.startswith("GENE")][:2]
        table = client.perturb(adata, "cell3", expressed, goal="sex: male")
    for end, task in (("", "type"), *((f"_{task}", task) for task in TASKS)):
        got = adata.obsm[f"remote_class_probabilities{end}"]
        assert list(got.columns) == TASKS[task]
        np.testing.assert_allclose(got.to_numpy()[answered], odds[task], atol=1e-5)
        labels = adata.obs[f"remote_predicted_labels{end}"]
        assert labels[answered].tolist() == np.array(TASKS[task])[odds[task].argmax(axis=1)].tolist()
        score = adata.obs[f"remote_conf_score{end}"]
        np.testing.assert_allclose(score[answered], odds[task].max(axis=1), atol=1e-5)
        assert labels.isna().tolist() == score.isna().tolist() == (~answered).tolist()
        assert plain.obs[f"plain_predicted_labels{end}"].tolist() == labels[:3].tolist()
        assert nothing.obs[f"nothing_predicted_labels{end}"].isna().all()
    assert adata.uns["geneformer_ray"]["remote_predicted_labels"]["digest"] == several.digest
    adata.write_h5ad(tmp_path / "answered.h5ad")
    assert table["shift_to_sex: male"].is_monotonic_decreasing
    changes = [f"change_{task}: {label}" for task in TASKS for label in TASKS[task]]
    assert set(table.columns) >= {*changes, *(f"change_{label}" for label in LABELS)}
    np.testing.assert_array_equal(table["change_type: beta"], table["change_beta"])
    np.testing.assert_allclose(table["change_sex: male"] + table["change_sex: female"], 0, atol=1e-6)
    assert {task: list(said["probabilities"]) for task, said in table.attrs["tasks"].items()} == TASKS


def test_one_task_has_the_columns_that_it_always_had(url: str, adata: anndata.AnnData) -> None:
    with Client(url) as client:
        client.classify(adata, probabilities=True)
        expressed = [name for name in adata.var_names[adata.X[3].toarray()[0] > 0] if name.startswith("GENE")][:2]
        table = client.perturb(adata, "cell3", expressed)
    assert columns(adata) == ["predicted_labels", "conf_score", "class_probabilities"]
    shifts, changes = (f"shift_to_{state}" for state in ("alpha", "beta")), (f"change_{label}" for label in LABELS)
    assert list(table.columns) == ["gene", "symbol", "similarity", *shifts, *changes, "affected_genes"]
    assert list(table.attrs) == ["model", "probabilities", "skipped"]


def test_labels_are_those_of_the_model_that_answered(
    service: Direct, several: ServedModel, adata: anndata.AnnData
) -> None:
    """The model is replaced between being asked what it is and answering, there and back."""
    for probabilities in (False, True):
        replaced = Direct(service.model, service.settings)

        def swap(number: int, _: bytes, replaced: Direct = replaced) -> None:
            replaced.model = several if number == 0 else replaced.model

        with serving(before(replaced, swap)) as url, Client(url, requests_at_once=1) as client:
            client.classify(adata, probabilities=probabilities)
            assert adata.obs["predicted_labels_sex"].cat.categories.isin(TASKS["sex"]).all()
            assert adata.uns["geneformer_ray"]["predicted_labels"]["digest"] == several.digest
            replaced.model = service.model
            again = anndata.AnnData(adata.X, var=adata.var)
            client.classify(again, probabilities=probabilities)
            assert "predicted_labels_sex" not in again.obs
    assert list(adata.obsm["class_probabilities_sex"].columns) == TASKS["sex"]
