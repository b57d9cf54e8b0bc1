"""Another version takes the place of the one that serves, or does not: a real registry, no Ray."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch

from geneformer_ray.compute.classifier import new_classifier
from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.compute.gene_classifier import new_gene_classifier
from geneformer_ray.compute.model_directory import weights_digest
from geneformer_ray.compute.multitask import new_multitask_classifier
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError, RegistryUnavailable
from geneformer_ray.manage.registry import WEIGHTS_TAG, open_store
from geneformer_ray.manage.runs import register
from serve.found_model import ModelSource
from serve.model import ServedModel
from serve.model_cache import ModelCache
from serve.settings import ServeSettings
from serve.watcher import TRY_AGAIN_SECONDS, ModelWatcher, first_model
from tests.unit.served import Direct, ask

EXECUTION = choose_execution(cpus=1)
LABELS = ["alpha", "beta", "delta"]


class Lab:
    """A registry with versions of one model. The database is one for all tests: to make it takes seconds."""

    def __init__(self, folder: Path, database: Path, trunk: Path, vocabulary: GeneVocabulary) -> None:
        self.folder, self.trunk, self.vocabulary = folder, trunk, vocabulary
        self.database = database
        self.uri = f"sqlite:///{self.database}"
        self.name = folder.name

    def train(self, seed: int, labels: list[str] = LABELS) -> Path:
        torch.manual_seed(seed)
        classifier, own = new_classifier(self.trunk, self.vocabulary, labels, "mean")
        directory = self.folder / f"model{seed}"
        classifier.save(directory, own)
        return directory

    def train_tasks(self, seed: int, tasks: dict[str, list[str]]) -> Path:
        torch.manual_seed(seed)
        classifier, own = new_multitask_classifier(self.trunk, self.vocabulary, tasks, "mean")
        directory = self.folder / f"model{seed}"
        classifier.save(directory, own)
        return directory

    def register(self, directory: Path, **tags: str) -> int:
        client = mlflow.MlflowClient()
        run = client.create_run(client.get_experiment_by_name("geneformer-ray").experiment_id)
        given = {WEIGHTS_TAG: weights_digest(directory), **tags}
        return register(run.info.run_id, f"{self.name} {directory.name}", directory, self.name, given, [[2, 3]]).version

    def champion(self, version: int) -> None:
        mlflow.MlflowClient().set_registered_model_alias(self.name, "champion", str(version))

    def source(self) -> ModelSource:
        return ModelSource(f"models:/{self.name}@champion", self.uri, ModelCache(self.folder / "cache"))

    def away(self) -> Path:
        """Take the registry away."""
        return self.database.rename(self.folder / "away.db")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("registry")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        open_store(str(folder))
    return folder / "mlflow.db"


@pytest.fixture
def lab(
    tmp_path: Path,
    database: Path,
    model_directory: Path,
    vocabulary: GeneVocabulary,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Lab]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    mlflow.set_tracking_uri(f"sqlite:///{database}")
    made = Lab(tmp_path, database, model_directory, vocabulary)
    yield made
    away = tmp_path / "away.db"
    if away.exists():
        away.rename(database)


class Replica:
    """What holds a model, and the watcher that replaces it."""

    def __init__(self, source: ModelSource) -> None:
        self.model = first_model(source, self._open)
        self.refused = 0
        self.watcher = ModelWatcher(source, self._open, lambda: self.model, self._replace, self._count_refusal, 1)

    @staticmethod
    def _open(found: Any) -> ServedModel:
        return ServedModel(found, execution=EXECUTION)

    def _count_refusal(self) -> None:
        self.refused += 1

    def _replace(self, model: ServedModel) -> None:
        self.model = model

    def look(self) -> int | None:
        asyncio.run(self.watcher.look())
        return self.model.version


def test_the_alias_is_followed_there_and_back(lab: Lab) -> None:
    first, second = lab.register(lab.train(1)), lab.register(lab.train(2))
    lab.champion(first)
    replica = Replica(lab.source())
    old = replica.model
    assert replica.look() == first
    assert replica.model is old  # nothing moved, nothing loaded
    lab.champion(second)
    assert replica.look() == second
    assert replica.model.digest == weights_digest(lab.folder / "model2")
    lab.champion(first)
    assert replica.look() == first
    cell = [np.array([5, 6, 7])]
    np.testing.assert_array_equal(replica.model.logits(cell), old.logits(cell))
    assert replica.refused == 0


TASKS = {"type": LABELS, "sex": ["female", "male"]}
CELLS = {"cells": [{"input_ids": [5, 6, 7]}, {"input_ids": [9, 4]}], "top": 2}


def classified(replica: Replica) -> list[dict[str, Any]]:
    """Classify through the routes; give what clients of one-task models read, which every answer must have."""
    answer = ask(Direct(replica.model, ServeSettings()), "POST", "/v1/classify", json=CELLS)
    assert answer.status_code == 200, answer.text
    content = answer.json()
    assert content["model"]["version"] == replica.model.version
    for cell in content["cells"]:
        assert cell["label"] in LABELS and cell["top"][0] == {name: cell[name] for name in ("label", "probability")}
    cells: list[dict[str, Any]] = content["cells"]
    return cells


def test_one_task_becomes_several_and_goes_back(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    first, second = lab.register(lab.train(1)), lab.register(lab.train_tasks(2, TASKS))
    lab.champion(first)
    replica = Replica(lab.source())
    before = classified(replica)
    lab.champion(second)
    assert replica.look() == second
    during = classified(replica)
    assert [list(cell["tasks"]) for cell in during] == [["type", "sex"]] * 2
    assert "has no label" not in caplog.text  # nothing is lost that somebody may wait for
    lab.champion(first)
    assert replica.look() == first
    assert classified(replica) == before
    assert not any("tasks" in cell for cell in before)
    assert f"version {first} has no label sex: female, sex: male" in caplog.text
    assert replica.refused == 0
    # Without the registry a start finds the one of several tasks as it finds any.
    lab.champion(second)
    assert Replica(lab.source()).model.tasks == TASKS
    lab.away()
    assert Replica(lab.source()).model.tasks == TASKS


def test_a_champion_that_classifies_genes_is_refused_in_one_line(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    first, genes = lab.register(lab.train(1)), lab.folder / "genes"
    new_gene_classifier(lab.trunk, ["sensitive", "insensitive"]).save(genes, lab.vocabulary)
    second = lab.register(genes)
    lab.champion(first)
    replica = Replica(lab.source())
    lab.champion(second)
    assert replica.look() == first
    assert replica.refused == 1
    (line,) = [record.getMessage() for record in caplog.records if "is refused" in record.getMessage()]
    assert line.startswith(f"version {second} is refused, version {first} serves on: InputError: model: got ")
    assert line.endswith("a classifier of genes; takes a classifier of cells") and "\n" not in line
    assert Replica(lab.source()).model.version == first  # also where a replica starts with it
    assert classified(replica)


def _truncate(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def _no_number(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(directory / "model.safetensors")
    name = next(name for name in weights if "classifier.weight" in name)
    weights[name][0, 0] = float("nan")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("spoil", [_truncate, _no_number])
def test_a_broken_candidate_is_refused_and_the_old_one_serves_on(
    lab: Lab, spoil: Any, caplog: pytest.LogCaptureFixture
) -> None:
    first, broken = lab.register(lab.train(1)), lab.train(2)
    spoil(broken)
    second = lab.register(broken)
    lab.champion(first)
    replica = Replica(lab.source())
    lab.champion(second)
    assert replica.look() == first
    assert replica.look() == first
    assert replica.refused == 1  # not tried again at every look
    assert f"version {second} is refused, version {first} serves on" in caplog.text
    third = lab.register(lab.train(3))
    lab.champion(third)
    assert replica.look() == third


def test_other_weights_than_were_registered_are_refused(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    first, second = lab.register(lab.train(1)), lab.register(lab.train(2), **{WEIGHTS_TAG: "0123456789abcdef"})
    lab.champion(first)
    replica = Replica(lab.source())
    lab.champion(second)
    assert replica.look() == first
    assert "0123456789abcdef, which were registered" in caplog.text


def test_a_model_of_other_genes_is_refused(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    from geneformer_ray.compute.model_directory import save_model
    from geneformer_ray.compute.pretraining import new_model

    first = lab.register(lab.train(1))
    lab.champion(first)
    replica = Replica(lab.source())
    others = GeneVocabulary.from_medians({f"OTHER{number}": 1.0 for number in range(40)}, max_length=16)
    save_model(new_model(others, layers=2, width=16, heads=2, feed_forward=32), others, lab.folder / "others")
    lab.trunk, lab.vocabulary = lab.folder / "others", others
    lab.champion(lab.register(lab.train(4)))
    assert replica.look() == first
    assert "genes of the present one" in caplog.text


def test_a_registry_that_is_gone_changes_nothing(lab: Lab) -> None:
    first, second = lab.register(lab.train(1)), lab.register(lab.train(2))
    lab.champion(first)
    replica = Replica(lab.source())
    away = lab.away()
    assert replica.look() == first
    assert replica.refused == 0
    # A start without it serves the same from this machine's copy.
    alone = Replica(lab.source())
    assert (alone.model.version, alone.model.digest) == (first, replica.model.digest)
    away.rename(lab.database)
    lab.champion(second)
    assert (replica.look(), alone.look()) == (second, second)
    lab.away()
    assert Replica(lab.source()).model.version == second


@pytest.mark.parametrize("spoil", [_truncate, _no_number])
def test_a_start_with_a_broken_champion_serves_what_served_last(
    lab: Lab, spoil: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Also without the registry, and after the broken one has been tried."""
    first, broken = lab.register(lab.train(1)), lab.train(2)
    spoil(broken)
    lab.champion(first)
    running = Replica(lab.source())
    second = lab.register(broken)
    lab.champion(second)
    assert running.look() == first
    assert Replica(lab.source()).model.version == first
    assert f"version {first}, which served last, serves" in caplog.text
    lab.away()
    assert Replica(lab.source()).model.version == first


