"""Embeddings of cells, genes and states, against one cell at a time with stock transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geneformer_ray.compute.cell_states import check_states, state_embeddings, states_file, states_in_file, sum_by_state
from geneformer_ray.compute.embedding import (
    cell_embeddings,
    gene_embedding_sums,
)
from geneformer_ray.compute.encoder import LAYERS, Encoder
from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError
from tests.conftest import random_cells
from tests.reference import StockTrunk, gene_positions

EXECUTION = choose_execution(cpus=1)
LENGTHS = [5, 16, 1, 9, 5, 12]


@pytest.fixture(scope="module", params=["plain", "special"])
def model(
    request: pytest.FixtureRequest,
    model_directory: Path,
    special_model_directory: Path,
    vocabulary: GeneVocabulary,
    special_vocabulary: GeneVocabulary,
) -> tuple[Path, GeneVocabulary]:
    return {
        "plain": (model_directory, vocabulary),
        "special": (special_model_directory, special_vocabulary),
    }[request.param]


@pytest.mark.parametrize("layer", LAYERS)
def test_cell_embeddings(model: tuple[Path, GeneVocabulary], layer: int, rng: np.random.Generator) -> None:
    directory, vocabulary = model
    cells = random_cells(vocabulary, rng, LENGTHS)
    encoder, trunk = Encoder.load(directory, layer=layer, execution=EXECUTION), StockTrunk(directory)
    hidden = [trunk.hidden(ids, layer) for ids in cells]
    means = [
        np.mean([states[position] for position in gene_positions(ids, vocabulary)], axis=0)
        for ids, states in zip(cells, hidden, strict=True)
    ]
    for tokens in (1, 40, 16_384):
        ours = cell_embeddings(encoder, cells, vocabulary, tokens_per_batch=tokens)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, means, atol=1e-5)
    if vocabulary.cls_id is not None:
        ours = cell_embeddings(encoder, cells, vocabulary, embedding="cls")
        np.testing.assert_allclose(ours, [states[0] for states in hidden], atol=1e-5)
        assert np.abs(ours - means).max() > 0.05


def test_embeddings_that_are_not_there(model_directory: Path, vocabulary: GeneVocabulary) -> None:
    encoder = Encoder.load(model_directory, execution=EXECUTION)
    cells = [np.array([5, 6])]
    with pytest.raises(InputError, match="--embedding: got cls for a model without a <cls> token; takes mean"):
        cell_embeddings(encoder, cells, vocabulary, embedding="cls")
    with pytest.raises(InputError, match="--embedding: got gene; takes one of mean, cls"):
        cell_embeddings(encoder, cells, vocabulary, embedding="gene")


@pytest.mark.parametrize("layer", LAYERS)
def test_gene_embedding_sums(model: tuple[Path, GeneVocabulary], layer: int, rng: np.random.Generator) -> None:
    directory, vocabulary = model
    cells = random_cells(vocabulary, rng, LENGTHS)
    encoder, trunk = Encoder.load(directory, layer=layer, execution=EXECUTION), StockTrunk(directory)
    expected, counts = np.zeros((len(vocabulary), 16)), [0] * len(vocabulary)
    for ids in cells:
        for token, state in zip(ids, trunk.hidden(ids, layer), strict=True):
            expected[token] += state
            counts[token] += 1
    sums, number = gene_embedding_sums(encoder, cells, vocabulary)
    assert number.tolist() == counts
    assert number[vocabulary.pad_id] == 0
    np.testing.assert_allclose(sums, expected, atol=1e-4)
    # Shards of a data set add up.
    halves = [gene_embedding_sums(encoder, part, vocabulary) for part in (cells[:2], cells[2:])]
    np.testing.assert_allclose(halves[0][0] + halves[1][0], sums, atol=1e-4)
    assert (halves[0][1] + halves[1][1]).tolist() == counts


def test_no_cells(model_directory: Path, vocabulary: GeneVocabulary) -> None:
    encoder = Encoder.load(model_directory, execution=EXECUTION)
    assert cell_embeddings(encoder, [], vocabulary).shape == (0, 16)
    sums, cells = gene_embedding_sums(encoder, [], vocabulary)
    assert not sums.any()
    assert not cells.any()


# ------------------------------------------------------------------ states


@given(
    names=st.lists(st.sampled_from(["AD", "AD_treated", "healthy", None]), min_size=1, max_size=12),
    cut=st.integers(0, 12),
)
@settings(max_examples=30, deadline=None)
def test_state_embeddings_are_means_of_whole_names(names: list[str | None], cut: int) -> None:
    """A state whose name another one contains is another state; shards add up; no state is none."""
    embeddings = np.arange(len(names) * 2, dtype=np.float32).reshape(-1, 2) ** 2
    states = np.array(names, dtype=object)
    shards = [(embeddings[:cut], states[:cut]), (embeddings[cut:], states[cut:])]
    result = state_embeddings([sum_by_state(*shard) for shard in shards])
    assert list(result) == sorted({name for name in names if name is not None})
    for state, vector in result.items():
        rows = [embeddings[number] for number, name in enumerate(names) if name == state]
        np.testing.assert_allclose(vector, np.mean(rows, axis=0), rtol=1e-6)
        assert vector.dtype == np.float32


def test_states_from_a_file() -> None:
    checked = check_states({"a": [1, 2.5], "b": [0, 1], "c": "unread"}, 2, ["b", "a"])
    assert list(checked) == ["b", "a"]
    assert checked["a"].dtype == np.float32
    assert checked["a"].tolist() == [1, 2.5]


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ({"b": [1, 2]}, "no state 'a'; takes a file that holds it .it has b"),
        ({}, "no state 'a'; takes a file that holds it .it has none"),
        ({"a": [1, 2, 3]}, r"a of shape \(3,\); takes 2 finite numbers, the model's width"),
        ({"a": [[1, 2]]}, r"a of shape \(1, 2\)"),
        ({"a": 1.0}, r"a of shape \(\)"),
        ({"a": [1, float("nan")]}, "takes 2 finite numbers"),
        ({"a": [1, float("inf")]}, "takes 2 finite numbers"),
        ({"a": ["x", "y"]}, "a as no list of numbers"),
        ({"a": {"x": 1}}, "a as no list of numbers"),
        ({"a": [[1], [1, 2]]}, "a as no list of numbers"),
    ],
)
def test_states_from_a_file_that_do_not_fit(states: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=f"--state-embeddings: .*{message}"):
        check_states(states, 2, ["a"])


MADE_WITH = {"model": "abc", "embedding": "mean", "layer": -1}


def test_states_travel_in_a_file_with_what_made_them() -> None:
    states = {"a": np.array([0.1, 2], dtype=np.float32), "states": np.array([3, 4], dtype=np.float32)}
    content = json.loads(json.dumps(states_file(states, MADE_WITH)))
    read = check_states(states_in_file(content, MADE_WITH), 2, ["a", "states"])
    assert all((read[name] == states[name]).all() for name in states)


def test_a_plain_object_of_states_is_taken_as_it_is() -> None:
    plain = {"a": [1.0, 2.0], "states": [0.0, 1.0]}
    assert states_in_file(plain, MADE_WITH) == plain


@pytest.mark.parametrize("change", [{"model": "other"}, {"embedding": "cls"}, {"layer": 0}])
def test_states_of_something_else_are_refused(change: dict[str, Any]) -> None:
    (name,) = change
    content = states_file({"a": np.zeros(2, dtype=np.float32)}, MADE_WITH | change)
    with pytest.raises(InputError, match=f"--state-embeddings.*of {name} {change[name]}"):
        states_in_file(content, MADE_WITH)


def test_a_list_is_no_file_of_states() -> None:
    with pytest.raises(InputError, match="list"):
        states_in_file([1.0], MADE_WITH)
