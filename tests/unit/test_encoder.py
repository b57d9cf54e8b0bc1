"""The trunk, its directory, and what is refused at the door."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertModel

from geneformer_ray.compute.classifier import new_classifier
from geneformer_ray.compute.encoder import LAYERS, Encoder, add_token, attention_mask
from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.compute.model_directory import find_model, model_vocabulary, read_config, save_model
from geneformer_ray.compute.model_runner import ModelRunner
from geneformer_ray.compute.pretraining import new_model
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError, VocabularyMismatch
from tests.conftest import random_cells
from tests.reference import StockTrunk

EXECUTION = choose_execution(cpus=1)


@pytest.fixture
def copy(model_directory: Path, tmp_path: Path) -> Path:
    """A model directory to spoil."""
    return shutil.copytree(model_directory, tmp_path / "model")


def change_config(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# ------------------------------------------------------------------ hidden states


@pytest.mark.parametrize("layer", LAYERS)
def test_hidden_states_are_stock_ones(
    model_directory: Path, vocabulary: GeneVocabulary, rng: np.random.Generator, layer: int
) -> None:
    encoder, trunk = Encoder.load(model_directory, layer=layer, execution=EXECUTION), StockTrunk(model_directory)
    for ids in random_cells(vocabulary, rng, [1, 7, 16]):
        ours = encoder.hidden([ids[None]])[0][0]
        assert ours.dtype == torch.float32
        np.testing.assert_allclose(ours.numpy(), trunk.hidden(ids, layer), atol=2e-5)
    assert np.abs(trunk.hidden(ids, 0) - trunk.hidden(ids, -1)).max() > 0.1


@pytest.mark.parametrize("layer", LAYERS)
def test_groups_change_nothing(
    special_model_directory: Path, special_vocabulary: GeneVocabulary, rng: np.random.Generator, layer: int
) -> None:
    """Sequences of several lengths in one call, whole and position 0 alone."""
    encoder = Encoder.load(special_model_directory, layer=layer, execution=EXECUTION)
    cells = random_cells(special_vocabulary, rng, [16, 3, 9, 16, 16])
    groups = [np.stack([cells[0], cells[3], cells[4]]), cells[1][None], cells[2][None]]
    alone = [torch.cat([encoder.hidden([ids[None]])[0] for ids in group]) for group in groups]
    for together, one_by_one in zip(encoder.hidden(groups), alone, strict=True):
        torch.testing.assert_close(together, one_by_one, atol=1e-6, rtol=0)
    for first, one_by_one in zip(encoder.hidden(groups, first_only=True), alone, strict=True):
        torch.testing.assert_close(first, one_by_one[:, :1], atol=1e-6, rtol=0)


def test_only_the_layers_that_are_read_are_kept(model_directory: Path) -> None:
    assert len(Encoder.load(model_directory, layer=-1).trunk.layers) == 2
    assert len(Encoder.load(model_directory, layer=0).trunk.layers) == 3


def test_a_classifier_has_its_trunk(
    model_directory: Path, vocabulary: GeneVocabulary, rng: np.random.Generator, tmp_path: Path
) -> None:
    """The head of a directory does not matter."""
    model, own = new_classifier(model_directory, vocabulary, ["a", "b"], "mean")
    model.save(tmp_path / "classifier", own)
    ids = random_cells(vocabulary, rng, [8])[0]
    hidden = [Encoder.load(path, layer=0).hidden([ids[None]])[0] for path in (model_directory, tmp_path / "classifier")]
    assert torch.equal(hidden[0], hidden[1])


def test_layers_that_are_not_there(vocabulary: GeneVocabulary, model_directory: Path, tmp_path: Path) -> None:
    save_model(new_model(vocabulary, layers=1, width=4, heads=1, feed_forward=4), vocabulary, tmp_path)
    with pytest.raises(InputError, match="--layer: got -1; takes 0 for a model of 1 layers"):
        Encoder.load(tmp_path, layer=-1)
    assert len(Encoder.load(tmp_path, layer=0).trunk.layers) == 1
    for layer in (1, -2):
        with pytest.raises(InputError, match=f"--layer: got {layer}"):
            Encoder.load(model_directory, layer=layer)


def test_attention_mask_marks_what_is_real() -> None:
    mask_BL = attention_mask(torch.tensor([3, 0, 2]), 3)
    assert mask_BL.tolist() == [[1, 1, 1], [0, 0, 0], [1, 1, 0]]
    assert mask_BL.dtype == torch.int64


# ------------------------------------------------------------------ growing


def test_add_token(model_directory: Path, vocabulary: GeneVocabulary) -> None:
    bert = BertModel.from_pretrained(model_directory, add_pooling_layer=False)
    before = bert.get_input_embeddings().weight.detach().clone()
    add_token(bert, vocabulary)
    assert torch.equal(bert.get_input_embeddings().weight, before)
    add_token(bert, vocabulary.with_cls())
    after = bert.get_input_embeddings()
    assert torch.equal(after.weight[:-1], before)
    assert after.num_embeddings == bert.config.vocab_size == len(vocabulary) + 1
    assert after.padding_idx == vocabulary.pad_id
    with pytest.raises(InputError, match=f"at least the model's {len(vocabulary) + 1}"):
        add_token(bert, vocabulary)


# ------------------------------------------------------------------ finding a model


def test_find_model(model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_model(str(model_directory)) == model_directory
    assert find_model(model_directory.as_uri()).joinpath("config.json").exists()
    monkeypatch.chdir(model_directory.parent)
    assert find_model(model_directory.name) == model_directory


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere", "~/nowhere", "file:///nowhere/at/all"])
def test_a_model_that_is_not_there(name: str) -> None:
    with pytest.raises(InputError, match=r"--model: got .*nowhere.*; takes a model directory that exists"):
        find_model(name)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: (path / "config.json").unlink(), "without config.json"),
        (lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"), "pickles are not read"),
    ],
    ids=["config", "weights"],
)
def test_a_model_without_its_files(copy: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(copy)
    with pytest.raises(InputError, match=message):
        find_model(str(copy))


@pytest.mark.parametrize(
    "name", ["nobody/nothing", "nobody/nothing/some/folder@main", "runs/no--model", "runs/no..model"]
)
def test_a_hub_id_that_cannot_be_reached(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # The library reads the variable when it is imported, which may have been before.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"--model: got .*; takes a directory that exists, or a hub id") as caught:
        find_model(name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ['{"model_type": "gpt2"}', "{}", "[]", "not JSON", '"bert"'])
def test_a_config_that_is_no_bert(copy: Path, content: str) -> None:
    (copy / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"--start: .*(a BERT model|a readable JSON file)"):
        read_config(copy, "--start")


def test_a_config_that_is_missing(copy: Path) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(InputError, match="takes a file that exists"):
        read_config(copy)


# ------------------------------------------------------------------ its vocabulary


def other_vocabulary(vocabulary: GeneVocabulary) -> GeneVocabulary:
    """The same genes in another order."""
    names = vocabulary.names
    return GeneVocabulary({name: number for number, name in enumerate(names[:2] + names[:1:-1])}, max_length=16)


def test_a_model_carries_its_vocabulary(model_directory: Path, vocabulary: GeneVocabulary, tmp_path: Path) -> None:
    config = read_config(model_directory)
    own = model_vocabulary(model_directory, None, config)
    assert (own.digest, own.max_length) == (vocabulary.digest, vocabulary.max_length)
    vocabulary.save(str(tmp_path / "same"))
    assert model_vocabulary(model_directory, str(tmp_path / "same"), config).digest == vocabulary.digest
    other_vocabulary(vocabulary).save(str(tmp_path / "other"))
    with pytest.raises(VocabularyMismatch, match=f"{vocabulary.digest}, the model's own, or nothing"):
        model_vocabulary(model_directory, str(tmp_path / "other"), config)


def test_the_parent_is_accepted_for_an_extended_vocabulary(
    model_directory: Path, vocabulary: GeneVocabulary, tmp_path: Path
) -> None:
    """A user goes on naming the vocabulary that the cells were tokenised with; the model's own is used."""
    model, extended = new_classifier(model_directory, vocabulary, ["a", "b"], "cls")
    model.save(tmp_path / "model", extended)
    vocabulary.save(str(tmp_path / "parent"))
    found = model_vocabulary(tmp_path / "model", str(tmp_path / "parent"), read_config(tmp_path / "model"))
    assert found.digest == extended.digest


