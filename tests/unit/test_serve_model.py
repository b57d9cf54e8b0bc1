"""Serving without Ray or a socket: what a served model answers is what the library computes offline."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from scipy import sparse
from scipy.special import softmax

from geneformer_ray.compute.classifier import POOLINGS, CellClassifier, new_classifier, predict_logits
from geneformer_ray.compute.encoder import Encoder
from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.compute.perturbation import PerturbationPlan
from geneformer_ray.compute.reading import Reading
from geneformer_ray.compute.shifts import shift_cell
from geneformer_ray.data.rank_value import RankValueEncoder
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError, UnknownGeneError
from serve.api import create_api
from serve.found_model import FoundModel, find_served_model
from serve.model import ServedModel
from serve.settings import ServeSettings

LABELS = ["alpha", "beta", "delta", "ductal"]
EXECUTION = choose_execution(cpus=1)


def make_classifier(trunk: Path, vocabulary: GeneVocabulary, pooling: str, directory: Path) -> GeneVocabulary:
    import torch

    torch.manual_seed(1)
    model, own = new_classifier(trunk, vocabulary, LABELS, pooling)
    with torch.no_grad():
        model.classifier.weight.normal_(std=2.0)
    model.save(directory, own)
    return own


def serve_directory(directory: Path) -> ServedModel:
    return ServedModel(find_served_model(str(directory)), execution=EXECUTION)


@pytest.fixture(scope="module")
def directory(model_directory: Path, vocabulary: GeneVocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mean-pooled classifier with two states."""
    path = tmp_path_factory.mktemp("served") / "islets"
    make_classifier(model_directory, vocabulary, "mean", path)
    states = np.random.default_rng(3).normal(size=(2, 16)).round(4)
    (path / "states.json").write_text(json.dumps({"alpha": states[0].tolist(), "beta": states[1].tolist()}))
    return path


@pytest.fixture(scope="module")
def served(directory: Path) -> ServedModel:
    return serve_directory(directory)


def some_counts(vocabulary: GeneVocabulary, rng: np.random.Generator, genes: int) -> dict[str, float]:
    names = rng.permutation(vocabulary.genes)[:genes]
    return {str(name): float(rng.integers(1, 40)) for name in names}


# ---------------------------------------------------------------------- the model


@pytest.mark.parametrize("pooling", POOLINGS)
def test_counts_give_the_offline_probabilities(
    pooling: str, model_directory: Path, vocabulary: GeneVocabulary, tmp_path: Path, rng: np.random.Generator
) -> None:
    own = make_classifier(model_directory, vocabulary, pooling, tmp_path / "model")
    served = serve_directory(tmp_path / "model")
    cells = [some_counts(vocabulary, rng, genes) for genes in (3, 12, 30)]
    answer = served.classify([served.encode(cell).input_ids for cell in cells])

    # Offline the cells are rows of one matrix with a column for every gene, encoded with the vocabulary they came with.
    matrix = sparse.csr_array(np.array([[cell.get(gene, 0.0) for gene in vocabulary.genes] for cell in cells]))
    encoded = RankValueEncoder(vocabulary, vocabulary.genes).encode(matrix, matrix.sum(axis=1))
    sequences = [own.adapt(encoded.cell(i), vocabulary.digest) for i in range(len(cells))]
    model = CellClassifier.load(tmp_path / "model", own)
    offline = softmax(predict_logits(model, sequences, own.pad_id, execution=EXECUTION), axis=1)
    np.testing.assert_allclose(answer, offline, atol=1e-6)
    assert answer.std(axis=0).max() > 1e-3  # the cells differ, so that a mix-up would show


def test_the_extended_vocabulary_encodes_as_its_parent_adapted(
    model_directory: Path, vocabulary: GeneVocabulary, tmp_path: Path, rng: np.random.Generator
) -> None:
    own = make_classifier(model_directory, vocabulary, "cls", tmp_path / "model")
    served = serve_directory(tmp_path / "model")
    assert own.parent_digest == vocabulary.digest
    for genes in (1, 15, 16, 30):  # below, at and above the sixteen positions
        counts = some_counts(vocabulary, rng, genes)
        values = np.array([list(counts.values())])
        parent = RankValueEncoder(vocabulary, list(counts)).encode(values, values.sum(axis=1)).cell(0)
        direct = served.encode(counts).input_ids
        np.testing.assert_array_equal(direct, own.adapt(parent, vocabulary.digest))
        np.testing.assert_array_equal(direct, served.accept(parent.tolist()).input_ids)
        np.testing.assert_array_equal(direct, served.accept(direct.tolist()).input_ids)


