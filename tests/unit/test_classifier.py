"""The classifier: what enters the head, what lies in its directory, and who can load it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from geneformer_ray.compute.classifier import (
    POOLINGS,
    CellClassifier,
    mean_over_genes,
    new_classifier,
    predict_logits,
    stock_pooling,
)
from geneformer_ray.compute.encoder import attention_mask
from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.compute.model_directory import model_vocabulary, read_config
from geneformer_ray.data.batching import pad
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError
from tests.conftest import random_cells
from tests.reference import Cell, StockTrunk, gene_positions

LABELS = ["alpha", "beta", "delta"]
LENGTHS = [9, 3, 15, 1, 6, 9]
EXECUTION = choose_execution(cpus=1)

# Where position 0 is what is pooled, stock transformers computes the same.
STOCK = {("plain", "first_gene"), ("plain", "cls"), ("special", "cls")}


class Trained:
    """A classifier with a far from neutral head, its directory, and some cells of its vocabulary."""

    def __init__(self, trunk: Path, vocabulary: GeneVocabulary, pooling: str, directory: Path) -> None:
        self.pooling, self.directory, self.parent = pooling, directory, vocabulary
        torch.manual_seed(1)
        self.model, self.vocabulary = new_classifier(trunk, vocabulary, LABELS, pooling)
        with torch.no_grad():
            for module in (self.model.bert.pooler.dense, self.model.classifier):
                module.weight.normal_(std=0.5)
                module.bias.normal_(std=0.5)
        self.model.eval()
        cells = random_cells(vocabulary, np.random.default_rng(0), LENGTHS)
        self.cells = [self.vocabulary.adapt(ids, vocabulary.digest) for ids in cells]
        self.model.save(directory, self.vocabulary)

    def logits(self, model: CellClassifier | None = None) -> np.ndarray:
        return predict_logits(model or self.model, self.cells, self.vocabulary.pad_id, execution=EXECUTION)


@pytest.fixture(scope="module")
def trunks(
    model_directory: Path,
    special_model_directory: Path,
    vocabulary: GeneVocabulary,
    special_vocabulary: GeneVocabulary,
) -> dict[str, tuple[Path, GeneVocabulary]]:
    return {"plain": (model_directory, vocabulary), "special": (special_model_directory, special_vocabulary)}


@pytest.fixture(
    scope="module", params=[(kind, pooling) for kind in ("plain", "special") for pooling in POOLINGS], ids="-".join
)
def kind_and_pooling(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture(scope="module")
def trained(
    trunks: dict[str, tuple[Path, GeneVocabulary]],
    kind_and_pooling: tuple[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Trained:
    kind, pooling = kind_and_pooling
    return Trained(*trunks[kind], pooling, tmp_path_factory.mktemp("classifiers") / f"{kind}-{pooling}")


@pytest.fixture(scope="module")
def with_cls(model_directory: Path, vocabulary: GeneVocabulary, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A V1-like trunk that learned a ``<cls>``."""
    return Trained(model_directory, vocabulary, "cls", tmp_path_factory.mktemp("extended") / "cls")


# ------------------------------------------------------------------ what enters the head


def pooled_vector(hidden_LD: np.ndarray, ids: Cell, vocabulary: GeneVocabulary, pooling: str) -> np.ndarray:
    positions = gene_positions(ids, vocabulary)
    if pooling == "cls":
        assert ids[0] == vocabulary.tokens["<cls>"]
        return hidden_LD[0]
    if pooling == "first_gene":
        return hidden_LD[positions[0]]
    return np.mean([hidden_LD[position] for position in positions], axis=0)


def test_logits_are_the_head_on_the_pooled_vector(trained: Trained) -> None:
    trunk = StockTrunk(trained.directory)
    weights = {name: value.double().numpy() for name, value in trained.model.state_dict().items()}
    expected = []
    for ids in trained.cells:
        vector = pooled_vector(trunk.hidden(ids), ids, trained.vocabulary, trained.pooling)
        dense = np.tanh(weights["bert.pooler.dense.weight"] @ vector + weights["bert.pooler.dense.bias"])
        expected.append(weights["classifier.weight"] @ dense + weights["classifier.bias"])
    assert np.ptp(expected, axis=0).min() > 0.05  # the cells differ, so that a wrong position would show
    np.testing.assert_allclose(trained.logits(), expected, atol=1e-5)


