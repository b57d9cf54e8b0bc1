"""A model of several tasks behind the routes: an answer a task; a model of one task answers byte for byte as ever."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from geneformer_ray.compute.embedding import cell_embeddings
from geneformer_ray.compute.encoder import Encoder
from geneformer_ray.compute.gene_classifier import new_gene_classifier
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError
from serve.model import ServedModel
from serve.schemas import ClassifyAnswer, ModelAnswer, PerturbAnswer
from serve.settings import ServeSettings
from tests.unit.served import (
    EXECUTION,
    LABELS,
    TASKS,
    Direct,
    ask,
    make_islets,
    make_multitask,
    offline_odds_by_task,
    serve_directory,
)

CELLS = [[9, 4, 21, 30, 17], [11], [7, 6, 5]]
HDF5 = {"content-type": "application/x-hdf5"}


@pytest.fixture(scope="module")
def directory(model_directory: Path, vocabulary: GeneVocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "islets"
    make_multitask(model_directory, vocabulary, path)
    return path


@pytest.fixture(scope="module")
def served(directory: Path) -> ServedModel:
    return serve_directory(directory)


@pytest.fixture(scope="module")
def service(served: ServedModel) -> Direct:
    return Direct(served, ServeSettings(max_candidate_genes=8, batch_tokens=16))


@pytest.fixture(scope="module")
def odds(directory: Path, vocabulary: GeneVocabulary) -> dict[str, np.ndarray]:
    """What the library says of the cells."""
    return offline_odds_by_task(directory, vocabulary, [np.array(ids) for ids in CELLS])


def answer(service: Direct, path: str, **options: Any) -> Any:
    found = ask(service, "POST" if options else "GET", path, **options)
    assert found.status_code == 200, found.text
    return found.json()


def given(top: int = 9) -> dict[str, Any]:
    return {"cells": [{"input_ids": ids} for ids in CELLS], "top": top}


def check_cell(cell: dict[str, Any], odds_of: dict[str, np.ndarray], top: int) -> None:
    """Compare a cell's answer with its probabilities in each task."""
    assert list(cell["tasks"]) == list(TASKS)
    for task, labels in TASKS.items():
        said, order = cell["tasks"][task], np.argsort(-odds_of[task])[:top]
        assert [item["label"] for item in said["top"]] == [labels[number] for number in order]
        np.testing.assert_allclose([item["probability"] for item in said["top"]], odds_of[task][order], atol=1e-5)
        assert {"label": said["label"], "probability": said["probability"]} == said["top"][0]
    assert {name: cell[name] for name in ("label", "probability", "top")} == cell["tasks"]["type"]


# ---------------------------------------------------------------------- several tasks


@pytest.mark.parametrize("top", [1, 3, 9])
def test_every_task_has_its_answer(service: Direct, odds: dict[str, np.ndarray], top: int) -> None:
    found = answer(service, "/v1/classify", json=given(top))
    for number, cell in enumerate(found["cells"]):
        check_cell(cell, {task: odds[task][number] for task in TASKS}, top)
    assert all(odds[task].std(axis=0).max() > 1e-3 for task in TASKS)  # cells that were mixed up would show
    ClassifyAnswer.model_validate(found)


def test_a_file_is_answered_in_every_task(
    service: Direct, directory: Path, vocabulary: GeneVocabulary, tmp_path: Path
) -> None:
    counts = np.random.default_rng(2).poisson(2.0, size=(4, 12)).astype(np.float32)
    counts[1] = 0
    var = pd.DataFrame(index=vocabulary.genes[:12])
    for name, rows in (("cells", counts), ("empty", counts[1:2])):
        anndata.AnnData(sparse.csr_matrix(rows), var=var).write_h5ad(tmp_path / f"{name}.h5ad")
    path = "/v1/classify?top=4&return_input_ids=true"
    found = answer(service, path, content=(tmp_path / "cells.h5ad").read_bytes(), headers=HDF5)["cells"]
    there = [cell for cell in found if cell["reason"] is None]
    offline = offline_odds_by_task(directory, vocabulary, [np.array(cell["input_ids"]) for cell in there])
    for number, cell in enumerate(there):
        check_cell(cell, {task: offline[task][number] for task in TASKS}, 4)
    nothing = {"label": None, "probability": None, "top": []}
    assert [cell["cell_id"] for cell in found if cell["reason"]] == ["1"]
    assert found[1]["tasks"] == dict.fromkeys(TASKS, nothing)
    (alone,) = answer(service, path, content=(tmp_path / "empty.h5ad").read_bytes(), headers=HDF5)["cells"]
    assert (alone["reason"] is not None, alone["tasks"]) == (True, dict.fromkeys(TASKS, nothing))


