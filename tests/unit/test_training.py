"""Training steps: what is learned, in which order, and the same on one worker as on many."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BertForMaskedLM

from geneformer_ray.compute.classifier import CellClassifier, new_classifier
from geneformer_ray.compute.encoder import attention_mask
from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.compute.freezing import check_frozen_layers, freeze
from geneformer_ray.compute.model_directory import load_weights, save_model
from geneformer_ray.compute.optimisation import SCHEDULES, Optimisation
from geneformer_ray.compute.pretraining import (
    MaskedGeneModel,
    choose_masked,
    count_masked,
    masked_genes,
    masked_loss,
    new_model,
)
from geneformer_ray.compute.training import (
    BatchLoss,
    Share,
    StepResult,
    TrainingOptions,
    balanced_weights,
    classifier_loss,
    drop_genes,
    train_step,
    training_plan,
)
from geneformer_ray.data.batching import TrainingPlan, pad
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError
from tests.conftest import random_cells
from tests.reference import Cell

EXECUTION = choose_execution(cpus=1)
LABELS = ["alpha", "beta"]


@pytest.fixture(scope="module")
def separable(vocabulary: GeneVocabulary) -> tuple[list[Cell], np.ndarray]:
    """Cells of two types that share no gene."""
    rng = np.random.default_rng(0)
    targets = rng.integers(2, size=61)
    genes = [np.arange(2, 22), np.arange(22, 42)]
    cells = [rng.permutation(genes[target])[: rng.integers(4, 16)].astype(np.int32) for target in targets]
    return cells, targets


@pytest.fixture
def classifier(model_directory: Path, vocabulary: GeneVocabulary) -> CellClassifier:
    torch.manual_seed(0)
    return new_classifier(model_directory, vocabulary, LABELS, "mean")[0]


def run_epoch(
    model: nn.Module,
    optimisation: Optimisation,
    cells: list[Cell],
    loss_of: BatchLoss,
    options: TrainingOptions,
    vocabulary: GeneVocabulary,
    *,
    epoch: int = 0,
    share: Share | None = None,
    items_of: Callable[[np.ndarray], Any] = len,
) -> list[StepResult]:
    share = share or Share()
    return [
        train_step(
            model, optimisation, step, [[cells[i] for i in workers[share.rank]] for workers in step.batches],
            loss_of, items_of, options, vocabulary=vocabulary, execution=EXECUTION, share=share,
        )
        for step in planned(cells, options, share.workers).steps(epoch)
    ]  # fmt: skip


def planned(cells: list[Cell], options: TrainingOptions, workers: int = 1) -> TrainingPlan:
    lengths = np.array([len(ids) for ids in cells])
    return training_plan(lengths, np.zeros_like(lengths), options, workers)


def planned_steps(cells: list[Cell], options: TrainingOptions, workers: int = 1) -> int:
    plan = planned(cells, options, workers)
    return sum(plan.count(epoch) for epoch in range(options.epochs))


# ------------------------------------------------------------------ the optimiser


def test_weight_decay_spares_biases_and_layer_norms(classifier: CellClassifier) -> None:
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(0.5)
    before = {name: value.detach().clone() for name, value in classifier.named_parameters()}
    options = TrainingOptions(epochs=1, learning_rate=0.1, warmup_fraction=0, schedule="constant", weight_decay=0.5)
    optimisation = Optimisation(classifier, options, total_steps=10)
    # A gradient of zero everywhere leaves only the decay.
    (sum(parameter.sum() for parameter in classifier.parameters()) * 0.0).backward()
    optimisation.step()
    for name, after in classifier.named_parameters():
        spared = name.endswith("bias") or "LayerNorm" in name
        torch.testing.assert_close(after.detach(), before[name] * (1.0 if spared else 1 - 0.1 * 0.5), msg=name)


def test_gradients_are_clipped_to_the_norm() -> None:
    """After clipping, a step cannot tell a steep loss from a steeper one."""
    after = []
    for steepness in (10, 1000):
        model = nn.Linear(3, 1)
        nn.init.ones_(model.weight)
        options = TrainingOptions(epochs=1, learning_rate=0.1, warmup_fraction=0, max_grad_norm=1e-8)
        (steepness * model(torch.tensor([1.0, 2.0, 3.0])).sum()).backward()
        Optimisation(model, options, total_steps=1).step()
        after.append(model.weight.detach().clone())
    torch.testing.assert_close(after[0], after[1], atol=1e-6, rtol=0)
    # Adam's epsilon is as large as these gradients: an unclipped step would be the whole learning rate.
    assert float((1 - after[0]).max()) < 0.05


def test_the_rate_rises_and_falls() -> None:
    parameter = nn.Linear(1, 1, bias=False)
    options = TrainingOptions(epochs=1, learning_rate=1.0, warmup_fraction=0.5, weight_decay=0)
    optimisation = Optimisation(parameter, options, total_steps=4)
    rates = []
    for _ in range(4):
        rates.append(optimisation.state()["adamw"]["param_groups"][0]["lr"])
        parameter(torch.ones(1)).sum().backward()
        optimisation.step()
    assert rates == [0, 0.5, 1, 0.5]
    assert optimisation.state()["adamw"]["param_groups"][0]["lr"] == 0


@pytest.mark.parametrize("schedule", ["nonsense", "", "reduce_lr_on_plateau", "warmup_stable_decay"])
def test_an_unknown_schedule_is_refused(schedule: str) -> None:
    with pytest.raises(InputError, match=f"--schedule: got {schedule}; takes one of linear, cosine, "):
        Optimisation(nn.Linear(1, 1), TrainingOptions(epochs=1, learning_rate=1, schedule=schedule), 10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_schedules_that_are_named(schedule: str) -> None:
    model = nn.Linear(1, 1)
    optimisation = Optimisation(model, TrainingOptions(epochs=1, learning_rate=1, schedule=schedule), 10)
    for _ in range(10):
        model(torch.ones(1)).sum().backward()
        optimisation.step()


# ------------------------------------------------------------------ data-parallel


class Gradients(Optimisation):
    """Keeps every step's gradients and leaves the weights as they are."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.steps: list[list[torch.Tensor]] = []

    def step(self) -> None:
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        self.steps.append([parameter.grad.clone() for parameter in parameters])
        self.model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("weighted", [False, True])