def test_poolings_differ(trunks: dict[str, tuple[Path, GeneVocabulary]], tmp_path: Path) -> None:
    several = [Trained(*trunks["special"], pooling, tmp_path / pooling).logits() for pooling in POOLINGS]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(several[one] - several[other]).max() > 0.05


def test_a_padded_batch_equals_single_cells(trained: Trained) -> None:
    ids, lengths = pad(trained.cells, trained.vocabulary.pad_id)
    mask_BL = attention_mask(torch.from_numpy(lengths), ids.shape[1])
    with torch.inference_mode():
        batched = trained.model(torch.from_numpy(ids), mask_BL)
        single = [trained.model(torch.from_numpy(cell.astype(np.int64))[None])[0] for cell in trained.cells]
    torch.testing.assert_close(batched, torch.stack(single), atol=1e-5, rtol=0)


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_mean_reads_genes_only(data: st.DataObject) -> None:
    """Whatever lies at padding and special tokens does not enter the mean."""
    special = torch.tensor([0, 1, 2, 3])
    rows = data.draw(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=7), min_size=1, max_size=4))
    ids, lengths = pad([np.array(row) for row in rows], 0)
    ids_BL, mask_BL = torch.from_numpy(ids), attention_mask(torch.from_numpy(lengths), ids.shape[1])
    hidden_BLD = torch.arange(ids.size * 2, dtype=torch.float32).reshape(*ids.shape, 2)
    noise_BLD = torch.where(torch.isin(ids_BL, special)[:, :, None], torch.tensor(1e6), hidden_BLD)
    pooled_BD = mean_over_genes(noise_BLD, ids_BL, mask_BL, special)
    for number, row in enumerate(rows):
        genes = [hidden_BLD[number, position].numpy() for position, token in enumerate(row) if token > 3]
        expected = np.mean(genes, axis=0) if genes else np.zeros(2)
        np.testing.assert_allclose(pooled_BD[number].numpy(), expected, rtol=1e-5)


def test_first_gene_is_behind_a_cls(special_model_directory: Path, special_vocabulary: GeneVocabulary) -> None:
    model, _ = new_classifier(special_model_directory, special_vocabulary, LABELS, "first_gene")
    hidden_BLD = torch.arange(24.0).reshape(2, 4, 3)
    ids_BL = torch.tensor([[2, 10, 11, 3], [2, 12, 3, 0]])
    assert torch.equal(model.pool(hidden_BLD, ids_BL, torch.ones(2, 4)), hidden_BLD[:, 1])


# ------------------------------------------------------------------ the directory


def test_stock_transformers_loads_what_pools_position_0(trained: Trained, kind_and_pooling: tuple[str, str]) -> None:
    architectures = json.loads((trained.directory / "config.json").read_text())["architectures"]
    is_stock = kind_and_pooling in STOCK
    assert architectures == ["BertForSequenceClassification" if is_stock else "CellClassifier"]
    stock = BertForSequenceClassification.from_pretrained(trained.directory).eval()
    ids, lengths = pad(trained.cells, trained.vocabulary.pad_id)
    with torch.inference_mode():
        mask_BL = attention_mask(torch.from_numpy(lengths), ids.shape[1])
        theirs = stock(input_ids=torch.from_numpy(ids), attention_mask=mask_BL).logits.numpy()
    difference = np.abs(trained.logits() - theirs).max()
    assert difference < 1e-5 if is_stock else difference > 0.05
    assert [stock.config.id2label[number] for number in range(len(LABELS))] == LABELS