def test_a_broken_model_alone_is_not_served(lab: Lab) -> None:
    broken = lab.train(1)
    _no_number(broken)
    lab.champion(lab.register(broken))
    with pytest.raises(InputError, match="no numbers"):
        Replica(lab.source())


def test_a_kept_copy_is_not_fetched_again(lab: Lab) -> None:
    first = lab.register(lab.train(1))
    lab.champion(first)
    Replica(lab.source())
    # The store of files is down, the registry itself answers.
    artifacts = lab.database.parent / "artifacts"
    away = artifacts.rename(artifacts.with_name("artifacts_away"))
    try:
        assert Replica(lab.source()).model.version == first
    finally:
        away.rename(artifacts)


def test_a_refused_version_is_tried_again_later(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = lab.register(lab.train(1)), lab.register(lab.train(2), **{WEIGHTS_TAG: "0123456789abcdef"})
    lab.champion(first)
    replica = Replica(lab.source())
    lab.champion(second)
    replica.look()
    monkeypatch.setattr("serve.watcher.time.monotonic", lambda now=time.monotonic: now() + TRY_AGAIN_SECONDS)
    replica.look()
    assert replica.refused == 2


def test_a_model_that_takes_or_gives_less_is_refused(
    lab: Lab, vocabulary: GeneVocabulary, caplog: pytest.LogCaptureFixture
) -> None:
    from geneformer_ray.compute.model_directory import save_model
    from geneformer_ray.compute.pretraining import new_model

    first = lab.register(lab.train(1))
    lab.champion(first)
    replica = Replica(lab.source())
    for number, (layers, medians) in enumerate([(1, vocabulary.medians), (2, {})]):
        own = replace(vocabulary, medians=medians)
        save_model(new_model(own, layers=layers, width=16, heads=2, feed_forward=32), own, lab.folder / f"t{number}")
        lab.trunk, lab.vocabulary = lab.folder / f"t{number}", own
        lab.champion(lab.register(lab.train(5 + number)))
        assert replica.look() == first
    assert "without mean embeddings" in caplog.text
    assert "without medians" in caplog.text


def test_what_serves_is_never_forgotten(lab: Lab) -> None:
    first = lab.register(lab.train(1))
    lab.champion(first)
    replica = Replica(lab.source())
    for seed in range(2, 8):
        broken = lab.train(seed)
        _no_number(broken)
        lab.champion(lab.register(broken))
        assert replica.look() == first
    assert replica.refused == 6
    assert replica.model.directory.exists()


def test_a_copy_that_was_tampered_with_is_not_served(lab: Lab) -> None:
    lab.champion(lab.register(lab.train(1)))
    Replica(lab.source())
    (weights,) = (lab.folder / "cache").rglob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-8] + b"tampered")
    assert Replica(lab.source()).model.version == 1  # the registry's own
    weights.write_bytes(weights.read_bytes()[:-8] + b"tampered")
    lab.away()
    with pytest.raises(RegistryUnavailable):
        Replica(lab.source())


def test_without_registry_and_copy_there_is_one_line(lab: Lab) -> None:
    lab.champion(lab.register(lab.train(1)))
    lab.away()
    with pytest.raises(RegistryUnavailable, match="there is no such file"):
        Replica(lab.source())


def test_old_copies_go(lab: Lab) -> None:
    versions = [lab.register(lab.train(seed)) for seed in range(1, 7)]
    for version in versions:
        lab.champion(version)
        Replica(lab.source())
    kept = {int(path.name) for path in (lab.folder / "cache" / lab.name).iterdir() if path.name.isdigit()}
    assert kept == set(versions[-4:])
    assert not list((lab.folder / "cache" / lab.name).glob(".*"))
    shutil.rmtree(lab.folder / "cache")
    assert Replica(lab.source()).model.version == versions[-1]
