"""Real Ray Serve over real HTTP: every answer is the offline one, however requests are batched."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from geneformer_ray.compute.classifier import CellClassifier, new_classifier, predict_logits
from geneformer_ray.compute.encoder import Encoder
from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.compute.perturbation import PerturbationPlan
from geneformer_ray.compute.reading import Reading
from geneformer_ray.compute.shifts import shift_cell
from geneformer_ray.data.rank_value import RankValueEncoder
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError

pytestmark = pytest.mark.integration

LABELS = ["alpha", "beta", "delta", "ductal"]
EXECUTION = choose_execution(cpus=1)


@dataclass(frozen=True)
class Served:
    """A running service and the same model offline."""

    client: httpx.Client
    directory: Path
    vocabulary: GeneVocabulary
    model: CellClassifier

    def classify(self, body: dict[str, Any]) -> httpx.Response:
        return self.client.post("/v1/classify", json=body)

    def offline(self, sequences: list[np.ndarray]) -> np.ndarray:
        logits = predict_logits(self.model, sequences, self.vocabulary.pad_id, execution=EXECUTION)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return odds / odds.sum(axis=1, keepdims=True)


@pytest.fixture(scope="module")
def served(
    model_directory: Path, vocabulary: GeneVocabulary, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """A `cls` classifier, whose vocabulary extends the one that its cells were encoded with."""
    import torch

    from geneformer_ray.distribute.cluster import connected
    from serve.run import running
    from serve.settings import ServeSettings

    directory = tmp_path_factory.mktemp("served") / "islets"
    torch.manual_seed(1)
    classifier, own = new_classifier(model_directory, vocabulary, LABELS, "cls")
    with torch.no_grad():
        classifier.classifier.weight.normal_(std=2.0)
    classifier.save(directory, own)
    states = np.random.default_rng(3).normal(size=(2, 16)).round(4)
    (directory / "states.json").write_text(json.dumps({"alpha": states[0].tolist(), "beta": states[1].tolist()}))

    settings = ServeSettings.read(
        {
            "model": str(directory),
            "max_cells": 8,
            "max_candidate_genes": 4,
            "max_body_bytes": 65_536,
            "batch_tokens": 64,
        }
    )
    with connected(cpus=2):
        started = time.monotonic()
        with running(settings) as url, httpx.Client(base_url=url, timeout=30) as client:
            print(f"\nserving after {time.monotonic() - started:.1f} s")
            yield Served(client, directory, own, CellClassifier.load(directory, own))
        stopping = time.monotonic()
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/v2/health/live", timeout=2)
        print(f"\nstopped and checked in {time.monotonic() - stopping:.1f} s")


def test_health_and_model(served: Served) -> None:
    assert served.client.get("/v2/health/live").json() == {"live": True}
    assert served.client.get("/v2/health/ready").json() == {"ready": True}
    model = served.client.get("/v1/model").json()
    assert (model["name"], model["pooling"], model["labels"]) == ("islets", "cls", LABELS)
    assert model["vocabulary_digest"] == served.vocabulary.digest
    assert model["states"] == ["alpha", "beta"]


def test_counts_and_token_ids_give_the_offline_answer(
    served: Served, vocabulary: GeneVocabulary, rng: np.random.Generator
) -> None:
    counts = rng.integers(0, 30, size=(5, len(vocabulary.genes)))
    counts[0, 3:] = 0
    encoded = RankValueEncoder(vocabulary, vocabulary.genes).encode(counts.astype(float), counts.sum(axis=1))
    parents = [encoded.cell(i) for i in range(len(counts))]
    offline = served.offline([served.vocabulary.adapt(ids, vocabulary.digest) for ids in parents])
    by_counts = [
        {"counts": {gene: int(n) for gene, n in zip(vocabulary.genes, row, strict=True) if n}, "cell_id": f"c{i}"}
        for i, row in enumerate(counts)
    ]
    by_ids = [{"input_ids": ids.tolist(), "cell_id": f"c{i}"} for i, ids in enumerate(parents)]
    for cells in (by_counts, by_ids):
        answer = served.classify({"cells": cells, "top": len(LABELS)})
        assert answer.status_code == 200, answer.text
        for i, cell in enumerate(answer.json()["cells"]):
            got = {item["label"]: item["probability"] for item in cell["top"]}
            np.testing.assert_allclose([got[label] for label in LABELS], offline[i], atol=1e-5)
            assert (cell["cell_id"], cell["label"]) == (f"c{i}", LABELS[offline[i].argmax()])
            assert cell["unknown_share"] == 0


def test_concurrent_requests_get_their_own_answers(
    served: Served, vocabulary: GeneVocabulary, rng: np.random.Generator
) -> None:
    genes = np.arange(2, len(vocabulary), dtype=np.int32)
    requests = []
    for number in range(48):
        lengths = rng.integers(1, 16, size=rng.integers(1, 6))
        cells = [rng.permutation(genes)[:length] for length in lengths]
        requests.append((number % len(LABELS) + 1, cells))

    def ask(request: tuple[int, list[np.ndarray]]) -> dict[str, Any]:
        top, cells = request
        answer = served.classify({"cells": [{"input_ids": ids.tolist()} for ids in cells], "top": top})
        assert answer.status_code == 200, answer.text
        return answer.json()

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, requests))
    for (top, cells), answer in zip(requests, answers, strict=True):
        offline = served.offline([served.vocabulary.adapt(ids, vocabulary.digest) for ids in cells])
        for cell, odds in zip(answer["cells"], offline, strict=True):
            order = np.argsort(-odds)[:top]
            assert [item["label"] for item in cell["top"]] == [LABELS[i] for i in order]
            np.testing.assert_allclose([item["probability"] for item in cell["top"]], odds[order], atol=1e-5)


def test_perturbing_gives_the_screens_numbers(served: Served, vocabulary: GeneVocabulary) -> None:
    ids = np.array([9, 4, 21, 30, 17, 2], dtype=np.int32)
    adapted = served.vocabulary.adapt(ids, vocabulary.digest)
    encoder = Encoder.load(served.directory, layer=-1, execution=EXECUTION)
    given = json.loads((served.directory / "states.json").read_text())
    names = {vocabulary.names[token]: token for token in (21, 9)}
    body: dict[str, Any] = {"cell": {"input_ids": ids.tolist()}, "genes": [*names, "GENE39"], "goal": "beta"}
    response = served.client.post("/v1/perturb", json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["skipped"] == [{"genes": ["GENE39"], "reason": "not expressed in the cell"}]
    plan = PerturbationPlan("delete", tuple(names.values()))
    states = {state: np.array(vector, dtype=np.float32) for state, vector in given.items()}
    similarity, shifts = (
        dict(zip(found.genes, found.values_ES, strict=True))
        for found in (
            shift_cell(encoder, adapted, plan, reading, served.vocabulary)
            for reading in (Reading(), Reading(states=states))
        )
    )
    towards = [event["shifts"]["beta"] for event in answer["events"]]
    assert towards == sorted(towards, reverse=True)
    assert {event["genes"][0] for event in answer["events"]} == names.keys()
    for event in answer["events"]:
        token = names[event["genes"][0]]
        np.testing.assert_allclose(event["similarity"], similarity[(token,)][0], atol=1e-5)
        np.testing.assert_allclose([event["shifts"][state] for state in states], shifts[(token,)], atol=1e-5)
        after, before = served.offline([adapted[adapted != token], adapted])
        np.testing.assert_allclose(list(event["probability_change"].values()), after - before, atol=1e-5)


def test_errors_have_one_body(served: Served) -> None:
    cell = {"counts": {"GENE01": 3}}
    for body, status, field in (
        ({"cells": [{"counts": {"GENE01": -1}}]}, 422, "cells[0].counts.GENE01"),
        ({"cells": [cell], "best": 2}, 422, "best"),
        ({"cells": [cell] * 9}, 413, "cells"),
        ({"cells": [{"counts": {"x" * 70_000: 1}}]}, 413, "body"),
    ):
        answer = served.classify(body)
        assert (answer.status_code, answer.json()["error"]["field"]) == (status, field), answer.text
    many = served.client.post("/v1/perturb", json={"cell": cell, "genes": ["GENE01"] * 5})
    assert many.status_code == 413
    assert "ray_jobs.screen" in many.json()["error"]["takes"]
    unknown = served.client.post("/v1/perturb", json={"cell": cell, "genes": ["GENE4"]})
    assert unknown.status_code == 422
    assert "nearest: GENE" in unknown.json()["error"]["takes"]
    missing = served.client.get("/v1/nothing")
    assert (missing.status_code, missing.json()["error"]["field"]) == (404, "path")


def test_a_second_service_does_not_end_the_first(served: Served) -> None:
    from serve.run import running
    from serve.settings import ServeSettings

    settings = ServeSettings.read({"model": str(served.directory)})
    with pytest.raises(InputError, match="running already"), running(settings):
        pass
    assert served.client.get("/v2/health/ready").status_code == 200


def test_the_deploy_configuration_is_valid() -> None:
    import yaml
    from ray.serve.schema import ServeDeploySchema

    from serve import app

    content = yaml.safe_load((Path(app.__file__).parent / "config.yaml").read_text())
    config = ServeDeploySchema.model_validate(content)
    (application,) = config.applications
    assert application.import_path == "serve.app:build"
    built: Any = app.build(application.args)
    # A name that no deployment has would only fail on the cluster.
    assert [item["name"] for item in content["applications"][0]["deployments"]] == [built._bound_deployment.name]
