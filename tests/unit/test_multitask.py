"""Several tasks on one trunk: one of them is a plain classifier, and no cut into batches changes a step."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, f1_score
from torch import nn
from transformers import BertForMaskedLM

from geneformer_ray.compute.classifier import POOLINGS, CellClassifier, new_classifier, predict_logits
from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.compute.freezing import freeze
from geneformer_ray.compute.model_directory import load_weights, model_vocabulary, read_config
from geneformer_ray.compute.multitask import (
    MultiTaskClassifier,
    balanced_task_weights,
    count_labels,
    load_classifier,
    multitask_loss,
    new_multitask_classifier,
)
from geneformer_ray.compute.optimisation import Optimisation
from geneformer_ray.compute.task_scores import mean_scores, score_tasks
from geneformer_ray.compute.training import (
    Share,
    TrainingOptions,
    balanced_weights,
    classifier_loss,
    train_step,
    training_plan,
)
from geneformer_ray.data.batching import Step
from geneformer_ray.data.task_splits import UNLABELLED
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError
from tests.conftest import random_cells
from tests.reference import Cell, StockTrunk, gene_positions

EXECUTION = choose_execution(cpus=1)
TASKS = {"type": ["alpha", "beta", "delta"], "sex": ["female", "male"], "age": ["adult", "child", "foetal", "old"]}
WEIGHTS = {"type": 1.0, "sex": 0.25, "age": 3.0}
LENGTHS = [9, 3, 15, 1, 6, 9, 12, 14, 2, 16, 11, 7, 5, 8]


@pytest.fixture(scope="module")
def cells(vocabulary: GeneVocabulary) -> list[Cell]:
    return random_cells(vocabulary, np.random.default_rng(0), LENGTHS)


@pytest.fixture(scope="module")
def targets() -> np.ndarray:
    """Classes of each cell in each task; half of them missing in the second, one cell without any."""
    rng = np.random.default_rng(1)
    drawn = np.stack([rng.integers(len(labels), size=len(LENGTHS)) for labels in TASKS.values()], axis=1)
    drawn[rng.random(len(LENGTHS)) < 0.5, 1] = UNLABELLED
    drawn[[2, 7], 0] = UNLABELLED
    drawn[4] = UNLABELLED
    return drawn


def fresh(directory: Path, vocabulary: GeneVocabulary, pooling: str = "mean", seed: int = 0) -> MultiTaskClassifier:
    torch.manual_seed(seed)
    model, _ = new_multitask_classifier(directory, vocabulary, TASKS, pooling)
    return far_from_neutral(model)


def far_from_neutral(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("classifier", "bert.pooler")):
                parameter.normal_(std=0.5)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    return model


# ------------------------------------------------------------------ what it computes


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", ["plain", "special"])
def test_logits_are_each_head_on_the_pooled_vector(
    kind: str,
    pooling: str,
    model_directory: Path,
    special_model_directory: Path,
    vocabulary: GeneVocabulary,
    special_vocabulary: GeneVocabulary,
    tmp_path: Path,
) -> None:
    directory, parent = {
        "plain": (model_directory, vocabulary), "special": (special_model_directory, special_vocabulary)
    }[kind]  # fmt: skip
    torch.manual_seed(0)
    model, own = new_multitask_classifier(directory, parent, TASKS, pooling)
    far_from_neutral(model)
    cells = [own.adapt(ids, parent.digest) for ids in random_cells(parent, np.random.default_rng(0), LENGTHS)]
    model.save(tmp_path, own)
    trunk = StockTrunk(tmp_path)
    weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
    expected: dict[str, list[np.ndarray]] = {task: [] for task in TASKS}
    for ids in cells:
        hidden_LD, genes = trunk.hidden(ids), gene_positions(ids, own)
        pooled = {"cls": hidden_LD[0], "first_gene": hidden_LD[genes[0]], "mean": hidden_LD[genes].mean(axis=0)}
        dense = np.tanh(weights["bert.pooler.dense.weight"] @ pooled[pooling] + weights["bert.pooler.dense.bias"])
        for number, task in enumerate(TASKS):
            head = weights[f"classifier.{number}.weight"], weights[f"classifier.{number}.bias"]
            expected[task].append(head[0] @ dense + head[1])
    logits = model.by_task(predict_logits(model, cells, own.pad_id, execution=EXECUTION))
    assert list(logits) == list(TASKS)
    for task, values in expected.items():
        assert np.ptp(values, axis=0).min() > 0.05
        np.testing.assert_allclose(logits[task], values, atol=1e-5, err_msg=task)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_pretrained_weights_are_those_of_the_directory(
    pooling: str, model_directory: Path, vocabulary: GeneVocabulary
) -> None:
    """Upstream's model of several tasks starts from random weights."""
    model, _ = new_multitask_classifier(model_directory, vocabulary, TASKS, pooling)
    trunk = {n: v for n, v in load_file(model_directory / "model.safetensors").items() if n.startswith("bert.")}
    state = model.state_dict()
    assert len(trunk) > 40
    for name, value in trunk.items():
        assert torch.equal(state[name][: len(value)], value), name
    assert {name for name in state if name not in trunk} == {
        "bert.pooler.dense.weight", "bert.pooler.dense.bias",
        *(f"classifier.{number}.{what}" for number in range(3) for what in ("weight", "bias")),
    }  # fmt: skip
    # Nothing is left without a value, and all of it is learned.
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_trunk_without_all_of_its_weights_is_refused(
    model_directory: Path, vocabulary: GeneVocabulary, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    weights = load_file(model_directory / "model.safetensors")
    del weights["bert.encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((model_directory / "config.json").read_text())
    with pytest.raises(InputError, match=r"whose weights lack bert\.encoder\.layer\.1\.output\.dense\.weight"):
        new_multitask_classifier(tmp_path, vocabulary, TASKS, "mean")


# ------------------------------------------------------------------ one task is a plain classifier


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("classifier.0.", "classifier."): value for name, value in state.items()}


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_one_task_is_a_classifier_to_the_last_bit(
    pooling: str, weighted: bool, model_directory: Path, vocabulary: GeneVocabulary, cells: list[Cell]
) -> None:
    """From its first weights to those that two epochs of training leave, with dropout on."""
    classes = np.arange(len(cells)) % 3
    tasks = {"type": TASKS["type"]}
    options = TrainingOptions(epochs=2, learning_rate=1e-2, tokens_per_batch=40, accumulate=2, gene_dropout=0.2)
    trained: list[dict[str, torch.Tensor]] = []
    results: list[list[Any]] = []
    for several in (False, True):
        torch.manual_seed(3)
        model: CellClassifier
        if several:
            model, own = new_multitask_classifier(model_directory, vocabulary, tasks, pooling)
            weights = balanced_task_weights(classes[:, None], tasks) if weighted else None
            loss_of = multitask_loss(classes[:, None], tasks, {"type": 0.3}, weights, 0.1 * weighted)
        else:
            model, own = new_classifier(model_directory, vocabulary, tasks["type"], pooling)
            weight = balanced_weights(classes, 3) if weighted else None
            loss_of = classifier_loss(classes, weight, 0.1 * weighted)
        assert any(module.p for module in model.modules() if isinstance(module, nn.Dropout))
        start = renamed(copy.deepcopy(model.state_dict()))
        adapted = [own.adapt(ids, vocabulary.digest) for ids in cells]
        lengths = np.array([len(ids) for ids in adapted])
        plan = training_plan(lengths, np.zeros_like(lengths), options, 1)
        optimisation = Optimisation(model, options, sum(plan.count(epoch) for epoch in range(options.epochs)))
        items_of = (lambda batch: count_labels(classes[batch][:, None])) if several else len
        results.append(
            [
                train_step(
                    model, optimisation, step, [[adapted[i] for i in workers[0]] for workers in step.batches],
                    loss_of, items_of, options, vocabulary=own, execution=EXECUTION,
                )
                for epoch in range(options.epochs)
                for step in plan.steps(epoch)
            ]
        )  # fmt: skip
        logits = predict_logits(model, adapted, own.pad_id, execution=EXECUTION)
        trained.append({**start, **{f"after {n}": v for n, v in renamed(model.state_dict()).items()}})
        trained[-1]["logits"] = torch.from_numpy(logits)
    assert results[0] == results[1]
    assert list(trained[0]) == list(trained[1])
    for name, value in trained[0].items():
        assert torch.equal(trained[1][name], value), name
    assert not torch.equal(trained[0]["after classifier.weight"], trained[0]["classifier.weight"])


# ------------------------------------------------------------------ the loss


def slow_gradients(
    model: MultiTaskClassifier, cells: list[Cell], targets: np.ndarray, numbers: list[int], weights: dict[str, float]
) -> tuple[float, dict[str, torch.Tensor]]:
    """The formula at the top of the module, written out label by label over single cells."""
    labelled = {task: sum(int(row[t]) >= 0 for row in targets) for t, task in enumerate(TASKS)}
    pairs = [(i, t) for i in numbers for t in range(len(TASKS)) if targets[i, t] >= 0]
    model = copy.deepcopy(model).train()
    total = torch.zeros((), dtype=torch.float64)
    for i, t in pairs:
        task = list(TASKS)[t]
        logits = model(torch.from_numpy(cells[i].astype(np.int64))[None])[0].double()
        start = sum(len(labels) for labels in list(TASKS.values())[:t])
        own = logits[start : start + len(TASKS[task])]
        entropy = torch.logsumexp(own, 0) - own[int(targets[i, t])]
        total = total + weights[task] / sum(weights.values()) * sum(labelled.values()) / labelled[task] * entropy
    total = total / len(pairs)
    total.backward()
    return float(total.detach()), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


class Kept:
    """Keeps gradients instead of stepping down them."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.gradients = model, {}

    def step(self) -> None:
        self.gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)


CUTS = {
    "one batch": [[[0, 1, 2, 3, 4, 5, 6, 7, 8]]],
    "uneven batches": [[[4, 0, 1, 2, 3, 5, 6]], [[7]], [[8]]],
    "one cell a batch": [[[i]] for i in range(9)],
    "two workers": [[[0, 1, 2, 3, 4], [5, 6, 7, 8]]],
    "three workers, one without a label": [[[0, 1, 2, 3], [4], [5]], [[6], [7], [8]]],
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_step_is_the_same_however_it_is_cut(
    cut: str, model_directory: Path, vocabulary: GeneVocabulary, cells: list[Cell], targets: np.ndarray
) -> None:
    model = fresh(model_directory, vocabulary)
    batches = [[np.array(mine) for mine in workers] for workers in CUTS[cut]]
    workers = len(batches[0])
    options = TrainingOptions(epochs=1, learning_rate=0.0, accumulate=len(batches))
    loss_of, items_of = multitask_loss(targets, TASKS, WEIGHTS), lambda batch: count_labels(targets[batch])
    sums: dict[str, torch.Tensor] = {}
    loss = items = 0.0
    for rank in range(workers):
        kept: Any = Kept(model)
        result = train_step(
            model, kept, Step(0, 0, batches), [[cells[i] for i in both[rank]] for both in batches],
            loss_of, items_of, options, vocabulary=vocabulary, execution=EXECUTION, share=Share(rank, workers),
        )  # fmt: skip
        loss, items = loss + result.loss_sum, items + result.items
        for name, gradient in kept.gradients.items():
            sums[name] = sums.get(name, torch.zeros_like(gradient)) + gradient / workers  # as DDP averages
    expected_loss, expected = slow_gradients(model, cells, targets, list(range(9)), WEIGHTS)
    assert items == (targets[:9] >= 0).sum()
    assert loss / items == pytest.approx(expected_loss, rel=1e-5)
    assert sums.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(sums[name], gradient, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-2


def test_over_all_cells_it_is_the_weighted_sum_of_the_tasks_means(
    model_directory: Path, vocabulary: GeneVocabulary, cells: list[Cell], targets: np.ndarray
) -> None:
    model = fresh(model_directory, vocabulary).eval()
    loss_of = multitask_loss(targets, TASKS, WEIGHTS)
    total, labels, right = 0.0, 0, 0
    means: dict[str, list[float]] = {task: [] for task in TASKS}
    hits = 0
    for i, ids in enumerate(cells):
        ids_BL = torch.from_numpy(ids.astype(np.int64))[None]
        with torch.inference_mode():
            loss, correct = loss_of(model, ids_BL, torch.ones_like(ids_BL), np.array([i]))
            logits = model.by_task(model(ids_BL).double().numpy())
        total, labels, right = total + float(loss), labels + count_labels(targets[[i]]), right + correct
        for t, (task, row) in enumerate(logits.items()):
            if targets[i, t] >= 0:
                means[task].append(float(np.log(np.exp(row[0]).sum()) - row[0, targets[i, t]]))
                hits += int(row[0].argmax() == targets[i, t])
    expected = sum(WEIGHTS[task] * np.mean(values) for task, values in means.items()) / sum(WEIGHTS.values())
    assert len({len(values) for values in means.values()}) == 3  # the tasks have different numbers of labels
    assert total / labels == pytest.approx(expected, rel=1e-5)
    assert (labels, right) == ((targets >= 0).sum(), hits)


def test_a_missing_label_adds_nothing(
    model_directory: Path, vocabulary: GeneVocabulary, cells: list[Cell], targets: np.ndarray
) -> None:
    model = fresh(model_directory, vocabulary)
    loss_of = multitask_loss(targets, TASKS)
    for i, without in ((2, 0), (4, None)):
        model.zero_grad(set_to_none=True)
        ids_BL = torch.from_numpy(cells[i].astype(np.int64))[None]
        loss, _ = loss_of(model, ids_BL, torch.ones_like(ids_BL), np.array([i]))
        loss.backward()
        silent = [head for t, head in enumerate(model.classifier) if without in (t, None)]
        assert silent
        assert all(not head.weight.grad.any() and not head.bias.grad.any() for head in silent)
        trunk = model.bert.encoder.layer[0].attention.self.query.weight.grad
        assert bool(trunk.any()) == (without is not None)
        assert (float(loss.detach()) == 0) == (without is None)


def test_balanced_classes_count_the_same_in_every_task(targets: np.ndarray) -> None:
    for (task, labels), weights, column in zip(
        TASKS.items(), balanced_task_weights(targets, TASKS), targets.T, strict=True
    ):
        counts = [int((column == number).sum()) for number in range(len(labels))]
        totals = [float(weights[number]) * count for number, count in enumerate(counts) if count]
        assert totals == pytest.approx([totals[0]] * len(totals)), task
        assert sum(totals) == pytest.approx(sum(counts) * len(totals) / len(labels))


def test_only_the_ratios_of_task_weights_count(
    model_directory: Path, vocabulary: GeneVocabulary, cells: list[Cell], targets: np.ndarray
) -> None:
    model = fresh(model_directory, vocabulary).eval()
    ids_BL = torch.from_numpy(cells[0].astype(np.int64))[None]

    def loss(weights: dict[str, float] | None) -> float:
        of = multitask_loss(targets, TASKS, weights)
        return float(of(model, ids_BL, torch.ones_like(ids_BL), np.array([0]))[0].detach())

    assert loss({"type": 7, "sex": 7, "age": 7}) == pytest.approx(loss(None))
    assert loss({"age": 3.0, "type": 1.0, "sex": 1.0}) == pytest.approx(loss({"age": 3.0}))
    assert abs(loss({"age": 3.0}) - loss(None)) > 1e-2


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"cell_type": 1.0}, "--task-weights: got cell_type; takes weights of type, sex, age"),
        ({"sex": 0.0}, r"--task-weights: got sex=0\.0; takes weights above 0"),
        ({"sex": float("nan")}, "--task-weights: got sex=nan; takes weights above 0"),
    ],
)
def test_weights_that_are_none_are_refused(targets: np.ndarray, weights: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        multitask_loss(targets, TASKS, weights)


def test_tasks_without_labels_or_classes_are_refused(
    targets: np.ndarray, model_directory: Path, vocabulary: GeneVocabulary
) -> None:
    empty = targets.copy()
    empty[:, 1] = UNLABELLED
    with pytest.raises(InputError, match="--label: got sex without a labelled cell to train"):
        multitask_loss(empty, TASKS)
    with pytest.raises(InputError, match="--label: got sex with 1 classes"):
        new_multitask_classifier(model_directory, vocabulary, {"sex": ["male"]}, "mean")
    with pytest.raises(InputError, match="--label: got nothing"):
        new_multitask_classifier(model_directory, vocabulary, {}, "mean")


# ------------------------------------------------------------------ files


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_directory_gives_the_same_logits_again(
    pooling: str, model_directory: Path, vocabulary: GeneVocabulary, cells: list[Cell], tmp_path: Path
) -> None:
    model, own = new_multitask_classifier(model_directory, vocabulary, TASKS, pooling)
    far_from_neutral(model).save(tmp_path, own)
    adapted = [own.adapt(ids, vocabulary.digest) for ids in cells]
    expected = predict_logits(model, adapted, own.pad_id, execution=EXECUTION)
    config = read_config(tmp_path)
    found = model_vocabulary(tmp_path, None, config)
    assert found.digest == own.digest
    for loaded in (MultiTaskClassifier.load(tmp_path, found), load_classifier(tmp_path, found)):
        assert isinstance(loaded, MultiTaskClassifier)
        assert (loaded.tasks, list(loaded.tasks), loaded.pooling) == (TASKS, list(TASKS), pooling)
        np.testing.assert_array_equal(predict_logits(loaded, adapted, own.pad_id, execution=EXECUTION), expected)
    assert config.architectures == ["MultiTaskClassifier"]


def test_nobody_takes_several_tasks_for_one(model_directory: Path, vocabulary: GeneVocabulary, tmp_path: Path) -> None:
    """Probabilities over the classes of all tasks together would mean nothing."""
    fresh(model_directory, vocabulary).save(tmp_path / "several", vocabulary)
    with pytest.raises(InputError, match=r"whose weights lack classifier\.bias and 1 more"):
        CellClassifier.load(tmp_path / "several", vocabulary)
    single, _ = new_classifier(model_directory, vocabulary, ["a", "b"], "mean")
    single.save(tmp_path / "one", vocabulary)
    assert type(load_classifier(tmp_path / "one", vocabulary)) is CellClassifier
    with pytest.raises(InputError, match="which has no tasks; takes a classifier of several tasks"):
        MultiTaskClassifier.load(tmp_path / "one", vocabulary)


def test_its_trunk_carries_other_heads(
    model_directory: Path, vocabulary: GeneVocabulary, cells: list[Cell], tmp_path: Path
) -> None:
    """A classifier of one task on a trunk that had several before is one of one task."""
    fresh(model_directory, vocabulary).save(tmp_path / "several", vocabulary)
    single, _ = new_classifier(tmp_path / "several", vocabulary, ["a", "b"], "first_gene")
    single.save(tmp_path / "one", vocabulary)
    loaded = load_classifier(tmp_path / "one", vocabulary)
    assert (type(loaded), loaded.labels) == (CellClassifier, ["a", "b"])
    again, _ = new_multitask_classifier(tmp_path / "several", vocabulary, {"sex": ["f", "m"]}, "cls")
    assert again.tasks == {"sex": ["f", "m"]}
    trunk = load_weights(BertForMaskedLM, tmp_path / "several", fresh=("cls.",)).bert.state_dict()
    for name, value in trunk.items():
        assert torch.equal(single.bert.state_dict()[name], value)


@pytest.mark.parametrize(
    "tasks", [None, [], {"type": ["a"]}, [{"name": "type"}], [{"name": "type", "labels": ["a", "b"]}] * 2, 3]
)
def test_a_broken_description_is_refused(
    tasks: Any, model_directory: Path, vocabulary: GeneVocabulary, tmp_path: Path
) -> None:
    fresh(model_directory, vocabulary).save(tmp_path, vocabulary)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tasks": tasks}))
    with pytest.raises(InputError, match=r"--model: got config\.json with the tasks"):
        load_classifier(tmp_path, vocabulary)


def test_frozen_layers_stay_and_heads_learn(model_directory: Path, vocabulary: GeneVocabulary) -> None:
    model = fresh(model_directory, vocabulary)
    freeze(model, layers=3, embeddings=True)
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learned == {n for n, _ in model.named_parameters() if n.startswith(("bert.pooler.", "classifier."))}


# ------------------------------------------------------------------ scores


def test_each_task_is_scored_on_its_labelled_cells(targets: np.ndarray) -> None:
    logits = np.random.default_rng(0).normal(size=(len(targets), 9)).astype(np.float32)
    scores = score_tasks(targets, logits, TASKS)
    found = []
    for t, (task, columns) in enumerate({"type": slice(0, 3), "sex": slice(3, 5), "age": slice(5, 9)}.items()):
        labelled = targets[:, t] >= 0
        truth, said = targets[labelled, t], logits[labelled, columns].argmax(axis=1)
        present = np.unique(truth)
        assert scores[task]["cells"] == labelled.sum()
        assert scores[task]["accuracy"] == pytest.approx(accuracy_score(truth, said))
        found.append(f1_score(truth, said, labels=present, average="macro", zero_division=0))
        assert scores[task]["macro_f1"] == pytest.approx(found[-1])
        assert list(scores[task]["per_class"]) == TASKS[task]
    means = mean_scores(scores)
    assert means["macro_f1"] == pytest.approx(np.mean(found))
    assert means["accuracy"] == pytest.approx(np.mean([one["accuracy"] for one in scores.values()]))
    errors = [one["calibration"]["expected_calibration_error"] for one in scores.values()]
    assert means["expected_calibration_error"] == pytest.approx(np.mean(errors)) and np.ptp(errors) > 0
    assert means["tasks"] == scores and list(means["tasks"]) == list(TASKS)