def test_a_directory_is_self_contained(trained: Trained, tmp_path: Path) -> None:
    """Moved elsewhere, it loads again with pooling, labels, vocabulary and weights."""
    moved = shutil.copytree(trained.directory, tmp_path / "moved")
    vocabulary = model_vocabulary(moved, None, read_config(moved))
    model = CellClassifier.load(moved, vocabulary)
    assert vocabulary.tokens == trained.vocabulary.tokens
    assert vocabulary.max_length == trained.vocabulary.max_length
    assert model.pooling == trained.pooling
    assert model.labels == LABELS
    assert not model.training
    for name, value in trained.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    np.testing.assert_array_equal(trained.logits(model), trained.logits())
    assert {path.suffix for path in moved.iterdir()} == {".json", ".safetensors"}


def test_loading_never_changes_the_pooling(
    trained: Trained, vocabulary: GeneVocabulary, special_vocabulary: GeneVocabulary, tmp_path: Path
) -> None:
    """Neither a round trip nor the vocabulary that happens to be at hand decides: the directory does."""
    at_hand = special_vocabulary if trained.parent is vocabulary else vocabulary
    model = CellClassifier.load(trained.directory, at_hand)
    model.save(tmp_path / "again", trained.vocabulary)
    again = CellClassifier.load(tmp_path / "again", trained.vocabulary)
    assert again.pooling == model.pooling == trained.pooling
    np.testing.assert_array_equal(trained.logits(again), trained.logits())
    former, now = (json.loads((path / "config.json").read_text()) for path in (trained.directory, tmp_path / "again"))
    assert former == now


def test_an_unknown_pooling_is_refused(trained: Trained, tmp_path: Path) -> None:
    directory = shutil.copytree(trained.directory, tmp_path / "model")
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(content | {"pooling": "max"}))
    with pytest.raises(InputError, match=r"config\.json: pooling: got max; takes one of first_gene, cls, mean"):
        CellClassifier.load(directory, trained.vocabulary)


# ------------------------------------------------------------------ a <cls> for a model without one


def test_cls_extends_the_vocabulary(with_cls: Trained, vocabulary: GeneVocabulary) -> None:
    saved = GeneVocabulary.load(str(with_cls.directory))
    assert saved.cls_id == len(vocabulary)
    assert saved.parent_digest == vocabulary.digest
    assert saved.digest != vocabulary.digest
    assert {name: saved.tokens[name] for name in vocabulary.tokens} == dict(vocabulary.tokens)
    config = read_config(with_cls.directory)
    assert config.vocabulary_digest == saved.digest
    assert config.vocab_size == len(vocabulary) + 1
    assert config.has_cls
    assert set(config.special_ids) == saved.special_ids


def test_cls_grows_the_embedding_by_one_row(
    with_cls: Trained, model_directory: Path, vocabulary: GeneVocabulary
) -> None:
    before = BertForMaskedLM.from_pretrained(model_directory).get_input_embeddings().weight
    loaded = CellClassifier.load(with_cls.directory, with_cls.vocabulary)
    after = loaded.get_input_embeddings().weight
    assert after.shape == (len(vocabulary) + 1, before.shape[1])
    assert torch.equal(after[:-1], before)
    assert 0 < float((after[-1] - before.mean(dim=0)).detach().norm()) < 0.5
    assert after.requires_grad


def test_cls_on_a_model_that_has_one_grows_nothing(
    special_model_directory: Path, special_vocabulary: GeneVocabulary
) -> None:
    model, vocabulary = new_classifier(special_model_directory, special_vocabulary, LABELS, "cls")
    assert vocabulary is special_vocabulary
    assert model.get_input_embeddings().num_embeddings == len(special_vocabulary)


# ------------------------------------------------------------------ the head


