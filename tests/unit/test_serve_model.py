"""Serving without Ray or a socket: what a served model answers is what the library computes offline."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import sparse

from geneformer_ray.compute.classifier import POOLINGS
from geneformer_ray.data.rank_value import RankValueEncoder
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError
from serve.cell_encoding import EncodedCell, ListedCounts
from serve.found_model import FoundModel, find_served_model
from serve.model import ServedModel
from serve.perturbing import CellPerturbation
from serve.settings import ServeSettings
from tests.unit.served import (
    EXECUTION,
    LABELS,
    make_classifier,
    make_islets,
    offline_odds,
    serve_directory,
    some_counts,
)


def encode(served: ServedModel, counts: dict[str, float], field: str = "counts", **options: object) -> EncodedCell:
    values = np.array(list(counts.values()), dtype=float)
    cell = ListedCounts(np.arange(len(counts)), values, field=field, **options)
    return served.cells.encode(list(counts), [cell], field)[0]


@pytest.fixture(scope="module")
def directory(model_directory: Path, vocabulary: GeneVocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mean-pooled classifier with two states."""
    path = tmp_path_factory.mktemp("served") / "islets"
    make_islets(model_directory, vocabulary, path)
    return path


@pytest.fixture(scope="module")
def served(directory: Path) -> ServedModel:
    return serve_directory(directory)


# ---------------------------------------------------------------------- the model


@pytest.mark.parametrize("pooling", POOLINGS)
def test_counts_give_the_offline_probabilities(
    pooling: str, model_directory: Path, vocabulary: GeneVocabulary, tmp_path: Path, rng: np.random.Generator
) -> None:
    own = make_classifier(model_directory, vocabulary, pooling, tmp_path / "model")
    served = serve_directory(tmp_path / "model")
    cells = [some_counts(vocabulary, rng, genes) for genes in (3, 12, 30)]
    answer = served.classify([encode(served, cell).input_ids for cell in cells])

    # Offline the cells are rows of one matrix with a column for every gene, encoded with the vocabulary they came with.
    matrix = sparse.csr_array(np.array([[cell.get(gene, 0.0) for gene in vocabulary.genes] for cell in cells]))
    encoded = RankValueEncoder(vocabulary, vocabulary.genes).encode(matrix, matrix.sum(axis=1))
    sequences = [own.adapt(encoded.cell(i), vocabulary.digest) for i in range(len(cells))]
    offline = offline_odds(tmp_path / "model", own, sequences)
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
        direct = encode(served, counts).input_ids
        np.testing.assert_array_equal(direct, own.adapt(parent, vocabulary.digest))
        np.testing.assert_array_equal(direct, served.accept(parent.tolist()).input_ids)
        np.testing.assert_array_equal(direct, served.accept(direct.tolist()).input_ids)


def test_genes_are_found_as_offline_and_unknown_ones_counted(directory: Path, served: ServedModel) -> None:
    counts = {"GENE01": 3.0, "gene02": 9.0, "NOSUCH1": 5.0, "NOSUCH2": 1.0, "NOSUCH3": 0.0}
    cell = encode(served, counts)
    assert [served.vocabulary.names[token] for token in cell.input_ids] == ["GENE02", "GENE01"]
    assert cell.unknown_share == pytest.approx(0.5)  # a gene without a count is not expressed
    np.testing.assert_array_equal(encode(served, counts, total=500.0).input_ids, cell.input_ids)


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
        encode(served, counts, field="cells[0].counts")
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
        encode(served, {"GENE01": 3.0})


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


def test_a_model_of_one_layer_classifies_only(tmp_path: Path, vocabulary: GeneVocabulary) -> None:
    from geneformer_ray.compute.model_directory import save_model
    from geneformer_ray.compute.pretraining import new_model

    save_model(new_model(vocabulary, layers=1, width=16, heads=2, feed_forward=24), vocabulary, tmp_path / "trunk")
    make_classifier(tmp_path / "trunk", vocabulary, "mean", tmp_path / "model")
    served = ServedModel(FoundModel(tmp_path / "model", "one", None), execution=EXECUTION)
    ids = np.array([4, 7], dtype=np.int32)
    assert served.classify([ids]).shape == (1, len(LABELS))
    assert served.embeddings == []
    with pytest.raises(InputError, match="one layer"):
        CellPerturbation(served, ids, ["GENE01"])


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
    args = content["applications"][0]["args"]
    ServeSettings.read(args)
    changed = {name for name in args if args[name] != ServeSettings.model_fields[name].default}
    assert changed <= {"max_replicas"}  # a cluster has room to grow
    assert content["http_options"]["host"] == "127.0.0.1"
