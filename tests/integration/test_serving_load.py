"""The service under load: requests of every kind at once, the alias moved back and forth, processes that are killed."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import mlflow
import numpy as np
import pytest

from geneformer_ray.compute.classifier import new_classifier
from geneformer_ray.compute.embedding import cell_embeddings
from geneformer_ray.compute.encoder import Encoder
from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.compute.model_directory import weights_digest
from geneformer_ray.compute.perturbation import PerturbationPlan
from geneformer_ray.compute.reading import Reading
from geneformer_ray.compute.shifts import shift_cell
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.manage.registry import WEIGHTS_TAG, open_store
from geneformer_ray.manage.runs import register
from serve.found_model import find_served_model
from serve.model import ServedModel
from tests.integration.processes import titles_below
from tests.unit.served import make_multitask

pytestmark = pytest.mark.integration

LABELS = ["alpha", "beta", "delta", "ductal"]
EXECUTION = choose_execution(cpus=1)
NAME, CLIENTS = "islets", 32
SEVERAL = 3  # the version of several tasks, whose first has the labels of the others


@dataclass(frozen=True)
class Service:
    """A running service of a registered model, and its versions offline: two of one task, and one of several."""

    url: str
    vocabulary: GeneVocabulary
    versions: dict[int, ServedModel]
    trunks: dict[int, Encoder]

    def champion(self, version: int) -> None:
        mlflow.MlflowClient().set_registered_model_alias(NAME, "champion", str(version))

    def serving(self) -> int:
        return int(httpx.get(f"{self.url}/v1/model", timeout=30).json()["version"])

    def make_champion(self, version: int) -> None:
        """Move the alias, and wait until it is followed."""
        self.champion(version)
        deadline = time.monotonic() + 60
        while self.serving() != version:
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.fixture(scope="module")
def service(
    model_directory: Path, vocabulary: GeneVocabulary, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    import torch

    from geneformer_ray.distribute.cluster import connected
    from serve.run import running
    from serve.settings import ServeSettings

    folder = tmp_path_factory.mktemp("load")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        uri = open_store(str(folder))
        client = mlflow.MlflowClient()
        experiment = client.get_experiment_by_name("geneformer-ray").experiment_id
        versions, trunks = {}, {}
        for seed in (1, 2, 3):
            directory = folder / f"model{seed}"
            if seed == SEVERAL:
                make_multitask(model_directory, vocabulary, directory)
            else:
                torch.manual_seed(seed)
                classifier, own = new_classifier(model_directory, vocabulary, LABELS, "mean")
                with torch.no_grad():
                    classifier.classifier.weight.normal_(std=2.0)
                classifier.save(directory, own)
            run = client.create_run(experiment).info.run_id
            tags = {WEIGHTS_TAG: weights_digest(directory)}
            number = register(run, f"digest{seed}", directory, NAME, tags, [[2, 3]]).version
            versions[number] = ServedModel(find_served_model(str(directory)), execution=EXECUTION)
            trunks[number] = Encoder.load(directory, layer=-1, execution=EXECUTION)
        client.set_registered_model_alias(NAME, "champion", "1")
        settings = {
            "model": f"models:/{NAME}@champion",
            "tracking_uri": uri,
            "cache_dir": str(folder / "cache"),
            "watch_s": 0.3,
            "batch_tokens": 64,
        }
        with connected(cpus=2), running(ServeSettings.read(settings)) as url:
            yield Service(url, vocabulary, versions, trunks)


# ---------------------------------------------------------------------- questions whose answers are known


@dataclass
class Tally:
    """What came back."""

    statuses: Counter[int | str] = field(default_factory=Counter)
    versions: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    # When the last answer before, and the first after a failure came.
    gaps: list[tuple[float, float]] = field(default_factory=list)
    failed_since: float | None = None
    last_good: float = field(default_factory=time.monotonic)

    def failed(self, what: int | str) -> None:
        self.statuses[what] += 1
        self.failed_since = self.failed_since or self.last_good

    def good(self, version: int, problem: str) -> None:
        self.statuses[200] += 1
        self.versions[version] += 1
        self.last_good = time.monotonic()
        if self.failed_since is not None:
            self.gaps.append((self.failed_since, self.last_good))
            self.failed_since = None
        if problem:
            self.wrong.append(problem)


Question = Callable[[httpx.AsyncClient, Service, np.random.Generator], Awaitable[tuple[httpx.Response, str]]]


def _cells(service: Service, rng: np.random.Generator) -> list[np.ndarray]:
    genes = np.arange(2, len(service.vocabulary), dtype=np.int32)
    return [rng.permutation(genes)[:length] for length in rng.integers(1, 16, size=rng.integers(1, 6))]


def _far(got: Any, wanted: Any) -> str:
    difference = float(np.max(np.abs(np.asarray(got, dtype=np.float64) - np.asarray(wanted, dtype=np.float64))))
    return "" if difference <= 1e-5 else f"differs by {difference}"


async def classify(client: httpx.AsyncClient, service: Service, rng: np.random.Generator) -> tuple[httpx.Response, str]:
    cells, top = _cells(service, rng), int(rng.integers(1, len(LABELS) + 1))
    body = {"cells": [{"input_ids": ids.tolist(), "cell_id": f"c{n}"} for n, ids in enumerate(cells)], "top": top}
    response = await client.post("/v1/classify", json=body)
    if response.status_code != 200:
        return response, ""
    answer = response.json()
    model = service.versions[answer["model"]["version"]]
    offline = model.classify(cells)
    for task, shares in model.by_task(offline).items():
        said = [cell["tasks"][task]["probability"] for cell in answer["cells"]]
        if problem := _far(said, shares.max(axis=1)):
            return response, f"classify {task} {problem}"
    for number, (cell, odds) in enumerate(zip(answer["cells"], offline[:, : len(LABELS)], strict=True)):
        order = np.argsort(-odds)[:top]
        if cell["cell_id"] != f"c{number}" or [one["label"] for one in cell["top"]] != [LABELS[i] for i in order]:
            return response, f"classify: {cell} for {odds}"
        if problem := _far([one["probability"] for one in cell["top"]], odds[order]):
            return response, f"classify {problem}"
    return response, ""


async def embed(client: httpx.AsyncClient, service: Service, rng: np.random.Generator) -> tuple[httpx.Response, str]:
    cells = _cells(service, rng)
    response = await client.post("/v1/embed", json={"cells": [{"input_ids": ids.tolist()} for ids in cells]})
    if response.status_code != 200:
        return response, ""
    answer = response.json()
    offline = cell_embeddings(service.trunks[answer["model"]["version"]], cells, service.vocabulary)
    problem = _far([cell["embedding"] for cell in answer["cells"]], offline)
    return response, problem and f"embed {problem}"


async def perturb(client: httpx.AsyncClient, service: Service, rng: np.random.Generator) -> tuple[httpx.Response, str]:
    genes = np.arange(2, len(service.vocabulary), dtype=np.int32)
    ids = rng.permutation(genes)[: rng.integers(4, 15)]
    chosen = rng.permutation(ids)[:3].tolist()
    what = str(rng.choice(["delete", "overexpress", "inhibit", "activate"]))
    names = [service.vocabulary.names[token] for token in chosen]
    body = {"cell": {"input_ids": ids.tolist()}, "genes": names, "perturbation": what}
    response = await client.post("/v1/perturb", json=body)
    if response.status_code != 200:
        return response, ""
    answer = response.json()
    plan = PerturbationPlan(what, tuple(chosen))
    offline = shift_cell(service.trunks[answer["model"]["version"]], ids, plan, Reading(), service.vocabulary)
    wanted = {
        service.vocabulary.names[event[0]]: value[0]
        for event, value in zip(offline.genes, offline.values_ES, strict=True)
    }
    got = {event["genes"][0]: event["similarity"] for event in answer["events"]}
    if got.keys() != wanted.keys():
        return response, f"perturb: {sorted(got)} for {sorted(wanted)}"
    problem = _far([got[name] for name in wanted], list(wanted.values()))
    return response, problem and f"perturb {what} {problem}"


async def load(service: Service, questions: list[Question], clients: int, until: Callable[[], bool]) -> Tally:
    """Ask from so many clients until told to stop."""
    tally = Tally()

    async def client(number: int) -> None:
        rng = np.random.default_rng(number)
        async with httpx.AsyncClient(base_url=service.url, timeout=60) as session:
            while not until():
                question = questions[int(rng.integers(len(questions)))]
                try:
                    response, problem = await question(session, service, rng)
                except httpx.TransportError as error:
                    tally.failed(type(error).__name__)
                    await asyncio.sleep(0.05)
                    continue
                if response.status_code == 200:
                    tally.good(response.json()["model"]["version"], problem)
                else:
                    tally.failed(response.status_code)
                    await asyncio.sleep(0.05)

    await asyncio.gather(*(client(number) for number in range(clients)))
    return tally


def for_seconds(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


# ---------------------------------------------------------------------- tests


def test_every_client_gets_its_own_answers(service: Service) -> None:
    tally = asyncio.run(load(service, [classify, classify, embed, perturb], CLIENTS, for_seconds(8)))
    assert tally.wrong == []
    assert set(tally.statuses) == {200}
    assert tally.statuses[200] >= 2 * CLIENTS


def test_clients_of_one_task_do_not_notice_several(service: Service) -> None:
    tally = asyncio.run(while_it_moves(service, [SEVERAL, 1, SEVERAL, 1]))
    assert tally.wrong == []
    assert set(tally.statuses) == {200}
    assert min(tally.versions[1], tally.versions[SEVERAL]) > 5


async def while_it_moves(service: Service, champions: list[int]) -> Tally:
    """Classify and embed from several clients while one version after the other becomes the champion."""
    done = False

    async def move() -> None:
        nonlocal done
        for champion in champions:
            await asyncio.to_thread(service.make_champion, champion)
            await asyncio.sleep(1)
        done = True

    mover = asyncio.create_task(move())
    tally = await load(service, [classify, embed], 16, lambda: done)
    await mover
    return tally


@pytest.mark.slow
def test_the_alias_moves_back_and_forth_and_nobody_notices(service: Service) -> None:
    tally = asyncio.run(while_it_moves(service, [2, 1, 2, 1, 2, 1]))
    assert tally.wrong == []
    assert set(tally.statuses) == {200}
    assert min(tally.versions[1], tally.versions[2]) > 10


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["ServeReplica", "ProxyActor"])
def test_a_killed_process_costs_errors_but_no_wrong_answer(
    service: Service, victim: str, record_property: Callable[[str, object], None]
) -> None:
    async def ask() -> Tally:
        async def kill() -> None:
            await asyncio.sleep(3)
            titles = await asyncio.to_thread(titles_below, os.getpid())
            (pid,) = [pid for pid, title in titles.items() if title.startswith("ray::") and victim in title]
            os.kill(pid, signal.SIGKILL)

        killer = asyncio.create_task(kill())
        tally = await load(service, [classify], 16, for_seconds(40))
        await killer
        return tally

    tally = asyncio.run(ask())
    errors = {what: count for what, count in tally.statuses.items() if what != 200}
    longest = max((after - before for before, after in tally.gaps), default=0.0)
    print(f"\n{victim} killed: {tally.statuses[200]} right, errors {errors}, recovered after {longest:.1f} s")
    record_property("recovery_s", round(longest, 1))
    assert tally.wrong == []
    assert tally.failed_since is None, "it did not come back"
    assert tally.statuses[200] > 50


@pytest.mark.slow
def test_a_client_that_leaves_and_a_deadline_free_their_place(service: Service) -> None:
    """Hundreds of requests that nobody waits for are not computed before the next one is answered."""
    genes = list(range(2, 17))
    body = {"cells": [{"input_ids": genes}] * 64}

    async def ask() -> tuple[float, float]:
        async with httpx.AsyncClient(base_url=service.url, timeout=60) as client:

            async def ask_many(leave_after: float | None) -> float:
                """Ask, leave or do not, and ask once more; the seconds until that is answered."""
                asked = [asyncio.create_task(client.post("/v1/classify", json=body)) for _ in range(48)]
                started = time.monotonic()
                if leave_after is not None:
                    await asyncio.sleep(leave_after)
                    for one in asked:
                        one.cancel()
                await asyncio.gather(*asked, return_exceptions=True)
                assert (await client.post("/v1/classify", json={"cells": [{"input_ids": genes}]})).status_code == 200
                return time.monotonic() - started

            everything = await ask_many(None)
            late = await client.post("/v1/classify", json=body, headers={"X-Deadline-Seconds": "0.0001"})
            assert (late.status_code, late.json()["error"]["field"]) == (504, "request")
            return everything, await ask_many(everything / 8)

    everything, abandoned = asyncio.run(ask())
    assert abandoned < everything / 2, (everything, abandoned)


@pytest.mark.slow
def test_who_comes_when_the_queue_is_full_is_told_when_to_come_again(service: Service) -> None:
    body = {"cells": [{"input_ids": list(range(2, 17))}] * 64}

    async def ask() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=500)
        async with httpx.AsyncClient(base_url=service.url, timeout=60, limits=limits) as client:
            return await asyncio.gather(*(client.post("/v1/classify", json=body) for _ in range(500)))

    answers = asyncio.run(ask())
    assert {answer.status_code for answer in answers} == {200, 503}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 503)
    offline = service.versions[service.serving()].classify([np.arange(2, 17, dtype=np.int32)])[0].max()
    for answer in answers:
        if answer.status_code == 200:
            assert abs(answer.json()["cells"][0]["probability"] - offline) < 1e-5
