"""Adapters: what is learned, that merging them changes no number, and that alone they go on their own base only."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertForMaskedLM

from geneformer_ray.compute.classifier import POOLINGS, CellClassifier, new_classifier, predict_logits
from geneformer_ray.compute.encoder import Encoder, attention_mask
from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.compute.gene_classifier import GeneClassifier, new_gene_classifier
from geneformer_ray.compute.lora import PROJECTIONS, Adapters, LoraOptions, adapted_classifier
from geneformer_ray.compute.model_directory import load_weights, save_model, weights_digest
from geneformer_ray.compute.multitask import MultiTaskClassifier, multitask_loss, new_multitask_classifier
from geneformer_ray.compute.optimisation import Optimisation
from geneformer_ray.compute.pretraining import MaskedGeneModel, count_masked, masked_loss
from geneformer_ray.compute.training import TrainingOptions, classifier_loss, train_step, training_plan
from geneformer_ray.data.batching import pad
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError
from tests.conftest import random_cells, randomise
from tests.reference import Cell

EXECUTION = choose_execution(cpus=1)
LABELS = ["alpha", "beta", "delta"]
TASKS = {"type": LABELS, "sex": ["female", "male"]}
LENGTHS = [9, 3, 15, 1, 6, 9, 12, 14, 2, 16, 11, 7]
TARGETS = np.arange(len(LENGTHS)) % 3
EVERY = LoraOptions(rank=3, alpha=5.0, projections=tuple(PROJECTIONS))
TRAINING = TrainingOptions(
    epochs=3, learning_rate=0.02, tokens_per_batch=60, accumulate=2, weight_decay=0.5, gene_dropout=0.2
)  # fmt: skip
TOKENS = "bert.embeddings.word_embeddings.weight"


def a_classifier(base: Path, vocabulary: GeneVocabulary, pooling: str = "mean", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return new_classifier(base, vocabulary, LABELS, pooling)


def adapted(
    base: Path, vocabulary: GeneVocabulary, options: LoraOptions = EVERY, pooling: str = "mean", seed: int = 0
) -> tuple[Adapters, GeneVocabulary]:
    model, own = a_classifier(base, vocabulary, pooling, seed)
    return Adapters(model, options, new_tokens=len(own) - len(vocabulary)), own


def stir(adapters: Adapters) -> Adapters:
    """Give all that is learned large values: B starts at zero, which hides what is done with it."""
    rows = adapters.model.get_input_embeddings().weight.detach().clone()
    with torch.no_grad():
        for parameter in adapters.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.4)
        if adapters.new_tokens:
            adapters.model.get_input_embeddings().weight[: -adapters.new_tokens] = rows[: -adapters.new_tokens]
    return adapters


@pytest.fixture(scope="module")
def cells(vocabulary: GeneVocabulary) -> list[Cell]:
    return random_cells(vocabulary, np.random.default_rng(0), LENGTHS)


def logits_of(model: Any, cells: list[Cell], vocabulary: GeneVocabulary) -> np.ndarray:
    return predict_logits(model, cells, vocabulary.pad_id, execution=EXECUTION)


def train(
    model: nn.Module, optimisation: Optimisation, cells: list[Cell], vocabulary: GeneVocabulary, epochs: range,
    loss_of: Any = None, items_of: Callable[[np.ndarray], int] = len,
) -> None:  # fmt: skip
    for epoch in epochs:
        for step in plan(cells).steps(epoch):
            train_step(
                model, optimisation, step, [[cells[i] for i in workers[0]] for workers in step.batches],
                loss_of or classifier_loss(TARGETS), items_of, TRAINING, vocabulary=vocabulary, execution=EXECUTION,
            )  # fmt: skip


def plan(cells: list[Cell]) -> Any:
    lengths = np.array([len(ids) for ids in cells])
    return training_plan(lengths, np.zeros_like(lengths), TRAINING, 1)


def optimiser(adapters: Adapters, cells: list[Cell]) -> Optimisation:
    total = sum(plan(cells).count(epoch) for epoch in range(TRAINING.epochs))
    return Optimisation(adapters.model, TRAINING, total, adapters.undecayed)


# ------------------------------------------------------------------ what is learned


@pytest.mark.parametrize("pooling", POOLINGS)
def test_fresh_adapters_change_nothing(
    pooling: str, model_directory: Path, vocabulary: GeneVocabulary, cells: list[Cell]
) -> None:
    plain, own = a_classifier(model_directory, vocabulary, pooling)
    own_cells = [own.adapt(ids, vocabulary.digest) for ids in cells]
    expected = logits_of(plain, own_cells, own)
    adapters, _ = adapted(model_directory, vocabulary, pooling=pooling)
    assert isinstance(adapters.model, CellClassifier)
    np.testing.assert_allclose(logits_of(adapters.model, own_cells, own), expected, atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("distributed", [False, True], ids=["alone", "DDP"])
def test_only_adapters_head_and_new_tokens_are_learned(
    pooling: str, distributed: bool, model_directory: Path, vocabulary: GeneVocabulary, cells: list[Cell],
    tmp_path: Path,
) -> None:  # fmt: skip
    """All else stays to the last bit, and is unknown to the optimiser; alone and data-parallel train the same."""
    options = replace(EVERY, projections=("query", "value"), layers=(0, 2), dropout=0.1)
    adapters, own = adapted(model_directory, vocabulary, options, pooling)
    model = adapters.model
    places = {f"bert.encoder.layer.{layer}.attention.self.{name}" for layer in (0, 2) for name in ("query", "value")}
    learned = {f"{place}.lora_{half}.default.weight" for place in places for half in "AB"}
    learned |= {f"{part}.{what}" for part in ("bert.pooler.dense", "classifier") for what in ("weight", "bias")}
    learned |= {TOKENS} if pooling == "cls" else set()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    own_cells = [own.adapt(ids, vocabulary.digest) for ids in cells]
    optimisation = optimiser(adapters, own_cells)
    assert sum(len(group["params"]) for group in optimisation.state()["adamw"]["param_groups"]) == len(learned)
    wrapped: nn.Module = model
    if distributed:
        store = torch.distributed.FileStore(str(tmp_path / "group"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        wrapped = nn.parallel.DistributedDataParallel(model)
    try:
        train(wrapped, optimisation, own_cells, own, range(TRAINING.epochs))
    finally:
        if distributed:
            torch.distributed.destroy_process_group()
    for name, after in model.named_parameters():
        assert after.requires_grad == (name in learned), name
        if name == TOKENS and name in learned:
            assert torch.equal(after[:-1], before[name][:-1])
            assert not torch.equal(after[-1], before[name][-1])
        else:
            assert torch.equal(after, before[name]) == (name not in learned), name
    if distributed:
        alone, _ = adapted(model_directory, vocabulary, options, pooling)
        train(alone.model, optimiser(alone, own_cells), own_cells, own, range(TRAINING.epochs))
        for name, value in alone.model.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], value, atol=1e-6, rtol=0, msg=name)


def test_adapters_drop_out_in_training_only(
    model_directory: Path, vocabulary: GeneVocabulary, cells: list[Cell]
) -> None:
    ids_BL = torch.from_numpy(cells[2].astype(np.int64))[None]
    for dropout in (0.0, 0.5):
        adapters, _ = adapted(model_directory, vocabulary, replace(EVERY, dropout=dropout))
        model = stir(adapters).model.train()
        for name, module in model.named_modules():
            if isinstance(module, nn.Dropout) and "lora_" not in name:
                module.p = 0.0
        with torch.no_grad():
            first, second = model(ids_BL), model(ids_BL)
            assert torch.equal(first, second) == (dropout == 0)
            model.eval()
            assert torch.equal(model(ids_BL), model(ids_BL))


# ------------------------------------------------------------------ merging


@pytest.mark.parametrize("kind", ["plain", "special"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_merged_model_is_an_ordinary_one_with_the_same_logits(
    kind: str,
    pooling: str,
    model_directory: Path,
    special_model_directory: Path,
    vocabulary: GeneVocabulary,
    special_vocabulary: GeneVocabulary,
    tmp_path: Path,
) -> None:
    base, parent = {
        "plain": (model_directory, vocabulary), "special": (special_model_directory, special_vocabulary)
    }[kind]  # fmt: skip
    adapters, own = adapted(base, parent, pooling=pooling)
    cells = [own.adapt(ids, parent.digest) for ids in random_cells(parent, np.random.default_rng(0), LENGTHS)]
    neutral = logits_of(adapters.model, cells, own)
    expected = logits_of(stir(adapters).model, cells, own)
    assert np.abs(expected - neutral).max() > 0.1
    state = {name: value.clone() for name, value in adapters.model.state_dict().items()}
    merged = adapters.merged()
    fresh, _ = a_classifier(base, parent, pooling)
    assert (type(merged), list(merged.state_dict())) == (CellClassifier, list(fresh.state_dict()))
    assert not hasattr(merged, "peft_config")
    assert all(parameter.requires_grad for parameter in merged.parameters())
    np.testing.assert_allclose(logits_of(merged, cells, own), expected, atol=1e-5)
    # What is trained on is not touched.
    assert all(torch.equal(value, state[name]) for name, value in adapters.model.state_dict().items())
    np.testing.assert_array_equal(logits_of(adapters.model, cells, own), expected)

    merged.save(tmp_path, own)
    loaded = CellClassifier.load(tmp_path, own)
    np.testing.assert_allclose(logits_of(loaded, cells, own), expected, atol=1e-5)
    # And the trunk that screens and embeddings read is the adapted one.
    ids, lengths = pad(cells[:4], own.pad_id)
    with torch.inference_mode():
        hidden = adapters.model.eval().hidden(
            torch.from_numpy(ids), attention_mask(torch.from_numpy(lengths), ids.shape[1])
        )
    encoder = Encoder.load(tmp_path, layer=0, execution=EXECUTION)
    for number, cell in enumerate(cells[:4]):
        torch.testing.assert_close(encoder.hidden([cell[None]])[0][0], hidden[number, : len(cell)], atol=1e-4, rtol=0)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_merged_matrix_is_the_sum_written_out(
    projection: str, model_directory: Path, vocabulary: GeneVocabulary
) -> None:
    """W + alpha / rank * B A at the chosen places of the chosen layer, and the base's own matrix everywhere else."""
    options = LoraOptions(rank=2, alpha=7.0, projections=(projection,), layers=(1,))
    adapters, _ = adapted(model_directory, vocabulary, options)
    stir(adapters)
    state, merged = adapters.model.state_dict(), adapters.merged().state_dict()
    place = f"bert.encoder.layer.1.{PROJECTIONS[projection]}"
    base = load_file(model_directory / "model.safetensors")
    a, b = (state[f"{place}.lora_{half}.default.weight"].double() for half in "AB")
    expected = base[f"{place}.weight"].double() + 7.0 / 2 * b @ a
    torch.testing.assert_close(merged[f"{place}.weight"].double(), expected, atol=1e-6, rtol=0)
    assert not torch.allclose(expected, base[f"{place}.weight"].double(), atol=0.1)
    for name, value in base.items():
        if name.startswith("bert.") and name != f"{place}.weight":
            assert torch.equal(merged[name], value), name


