"""What first-order screens are made of, in float64: gradients, and the closed forms of attention."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertModel

from geneformer_ray.compute.encoder import LAYERS, Encoder
from geneformer_ray.compute.execution import Execution
from geneformer_ray.compute.linear_trunk import Linearised, Point, linearise

DOUBLE = Execution("cpu", torch.float64, "sdpa", 1, "finite differences")
EMBEDDINGS = ("mean", "cls")
STATES_SD = torch.from_numpy(np.random.default_rng(2).normal(size=(2, 16)))
IDS = torch.tensor([2, *np.random.default_rng(3).permutation(np.arange(4, 44))[:15].tolist(), 3])
GENES = slice(1, 16)


@pytest.fixture(scope="module")
def bert(special_model_directory: Path) -> BertModel:
    return BertModel.from_pretrained(special_model_directory, add_pooling_layer=False).eval().double()


class SlowTrunk:
    """The model as stock transformers' modules one after another, with a bias on the keys; gradients are autograd's."""

    def __init__(self, bert: BertModel, layer: int, *, first_only: bool) -> None:
        self.bert, self.first_only = bert, first_only
        self.layers = bert.encoder.layer[: len(bert.encoder.layer) + layer]

    def embed(self, ids_L: torch.Tensor) -> torch.Tensor:
        embeddings: torch.Tensor = self.bert.embeddings(ids_L[None])[0].detach()
        return embeddings

    def __call__(self, entered_LD: torch.Tensor, bias_L: torch.Tensor) -> torch.Tensor:
        x_1LD = entered_LD[None]
        for layer in self.layers:
            own = layer.attention.self

            def heads(x_1LD: torch.Tensor, size: int = own.attention_head_size) -> torch.Tensor:
                return x_1LD.view(1, len(entered_LD), -1, size).transpose(1, 2)

            score = heads(own.query(x_1LD)) @ heads(own.key(x_1LD)).transpose(2, 3) * own.attention_head_size**-0.5
            context = (score + bias_L).softmax(dim=3) @ heads(own.value(x_1LD))
            past_1LD = layer.attention.output(context.transpose(1, 2).flatten(2), x_1LD)
            x_1LD = layer.output(layer.intermediate(past_1LD), past_1LD)
        read = x_1LD[0, 0] if self.first_only else x_1LD[0, GENES].mean(dim=0)
        return torch.cosine_similarity(read[None], STATES_SD)


def cosines(read_D: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines with the states, by autograd."""
    with torch.enable_grad():
        given_D = read_D.detach().requires_grad_()
        found_S = torch.cosine_similarity(given_D[None], STATES_SD)
        rows = [torch.autograd.grad(value, given_D, retain_graph=True)[0] for value in found_S]
    return found_S.detach(), torch.stack(rows)


def linearised(bert: BertModel, layer: int, embedding: str, at: list[int], ids: list[int]) -> Linearised:
    """One point beside another, so that places are not mixed up."""
    encoder = Encoder(bert, layer=layer, execution=DOUBLE)
    alternates = torch.tensor(at, dtype=torch.int64), torch.tensor(ids, dtype=torch.int64)
    point = Point(IDS, GENES, *alternates, functions=cosines, removed=True, inputs=True)
    other = Point(IDS[:9], slice(1, 9), torch.tensor([4]), torch.tensor([40]), functions=cosines, removed=True)
    return linearise(encoder.trunk, [other, point], first_only=embedding == "cls")[1]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_gradients_are_finite_differences(bert: BertModel, layer: int, embedding: str) -> None:
    """Of a bias on each key, and of everything that enters the first layer."""
    slow = SlowTrunk(bert, layer, first_only=embedding == "cls")
    found, entered_LD = linearised(bert, layer, embedding, [], []), slow.embed(IDS)
    none_L, step = torch.zeros(len(IDS), dtype=torch.float64), 1e-5
    with torch.no_grad():
        torch.testing.assert_close(found.values_S, slow(entered_LD, none_L), atol=1e-12, rtol=0)
        for position in range(len(IDS)):
            bias_L = none_L.clone()
            bias_L[position] = step
            slope_S = (slow(entered_LD, bias_L) - slow(entered_LD, -bias_L)) / (2 * step)
            torch.testing.assert_close(found.gate_SL[:, position], slope_S, atol=1e-8, rtol=0)
        assert found.inputs_SLD is not None
        for position, unit in itertools.product((0, 1, 7, len(IDS) - 1), (0, 5, 15)):
            moved_LD = torch.zeros_like(entered_LD)
            moved_LD[position, unit] = step
            slope_S = (slow(entered_LD + moved_LD, none_L) - slow(entered_LD - moved_LD, none_L)) / (2 * step)
            torch.testing.assert_close(found.inputs_SLD[:, position, unit], slope_S, atol=1e-8, rtol=0)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_a_small_replacement_is_the_gradient(special_model_directory: Path, layer: int, embedding: str) -> None:
    """As an alternate comes closer to the token that it replaces, its change becomes the gradient's."""
    bert = BertModel.from_pretrained(special_model_directory, add_pooling_layer=False).eval().double()
    slow, step = SlowTrunk(bert, layer, first_only=embedding == "cls"), 1e-6
    at = [1, 6, 15]
    spare = [token for token in range(4, 44) if token not in IDS.tolist()][: len(at)]
    words_VD = bert.embeddings.word_embeddings.weight
    with torch.no_grad():
        nudge_AD = step * torch.randn(len(at), 16, dtype=torch.float64, generator=torch.manual_seed(4))
        words_VD[spare] = words_VD[IDS[at]] + nudge_AD
    found, before_LD = linearised(bert, layer, embedding, at, spare), slow.embed(IDS)
    assert found.inputs_SLD is not None
    for number, position in enumerate(at):
        ids_L = IDS.clone()
        ids_L[position] = spare[number]
        change_S = found.inputs_SLD[:, position] @ (slow.embed(ids_L) - before_LD)[position]
        torch.testing.assert_close(found.replaced_SA[:, number], change_S, atol=1e-4 * step, rtol=0)
        assert change_S.abs().max() > 1e-2 * step