def test_what_is_served_names_its_tasks(service: Direct, served: ServedModel) -> None:
    model = answer(service, "/v1/model")
    assert model["tasks"] == {task: {"labels": labels} for task, labels in TASKS.items()}
    assert model["labels"] == LABELS
    assert model["states"] == [f"{task}: {label}" for task in TASKS for label in TASKS[task]]
    assert (model["pooling"], model["digest"]) == ("mean", served.digest)
    ModelAnswer.model_validate(model)
    assert [cell["label"] for cell in answer(service, "/v1/examples")["cells"]] == LABELS


def test_embeddings_are_the_trunks(service: Direct, directory: Path, vocabulary: GeneVocabulary) -> None:
    found = answer(service, "/v1/embed", json={"cells": [{"input_ids": ids} for ids in CELLS]})
    encoder = Encoder.load(directory, layer=-1, execution=EXECUTION)
    offline = cell_embeddings(encoder, [np.array(ids) for ids in CELLS], vocabulary)
    np.testing.assert_allclose([cell["embedding"] for cell in found["cells"]], offline, atol=1e-5)


@pytest.mark.parametrize("goal", [None, "sex: male"])
def test_a_perturbation_changes_every_task(
    service: Direct, directory: Path, vocabulary: GeneVocabulary, goal: str | None
) -> None:
    ids = CELLS[0]
    genes = [vocabulary.names[token] for token in ids]
    body = {"cell": {"input_ids": ids}, "genes": genes} | ({} if goal is None else {"goal": goal})
    found = answer(service, "/v1/perturb", json=body)
    before = offline_odds_by_task(directory, vocabulary, [np.array(ids)])
    assert list(found["tasks"]) == list(TASKS)
    for task, labels in TASKS.items():
        said = found["tasks"][task]["probabilities"]
        assert list(said) == labels
        np.testing.assert_allclose(list(said.values()), before[task][0], atol=1e-5)
    assert found["probabilities"] == found["tasks"]["type"]["probabilities"]
    assert sorted(event["genes"][0] for event in found["events"]) == sorted(genes)
    for event in found["events"]:
        left = [token for token in ids if vocabulary.names[token] != event["genes"][0]]
        after = offline_odds_by_task(directory, vocabulary, [np.array(left)])
        for task, labels in TASKS.items():
            change = event["tasks"][task]["probability_change"]
            assert list(change) == labels
            np.testing.assert_allclose(list(change.values()), after[task][0] - before[task][0], atol=1e-5)
        assert event["probability_change"] == event["tasks"]["type"]["probability_change"]
    if goal is not None:
        towards = [event["shifts"][goal] for event in found["events"]]
        assert towards == sorted(towards, reverse=True)
    PerturbAnswer.model_validate(found)


def test_the_offline_command_names_the_tasks_column(service: Direct, vocabulary: GeneVocabulary) -> None:
    body = {"cell": {"input_ids": CELLS[0]}, "genes": vocabulary.genes[:9], "goal": "stage: child"}
    found = ask(service, "POST", "/v1/perturb", json=body)
    words = shlex.split(found.json()["error"]["takes"].split("for more: ")[1])
    assert found.status_code == 413
    assert [words[words.index(flag) + 1] for flag in ("--state-column", "--goal")] == ["stage", "child"]


def test_the_inference_protocol_has_tensors_of_each_task(service: Direct, odds: dict[str, np.ndarray]) -> None:
    ends = {"": "type", **{f"_{task}": task for task in TASKS}}
    metadata = answer(service, "/v2/models/islets")["outputs"]
    assert metadata == [
        tensor
        for end, task in ends.items()
        for tensor in (
            {"name": f"probabilities{end}", "datatype": "FP32", "shape": [-1, len(TASKS[task])]},
            {"name": f"label{end}", "datatype": "BYTES", "shape": [-1]},
        )
    ]
    rows = [ids + [0] * (5 - len(ids)) for ids in CELLS]
    body: dict[str, Any] = {"inputs": [{"name": "input_ids", "datatype": "INT64", "shape": [3, 5], "data": rows}]}
    outputs = answer(service, "/v2/models/islets/infer", json=body)["outputs"]
    assert [output["name"] for output in outputs] == [output["name"] for output in metadata]
    for (_, task), shares, best in zip(ends.items(), outputs[::2], outputs[1::2], strict=True):
        assert shares["shape"] == [3, len(TASKS[task])]
        np.testing.assert_allclose(np.reshape(shares["data"], shares["shape"]), odds[task], atol=1e-5)
        assert best["data"] == [TASKS[task][number] for number in odds[task].argmax(axis=1)]
    asked = [{"name": name} for name in ("label_sex", "probabilities_stage")]
    some = answer(service, "/v2/models/islets/infer", json=body | {"outputs": asked})["outputs"]
    assert some == [output for output in outputs if {"name": output["name"]} in asked]
    unknown = ask(service, "POST", "/v2/models/islets/infer", json=body | {"outputs": [{"name": "label_age"}]})
    assert (unknown.status_code, unknown.json()["error"]["field"]) == (422, "outputs[0].name")
    assert "label_sex" in unknown.json()["error"]["takes"]