def test_genes_are_found_as_offline_and_unknown_ones_counted(directory: Path, served: ServedModel) -> None:
    counts = {"GENE01": 3.0, "gene02": 9.0, "NOSUCH1": 5.0, "NOSUCH2": 1.0, "NOSUCH3": 0.0}
    cell = served.encode(counts)
    assert [served.vocabulary.names[token] for token in cell.input_ids] == ["GENE02", "GENE01"]
    assert cell.unknown_share == pytest.approx(0.5)  # a gene without a count is not expressed
    np.testing.assert_array_equal(served.encode(counts, total=500.0).input_ids, cell.input_ids)


@pytest.mark.parametrize(
    ("counts", "takes"),
    [
        ({}, "expressed"),
        ({"GENE01": 0.0}, "expressed"),
        ({"NOSUCH": 3.0}, "names that the vocabulary knows"),
        ({"GENE01": 0.0, "NOSUCH": 3.0}, "at least one"),
        ({"GENE01": 0.5}, "allow_non_integer"),
    ],
)
def test_cells_without_an_encoding_are_refused(served: ServedModel, counts: dict[str, float], takes: str) -> None:
    with pytest.raises(InputError, match=takes) as error:
        served.encode(counts, field="cells[0].counts")
    assert error.value.field == "cells[0].counts"


def test_token_ids_are_checked(served: ServedModel, vocabulary: GeneVocabulary) -> None:
    for ids, takes in (
        ([], "at least one"),
        ([len(vocabulary)], "below 42"),
        ([5, 5], "each gene once"),
        ([5, vocabulary.pad_id], "no padding"),
        ([5, vocabulary.mask_id, 6], "only at the ends"),
        (list(range(2, 19)), "up to 16"),
    ):
        with pytest.raises(InputError, match=takes):
            served.accept(ids)


def test_counts_are_refused_without_medians(directory: Path, tmp_path: Path, vocabulary: GeneVocabulary) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    for file in ("config.json", "model.safetensors"):
        (copy / file).write_bytes((directory / file).read_bytes())
    dataclasses.replace(vocabulary, medians={}).save(str(copy))
    served = serve_directory(copy)
    assert served.classify([served.accept([4, 7]).input_ids]).shape == (1, len(LABELS))
    with pytest.raises(InputError, match="no medians"):
        served.encode({"GENE01": 3.0})


@pytest.mark.parametrize("together", [False, True])
def test_perturbing_gives_the_screens_numbers(
    served: ServedModel, directory: Path, vocabulary: GeneVocabulary, together: bool
) -> None:
    ids = np.array([9, 4, 21, 30, 17, 2], dtype=np.int32)
    names = [vocabulary.names[token] for token in (21, 9)]
    encoder = Encoder.load(directory, layer=-1, execution=EXECUTION)
    plan = PerturbationPlan("delete", (21, 9), together)
    events = [[21, 9]] if together else [[21], [9]]
    for states in ((), ("beta", "alpha")):
        reading = Reading(states={state: served.states[state] for state in states})
        offline = shift_cell(encoder, ids, plan, reading, vocabulary)
        result = served.perturb(ids, names, together=together, states=states)
        np.testing.assert_allclose(result.values_ES, offline.values_ES, atol=1e-6)
        assert result.genes == [[vocabulary.names[token] for token in event] for event in events]
        after = served.classify([ids[~np.isin(ids, event)] for event in events])
        np.testing.assert_allclose(result.changes_EC, after - served.classify([ids]), atol=1e-6)


def test_genes_that_make_no_event_are_named(served: ServedModel) -> None:
    ids = np.array([9, 4], dtype=np.int32)
    names = [served.vocabulary.names[token] for token in (9, 9, 21)]
    result = served.perturb(ids, names)
    assert result.genes == [[names[0]]]  # named twice, perturbed once
    assert result.absent == [names[2]]
    assert served.perturb(ids, names, together=True).genes == []
    only = served.perturb(ids[:1], names)
    assert (only.genes, only.without_comparison) == ([], [[names[0]]])
    with pytest.raises(UnknownGeneError, match=r"genes\[1\].*nearest: GENE"):
        served.perturb(ids, [names[0], "GENE0X"])


