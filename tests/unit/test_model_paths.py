"""A model saved by any path loads by every path: as a trunk, as a classifier, and by stock transformers."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
)

from geneformer_ray.compute.classifier import POOLINGS, CellClassifier, new_classifier, predict_logits
from geneformer_ray.compute.encoder import LAYERS, Encoder
from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.compute.model_directory import model_vocabulary, read_config, save_model
from geneformer_ray.compute.model_runner import ModelRunner
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError
from tests.conftest import random_cells

EXECUTION = choose_execution(cpus=1)
LABELS = ["alpha", "beta", "delta"]
KINDS = ("plain", "special")
# How a directory came about: a pooling stands for finetune's classifier with it. A stock classifier has its vocabulary
# in its directory, or only upstream's dictionary elsewhere.
MADE_BY = (*POOLINGS, "pretrain", "stock", "stock and a dictionary")
# Those that are classifiers and pool position 0, so that stock transformers computes the same.
SAME_AS_STOCK = [
    ("plain", "first_gene"), ("plain", "cls"), ("special", "cls"),
    *((kind, made_by) for kind in KINDS for made_by in ("stock", "stock and a dictionary")),
]  # fmt: skip


@dataclass(frozen=True)
class Saved:
    """A model directory, the vocabulary to name with it, and cells as a model of its own vocabulary reads them."""

    directory: Path
    given: str | None
    cells: list[np.ndarray]

    @property
    def vocabulary(self) -> GeneVocabulary:
        return model_vocabulary(self.directory, self.given, read_config(self.directory))

    def rows(self) -> list[torch.Tensor]:
        return [torch.from_numpy(ids.astype(np.int64))[None] for ids in self.cells]


@pytest.fixture(scope="module")
def everything(
    model_directory: Path,
    special_model_directory: Path,
    vocabulary: GeneVocabulary,
    special_vocabulary: GeneVocabulary,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[tuple[str, str], Saved]:
    """Every kind of vocabulary with every way to save a model, once."""
    trunks = {"plain": (model_directory, vocabulary), "special": (special_model_directory, special_vocabulary)}
    found = {}
    for kind, (trunk, own) in trunks.items():
        for made_by in MADE_BY:
            directory = tmp_path_factory.mktemp(made_by.replace(" ", "-"))
            found[kind, made_by] = save(made_by, trunk, own, directory)
    return found


def save(made_by: str, trunk: Path, vocabulary: GeneVocabulary, directory: Path) -> Saved:
    cells = random_cells(vocabulary, np.random.default_rng(3), [9, 3, 15, 1])
    torch.manual_seed(4)
    if made_by in POOLINGS:
        model, own = new_classifier(trunk, vocabulary, LABELS, made_by)
        torch.nn.init.normal_(model.classifier.weight)
        model.save(directory, own)
        return Saved(directory, None, [own.adapt(ids, vocabulary.digest) for ids in cells])
    if made_by == "pretrain":
        save_model(BertForMaskedLM.from_pretrained(trunk), vocabulary, directory)
        return Saved(directory, None, cells)
    config = BertConfig(
        vocab_size=len(vocabulary), max_position_embeddings=vocabulary.max_length, num_labels=len(LABELS),
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, initializer_range=0.5,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(directory)
    if made_by == "stock":
        vocabulary.save(str(directory))
        return Saved(directory, None, cells)
    elsewhere = directory.with_name(directory.name + "-dictionary")
    elsewhere.mkdir()
    (elsewhere / "token_dictionary.json").write_text(json.dumps(dict(vocabulary.tokens)))
    return Saved(directory, str(elsewhere / "token_dictionary.json"), cells)


@pytest.fixture(params=[(kind, made_by) for kind in KINDS for made_by in MADE_BY], ids="-".join)
def saved(request: pytest.FixtureRequest, everything: dict[tuple[str, str], Saved]) -> Saved:
    return everything[request.param]


@pytest.fixture(params=SAME_AS_STOCK, ids="-".join)
def stock_saved(request: pytest.FixtureRequest, everything: dict[tuple[str, str], Saved]) -> Saved:
    return everything[request.param]


@pytest.mark.parametrize("layer", LAYERS)
def test_every_model_is_a_trunk(saved: Saved, layer: int) -> None:
    """To us and to stock transformers alike, whatever head lies on it."""
    stock = AutoModel.from_pretrained(saved.directory).eval()
    encoder = Encoder.load(saved.directory, layer=layer, execution=EXECUTION)
    runner = ModelRunner(str(saved.directory), vocabulary=saved.given, layer=layer, cpus=1)
    for ids, ids_1L in zip(saved.cells, saved.rows(), strict=True):
        with torch.inference_mode():
            theirs = stock(ids_1L, output_hidden_states=True).hidden_states[stock.config.num_hidden_layers + layer]
        for ours in (encoder, runner.encoder):
            torch.testing.assert_close(ours.hidden([ids[None]])[0], theirs, atol=2e-5, rtol=0)
    # The cells have all special tokens of the model's vocabulary already.
    assert [ids.tolist() for ids in runner.sequences(saved.cells, None)] == [ids.tolist() for ids in saved.cells]
    assert runner.vocabulary.names == saved.vocabulary.names
    assert len(runner.vocabulary) == stock.config.vocab_size


def test_adapters_beside_the_weights_are_refused(everything: dict[tuple[str, str], Saved], tmp_path: Path) -> None:
    """transformers would put them on where peft is installed; the trunk that screens read would not have them."""
    directory = shutil.copytree(everything["plain", "mean"].directory, tmp_path / "model")
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": ""}))
    for load in (Encoder.load, lambda place, **_: CellClassifier.load(place, everything["plain", "mean"].vocabulary)):
        with pytest.raises(InputError, match="adapters beside its weights"):
            load(directory, layer=-1, execution=EXECUTION)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_model_is_a_trunk_to_finetune(saved: Saved, pooling: str, tmp_path: Path) -> None:
    """For other labels and any pooling; what comes out is a classifier that loads with the same logits."""
    model, own = new_classifier(saved.directory, saved.vocabulary, ["a", "b"], pooling)
    trunk = AutoModel.from_pretrained(saved.directory).state_dict()
    state = model.bert.state_dict()
    for name, value in trunk.items():
        if not name.startswith("pooler."):  # it belongs to the head
            assert torch.equal(state[name][: len(value)], value), name
    model.save(tmp_path, own)
    again = CellClassifier.load(tmp_path, GeneVocabulary.load(str(tmp_path)))
    cells = [own.adapt(ids, own.parent_digest) for ids in saved.cells]
    logits = [predict_logits(its, cells, own.pad_id, execution=EXECUTION) for its in (model, again)]
    assert again.labels == ["a", "b"]
    assert (again.pooling, logits[0].shape) == (pooling, (len(cells), 2))
    np.testing.assert_array_equal(*logits)


def test_stock_transformers_and_we_give_the_same_logits(stock_saved: Saved, tmp_path: Path) -> None:
    """Whoever saved it; and again when we have saved what stock transformers did."""
    model = CellClassifier.load(stock_saved.directory, stock_saved.vocabulary)
    assert model.is_stock
    model.save(tmp_path / "again", stock_saved.vocabulary)
    again = CellClassifier.load(tmp_path / "again", stock_saved.vocabulary)
    stock = [
        kind.from_pretrained(directory).eval()
        for kind in (BertForSequenceClassification, AutoModelForSequenceClassification)
        for directory in (stock_saved.directory, tmp_path / "again")
    ]
    for ids_1L in stock_saved.rows():
        with torch.inference_mode():
            for logits in (again(ids_1L), *(its(ids_1L).logits for its in stock)):
                torch.testing.assert_close(logits, model(ids_1L), atol=1e-6, rtol=0)
    assert {tuple(its.config.id2label.values()) for its in (again, *stock)} == {tuple(model.labels)}