def test_a_model_without_a_vocabulary(copy: Path, vocabulary: GeneVocabulary, tmp_path: Path) -> None:
    (copy / "vocabulary.json").unlink()
    given = {"same": vocabulary, "other": other_vocabulary(vocabulary), "larger": vocabulary.with_cls()}
    for name, value in given.items():
        value.save(str(tmp_path / name))
    config = read_config(copy)
    assert model_vocabulary(copy, str(tmp_path / "same"), config).digest == vocabulary.digest
    with pytest.raises(InputError, match=r"--vocabulary: got nothing; takes a vocabulary"):
        model_vocabulary(copy, None, config)
    with pytest.raises(VocabularyMismatch, match=f"{vocabulary.digest}, which the model was made with"):
        model_vocabulary(copy, str(tmp_path / "other"), config)
    # A model that records no digest, as other people's do: its size is what can be compared.
    del config.vocabulary_digest
    with pytest.raises(VocabularyMismatch, match=f"got a vocabulary of {len(vocabulary) + 1} tokens; takes one of"):
        model_vocabulary(copy, str(tmp_path / "larger"), config)
    assert model_vocabulary(copy, str(tmp_path / "other"), config).names != vocabulary.names


def test_a_model_whose_own_vocabulary_is_another(copy: Path) -> None:
    change_config(copy, vocabulary_digest="0123456789abcdef")
    with pytest.raises(VocabularyMismatch, match="0123456789abcdef, which the model was made with"):
        model_vocabulary(copy, None, read_config(copy))


# ------------------------------------------------------------------ opened for inference


def test_model_runner_takes_parent_cells(
    model_directory: Path, vocabulary: GeneVocabulary, rng: np.random.Generator, tmp_path: Path
) -> None:
    model, extended = new_classifier(model_directory, vocabulary, ["a", "b"], "cls")
    model.save(tmp_path / "model", extended)
    runner = ModelRunner(str(tmp_path / "model"), cpus=1)
    full, short = random_cells(vocabulary, rng, [16, 3])
    adapted = runner.sequences([full, short], vocabulary.digest)
    assert adapted[0].tolist() == [extended.cls_id, *full[:15]]
    assert adapted[1].tolist() == [extended.cls_id, *short]


def test_model_runner_never_cuts_silently(
    model_directory: Path, vocabulary: GeneVocabulary, rng: np.random.Generator
) -> None:
    runner = ModelRunner(str(model_directory), cpus=1)
    with pytest.raises(InputError, match=r"--cells: got a cell of 17 tokens; takes cells of up to 16"):
        runner.sequences(random_cells(vocabulary, rng, [4, 17]), vocabulary.digest)


@pytest.mark.parametrize("lost", ["bert.encoder.layer.1.output.dense.weight", "bert.embeddings.word_embeddings.weight"])
def test_weights_that_are_missing_are_never_made_up(model_directory: Path, tmp_path: Path, lost: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model_directory, broken)
    weights = load_file(broken / "model.safetensors")
    del weights[lost]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="weights lack"):
        Encoder.load(broken)
