"""The shared first layer, and batches that the memory does not hold."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from geneformer_ray.compute import attention as blocks
from geneformer_ray.compute import shared_attention as shared
from geneformer_ray.compute import shifts, trunk
from geneformer_ray.compute.encoder import Encoder
from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.compute.model_directory import save_model
from geneformer_ray.compute.perturbation import PerturbationPlan
from geneformer_ray.compute.pretraining import new_model
from geneformer_ray.compute.reading import Reading
from geneformer_ray.compute.shifts import EVENTS_THAT_SHARE, shift_cell, shift_cells
from geneformer_ray.compute.token_budget import TokenBudget, out_of_memory
from geneformer_ray.data.vocabulary import GeneVocabulary
from tests.conftest import random_cells, randomise
from tests.reference import StockTrunk, cosine

EXECUTION = choose_execution(cpus=1)
HEADS, WIDTH = 2, 8


def attention_one_by_one(ids_EL: torch.Tensor, layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters each sequence's layer, and its attention's context, written out."""
    entered, contexts = [], []
    for ids_L in ids_EL:
        x_LD = layer.embed(ids_L, torch.arange(len(ids_L)))
        q_LD, k_LD, v_LD = layer.qkv(x_LD)
        heads = []
        for q, k, v in zip(*(part.split(WIDTH // HEADS, dim=1) for part in (q_LD, k_LD, v_LD)), strict=True):
            heads.append(torch.softmax(q @ k.T, dim=1) @ v)
        entered.append(x_LD)
        contexts.append(torch.cat(heads, dim=1))
    return torch.cat(entered), torch.cat(contexts)


class Layer:
    """Random weights of a layer's front; large `scale` makes attention look at one key alone."""

    def __init__(self, scale: float) -> None:
        draw = torch.Generator().manual_seed(3)
        self.table = torch.randn(50, WIDTH, generator=draw)
        self.places = torch.randn(40, WIDTH, generator=draw)
        self.weight = torch.randn(WIDTH, 3 * WIDTH, generator=draw) * scale

    def embed(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.table[ids] + self.places[positions]

    def qkv(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x @ self.weight).split(WIDTH, dim=1)


@given(
    length=st.integers(6, 14),
    edit=st.sampled_from(["delete", "front", "shuffle", "same"]),
    scale=st.sampled_from([0.0, 0.3, 3.0]),
    seed=st.integers(0, 99),
)
def test_shared_attention_is_attention(length: int, edit: str, scale: float, seed: int) -> None:
    """Whatever sequences are put together: deletions, genes moved to the front, permutations of a stretch, copies."""
    rng, layer = np.random.default_rng(seed), Layer(scale)
    cell = rng.permutation(50)[:length]
    sequences = []
    for gene in rng.permutation(length)[:5]:
        if edit == "delete":
            sequences.append(np.delete(cell, gene))
        elif edit == "front":
            sequences.append(np.concatenate([cell[[gene]], np.delete(cell, gene)]))
        elif edit == "shuffle":
            sequences.append(np.concatenate([cell[:4], rng.permutation(cell[4:])]))
        else:
            sequences.append(cell)
    ids_EL = torch.from_numpy(np.stack(sequences))
    attend = shared.shared_attention(ids_EL, layer.embed, layer.qkv, HEADS, most_own_share=1.0)
    if attend is None:  # nothing at all is common
        assert edit != "same"
        assert not any((ids_EL[0, position] == ids_EL[:, position]).all() for position in range(ids_EL.shape[1]))
        return
    entered, context = attention_one_by_one(ids_EL, layer)
    given_back = [torch.cat(parts) for parts in zip(attend(slice(0, 2)), attend(slice(2, 5)), strict=True)]
    torch.testing.assert_close(given_back[0], entered, atol=0, rtol=0)
    # Scores of some hundreds carry float32's rounding into the exponent, in either way of computing them.
    torch.testing.assert_close(given_back[1], context, atol=1e-3 if scale > 1 else 3e-6, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0, -400.0])
@pytest.mark.parametrize("score_bytes", [2_000, 2 * 2**20])
@pytest.mark.parametrize(("sequences", "queries", "length"), [(3, 21, 21), (2, 1, 40), (1, 64, 64), (2, 1, 1)])
def test_attention_in_blocks(
    monkeypatch: pytest.MonkeyPatch, sequences: int, queries: int, length: int, score_bytes: int, scale: float
) -> None:
    """Whatever is a block, and whether or not scores leave the range of exponentials."""
    monkeypatch.setattr(blocks, "SCORE_BYTES_A_THREAD", score_bytes)
    draw = torch.Generator().manual_seed(length)
    # As the trunk hands them over: heads side by side in rows of all three.
    rows = torch.randn(sequences, length, 3, HEADS, 4, generator=draw)
    q_EHLK, k_EHLK, v_EHLK = (rows[:, :, part].transpose(1, 2) for part in range(3))
    q_EHLK = q_EHLK[:, :, :queries] * scale
    if scale < 0:  # every score far below 0: all exponentials vanish unless the highest is taken out
        q_EHLK, k_EHLK = -q_EHLK.abs(), k_EHLK.abs()
    context = blocks.attention(q_EHLK, k_EHLK, v_EHLK)
    weights = torch.softmax(q_EHLK.double() @ k_EHLK.double().transpose(2, 3), dim=3)
    expected = (weights @ v_EHLK.double()).transpose(1, 2).reshape(sequences * queries, -1)
    torch.testing.assert_close(context.double(), expected, atol=2e-6 if abs(scale) <= 1 else 1e-4, rtol=0)


def test_it_is_left_where_it_does_not_pay() -> None:
    layer, cell = Layer(1.0), np.arange(32)
    deletions = torch.from_numpy(np.stack([np.delete(cell, gene) for gene in range(8)]))
    few, far = deletions[: shared.LEAST_SEQUENCES - 1], deletions
    close = torch.from_numpy(np.stack([np.delete(cell, gene) for gene in range(20, 24)]))
    assert shared.shared_attention(few, layer.embed, layer.qkv, HEADS) is None
    assert shared.shared_attention(far, layer.embed, layer.qkv, HEADS) is None
    assert shared.shared_attention(close, layer.embed, layer.qkv, HEADS) is not None


# ------------------------------------------------------------------ cells long enough to share


@pytest.fixture(scope="module", params=["plain", "special"])
def long_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GeneVocabulary]:
    """A model of 320 positions, random weights large enough that mistakes show."""
    directory = tmp_path_factory.mktemp("long")
    genes = [f"GENE{number:03d}" for number in range(400)]
    special = ["<cls>", "<eos>"] if request.param == "special" else []
    names = ["<pad>", "<mask>", *special, *genes]
    vocabulary = GeneVocabulary({name: number for number, name in enumerate(names)}, max_length=320)
    torch.manual_seed(1)
    model = new_model(vocabulary, layers=3, width=16, heads=2, feed_forward=24)
    randomise(model, 0.25)
    save_model(model, vocabulary, directory)
    return directory, vocabulary


@pytest.mark.parametrize("perturbation", ["delete", "overexpress", "activate"])
def test_long_cells_are_as_one_event_at_a_time(
    long_model: tuple[Path, GeneVocabulary], perturbation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, vocabulary = long_model
    shares: list[bool] = []

    def watched(*given: Any) -> Any:
        attend = shared.shared_attention(*given)
        shares.append(attend is not None)
        return attend

    monkeypatch.setattr(trunk, "shared_attention", watched)
    ids = random_cells(vocabulary, np.random.default_rng(2), [300])[0]
    encoder, stock = Encoder.load(directory, execution=EXECUTION), StockTrunk(directory)
    found = shift_cell(encoder, ids, PerturbationPlan(perturbation), Reading(gene_shifts=True), vocabulary)
    assert len(found) == 300
    assert sum(shares) > 300 // EVENTS_THAT_SHARE // 2
    front = int(vocabulary.cls_id is not None)
    before = {int(token): state for token, state in zip(ids, stock.hidden(ids, -1), strict=True)}
    assert found.affected is not None
    assert found.gene_values is not None
    for number in (0, 1, 17, 150, 298, 299):
        (gene,) = found.genes[number]
        others = np.delete(ids, front + number)
        where = {"delete": None, "overexpress": 0, "activate": _activated(number, 300)}[perturbation]
        perturbed = others if where is None else np.insert(others, front + where, gene)
        after = {int(token): state for token, state in zip(perturbed, stock.hidden(perturbed, -1), strict=True)}
        expected = [cosine(before[token], after[token]) for token in found.affected[number].tolist()]
        np.testing.assert_allclose(found.gene_values[number], expected, atol=2e-5)
        assert len(expected) == 299


def _activated(rank: int, genes: int) -> int:
    quartile = 4 * rank // genes + 1
    return 0 if quartile == 1 else int((quartile - 1.5) * genes / 4)


def test_cells_share_batches(long_model: tuple[Path, GeneVocabulary]) -> None:
    """Neither the cells beside it nor the size of a batch change a cell's numbers."""
    directory, vocabulary = long_model
    cells = random_cells(vocabulary, np.random.default_rng(4), [5, 280, 40, 1, 260, 40])
    encoder, plan = Encoder.load(directory, execution=EXECUTION), PerturbationPlan()
    states = {"goal": np.random.default_rng(5).normal(size=16).astype(np.float32)}
    for reading in (Reading(states=states, gene_shifts=True), Reading(comparison="upstream", states=states)):
        alone = [shift_cell(encoder, ids, plan, reading, vocabulary) for ids in cells]
        for tokens in (300, 5_000, 10**9):
            together = shift_cells(encoder, cells, plan, reading, vocabulary, budget=TokenBudget(tokens))
            assert [cell.genes for cell in together] == [cell.genes for cell in alone]
            assert [cell.empty for cell in together] == [0, 0, 0, 1, 0, 0]
            for ours, theirs in zip(together, alone, strict=True):
                np.testing.assert_allclose(ours.values_ES, theirs.values_ES, atol=1e-6)
                for one, other in zip(ours.gene_values or [], theirs.gene_values or [], strict=True):
                    np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize(
    ("layers", "width", "heads", "activation"), [(1, 16, 2, "relu"), (2, 21, 3, "gelu"), (3, 8, 8, "gelu_new")]
)
def test_other_shapes(
    vocabulary: GeneVocabulary, tmp_path: Path, layers: int, width: int, heads: int, activation: str
) -> None:
    """One layer, heads of odd widths and of one number, activations other than Geneformer's; biases everywhere."""
    torch.manual_seed(2)
    model = new_model(vocabulary, layers=layers, width=width, heads=heads, feed_forward=24)
    model.config.hidden_act = activation
    randomise(model, 0.4)
    save_model(model, vocabulary, tmp_path)
    stock = StockTrunk(tmp_path)
    cells = random_cells(vocabulary, np.random.default_rng(6), [16, 16, 5])
    for layer in (0, -1)[:layers]:
        encoder = Encoder.load(tmp_path, layer=layer, execution=EXECUTION)
        groups = [np.stack(cells[:2]), cells[2][None], np.empty((2, 0), dtype=np.int32)]
        whole, first = encoder.hidden(groups), encoder.hidden(groups, first_only=True)
        for number, (group, row) in enumerate([(0, 0), (0, 1), (1, 0)]):
            expected = stock.hidden(cells[number], layer)
            np.testing.assert_allclose(whole[group][row].numpy(), expected, atol=1e-5)
            np.testing.assert_allclose(first[group][row].numpy(), expected[:1], atol=1e-5)
        assert whole[2].shape == (2, 0, width)
        assert first[2].shape == (2, 1, width)


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize("fails_in", ["hidden", "read_shifts"])
@pytest.mark.parametrize("perturbation", ["delete", "overexpress"])
def test_nothing_is_lost_when_memory_runs_out(
    model_directory: Path, vocabulary: GeneVocabulary, monkeypatch: pytest.MonkeyPatch, perturbation: str, fails_in: str
) -> None:
    """Failures before and while numbers are taken; full cells, so that overexpression cuts the original."""
    encoder = Encoder.load(model_directory, execution=EXECUTION)
    cells = random_cells(vocabulary, np.random.default_rng(7), [16, 16, 12, 15])
    states = {"goal": np.random.default_rng(8).normal(size=16).astype(np.float32)}
    sets = tuple(
        tuple(vocabulary.tokens[name] for name in vocabulary.genes[i : i + 1 + i % 3]) for i in range(0, 36, 3)
    )
    plan = PerturbationPlan(perturbation, sets=sets) if perturbation == "overexpress" else PerturbationPlan()
    reading = Reading(states=states, gene_shifts=True)
    whole = shift_cells(encoder, cells, plan, reading, vocabulary)
    hidden, read = encoder.hidden, shifts.read_shifts
    kept: list[weakref.ref[torch.Tensor]] = []
    calls = 0

    def tight(groups: Any, **options: Any) -> Any:
        assert not any(tensor() is not None for tensor in kept), "what a failed batch computed is still there"
        if fails_in == "hidden" and sum(group.size for group in groups) > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden(groups, **options)

    def failing(batch: Any, hidden_ELD: torch.Tensor, *rest: Any) -> Any:
        nonlocal calls
        calls += 1
        if fails_in == "read_shifts" and calls in (2, 3, 5) and len(batch) > 1:
            kept.append(weakref.ref(hidden_ELD))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(batch, hidden_ELD, *rest)

    monkeypatch.setattr(encoder, "hidden", tight)
    monkeypatch.setattr(shifts, "read_shifts", failing)
    budget = TokenBudget(10_000)
    tried = shift_cells(encoder, cells, plan, reading, vocabulary, budget=budget)
    assert 25 <= budget.tokens < 10_000  # fewer, but no fewer than it takes
    for ours, theirs in zip(tried, whole, strict=True):
        assert ours.genes == theirs.genes
        assert (ours.skipped, ours.empty) == (theirs.skipped, theirs.empty)
        np.testing.assert_allclose(ours.values_ES, theirs.values_ES, atol=2e-6)
        for one, other in zip(ours.gene_values or [], theirs.gene_values or [], strict=True):
            np.testing.assert_allclose(one, other, atol=2e-6)


TIGHT = """
import json, logging, resource, sys
import numpy as np
from geneformer_ray.compute.encoder import Encoder
from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.compute.perturbation import PerturbationPlan
from geneformer_ray.compute.reading import Reading
from geneformer_ray.compute.shifts import shift_cells
from geneformer_ray.compute.token_budget import TokenBudget
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError

logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
directory, room = sys.argv[1], int(sys.argv[2])
vocabulary = GeneVocabulary.load(directory)
encoder = Encoder.load(__import__("pathlib").Path(directory), execution=choose_execution(cpus=1))
ids = np.arange(len(vocabulary) - 310, len(vocabulary) - 10, dtype=np.int32)
def shifts(tokens):
    budget = TokenBudget(tokens)
    found = shift_cells(encoder, [ids] * 16, PerturbationPlan(), Reading(), vocabulary, budget=budget)
    return budget.tokens, np.concatenate([cell.values_ES[:, 0] for cell in found]).tolist()
plenty = shifts(1_000)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + room * 2**20, resource.RLIM_INFINITY))
tight = shifts(10**9)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(json.dumps([plenty, tight]))
"""


def test_batches_are_halved_where_memory_is_short(long_model: tuple[Path, GeneVocabulary]) -> None:
    """With real allocations that fail: sixteen cells' deletions do not fit, fewer do, and the numbers are the same."""
    done = subprocess.run(
        [sys.executable, "-c", TIGHT, str(long_model[0]), "32"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (_, plenty), (tokens, tight) = json.loads(done.stdout)
    assert 1_000 < tokens < 10**9
    assert "out of memory with" in done.stderr
    np.testing.assert_allclose(tight, plenty, atol=1e-6)


def test_which_errors_are_short_memory() -> None:
    assert out_of_memory(MemoryError())
    assert out_of_memory(torch.OutOfMemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert out_of_memory(caught.value)
    assert out_of_memory(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"))
    assert not out_of_memory(RuntimeError("shapes do not match"))


def test_budgets_follow_the_model() -> None:
    directory_of = {width: new_model_config(width) for width in (64, 4096)}
    small, large = (TokenBudget.of_free_memory(EXECUTION, directory_of[width]) for width in (64, 4096))
    assert 0 < large.tokens <= small.tokens


def new_model_config(width: int) -> object:
    from transformers import BertConfig

    return BertConfig(hidden_size=width, intermediate_size=4 * width)