def test_several_tasks_are_adapted_alike(
    model_directory: Path, vocabulary: GeneVocabulary, cells: list[Cell], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, own = new_multitask_classifier(model_directory, vocabulary, TASKS, "cls")
    adapters = Adapters(model, EVERY, new_tokens=1)
    own_cells = [own.adapt(ids, vocabulary.digest) for ids in cells]
    targets = np.stack([TARGETS, TARGETS % 2], axis=1)
    loss_of = multitask_loss(targets, TASKS)
    train(model, optimiser(adapters, own_cells), own_cells, own, range(2), loss_of, lambda batch: 2 * len(batch))
    expected = logits_of(model, own_cells, own)
    merged = adapters.merged()
    assert type(merged) is MultiTaskClassifier
    np.testing.assert_allclose(logits_of(merged, own_cells, own), expected, atol=1e-5)
    digest = weights_digest(model_directory)
    adapters.save(tmp_path, digest)
    again, vocabulary_again = adapted_classifier(model_directory, tmp_path, vocabulary)
    assert isinstance(again, MultiTaskClassifier)
    assert (again.tasks, vocabulary_again.digest) == (TASKS, own.digest)
    np.testing.assert_allclose(logits_of(again, own_cells, own), expected, atol=1e-5)


def test_a_classifier_of_genes_is_its_base_and_its_adapters(
    model_directory: Path, vocabulary: GeneVocabulary, cells: list[Cell], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    adapters = stir(Adapters(new_gene_classifier(model_directory, LABELS), EVERY))
    ids_BL = torch.from_numpy(np.asarray(cells[0], dtype=np.int64))[None]
    expected = adapters.model.eval()(ids_BL)
    adapters.save(tmp_path, weights_digest(model_directory))
    again, own = adapted_classifier(model_directory, tmp_path, vocabulary)
    assert isinstance(again, GeneClassifier)
    assert (again.labels, own.digest) == (LABELS, vocabulary.digest)
    torch.testing.assert_close(again(ids_BL), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [MaskedGeneModel, BertForMaskedLM])
def test_a_masked_gene_model_is_adapted(
    kind: type[Any], model_directory: Path, vocabulary: GeneVocabulary, cells: list[Cell], tmp_path: Path
) -> None:
    """Its head is learned; the embeddings, which are the head's last matrix too, are not."""
    torch.manual_seed(0)
    adapters = Adapters(load_weights(kind, model_directory), EVERY)
    learned = {n for n, p in adapters.model.named_parameters() if p.requires_grad and "lora_" not in n}
    transform = "cls.predictions.transform"
    assert learned == {
        "cls.predictions.bias", f"{transform}.dense.weight", f"{transform}.dense.bias",
        f"{transform}.LayerNorm.weight", f"{transform}.LayerNorm.bias",
    }  # fmt: skip
    if kind is MaskedGeneModel:
        counts = count_masked(cells, vocabulary)
        train(
            adapters.model, optimiser(adapters, cells), cells, vocabulary, range(2), masked_loss(vocabulary),
            lambda batch: int(counts[batch].sum()),
        )  # fmt: skip
    else:
        stir(adapters)
    merged = adapters.merged()
    state = merged.state_dict()
    assert torch.equal(
        state["cls.predictions.decoder.weight"], load_file(model_directory / "model.safetensors")[TOKENS]
    )
    stock = BertForMaskedLM(merged.config).eval()
    stock.load_state_dict(state)
    save_model(stock, vocabulary, tmp_path / "merged")
    stock = load_weights(BertForMaskedLM, tmp_path / "merged").eval()
    ids = torch.from_numpy(cells[2].astype(np.int64))[None]
    everywhere = {"masked_BL": torch.ones_like(ids).bool()} if kind is MaskedGeneModel else {}
    mask = torch.ones_like(ids)

    def logits(model: Any) -> torch.Tensor:
        with torch.inference_mode():
            given = model.eval()(input_ids=ids, attention_mask=mask, **everywhere)
        return given if kind is MaskedGeneModel else given.logits[0]

    with torch.inference_mode():
        expected = logits(adapters.model)
        torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(stock(ids, attention_mask=mask).logits[0], expected, atol=1e-5, rtol=1e-5)
    adapters.save(tmp_path / "adapters", "a digest")
    again = Adapters.load(load_weights(kind, model_directory), tmp_path / "adapters", "a digest")
    torch.testing.assert_close(logits(again.model), expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(InputError, match=r"--adapters: got .* adapters of a masked-gene model"):
        adapters.save(tmp_path / "adapters", weights_digest(model_directory))
        adapted_classifier(model_directory, tmp_path / "adapters", vocabulary)


def test_adapters_that_diverged_are_not_merged(model_directory: Path, vocabulary: GeneVocabulary) -> None:
    adapters, _ = adapted(model_directory, vocabulary)
    with torch.no_grad():
        next(p for n, p in adapters.model.named_parameters() if "lora_B" in n).fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        adapters.merged()


# ------------------------------------------------------------------ going on


def test_resuming_is_an_unbroken_run(model_directory: Path, vocabulary: GeneVocabulary, cells: list[Cell]) -> None:
    """From a checkpoint as workers write it, in a process with another random state; dropout is on."""
    options = replace(EVERY, dropout=0.2)
    unbroken, own = adapted(model_directory, vocabulary, options, "cls")
    own_cells = [own.adapt(ids, vocabulary.digest) for ids in cells]
    optimisation = optimiser(unbroken, own_cells)
    train(unbroken.model, optimisation, own_cells, own, range(1))
    checkpoint = io.BytesIO()
    torch.save({"model": unbroken.model.state_dict(), **optimisation.state()}, checkpoint)
    kept = unbroken.merged()  # as the weights of a good epoch are
    assert unbroken.model.training
    assert not any(module.training for module in kept.modules())
    train(unbroken.model, optimisation, own_cells, own, range(1, TRAINING.epochs))

    resumed, _ = adapted(model_directory, vocabulary, options, "cls", seed=99)
    saved = torch.load(io.BytesIO(checkpoint.getvalue()), weights_only=True)
    resumed.model.load_state_dict(saved["model"])
    optimisation = optimiser(resumed, own_cells)
    optimisation.restore(saved)
    train(resumed.model, optimisation, own_cells, own, range(1, TRAINING.epochs))
    for name, value in unbroken.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, atol=1e-7, rtol=0, msg=name)
        assert "lora_" not in name or not torch.equal(value, saved["model"][name])


# ------------------------------------------------------------------ alone


@pytest.fixture(scope="module")
def saved(model_directory: Path, vocabulary: GeneVocabulary, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Adapters of a classifier with a new ``<cls>``, in a folder of their own."""
    adapters, own = adapted(model_directory, vocabulary, replace(EVERY, layers=(2, 0)), "cls")
    directory = tmp_path_factory.mktemp("adapters") / "alone"
    stir(adapters).save(directory, weights_digest(model_directory))
    return adapters, own, directory


def test_adapters_alone_and_their_base_are_the_classifier(
    saved: Any, model_directory: Path, vocabulary: GeneVocabulary, cells: list[Cell]
) -> None:
    adapters, own, directory = saved
    own_cells = [own.adapt(ids, vocabulary.digest) for ids in cells]
    expected = logits_of(adapters.model, own_cells, own)
    torch.manual_seed(1234)
    merged, again = adapted_classifier(model_directory, directory, vocabulary)
    assert (again.digest, merged.labels, merged.pooling) == (own.digest, LABELS, "cls")
    np.testing.assert_allclose(logits_of(merged, own_cells, own), expected, atol=1e-5)


def test_what_lies_there_is_what_was_learned(saved: Any) -> None:
    _, _, directory = saved
    assert sorted(path.name for path in directory.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(directory / "adapter_model.safetensors")
    assert tensors.pop("new_tokens").shape == (1, 16)
    halves = [name for name in tensors if "lora_" in name]
    assert len(halves) == 2 * 2 * len(PROJECTIONS)
    assert set(tensors) - set(halves) == {
        f"base_model.model.{part}.{what}" for part in ("bert.pooler.dense", "classifier") for what in ("weight", "bias")
    }


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_pefts_own_loader_reads_the_folder(
    model_directory: Path, vocabulary: GeneVocabulary, cells: list[Cell], tmp_path: Path
) -> None:
    from peft import PeftModel

    adapters, own = adapted(model_directory, vocabulary)
    expected = logits_of(stir(adapters).model, cells, own)
    adapters.save(tmp_path, weights_digest(model_directory))
    model, _ = a_classifier(model_directory, vocabulary, seed=5)
    theirs = PeftModel.from_pretrained(model, tmp_path).merge_and_unload()
    np.testing.assert_allclose(logits_of(theirs, cells, own), expected, atol=1e-5)


def test_another_base_is_refused(saved: Any, model_directory: Path, vocabulary: GeneVocabulary, tmp_path: Path) -> None:
    """Of the same shape and vocabulary, so that nothing else would tell."""
    other = load_weights(MaskedGeneModel, model_directory)
    randomise(other, 0.4)
    save_model(other, vocabulary, tmp_path)
    theirs, ours = weights_digest(model_directory), weights_digest(tmp_path)
    message = f"--adapters: got adapters of the base {theirs}; takes adapters of {ours}, the base that is there"
    with pytest.raises(InputError, match=message):
        adapted_classifier(tmp_path, saved[2], vocabulary)
    with pytest.raises(InputError, match=message):
        Adapters.load(a_classifier(tmp_path, vocabulary, "cls")[0], saved[2], ours)


def test_another_head_is_refused(saved: Any, model_directory: Path, vocabulary: GeneVocabulary) -> None:
    """The same classes in another order have weights of the same shape."""
    digest = weights_digest(model_directory)
    turned, _ = new_classifier(model_directory, vocabulary, LABELS[::-1], "cls")
    pooled, _ = new_classifier(model_directory, vocabulary, LABELS, "mean")
    for model in (turned, pooled):
        with pytest.raises(InputError, match=r"--adapters: got adapters in .* of a model with .*; takes some for"):
            Adapters.load(model, saved[2], digest)


def broken_file(directory: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    from safetensors import safe_open

    path = directory / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["geneformer_ray"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    change(record, tensors)
    save_file(tensors, path, metadata={"geneformer_ray": json.dumps(record)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _, tensors: tensors.pop("new_tokens"), "whose weights do not fit the model"),
        (lambda _, tensors: tensors.update(more=torch.zeros(2)), "whose weights do not fit the model"),
        (lambda _, tensors: tensors.update(new_tokens=torch.zeros(1, 3)), "whose weights do not fit the model"),
        (lambda record, _: record["options"].update(rank=2), "whose weights do not fit the model"),
        (lambda record, _: record["options"].update(rank=0), "--lora-rank: got 0"),
        (lambda record, _: record["options"].update(rank="many"), "does not say what it is"),
        (lambda record, _: record["options"].pop("layers"), "does not say what it is"),
        (lambda record, _: record.update(new_tokens="many"), "does not say what it is"),
        (lambda record, _: record.pop("options"), r"does not say what it is \('options'\)"),
    ],
)  # fmt: skip
def test_a_broken_folder_is_refused(
    change: Any, message: str, saved: Any, model_directory: Path, vocabulary: GeneVocabulary, tmp_path: Path
) -> None:
    shutil.copytree(saved[2], tmp_path / "broken")
    broken_file(tmp_path / "broken", change)
    with pytest.raises(InputError, match=message):
        adapted_classifier(model_directory, tmp_path / "broken", vocabulary)


def test_what_is_no_folder_of_adapters_is_refused(
    saved: Any, model_directory: Path, vocabulary: GeneVocabulary, tmp_path: Path
) -> None:
    path = tmp_path / "adapter_model.safetensors"
    with pytest.raises(InputError, match=r"without adapter_model\.safetensors; takes a folder of adapters"):
        adapted_classifier(model_directory, tmp_path, vocabulary)
    whole = (saved[2] / path.name).read_bytes()
    for content in (whole[:-9], b"\x80\x04", b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match="which does not say what it is"):
            adapted_classifier(model_directory, tmp_path, vocabulary)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="which does not say what it is"):
        adapted_classifier(model_directory, tmp_path, vocabulary)


# ------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "--lora-rank: got 0; takes 1 or more"),
        ({"alpha": 0.0}, r"--lora-alpha: got 0\.0; takes a number above 0"),
        ({"alpha": float("nan")}, "--lora-alpha: got nan"),
        ({"dropout": 1.0}, r"--lora-dropout: got 1\.0; takes 0 or more, below 1"),
        ({"projections": ()}, "--lora-projections: got nothing; takes some of query, key, value, output, up, down"),
        ({"projections": ("query", "query")}, "--lora-projections: got query,query; .* each once"),
        ({"projections": ("query", "dense")}, "--lora-projections: got query,dense"),
        ({"layers": ()}, "--lora-layers: got nothing; takes some of 0 to 2, each once"),
        ({"layers": (0, 3)}, "--lora-layers: got 0,3; takes some of 0 to 2"),
        ({"layers": (-1,)}, "--lora-layers: got -1"),
        ({"layers": (1, 1)}, "--lora-layers: got 1,1"),
    ],
)
def test_bad_options_are_refused(
    change: dict[str, Any], message: str, model_directory: Path, vocabulary: GeneVocabulary
) -> None:
    model, _ = a_classifier(model_directory, vocabulary)
    names = list(model.state_dict())
    with pytest.raises(InputError, match=message):
        Adapters(model, replace(LoraOptions(), **change))
    assert list(model.state_dict()) == names


def test_query_and_value_of_every_layer_are_adapted_by_default(
    model_directory: Path, vocabulary: GeneVocabulary
) -> None:
    adapters, _ = adapted(model_directory, vocabulary, LoraOptions())
    halves = {name: tuple(p.shape) for name, p in adapters.model.named_parameters() if "lora_" in name}
    assert halves == {
        f"bert.encoder.layer.{layer}.attention.self.{name}.lora_{half}.default.weight": shape
        for layer in range(3)
        for name in ("query", "value")
        for half, shape in (("A", (8, 16)), ("B", (16, 8)))
    }