def test_two_workers_step_like_one(
    classifier: CellClassifier,
    vocabulary: GeneVocabulary,
    separable: tuple[list[Cell], np.ndarray],
    weighted: bool,
) -> None:
    """The mean of two workers' gradients, which is what DDP takes, is that of one worker on the whole batch."""
    cells, targets = separable
    for module in classifier.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    # Items a cell, as masked genes are: the workers' batches count differently many.
    items = 1 + np.arange(len(cells)) % 5 if weighted else np.ones(len(cells), dtype=int)

    def loss_of(
        model: nn.Module, ids_BL: torch.Tensor, mask_BL: torch.Tensor, batch: np.ndarray
    ) -> tuple[torch.Tensor, int]:
        target_B = torch.from_numpy(targets[batch])
        loss_B = nn.functional.cross_entropy(model(ids_BL, mask_BL), target_B, reduction="none")
        return (loss_B * torch.from_numpy(items[batch])).sum(), 0

    def gradients(share: Share) -> tuple[list[list[torch.Tensor]], list[StepResult]]:
        recorder = Gradients(classifier)
        options = TrainingOptions(epochs=1, learning_rate=0.0, tokens_per_batch=240 // share.workers)
        results = run_epoch(
            classifier, recorder, cells, loss_of, options, vocabulary,
            share=share, items_of=lambda batch: int(items[batch].sum()),
        )  # fmt: skip
        return recorder.steps, results

    (alone, whole), (first, one), (second, two) = (gradients(Share(*each)) for each in ((0, 1), (0, 2), (1, 2)))
    assert len(alone) == len(first) == len(second) > 2
    for a, b, c in zip(whole, one, two, strict=True):
        assert (a.cells, a.items) == (b.cells + c.cells, b.items + c.items)
        assert a.loss_sum == pytest.approx(b.loss_sum + c.loss_sum, rel=1e-5)
    assert any(b.items != c.items for b, c in zip(one, two, strict=True))
    for step, (full, left, right) in enumerate(zip(alone, first, second, strict=True)):
        assert max(float(gradient.abs().max()) for gradient in full) > 1e-3
        for expected, a, b in zip(full, left, right, strict=True):
            torch.testing.assert_close((a + b) / 2, expected, atol=1e-6, rtol=1e-5, msg=lambda m, s=step: f"{s}: {m}")


@pytest.mark.parametrize("workers", [1, 2])
def test_accumulated_batches_step_like_one_big_batch(
    classifier: CellClassifier, vocabulary: GeneVocabulary, separable: tuple[list[Cell], np.ndarray], workers: int
) -> None:
    """Whatever the sizes of the micro-batches: every cell of a step counts the same, on every worker."""
    cells, targets = separable
    for module in classifier.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    options = TrainingOptions(epochs=1, learning_rate=0.0, tokens_per_batch=48, accumulate=3)
    recorders, results = [], []
    for rank in range(workers):
        recorders.append(Gradients(classifier))
        share = Share(rank, workers)
        results.append(
            run_epoch(classifier, recorders[-1], cells, classifier_loss(targets), options, vocabulary, share=share)
        )
    steps = list(planned(cells, options, workers).steps(0))
    assert len(steps) == len(recorders[0].steps) > 2
    assert len({len(batch) for step in steps for batches in step.batches for batch in batches}) > 1
    for number, step in enumerate(steps):
        together = np.concatenate([batch for batches in step.batches for batch in batches])
        ids, real = pad([cells[i] for i in together], vocabulary.pad_id)
        mask_BL = attention_mask(torch.from_numpy(real), ids.shape[1])
        loss, _ = classifier_loss(targets)(classifier, torch.from_numpy(ids), mask_BL, together)
        assert float(loss.detach()) == pytest.approx(sum(worker[number].loss_sum for worker in results), rel=1e-5)
        (loss / len(together)).backward()
        expected = [parameter.grad for parameter in classifier.parameters() if parameter.grad is not None]
        for number_of, gradient in enumerate(expected):
            mean = sum(recorder.steps[number][number_of] for recorder in recorders) / workers
            torch.testing.assert_close(mean, gradient, atol=1e-6, rtol=1e-5)
        classifier.zero_grad(set_to_none=True)


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("layers", [0, 2, 3])
def test_what_is_frozen_stays_as_it_is(
    classifier: CellClassifier,
    vocabulary: GeneVocabulary,
    separable: tuple[list[Cell], np.ndarray],
    layers: int,
    embeddings: bool,
) -> None:
    """And all else is learned; what is frozen has no gradient and is unknown to the optimiser."""
    cells, targets = separable
    freeze(classifier, layers=layers, embeddings=embeddings)
    fronts = [f"bert.encoder.layer.{number}." for number in range(layers)] + ["bert.embeddings."] * embeddings
    frozen = {name for name, _ in classifier.named_parameters() if name.startswith(tuple(fronts))}
    before = {name: value.detach().clone() for name, value in classifier.named_parameters()}
    options = TrainingOptions(epochs=1, learning_rate=0.01, warmup_fraction=0, tokens_per_batch=128)
    optimisation = Optimisation(classifier, options, planned_steps(cells, options))
    run_epoch(classifier, optimisation, cells, classifier_loss(targets), options, vocabulary)
    learned = sum(len(group["params"]) for group in optimisation.state()["adamw"]["param_groups"])
    assert learned == len(before) - len(frozen)
    for name, after in classifier.named_parameters():
        assert after.requires_grad == (name not in frozen)
        # The gradient of a key's bias is zero: softmax does not see what all scores have in common.
        if not name.endswith("key.bias"):
            assert torch.equal(after.detach(), before[name]) == (name in frozen), name


NEW_TOKEN = TrainingOptions(
    epochs=3, learning_rate=0.01, tokens_per_batch=64, accumulate=2, weight_decay=0.5, gene_dropout=0.2
)  # fmt: skip
TOKENS = "bert.embeddings.word_embeddings.weight"


def with_a_new_token(
    directory: Path, vocabulary: GeneVocabulary, seed: int = 0
) -> tuple[CellClassifier, GeneVocabulary, list[nn.Parameter]]:
    """A classifier that reads a ``<cls>`` its trunk does not know, on frozen embeddings."""
    torch.manual_seed(seed)
    model, own = new_classifier(directory, vocabulary, LABELS, "cls")
    return model, own, freeze(model, embeddings=True, new_tokens=len(own) - len(vocabulary))


@pytest.mark.parametrize("distributed", [False, True], ids=["alone", "DDP"])
def test_a_new_token_is_learned_on_frozen_embeddings(
    model_directory: Path,
    vocabulary: GeneVocabulary,
    separable: tuple[list[Cell], np.ndarray],
    tmp_path: Path,
    distributed: bool,
) -> None:
    """Every other row stays to the last bit, and so do positions and their LayerNorm."""
    model, own, undecayed = with_a_new_token(model_directory, vocabulary)
    cells = [own.adapt(ids, vocabulary.digest) for ids in separable[0]]
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimisation = Optimisation(model, NEW_TOKEN, planned_steps(cells, NEW_TOKEN), undecayed)
    wrapped: nn.Module = model
    if distributed:
        store = torch.distributed.FileStore(str(tmp_path / "group"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        wrapped = nn.parallel.DistributedDataParallel(model)
    try:
        for epoch in range(NEW_TOKEN.epochs):
            run_epoch(wrapped, optimisation, cells, classifier_loss(separable[1]), NEW_TOKEN, own, epoch=epoch)
    finally:
        if distributed:
            torch.distributed.destroy_process_group()
    after = dict(model.named_parameters())
    assert torch.equal(after[TOKENS][:-1], before[TOKENS][:-1])
    assert float((after[TOKENS][-1] - before[TOKENS][-1]).detach().abs().max()) > 1e-2
    for name, value in after.items():
        if name != TOKENS:
            frozen = name.startswith("bert.embeddings.")
            assert value.requires_grad != frozen
            assert torch.equal(value, before[name]) == frozen or name.endswith("key.bias"), name


def test_a_new_token_has_the_gradient_that_it_has_unfrozen(
    model_directory: Path, vocabulary: GeneVocabulary, separable: tuple[list[Cell], np.ndarray]
) -> None:
    gradients = []
    for freezes in (True, False):
        torch.manual_seed(0)
        model, own = new_classifier(model_directory, vocabulary, LABELS, "cls")
        freeze(model, embeddings=freezes, new_tokens=1)
        cells = [own.adapt(ids, vocabulary.digest) for ids in separable[0]]
        recorder = Gradients(model)
        run_epoch(model, recorder, cells, classifier_loss(separable[1]), RESUMED, own)
        gradients.append([step[0] for step in recorder.steps])  # the first parameter: the tokens
    for ours, unfrozen in zip(*gradients, strict=True):
        assert not ours[:-1].any()
        assert unfrozen[:-1].any()
        torch.testing.assert_close(ours[-1], unfrozen[-1])


def test_a_new_token_is_learned_on_after_a_checkpoint(
    model_directory: Path, vocabulary: GeneVocabulary, separable: tuple[list[Cell], np.ndarray]
) -> None:
    def trained(model: CellClassifier, optimisation: Optimisation, epochs: range) -> None:
        for epoch in epochs:
            run_epoch(model, optimisation, cells, classifier_loss(separable[1]), NEW_TOKEN, own, epoch=epoch)

    unbroken, own, undecayed = with_a_new_token(model_directory, vocabulary)
    start = unbroken.get_input_embeddings().weight.detach().clone()
    cells = [own.adapt(ids, vocabulary.digest) for ids in separable[0]]
    total = planned_steps(cells, NEW_TOKEN)
    optimisation = Optimisation(unbroken, NEW_TOKEN, total, undecayed)
    trained(unbroken, optimisation, range(1))
    checkpoint = io.BytesIO()
    torch.save({"model": unbroken.state_dict(), **optimisation.state()}, checkpoint)
    trained(unbroken, optimisation, range(1, NEW_TOKEN.epochs))

    resumed, _, undecayed = with_a_new_token(model_directory, vocabulary, seed=99)
    saved = torch.load(io.BytesIO(checkpoint.getvalue()), weights_only=True)
    resumed.load_state_dict(saved["model"])
    optimisation = Optimisation(resumed, NEW_TOKEN, total, undecayed)
    optimisation.restore(saved)
    trained(resumed, optimisation, range(1, NEW_TOKEN.epochs))
    tokens = resumed.get_input_embeddings().weight.detach()
    assert torch.equal(tokens[:-1], start[:-1])
    assert not torch.equal(tokens[-1], saved["model"][TOKENS][-1])
    torch.testing.assert_close(tokens, unbroken.get_input_embeddings().weight.detach(), atol=1e-7, rtol=0)


def test_a_token_that_is_not_new_stays_frozen(
    special_model_directory: Path, special_vocabulary: GeneVocabulary
) -> None:
    model, own = new_classifier(special_model_directory, special_vocabulary, LABELS, "cls")
    assert freeze(model, embeddings=True, new_tokens=len(own) - len(special_vocabulary)) == []
    assert not model.get_input_embeddings().weight.requires_grad


def test_more_frozen_layers_than_there_are_are_refused(classifier: CellClassifier) -> None:
    for refuse in (lambda: freeze(classifier, layers=4), lambda: check_frozen_layers(4, classifier.config)):
        with pytest.raises(InputError, match="--freeze-layers: got 4; takes 0 to 3, the layers that the model has"):
            refuse()


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_an_epoch_sees_every_cell_once(
    vocabulary: GeneVocabulary, separable: tuple[list[Cell], np.ndarray], workers: int
) -> None:
    cells, _ = separable
    options = TrainingOptions(epochs=3, learning_rate=0.0, tokens_per_batch=64)
    model = nn.Linear(1, 1)
    seen: list[int] = []

    def loss_of(
        model: nn.Module, ids_BL: torch.Tensor, mask_BL: torch.Tensor, batch: np.ndarray
    ) -> tuple[torch.Tensor, int]:
        for row, number in enumerate(batch):
            assert ids_BL[row][mask_BL[row].bool()].tolist() == cells[number].tolist()
        seen.extend(batch.tolist())
        return model(torch.ones(1)).sum(), 0

    steps = [
        len(
            run_epoch(model, Gradients(model), cells, loss_of, options, vocabulary, epoch=1, share=Share(rank, workers))
        )
        for rank in range(workers)
    ]
    assert sorted(seen) == list(range(len(cells)))
    assert len(set(steps)) == 1
    epochs = range(options.epochs)
    total = sum(
        len(
            run_epoch(
                model, Gradients(model), cells, loss_of, options, vocabulary, epoch=epoch, share=Share(0, workers)
            )
        )
        for epoch in epochs
    )
    assert planned_steps(cells, options, workers) == total


def test_more_workers_than_cells_are_refused() -> None:
    with pytest.raises(InputError, match="--num-workers: got 3 for 2 training cells"):
        planned_steps([np.arange(4)] * 2, TrainingOptions(epochs=1, learning_rate=1), 3)


# ------------------------------------------------------------------ a pure function of where we are

RESUMED = TrainingOptions(epochs=3, learning_rate=1e-3, tokens_per_batch=128, gene_dropout=0.2, seed=4)


def test_resuming_is_an_unbroken_run(
    classifier: CellClassifier, vocabulary: GeneVocabulary, separable: tuple[list[Cell], np.ndarray]
) -> None:
    """From a checkpoint at an epoch's end, in a process whose random state is another."""
    cells, targets = separable
    for module in classifier.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    total = planned_steps(cells, RESUMED)
    unbroken, resumed = classifier, copy.deepcopy(classifier)
    optimisation = Optimisation(unbroken, RESUMED, total)
    loss_of = classifier_loss(targets)
    checkpoint = io.BytesIO()
    for epoch in range(RESUMED.epochs):
        run_epoch(unbroken, optimisation, cells, loss_of, RESUMED, vocabulary, epoch=epoch)
        if epoch == 0:
            torch.save({"model": unbroken.state_dict(), **optimisation.state()}, checkpoint)

    torch.manual_seed(12345)
    saved = torch.load(io.BytesIO(checkpoint.getvalue()), weights_only=True)
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.normal_()
    resumed.load_state_dict(saved["model"])
    optimisation = Optimisation(resumed, RESUMED, total)
    optimisation.restore(saved)
    for epoch in range(1, RESUMED.epochs):
        run_epoch(resumed, optimisation, cells, loss_of, RESUMED, vocabulary, epoch=epoch)
    for name, value in unbroken.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, atol=1e-7, rtol=0, msg=name)
        assert not name.endswith("weight") or not torch.equal(value, saved["model"][name])


def drawn(
    cells: list[Cell], vocabulary: GeneVocabulary, *, seed: int = 0, epoch: int = 0, rank: int = 0, workers: int = 2
) -> list[tuple[Any, ...]]:
    """What each step of an epoch sees: its cells, the genes left in them, and torch's next random number."""
    options = TrainingOptions(epochs=9, learning_rate=0.0, tokens_per_batch=64, gene_dropout=0.3, seed=seed)
    model = nn.Linear(1, 1)
    steps: list[tuple[Any, ...]] = []

    def loss_of(
        model: nn.Module, ids_BL: torch.Tensor, mask_BL: torch.Tensor, batch: np.ndarray
    ) -> tuple[torch.Tensor, int]:
        steps.append((batch.tolist(), ids_BL.tolist(), float(torch.rand(()))))
        return model(torch.ones(1)).sum(), 0

    run_epoch(model, Gradients(model), cells, loss_of, options, vocabulary, epoch=epoch, share=Share(rank, workers))
    return steps


def test_order_and_dropout_depend_on_where_we_are(
    vocabulary: GeneVocabulary, separable: tuple[list[Cell], np.ndarray]
) -> None:
    cells, _ = separable
    first = drawn(cells, vocabulary)
    torch.manual_seed(777)
    np.random.default_rng().random()
    assert drawn(cells, vocabulary) == first
    others = [drawn(cells, vocabulary, **where) for where in ({"seed": 1}, {"epoch": 1}, {"rank": 1})]
    random_numbers = [number for steps in (first, *others) for *_, number in steps]
    assert len(set(random_numbers)) == len(random_numbers)
    for steps in others:
        assert [batch for batch, *_ in steps] != [batch for batch, *_ in first]


def test_gene_dropout_depends_on_seed_and_epoch(vocabulary: GeneVocabulary) -> None:
    """One cell, so that the order cannot be what differs."""
    cell = [np.arange(2, 18)]
    left = {
        (seed, epoch): drawn(cell, vocabulary, seed=seed, epoch=epoch, workers=1)[0][1]
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert all(len(ids[0]) == 11 for ids in left.values())
    assert len({str(ids) for ids in left.values()}) == 4


# ------------------------------------------------------------------ what a step is made of


@given(lengths=st.lists(st.integers(0, 16), min_size=1, max_size=4), share=st.floats(0, 0.99), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_drop_genes(special_vocabulary: GeneVocabulary, lengths: list[int], share: float, seed: int) -> None:
    """Order and special tokens stay, the right number of genes goes, and at least one stays where there was one."""
    cells = random_cells(special_vocabulary, np.random.default_rng(seed), lengths)
    dropped = drop_genes(cells, share, special_vocabulary, np.random.default_rng(seed))
    for ids, left, genes in zip(cells, dropped, lengths, strict=True):
        assert left.tolist() == [token for token in ids.tolist() if token in left]
        assert (left[0], left[-1]) == (ids[0], ids[-1])
        assert len(left) - 2 == max(min(genes, 1), genes - round(share * genes))


@given(targets=st.lists(st.integers(0, 2), min_size=1, max_size=30))
def test_balanced_weights_make_classes_count_the_same(targets: list[int]) -> None:
    array = np.array([0, 1, 2, *targets])
    weights = balanced_weights(array, 3)
    assert weights.dtype == torch.float32
    totals = [float(weights[number]) * int((array == number).sum()) for number in range(3)]
    assert totals == pytest.approx([len(array) / 3] * 3, rel=1e-5)


class Logits(nn.Module):
    """Answers with fixed logits."""

    def __init__(self, logits_BC: np.ndarray) -> None:
        super().__init__()
        self.logits_BC = torch.from_numpy(logits_BC)

    def forward(self, ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        return self.logits_BC


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]])
def test_classifier_loss(rng: np.random.Generator, smoothing: float, weights: list[float] | None) -> None:
    """Cross entropy to a target of which a share is spread evenly over all classes, summed over cells."""
    logits = rng.normal(size=(5, 3))
    targets, batch = np.array([9, 2, 0, 1, 1, 9, 0]), np.array([1, 2, 3, 4, 6])
    expected = 0.0
    for row, number in enumerate(batch):
        log_p = logits[row] - np.log(np.exp(logits[row]).sum())
        for label in range(3):
            share = smoothing / 3 + (1 - smoothing) * (label == targets[number])
            expected -= share * log_p[label] * (1.0 if weights is None else weights[label])
    loss_of = classifier_loss(targets, None if weights is None else torch.tensor(weights), smoothing)
    loss, correct = loss_of(Logits(logits), torch.zeros(5, 2), torch.ones(5, 2), batch)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert correct == int((logits.argmax(axis=1) == targets[batch]).sum())


@pytest.mark.parametrize("pooling", ["first_gene", "cls", "mean"])
def test_one_epoch_learns_separable_cells(
    vocabulary: GeneVocabulary, separable: tuple[list[Cell], np.ndarray], pooling: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    trunk = new_model(vocabulary, layers=1, width=16, heads=2, feed_forward=16, initializer_range=0.2)
    save_model(trunk, vocabulary, tmp_path)
    model, own = new_classifier(tmp_path, vocabulary, LABELS, pooling)
    cells = [own.adapt(ids, vocabulary.digest) for ids in separable[0]] * 8
    targets = np.tile(separable[1], 8)
    options = TrainingOptions(epochs=1, learning_rate=0.01, tokens_per_batch=64)
    loss_of = classifier_loss(targets)

    def whole() -> tuple[float, int]:
        ids, lengths = pad(cells, own.pad_id)
        mask_BL = attention_mask(torch.from_numpy(lengths), ids.shape[1])
        model.eval()
        with torch.no_grad():
            loss, correct = loss_of(model, torch.from_numpy(ids), mask_BL, np.arange(len(cells)))
        return float(loss) / len(cells), correct

    before, _ = whole()
    steps = planned_steps(cells, options)
    results = run_epoch(model, Optimisation(model, options, steps), cells, loss_of, options, own)
    after, correct = whole()
    assert after < 0.3 * before
    assert correct > 0.95 * len(cells)
    assert sum(result.cells for result in results) == len(cells)
    assert sum(result.tokens for result in results) == sum(len(ids) for ids in cells)
    assert all(result.tokens <= result.padded_tokens <= 64 for result in results)


# ------------------------------------------------------------------ masked genes


@pytest.mark.parametrize(("genes", "masked"), [(1, 1), (3, 1), (10, 2), (100, 15), (2048, 307)])
def test_masked_genes(genes: int, masked: int) -> None:
    assert masked_genes(genes) == masked


@given(lengths=st.lists(st.integers(0, 16), min_size=1, max_size=5), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_only_genes_are_masked(special_vocabulary: GeneVocabulary, lengths: list[int], seed: int) -> None:
    """Exactly so many a cell as every worker counts ahead; all else is seen as it is."""
    cells = random_cells(special_vocabulary, np.random.default_rng(seed), lengths)
    ids, real = pad(cells, special_vocabulary.pad_id)
    ids_BL, mask_BL = torch.from_numpy(ids), attention_mask(torch.from_numpy(real), ids.shape[1])
    torch.manual_seed(seed)
    seen_BL, masked_BL = choose_masked(ids_BL, mask_BL, special_vocabulary)
    special = torch.tensor(sorted(special_vocabulary.special_ids))
    assert not torch.isin(ids_BL[masked_BL], special).any()
    assert torch.equal(seen_BL[~masked_BL], ids_BL[~masked_BL])
    expected = [masked_genes(genes) if genes else 0 for genes in lengths]
    assert masked_BL.sum(dim=1).tolist() == expected
    assert count_masked(cells, special_vocabulary).tolist() == expected
    seen = seen_BL[masked_BL]
    assert bool(((seen == special_vocabulary.mask_id) | ~torch.isin(seen, special)).all())


def test_what_is_seen_at_masked_genes(vocabulary: GeneVocabulary, rng: np.random.Generator) -> None:
    """80 % the mask, 10 % another gene, 10 % the gene itself; every position is chosen as often as any other."""
    ids_BL = torch.from_numpy(np.stack(random_cells(vocabulary, rng, [16] * 8_000)).astype(np.int64))
    torch.manual_seed(0)
    seen_BL, masked_BL = choose_masked(ids_BL, torch.ones_like(ids_BL), vocabulary)
    seen, true = seen_BL[masked_BL], ids_BL[masked_BL]
    assert len(seen) == 8_000 * masked_genes(16)
    assert float((seen == vocabulary.mask_id).double().mean()) == pytest.approx(0.8, abs=0.015)
    # One swap in forty draws the gene itself.
    assert float((seen == true).double().mean()) == pytest.approx(0.1 + 0.1 / 40, abs=0.01)
    assert np.ptp(masked_BL.double().mean(dim=0).numpy()) < 0.03


@pytest.mark.parametrize("kind", ["plain", "special"])
def test_the_head_at_masked_genes_is_the_stock_head(
    kind: str,
    model_directory: Path,
    special_model_directory: Path,
    vocabulary: GeneVocabulary,
    special_vocabulary: GeneVocabulary,
    rng: np.random.Generator,
) -> None:
    own = {"plain": vocabulary, "special": special_vocabulary}[kind]
    directory = {"plain": model_directory, "special": special_model_directory}[kind]
    ours = load_weights(MaskedGeneModel, directory).eval()
    stock = BertForMaskedLM.from_pretrained(directory, attn_implementation="eager").eval()
    ids, real = pad(random_cells(own, rng, [16, 7, 12]), own.pad_id)
    ids_BL, mask_BL = torch.from_numpy(ids), attention_mask(torch.from_numpy(real), ids.shape[1])
    torch.manual_seed(3)
    seen_BL, masked_BL = choose_masked(ids_BL, mask_BL, own)
    with torch.no_grad():
        theirs_MV = stock(input_ids=seen_BL, attention_mask=mask_BL).logits[masked_BL]
        torch.testing.assert_close(ours(seen_BL, mask_BL, masked_BL), theirs_MV, atol=2e-5, rtol=0)
        torch.manual_seed(3)
        loss, correct = masked_loss(own)(ours, ids_BL, mask_BL, np.arange(3))
    target_M = ids_BL[masked_BL]
    expected = -theirs_MV.log_softmax(dim=1)[torch.arange(len(target_M)), target_M].sum()
    torch.testing.assert_close(loss, expected, atol=1e-3, rtol=1e-5)
    assert correct == int((theirs_MV.argmax(dim=1) == target_M).sum())


def test_training_lowers_the_masked_loss(
    model_directory: Path, vocabulary: GeneVocabulary, separable: tuple[list[Cell], np.ndarray]
) -> None:
    cells, _ = separable
    model = load_weights(MaskedGeneModel, model_directory)
    masked = count_masked(cells, vocabulary)
    options = TrainingOptions(epochs=6, learning_rate=0.01, tokens_per_batch=128)
    steps = planned_steps(cells, options)
    optimisation = Optimisation(model, options, steps)
    losses = []
    for epoch in range(options.epochs):
        results = run_epoch(
            model, optimisation, cells, masked_loss(vocabulary), options, vocabulary,
            epoch=epoch, items_of=lambda batch: int(masked[batch].sum()),
        )  # fmt: skip
        losses.append(sum(result.loss_sum for result in results) / sum(result.items for result in results))
        assert sum(result.items for result in results) == masked.sum()
    assert losses[-1] < 0.9 * losses[0]
