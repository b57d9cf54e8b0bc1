"""The gene classifier: its logits, its directory, and what it learns from."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertForTokenClassification

from geneformer_ray.compute.classifier import CellClassifier, new_classifier
from geneformer_ray.compute.encoder import attention_mask
from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.compute.freezing import freeze
from geneformer_ray.compute.gene_classifier import (
    NO_CLASS,
    GeneClassifier,
    balanced_gene_weights,
    gene_loss,
    new_gene_classifier,
    token_classes,
)
from geneformer_ray.compute.lora import Adapters, LoraOptions
from geneformer_ray.compute.model_directory import model_vocabulary, read_config, save_model
from geneformer_ray.compute.optimisation import Optimisation
from geneformer_ray.compute.pretraining import new_model
from geneformer_ray.compute.training import Share, StepResult, TrainingOptions, train_step, training_plan
from geneformer_ray.data.batching import Step, pad
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError
from tests.conftest import random_cells, randomise
from tests.reference import Cell, StockTrunk

EXECUTION = choose_execution(cpus=1)
LABELS = ["insensitive", "sensitive", "unclear"]
LENGTHS = [9, 3, 15, 1, 6, 9]


def batch_of(cells: list[Cell], vocabulary: GeneVocabulary) -> tuple[torch.Tensor, torch.Tensor]:
    ids, lengths = pad(cells, vocabulary.pad_id)
    return torch.from_numpy(ids), attention_mask(torch.from_numpy(lengths), ids.shape[1])


@pytest.fixture(scope="module", params=["plain", "special"])
def trunk(request: pytest.FixtureRequest) -> tuple[Path, GeneVocabulary]:
    """A model directory without and with special tokens."""
    prefix = "" if request.param == "plain" else "special_"
    return request.getfixturevalue(f"{prefix}model_directory"), request.getfixturevalue(f"{prefix}vocabulary")


@pytest.fixture(scope="module")
def model(trunk: tuple[Path, GeneVocabulary]) -> GeneClassifier:
    torch.manual_seed(1)
    model = new_gene_classifier(trunk[0], LABELS)
    randomise(model.classifier, 0.5)
    return model.eval()


@pytest.fixture(scope="module")
def saved(model: GeneClassifier, trunk: tuple[Path, GeneVocabulary], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("genes") / "model"
    model.save(directory, trunk[1])
    return directory


@pytest.fixture(scope="module")
def cells(trunk: tuple[Path, GeneVocabulary]) -> list[Cell]:
    return random_cells(trunk[1], np.random.default_rng(0), LENGTHS)


# ------------------------------------------------------------------ logits


def test_logits_are_the_head_on_each_hidden_state(model: GeneClassifier, saved: Path, cells: list[Cell]) -> None:
    stock = StockTrunk(saved)
    weight, bias = (value.double().numpy() for value in (model.classifier.weight.data, model.classifier.bias.data))
    with torch.inference_mode():
        for ids in cells:
            found = model(torch.from_numpy(ids.astype(np.int64))[None])[0].numpy()
            expected = stock.hidden(ids) @ weight.T + bias
            np.testing.assert_allclose(found, expected, atol=1e-5)
            assert len(ids) < 5 or np.ptp(expected, axis=0).min() > 0.05  # so that a wrong position would show


def test_the_head_is_computed_where_it_is_asked_for(
    model: GeneClassifier, trunk: tuple[Path, GeneVocabulary], cells: list[Cell]
) -> None:
    ids_BL, mask_BL = batch_of(cells, trunk[1])
    at_BL = (torch.rand(ids_BL.shape, generator=torch.Generator().manual_seed(0)) < 0.4) & mask_BL.bool()
    with torch.inference_mode():
        whole, some = model(ids_BL, mask_BL), model(ids_BL, mask_BL, at_BL)
    assert whole.shape == (*ids_BL.shape, 3)
    assert torch.equal(whole[at_BL], some)


def test_padding_changes_nothing(model: GeneClassifier, trunk: tuple[Path, GeneVocabulary], cells: list[Cell]) -> None:
    ids_BL, mask_BL = batch_of(cells, trunk[1])
    with torch.inference_mode():
        batched = model(ids_BL, mask_BL)
        for number, ids in enumerate(cells):
            alone = model(torch.from_numpy(ids.astype(np.int64))[None])[0]
            torch.testing.assert_close(batched[number, : len(ids)], alone, atol=1e-5, rtol=0)


# ------------------------------------------------------------------ the directory


def test_stock_transformers_loads_it(
    model: GeneClassifier, saved: Path, trunk: tuple[Path, GeneVocabulary], cells: list[Cell]
) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert config["architectures"] == ["BertForTokenClassification"]
    assert config["task"] == "genes"
    stock, info = BertForTokenClassification.from_pretrained(saved, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert [stock.config.id2label[number] for number in range(3)] == LABELS
    ids_BL, mask_BL = batch_of(cells, trunk[1])
    with torch.inference_mode():
        theirs, ours = stock.eval()(input_ids=ids_BL, attention_mask=mask_BL).logits, model(ids_BL, mask_BL)
    torch.testing.assert_close(theirs[mask_BL.bool()], ours[mask_BL.bool()], atol=1e-6, rtol=0)


def test_a_directory_is_self_contained(
    model: GeneClassifier, saved: Path, trunk: tuple[Path, GeneVocabulary], tmp_path: Path
) -> None:
    moved = shutil.copytree(saved, tmp_path / "moved")
    again = GeneClassifier.load(moved)
    assert again.labels == LABELS
    assert not again.training
    assert model_vocabulary(moved, None, read_config(moved)).tokens == trunk[1].tokens
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    again.save(tmp_path / "twice", trunk[1])
    assert GeneClassifier.load(tmp_path / "twice").labels == LABELS


def test_a_stock_checkpoint_loads(model: GeneClassifier, saved: Path, tmp_path: Path) -> None:
    """Upstream's gene classifiers are plain ones, which know of no task."""
    BertForTokenClassification.from_pretrained(saved).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({key: content[key] for key in content if key != "task"}))
    assert torch.equal(GeneClassifier.load(tmp_path).classifier.weight, model.classifier.weight)