def test_a_registered_champion_is_served(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from geneformer_ray.manage import registry
    from geneformer_ray.manage.promotion import promote
    from geneformer_ray.manage.runs import RunRecord, log_run, register

    store = tmp_path / "store"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    uri = registry.open_store(str(store))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # put back at the end
    run_id = log_run(RunRecord("one", "a run", parameters={}, metrics={"macro_f1": 0.5}))
    for digest in ("first", "second"):
        version = register(run_id, digest, directory, "islets", {"choosing_macro_f1": "0.5"}, [[4, 5]])
    promote("islets", 1)
    for model, number in (("models:/islets@champion", 1), ("models:/islets/2", 2)):
        served = ServedModel(find_served_model(model, uri), execution=EXECUTION)
        assert (served.name, served.version, served.labels) == ("islets", number, LABELS)
        assert served.digest == serve_directory(directory).digest
        assert set(served.states) == {"alpha", "beta"}
    assert version.version == 2
    for model in ("models:/islets@nobody", "models:/nothing@champion", "models:/islets/9", "models:/islets"):
        with pytest.raises(InputError, match=r"^model: "):
            find_served_model(model, uri)
    with pytest.raises(InputError, match="tracking_uri"):
        find_served_model("models:/islets@champion", f"sqlite:///{tmp_path}/elsewhere.db")


def test_states_of_another_width_are_refused(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "states.json").write_text('{"alpha": [1.0, 2.0]}')
    for file in ("config.json", "model.safetensors", "vocabulary.json"):
        (tmp_path / file).write_bytes((directory / file).read_bytes())
    with pytest.raises(InputError, match="16 finite numbers"):
        serve_directory(tmp_path)


# ---------------------------------------------------------------------- the settings


def test_settings_come_from_the_environment_and_args_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GENEFORMER_SERVE_MAX_CELLS", "7")
    monkeypatch.setenv("GENEFORMER_SERVE_BATCH_WAIT_S", "0.5")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    (tmp_path / "model").mkdir()
    settings = ServeSettings.read({"max_cells": 9, "model": "model"})
    assert (settings.max_cells, settings.batch_wait_s) == (9, 0.5)
    assert settings.model == str(tmp_path / "model")
    assert settings.tracking_uri == "http://mlflow:5000"
    assert ServeSettings.read().model == "models:/geneformer@champion"
    for args, field in (({"max_cell": 3}, "max_cell"), ({"num_cpus": 0}, "num_cpus"), ({"batch_tokens": "x"}, "batch")):
        with pytest.raises(InputError, match=f"^{field}"):
            ServeSettings.read(args)


def test_the_deploy_configuration_names_real_settings() -> None:
    content = yaml.safe_load((Path(__file__).parents[2] / "serve" / "config.yaml").read_text())
    settings = ServeSettings.read(content["applications"][0]["args"])
    defaults = {name: field.default for name, field in ServeSettings.model_fields.items() if name != "tracking_uri"}
    assert settings.model_dump(exclude={"tracking_uri"}) == defaults
    assert content["http_options"]["host"] == "127.0.0.1"


# ---------------------------------------------------------------------- the routes


class Direct:
    """Computes where it stands."""

    def __init__(self, model: ServedModel, settings: ServeSettings) -> None:
        self.model = model
        self.settings = settings

    async def vectors(self, model: ServedModel, sequences: Sequence[np.ndarray], what: Any) -> np.ndarray:
        return model.vectors(sequences, what)

    async def run(self, work: Callable[[], Any]) -> Any:
        return work()


def ask(service: Direct, method: str, path: str, **options: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(create_api(service)), base_url="http://test"
        ) as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


@pytest.fixture(scope="module")
def service(served: ServedModel) -> Direct:
    return Direct(
        served, ServeSettings(max_cells=3, max_genes=20, max_candidate_genes=3, max_body_bytes=4096, batch_tokens=16)
    )


CELL = {"counts": {"GENE01": 3, "GENE02": 9}}
PERTURB = {"cell": CELL, "genes": ["GENE01"]}


def test_a_request_larger_than_a_batch_keeps_its_order(service: Direct, served: ServedModel) -> None:
    cells = [[4, 5], [9, 8, 7, 6, 5, 4, 3, 2], [11]]
    answer = ask(service, "POST", "/v1/classify", json={"cells": [{"input_ids": ids} for ids in cells], "top": 9})
    assert answer.status_code == 200, answer.text
    offline = served.classify([np.array(ids) for ids in cells])
    for number, (cell, expected) in enumerate(zip(answer.json()["cells"], offline, strict=True)):
        assert cell["cell_id"] == str(number)
        assert [item["label"] for item in cell["top"]] == [LABELS[i] for i in np.argsort(-expected)]
        np.testing.assert_allclose([item["probability"] for item in cell["top"]], -np.sort(-expected), atol=1e-6)


@pytest.mark.parametrize("perturbation", ["overexpress", "inhibit", "activate"])
def test_every_perturbation_is_that_of_the_screen(
    service: Direct, served: ServedModel, directory: Path, perturbation: str
) -> None:
    """GENE30 is not in the cell: only overexpression has an event for it."""
    names = [f"GENE{number:02d}" for number in range(1, 9)]
    cell = {"counts": {name: 40 - 4 * number for number, name in enumerate(names)}}
    body = {"cell": cell, "genes": ["GENE05", "GENE30"], "perturbation": perturbation}
    if perturbation != "overexpress":
        body["rank_shift"] = 2
    answer = ask(service, "POST", "/v1/perturb", json=body)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    tokens = served.vocabulary.tokens
    plan = PerturbationPlan(perturbation, (tokens["GENE05"], tokens["GENE30"]), rank_shift=body.get("rank_shift", 1))
    ids = served.encode(cell["counts"]).input_ids
    encoder = Encoder.load(directory, execution=EXECUTION)
    offline = shift_cell(encoder, ids, plan, Reading(), served.vocabulary)
    genes = ["GENE05", "GENE30"] if perturbation == "overexpress" else ["GENE05"]
    assert [event["genes"] for event in found["events"]] == [[gene] for gene in genes]
    np.testing.assert_allclose([event["similarity"] for event in found["events"]], offline.values_ES[:, 0], atol=1e-6)
    assert [event["genes"] for event in found["skipped"]] == ([] if perturbation == "overexpress" else [["GENE30"]])


@pytest.mark.parametrize(
    ("path", "body", "status", "field"),
    [
        ("classify", {}, 422, "cells"),
        ("classify", {"cells": []}, 422, "cells"),
        ("classify", {"cells": [{}]}, 422, "cells[0]"),
        ("classify", {"cells": [CELL | {"input_ids": [3]}]}, 422, "cells[0]"),
        ("classify", {"cells": [CELL], "tops": 3}, 422, "tops"),
        ("classify", {"cells": [CELL], "top": 0}, 422, "top"),
        ("classify", {"cells": [CELL], "top": "3"}, 422, "top"),
        ("classify", {"cells": [{"counts": {"GENE01": -1}}]}, 422, "cells[0].counts.GENE01"),
        ("classify", {"cells": [{"counts": {"GENE01": "3"}}]}, 422, "cells[0].counts.GENE01"),
        ("classify", {"cells": [{"counts": {"GENE01": True}}]}, 422, "cells[0].counts.GENE01"),
        ("classify", {"cells": [{"counts": {"GENE01": 0.5}}]}, 422, "cells[0].counts"),
        ("classify", {"cells": [CELL, {"counts": {"NOSUCH": 1}}]}, 422, "cells[1].counts"),
        ("classify", {"cells": [CELL | {"total": 0}]}, 422, "cells[0].total"),
        ("classify", {"cells": [{"input_ids": [3, -1]}]}, 422, "cells[0].input_ids[1]"),
        ("classify", {"cells": [{"input_ids": [3.5]}]}, 422, "cells[0].input_ids[0]"),
        ("classify", {"cells": [{"input_ids": [3, 4], "total": 5}]}, 422, "cells[0]"),
        ("classify", {"cells": [{"input_ids": [3, 400]}]}, 422, "cells[0].input_ids"),
        ("classify", {"cells": [CELL] * 4}, 413, "cells"),
        ("classify", {"cells": [{"input_ids": list(range(2, 24))}]}, 413, "cells[0].input_ids"),
        ("classify", {"cells": [{"counts": {f"G{i}": 1 for i in range(21)}}]}, 413, "cells[0].counts"),
        ("classify", {"cells": [{"counts": {"G" * 90: 1} | {"x" * 5000: 1}}]}, 413, "body"),
        ("perturb", {"cell": CELL, "genes": []}, 422, "genes"),
        ("perturb", {"cell": CELL, "genes": ["GENE0X"]}, 422, "genes[0]"),
        ("perturb", PERTURB | {"rank_shift": 2}, 422, "rank_shift"),
        ("perturb", PERTURB | {"perturbation": "inhibit", "rank_shift": 4}, 422, "rank_shift"),
        ("perturb", PERTURB | {"perturbation": "knit"}, 422, "perturbation"),
        ("perturb", PERTURB | {"goal": "gamma"}, 422, "goal"),
        ("perturb", {"cell": CELL, "genes": ["A", "B", "C", "D"]}, 413, "genes"),
    ],
)
def test_bad_bodies_are_refused_with_the_field(
    service: Direct, path: str, body: dict[str, Any], status: int, field: str
) -> None:
    answer = ask(service, "POST", f"/v1/{path}", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["field"]) == (status, field), answer.text
    assert set(error) == {"field", "got", "takes"}
    assert all(error.values())


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"cells": [{"counts": {"GENE01": NaN}}]}', b'{"cells": [{"counts": {"\\ud800": 1}}]}'],
)
def test_hostile_bodies_are_refused(service: Direct, content: bytes) -> None:
    answer = ask(service, "POST", "/v1/classify", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 422, answer.text
    assert set(answer.json()["error"]) == {"field", "got", "takes"}


def test_a_body_without_an_announced_length_is_limited_too(service: Direct) -> None:
    async def pieces() -> Any:
        for _ in range(10):
            yield b" " * 1000

    answer = ask(service, "POST", "/v1/classify", content=pieces())
    assert (answer.status_code, answer.json()["error"]["field"]) == (413, "body")


def test_answers_beside_the_way(service: Direct, served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(service, "GET", "/v2/health/live").json() == {"live": True}
    assert ask(service, "GET", "/v2/health/ready").json() == {"ready": True}
    assert ask(service, "GET", "/v1/model").json() == {
        "name": "islets",
        "version": None,
        "digest": served.digest,
        "pooling": "mean",
        "labels": LABELS,
        "vocabulary_digest": served.vocabulary.digest,
        "encodes_counts": True,
        "max_length": 16,
        "states": ["alpha", "beta"],
    }
    missing = ask(service, "GET", "/v1/nothing")
    assert (missing.status_code, missing.json()["error"]["field"]) == (404, "path")
    wrong = ask(service, "GET", "/v1/classify")
    assert (wrong.status_code, wrong.json()["error"]["field"]) == (405, "method")
    assert "/v1/perturb" in ask(service, "GET", "/openapi.json").json()["paths"]

    def broken(_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(service.model, "logits", broken)
    fault = ask(service, "POST", "/v1/classify", json={"cells": [CELL]})
    assert fault.status_code == 500
    assert "secret" not in fault.text
    assert fault.json()["error"]["field"] == "server"


def test_perturb_answers_each_event(service: Direct, served: ServedModel) -> None:
    counts = {"GENE01": 3, "GENE02": 9, "GENE03": 5}
    body = {"cell": {"counts": counts, "cell_id": "c"}, "genes": ["gene02", "GENE09"], "goal": "beta"}
    answer = ask(service, "POST", "/v1/perturb", json=body).json()
    offline = served.perturb(served.encode(counts).input_ids, ["GENE02"], states=["beta"])
    (event,) = answer["events"]
    assert (answer["cell_id"], event["genes"], event["similarity"]) == ("c", ["GENE02"], None)
    assert event["shifts"] == {"beta": pytest.approx(float(offline.values_ES[0, 0]), abs=1e-6)}
    assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert sum(event["probability_change"].values()) == pytest.approx(0, abs=1e-5)
    assert answer["skipped"] == [{"genes": ["GENE09"], "reason": "not expressed in the cell"}]
    without = ask(service, "POST", "/v1/perturb", json={k: v for k, v in body.items() if k != "goal"}).json()
    assert without["events"][0]["shifts"] is None
    assert -1 <= without["events"][0]["similarity"] < 1


def test_a_model_of_one_layer_classifies_only(tmp_path: Path, vocabulary: GeneVocabulary) -> None:
    from geneformer_ray.compute.model_directory import save_model
    from geneformer_ray.compute.pretraining import new_model

    save_model(new_model(vocabulary, layers=1, width=16, heads=2, feed_forward=24), vocabulary, tmp_path / "trunk")
    make_classifier(tmp_path / "trunk", vocabulary, "mean", tmp_path / "model")
    served = ServedModel(FoundModel(tmp_path / "model", "one", None), execution=EXECUTION)
    ids = np.array([4, 7], dtype=np.int32)
    assert served.classify([ids]).shape == (1, len(LABELS))
    with pytest.raises(InputError, match="one layer"):
        served.perturb(ids, ["GENE01"])