def fresh_head(trunk: Path, vocabulary: GeneVocabulary, pooling: str, seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    model, _ = new_classifier(trunk, vocabulary, LABELS, pooling)
    return [*model.bert.pooler.parameters(), *model.classifier.parameters()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_head_depends_on_the_seed_alone(model_directory: Path, vocabulary: GeneVocabulary) -> None:
    """All three poolings start from the same head, so that they compare."""
    heads = [fresh_head(model_directory, vocabulary, pooling) for pooling in POOLINGS]
    assert same(heads[0], heads[1])
    assert same(heads[0], heads[2])
    assert not same(heads[0], fresh_head(model_directory, vocabulary, "mean", seed=1))


def test_the_head_of_a_former_task_is_left(trained: Trained) -> None:
    model, _ = new_classifier(trained.directory, trained.vocabulary, LABELS, "mean")
    assert not torch.equal(model.classifier.weight, trained.model.classifier.weight)
    assert not torch.equal(model.bert.pooler.dense.weight, trained.model.bert.pooler.dense.weight)
    assert float(model.bert.pooler.dense.weight.detach().abs().max()) < 0.2
    assert not model.bert.pooler.dense.bias.any()
    assert not model.classifier.bias.any()
    for name, value in trained.model.bert.encoder.state_dict().items():
        assert torch.equal(model.bert.encoder.state_dict()[name], value), name


@pytest.mark.parametrize("labels", [2, 5])
def test_a_classifier_is_a_trunk_for_other_labels(trained: Trained, labels: int) -> None:
    names = [f"type {number}" for number in range(labels)]
    model, _ = new_classifier(trained.directory, trained.vocabulary, names, "mean")
    assert model.labels == names
    assert model.classifier.weight.shape[0] == labels
    assert torch.equal(model.get_input_embeddings().weight, trained.model.get_input_embeddings().weight)


# ------------------------------------------------------------------ other people's models


@pytest.mark.parametrize(("kind", "pooling"), [("plain", "first_gene"), ("special", "cls")])
def test_a_stock_classifier_pools_position_0(
    trunks: dict[str, tuple[Path, GeneVocabulary]], kind: str, pooling: str, tmp_path: Path
) -> None:
    vocabulary = trunks[kind][1]
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    stock = BertForSequenceClassification(
        BertConfig(vocab_size=len(vocabulary), max_position_embeddings=18, num_labels=4, initializer_range=0.5, **shape)
    ).eval()
    stock.save_pretrained(tmp_path)
    assert stock_pooling(vocabulary) == pooling
    model = CellClassifier.load(tmp_path, vocabulary)
    assert model.pooling == pooling
    cells = random_cells(vocabulary, np.random.default_rng(2), LENGTHS)
    with torch.inference_mode():
        theirs = [stock(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].numpy() for ids in cells]
    ours = predict_logits(model, cells, vocabulary.pad_id, execution=EXECUTION)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_masked_gene_model_is_no_classifier(model_directory: Path, vocabulary: GeneVocabulary) -> None:
    with pytest.raises(InputError, match=r"--model: .*which is no classifier"):
        CellClassifier.load(model_directory, vocabulary)


def test_an_unknown_pooling_is_refused_at_the_start(model_directory: Path, vocabulary: GeneVocabulary) -> None:
    with pytest.raises(InputError, match="--pooling: got max; takes one of first_gene, cls, mean"):
        new_classifier(model_directory, vocabulary, LABELS, "max")


# ------------------------------------------------------------------ predictions


@given(order=st.permutations(range(len(LENGTHS))), tokens_per_batch=st.integers(1, 120))
@settings(max_examples=15, deadline=None)
def test_predictions_know_no_batches(with_cls: Trained, order: list[int], tokens_per_batch: int) -> None:
    cells = [with_cls.cells[number] for number in order]
    pad_id = with_cls.vocabulary.pad_id
    shuffled = predict_logits(with_cls.model, cells, pad_id, execution=EXECUTION, tokens_per_batch=tokens_per_batch)
    np.testing.assert_allclose(shuffled, with_cls.logits()[order], atol=1e-5)


def test_predictions_of_no_cells(with_cls: Trained) -> None:
    logits = predict_logits(with_cls.model, [], with_cls.vocabulary.pad_id, execution=EXECUTION)
    assert logits.shape == (0, len(LABELS))