def test_what_others_attend_to_is_closed_form(bert: BertModel) -> None:
    """One layer: what each query gets without a key, and with another, one query at a time, through a gradient."""
    layer = bert.encoder.layer[0]
    own, entered_LD = layer.attention.self, SlowTrunk(bert, -2, first_only=False).embed(IDS)
    alternate = 41
    ids_L = IDS.clone()
    ids_L[6] = alternate
    other_LD = SlowTrunk(bert, -2, first_only=False).embed(ids_L)
    small = BertModel(bert.config, add_pooling_layer=False).double().eval()
    small.load_state_dict(bert.state_dict())
    small.encoder.layer = small.encoder.layer[:1]
    small.config.num_hidden_layers = 1
    found = linearised(small, 0, "mean", [6], [alternate])

    def behind(context_LD: torch.Tensor, past_LD: torch.Tensor) -> torch.Tensor:
        y_LD = layer.attention.output(context_LD, past_LD)
        return torch.cosine_similarity(layer.output(layer.intermediate(y_LD), y_LD)[GENES].mean(dim=0)[None], STATES_SD)

    def context(keys: list[tuple[int, torch.Tensor]], query: int) -> torch.Tensor:
        parts = []
        for head in range(2):
            some = slice(8 * head, 8 * head + 8)
            q = own.query(entered_LD[query])[some]
            score = torch.stack([q @ own.key(x_D)[some] * 8**-0.5 for _, x_D in keys])
            parts.append(score.softmax(dim=0) @ torch.stack([own.value(x_D)[some] for _, x_D in keys]))
        return torch.cat(parts)

    everyone = list(enumerate(entered_LD))
    whole_LD = torch.stack([context(everyone, query) for query in range(len(IDS))]).detach()
    slope_SLD = torch.autograd.functional.jacobian(lambda c_LD: behind(c_LD, entered_LD), whole_LD)
    for gone in (1, 6, 15):
        rest = [key for key in everyone if key[0] != gone]
        change_S = torch.zeros(2, dtype=torch.float64)
        for query in range(len(IDS)):
            if query != gone:
                change_S += slope_SLD[:, query] @ (context(rest, query) - whole_LD[query])
        torch.testing.assert_close(found.removed_SL[:, gone], change_S, atol=1e-10, rtol=0)
    changed = [(key, other_LD[6] if key == 6 else x_D) for key, x_D in everyone]
    change_S = torch.zeros(2, dtype=torch.float64)
    for query in range(len(IDS)):
        if query != 6:
            change_S += slope_SLD[:, query] @ (context(changed, query) - whole_LD[query])
    # Its own state is computed, not estimated, and counts in the mean.
    after_LD = layer(other_LD[None])
    after_LD = (after_LD if torch.is_tensor(after_LD) else after_LD[0])[0]
    before_LD = layer(entered_LD[None])
    before_LD = (before_LD if torch.is_tensor(before_LD) else before_LD[0])[0]
    mean_D = before_LD[GENES].mean(dim=0).detach().requires_grad_()
    rows = [
        torch.autograd.grad(value, mean_D, retain_graph=True)[0]
        for value in torch.cosine_similarity(mean_D[None], STATES_SD)
    ]
    change_S += torch.stack(rows) @ (after_LD - before_LD)[6] / 15
    torch.testing.assert_close(found.replaced_SA[:, 0], change_S, atol=1e-10, rtol=0)