def test_other_models_are_refused(trunk: tuple[Path, GeneVocabulary], saved: Path, tmp_path: Path) -> None:
    classifier, _ = new_classifier(*trunk, LABELS, "mean")
    classifier.save(tmp_path, trunk[1])
    for directory in (trunk[0], tmp_path):
        with pytest.raises(InputError, match="no gene classifier"):
            GeneClassifier.load(directory)
    with pytest.raises(InputError, match="no classifier"):
        CellClassifier.load(saved, trunk[1])


@pytest.mark.parametrize("name", ["classifier.weight", "bert.encoder.layer.1.output.dense.bias"])
def test_a_weight_that_is_missing_is_refused(saved: Path, name: str, tmp_path: Path) -> None:
    """A fresh head is random, and nothing else."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(saved, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=re.escape(name)):
        GeneClassifier.load(tmp_path / "model")
    if name.startswith("bert."):
        with pytest.raises(InputError, match=re.escape(name)):
            new_gene_classifier(tmp_path / "model", LABELS)
    else:
        new_gene_classifier(tmp_path / "model", LABELS)


# ------------------------------------------------------------------ a fresh head


def test_the_trunk_is_kept_and_the_head_is_the_seeds(model_directory: Path, vocabulary: GeneVocabulary) -> None:
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        fresh = new_gene_classifier(model_directory, LABELS)
        heads.append(fresh.classifier.weight)
        assert not fresh.classifier.bias.any()
        assert not any("pooler" in name for name in fresh.state_dict())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert heads[0].std() < 0.05
    cell = random_cells(vocabulary, np.random.default_rng(0), [9])[0]
    ours = fresh.eval().bert(torch.from_numpy(cell.astype(np.int64))[None]).last_hidden_state[0].detach().numpy()
    np.testing.assert_allclose(ours, StockTrunk(model_directory).hidden(cell), atol=1e-5)


def test_a_former_head_is_no_head_start(saved: Path, trunk: tuple[Path, GeneVocabulary], tmp_path: Path) -> None:
    """Neither one of the same shape nor one of cells."""
    cells_model, _ = new_classifier(*trunk, LABELS[:2], "mean")
    randomise(cells_model.classifier, 5.0)
    cells_model.config.tasks = [{"name": "type", "labels": LABELS[:2]}]  # as one of several tasks has
    cells_model.save(tmp_path / "cells", trunk[1])
    for former in (saved, tmp_path / "cells"):
        torch.manual_seed(0)
        fresh = new_gene_classifier(former, LABELS)
        assert fresh.classifier.weight.shape == (3, 16)
        assert fresh.classifier.weight.std() < 0.05
    # What a cell classifier records would make this one pass for it.
    fresh.save(tmp_path / "genes", trunk[1])
    assert (
        not {"pooling", "has_cls", "special_ids"} & json.loads((tmp_path / "genes" / "config.json").read_text()).keys()
    )
    with pytest.raises(InputError, match="no classifier"):
        CellClassifier.load(tmp_path / "genes", trunk[1])


def test_cells_can_be_learned_on_the_trunk_of_genes(
    saved: Path, trunk: tuple[Path, GeneVocabulary], tmp_path: Path
) -> None:
    classifier, vocabulary = new_classifier(saved, trunk[1], LABELS[:2], "mean")
    classifier.save(tmp_path, vocabulary)
    assert "task" not in json.loads((tmp_path / "config.json").read_text())
    assert CellClassifier.load(tmp_path, vocabulary).labels == LABELS[:2]


def test_adapters_learn_beside_the_head_and_merge(trunk: tuple[Path, GeneVocabulary], tmp_path: Path) -> None:
    model = new_gene_classifier(trunk[0], LABELS)
    adapters = Adapters(model, LoraOptions(2, 4.0, 0.0, ("query", "value"), None))
    learned = {name: its for name, its in model.named_parameters() if its.requires_grad}
    assert {name for name in learned if "lora" not in name} == {"classifier.weight", "classifier.bias"}
    with torch.no_grad():
        for parameter in learned.values():
            parameter.normal_(std=0.3)
    ids_BL, mask_BL = batch_of(random_cells(trunk[1], np.random.default_rng(0), LENGTHS), trunk[1])
    adapters.merged().save(tmp_path, trunk[1])
    with torch.inference_mode():
        expected = model.eval()(ids_BL, mask_BL)
        np.testing.assert_allclose(GeneClassifier.load(tmp_path)(ids_BL, mask_BL), expected, atol=1e-5)


def test_layers_and_embeddings_freeze(model_directory: Path) -> None:
    fresh = new_gene_classifier(model_directory, LABELS)
    freeze(fresh, layers=2, embeddings=True)
    learned = {name for name, parameter in fresh.named_parameters() if parameter.requires_grad}
    assert all(name.startswith(("bert.encoder.layer.2.", "classifier.")) for name in learned)
    assert {"classifier.weight", "classifier.bias"} < learned


# ------------------------------------------------------------------ the loss


def slow_loss(logits_BLC: np.ndarray, cells: list[Cell], class_of: dict[int, int]) -> tuple[float, int, int]:
    """Cross entropy over the genes that have a class: one at a time, in float64. Also how many, and how many right."""
    loss, items, correct = 0.0, 0, 0
    for row, ids in enumerate(cells):
        for position, token in enumerate(ids.tolist()):
            if token in class_of:
                logits = logits_BLC[row, position].astype(np.float64)
                loss -= logits[class_of[token]] - np.log(np.exp(logits).sum())
                items, correct = items + 1, correct + int(np.argmax(logits) == class_of[token])
    return loss, items, correct


@given(seed=st.integers(0, 10_000), genes=st.integers(1, 20))
@settings(max_examples=25)
def test_the_loss_is_over_the_genes_with_a_class_alone(
    model: GeneClassifier, trunk: tuple[Path, GeneVocabulary], seed: int, genes: int
) -> None:
    vocabulary, rng = trunk[1], np.random.default_rng(seed)
    cells = random_cells(vocabulary, rng, rng.integers(0, 15, 5).tolist())
    tokens = np.array([vocabulary.tokens[gene] for gene in rng.permutation(vocabulary.genes)[:genes]])
    targets = rng.integers(0, 3, genes)
    class_V = token_classes(tokens, targets, vocabulary)
    ids_BL, mask_BL = batch_of(cells, vocabulary)
    with torch.inference_mode():
        loss, correct = gene_loss(class_V)(model, ids_BL, mask_BL, np.arange(5))
        logits = model(ids_BL, mask_BL).numpy()
    expected, items, right = slow_loss(logits, cells, dict(zip(tokens.tolist(), targets.tolist(), strict=True)))
    assert float(loss) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert correct == right
    # What the plan of a training counts ahead is what the loss sums over.
    assert items == sum(int((class_V[cell] != NO_CLASS).sum()) for cell in cells)


class AnyContext(torch.nn.Module):
    """Stands where the classifier does: logits that a gene has of itself, whatever is around it."""

    def __init__(self, vocabulary: GeneVocabulary) -> None:
        super().__init__()
        self.logits = torch.nn.Embedding(len(vocabulary), 3)
        self.asked = torch.zeros(0)

    def forward(self, ids_BL: torch.Tensor, mask_BL: torch.Tensor, at_BL: torch.Tensor) -> torch.Tensor:
        self.asked = at_BL
        return self.logits(ids_BL)[at_BL]


def test_other_positions_never_matter(special_vocabulary: GeneVocabulary) -> None:
    """Neither to the loss nor to its gradient: other genes, special tokens and padding."""
    vocabulary, rng = special_vocabulary, np.random.default_rng(3)
    tokens = np.array([vocabulary.tokens[gene] for gene in vocabulary.genes[:10]])
    class_V = token_classes(tokens, rng.integers(0, 3, 10), vocabulary)
    table = AnyContext(vocabulary)
    ids_BL, mask_BL = batch_of(random_cells(vocabulary, rng, [9, 14, 3]), vocabulary)
    loss, _ = gene_loss(class_V)(table, ids_BL, mask_BL, np.arange(3))
    loss.backward()
    touched = set(np.flatnonzero(table.logits.weight.grad.abs().sum(dim=1)).tolist())  # type: ignore[union-attr]
    assert touched == set(tokens.tolist()) & set(ids_BL.unique().tolist())
    labelled_BL = torch.from_numpy(class_V)[ids_BL] != NO_CLASS
    assert torch.equal(table.asked, labelled_BL)  # the head costs nothing elsewhere
    others = [token for token in range(len(vocabulary)) if class_V[token] == NO_CLASS]
    for _ in range(5):
        swapped_BL = torch.where(labelled_BL, ids_BL, torch.from_numpy(rng.choice(others, tuple(ids_BL.shape))))
        assert torch.equal(gene_loss(class_V)(table, swapped_BL, mask_BL, np.arange(3))[0], loss)
    # A gene behind the end of a cell is none of its.
    masked_BL = mask_BL.clone()
    masked_BL[:, 4:] = 0
    cut = gene_loss(class_V)(table, ids_BL[:, :4], masked_BL[:, :4], np.arange(3))[0]
    assert torch.equal(gene_loss(class_V)(table, ids_BL, masked_BL, np.arange(3))[0], cut)


def test_special_tokens_have_no_class(special_vocabulary: GeneVocabulary) -> None:
    class_V = token_classes(np.array([7, 5]), np.array([1, 0]), special_vocabulary)
    assert {token: class_V[token] for token in np.flatnonzero(class_V != NO_CLASS)} == {5: 0, 7: 1}
    for token in special_vocabulary.special_ids:
        with pytest.raises(ValueError, match="special token"):
            token_classes(np.array([5, token]), np.array([0, 1]), special_vocabulary)


def test_weights_and_smoothing_reach_the_loss(
    model: GeneClassifier, trunk: tuple[Path, GeneVocabulary], cells: list[Cell]
) -> None:
    vocabulary = trunk[1]
    tokens = np.array([vocabulary.tokens[gene] for gene in vocabulary.genes])
    targets = np.arange(len(tokens)) % 3
    class_V = token_classes(tokens, targets, vocabulary)
    ids_BL, mask_BL = batch_of(cells, vocabulary)
    weights = torch.tensor([0.5, 2.0, 0.0])
    with torch.inference_mode():
        found, _ = gene_loss(class_V, weights, 0.1)(model, ids_BL, mask_BL, np.arange(len(cells)))
        logits = model(ids_BL, mask_BL).flatten(0, 1)
    labels = torch.from_numpy(class_V)[ids_BL].masked_fill(mask_BL == 0, NO_CLASS).flatten()
    stock = torch.nn.CrossEntropyLoss(weights, reduction="sum", label_smoothing=0.1, ignore_index=-100)
    assert float(found) == pytest.approx(float(stock(logits, labels)), rel=1e-5)


def test_balanced_weights_make_classes_count_the_same() -> None:
    targets, cells = np.array([0, 1, 1, 2]), np.array([10, 3, 2, 1])
    weights = balanced_gene_weights(targets, cells, 3).double().numpy()
    occurrences = np.array([10, 5, 1])
    np.testing.assert_allclose(weights * occurrences, 16 / 3, rtol=1e-6)


# ------------------------------------------------------------------ learning


def learn(
    model: GeneClassifier, cells: list[Cell], class_V: np.ndarray, vocabulary: GeneVocabulary
) -> list[StepResult]:
    options = TrainingOptions(epochs=10, learning_rate=1e-2, warmup_fraction=0.1, tokens_per_batch=128)
    lengths = np.array([len(cell) for cell in cells])
    plan = training_plan(lengths, np.zeros_like(lengths), options, 1)
    labelled = np.array([(class_V[cell] != NO_CLASS).sum() for cell in cells])
    total = sum(plan.count(epoch) for epoch in range(options.epochs))
    optimisation, results = Optimisation(model, options, total), []
    for epoch in range(options.epochs):
        sums = [
            train_step(
                model, optimisation, step, [[cells[i] for i in batch] for (batch,) in step.batches],
                gene_loss(class_V), lambda batch: int(labelled[batch].sum()), options,
                vocabulary=vocabulary, execution=EXECUTION,
            )
            for step in plan.steps(epoch)
        ]  # fmt: skip
        results.append(sum(sums[1:], sums[0]))
    return results


def test_a_class_is_learned_and_known_of_other_genes(vocabulary: GeneVocabulary, tmp_path: Path) -> None:
    """One class stands in front, the other behind: what training genes teach of that holds for held-out ones."""
    rng = np.random.default_rng(0)
    genes = np.array([vocabulary.tokens[gene] for gene in vocabulary.genes], dtype=np.int32)
    front, behind = genes[::2], genes[1::2]
    cells = [np.concatenate([rng.permutation(front)[:6], rng.permutation(behind)[:6]]) for _ in range(80)]
    train = np.r_[front[:14], behind[:14]]
    class_V = token_classes(train, np.repeat([0, 1], 14), vocabulary)
    torch.manual_seed(0)
    save_model(new_model(vocabulary, layers=2, width=16, heads=2, feed_forward=24), vocabulary, tmp_path)
    model = new_gene_classifier(tmp_path, LABELS[:2])
    results = learn(model, cells, class_V, vocabulary)
    assert results[0].items == sum(int((class_V[cell] != NO_CLASS).sum()) for cell in cells)
    assert results[-1].loss_sum < results[0].loss_sum / 2
    model.eval()
    held_out = np.isin(np.stack(cells), np.r_[front[14:], behind[14:]])
    with torch.inference_mode():
        said = model(*batch_of(cells, vocabulary)).argmax(dim=2).numpy()
    truth = np.tile(np.repeat([0, 1], 6), (80, 1))
    assert (said == truth)[held_out].mean() > 0.95


def test_gradients_of_workers_add_up(model_directory: Path, vocabulary: GeneVocabulary) -> None:
    """Weighted by their labelled genes, which differ: two workers step where one alone would."""
    rng = np.random.default_rng(2)
    cells = random_cells(vocabulary, rng, [4, 15, 9, 12])
    tokens = np.array([vocabulary.tokens[gene] for gene in vocabulary.genes[:12]])
    class_V = token_classes(tokens, np.arange(12) % 3, vocabulary)
    labelled = np.array([(class_V[cell] != NO_CLASS).sum() for cell in cells])
    torch.manual_seed(0)
    model = new_gene_classifier(model_directory, LABELS)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    options = TrainingOptions(epochs=1, learning_rate=1e-3)

    class Kept:
        """Keeps the gradients that a step would follow."""

        def step(self) -> None:
            self.gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            model.zero_grad(set_to_none=True)

    def gradients(batches: list[np.ndarray]) -> torch.Tensor:
        each = []
        for rank in range(len(batches)):
            kept = Kept()
            train_step(
                model, kept, Step(0, 0, [batches]), [[cells[i] for i in batches[rank]]], gene_loss(class_V),  # type: ignore[arg-type]
                lambda batch: int(labelled[batch].sum()), options,
                vocabulary=vocabulary, execution=EXECUTION, share=Share(rank, len(batches)),
            )  # fmt: skip
            each.append(kept.gradients)
        return torch.stack(each).mean(dim=0)  # as the data-parallel wrapper does

    assert labelled[:1].sum() != labelled[1:].sum()
    torch.testing.assert_close(
        gradients([np.array([0]), np.array([1, 2, 3])]), gradients([np.arange(4)]), atol=1e-6, rtol=1e-4
    )