# ---------------------------------------------------------------------- one task


@pytest.fixture(scope="module")
def single(model_directory: Path, vocabulary: GeneVocabulary, tmp_path_factory: pytest.TempPathFactory) -> Direct:
    path = tmp_path_factory.mktemp("single") / "islets"
    make_islets(model_directory, vocabulary, path)
    return Direct(serve_directory(path), ServeSettings(batch_tokens=16))


def text_of(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()


def test_one_task_is_answered_byte_for_byte_as_before_there_were_tasks(single: Direct, served: ServedModel) -> None:
    """Fields, their order and their spelling are written out here; the numbers are those of the model."""
    model = {"name": "islets", "version": None, "digest": single.model.digest}
    odds = single.model.classify([np.array(ids) for ids in CELLS])
    cells = []
    for number, row in enumerate(odds):
        top = [{"label": LABELS[i], "probability": float(row[i])} for i in np.argsort(-row)[:2]]
        begins = {"cell_id": str(number), "unknown_share": 0.0, "reason": None}
        cells.append(begins | top[0] | {"top": top, "input_ids": None})
    classified = ask(single, "POST", "/v1/classify", json=given(2)).content
    assert classified == text_of({"cells": cells, "model": model})

    body = {"cell": {"input_ids": CELLS[1]}, "genes": ["GENE01"]}
    # Another batch may differ in the last digit: each is computed as its request computes it.
    (second,) = single.model.classify([np.array(CELLS[1])])
    before = dict(zip(LABELS, map(float, second), strict=True))
    answered: dict[str, Any] = {"cell_id": "0", "perturbation": "delete", "goal": None, "probabilities": before}
    answered |= {"events": [], "skipped": [{"genes": ["GENE01"], "reason": "not expressed in the cell"}]}
    perturbed = ask(single, "POST", "/v1/perturb", json=body).content
    assert perturbed == text_of(answered | {"unknown_share": 0.0, "model": model})
    event = ask(single, "POST", "/v1/perturb", json={"cell": {"input_ids": CELLS[0]}, "genes": ["GENE07"]}).json()
    fields = ["genes", "symbols", "similarity", "shifts", "probability_change", "affected_genes"]
    assert list(event["events"][0]) == fields

    told = ask(single, "GET", "/v1/model").json()
    several = answer(Direct(served, ServeSettings(batch_tokens=16)), "/v1/model")
    assert list(told) == [name for name in several if name != "tasks"]
    tensor = {"name": "input_ids", "datatype": "INT64", "shape": [1, 5], "data": CELLS[0]}
    (first,) = single.model.classify([np.array(CELLS[0])])
    outputs = [
        {"name": "probabilities", "datatype": "FP32", "shape": [1, 4], "data": list(map(float, first))},
        {"name": "label", "datatype": "BYTES", "shape": [1], "data": [LABELS[first.argmax()]]},
    ]
    inferred = ask(single, "POST", "/v2/models/islets/infer", json={"inputs": [tensor]}).content
    begins = {"model_name": "islets", "parameters": {"digest": single.model.digest}}
    assert inferred == text_of(begins | {"outputs": outputs})
    assert list(single.model.tasks) == []


def test_the_document_has_tasks_that_no_answer_must_have(single: Direct) -> None:
    schemas = answer(single, "/openapi.json")["components"]["schemas"]
    for name, of in (
        ("ClassifiedCell", "TaskClass"),
        ("ModelAnswer", "TaskLabels"),
        ("PerturbAnswer", "TaskProbabilities"),
        ("PerturbedEvent", "TaskChanges"),
    ):
        tasks = schemas[name]["properties"]["tasks"]
        assert tasks["anyOf"][0]["additionalProperties"] == {"$ref": f"#/components/schemas/{of}"}
        assert "tasks" not in schemas[name]["required"]
        # What is said of a task is said under the names that it has without tasks.
        assert set(schemas[of]["properties"]) < set(schemas[name]["properties"])


# ---------------------------------------------------------------------- what is not served


def test_a_classifier_of_genes_is_refused(model_directory: Path, vocabulary: GeneVocabulary, tmp_path: Path) -> None:
    new_gene_classifier(model_directory, ["sensitive", "insensitive"]).save(tmp_path / "genes", vocabulary)
    with pytest.raises(InputError, match=r"^model: got \S+/genes, a classifier of genes; takes a classifier of cells$"):
        serve_directory(tmp_path / "genes")


def test_tasks_that_do_not_fit_the_heads_are_refused(directory: Path, tmp_path: Path) -> None:
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["tasks"][1]["labels"].append("other")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="with 9 labels in all"):
        serve_directory(tmp_path)
