"""Deletions with ranks held, against stock BERT with the same positions; and what a shift is made of."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import BertModel

from geneformer_ray.compute.cell_events import cell_events
from geneformer_ray.compute.decomposition import decompose, decomposed_rows, shift_decomposed
from geneformer_ray.compute.encoder import LAYERS, Encoder
from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.compute.model_directory import save_model
from geneformer_ray.compute.perturbation import PerturbationPlan
from geneformer_ray.compute.pretraining import new_model
from geneformer_ray.compute.reading import COMPARISONS, Reading
from geneformer_ray.compute.shift_rows import read_shift_rows
from geneformer_ray.compute.shift_tables import CELL_SHIFTS, cell_shift_rows
from geneformer_ray.compute.shifts import CellShifts, shift_cell, shift_cells
from geneformer_ray.compute.token_budget import TokenBudget
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError
from tests.conftest import random_cells, randomise
from tests.reference import Cell, cosine, gene_positions

HOLD = PerturbationPlan(ranks="hold")
EXECUTION = choose_execution(cpus=1)
TOLERANCE = 2e-5
STATES = {name: np.random.default_rng(number).normal(size=16).astype(np.float32) for number, name in enumerate("ab")}


class HeldTrunk:
    """Stock BERT over the whole cell: deleted genes are masked out, every token keeps the position it is told."""

    def __init__(self, directory: Path, layer: int) -> None:
        self.bert = BertModel.from_pretrained(directory, add_pooling_layer=False, attn_implementation="eager").eval()
        self.number = len(self.bert.encoder.layer) + layer
        self.known: dict[tuple[bytes, tuple[int, ...]], np.ndarray] = {}

    @torch.inference_mode()
    def hidden(self, ids: Cell, deleted: tuple[int, ...]) -> np.ndarray:
        """Hidden states of the whole cell; those of deleted genes are computed, and nobody looks at them."""
        key = (ids.tobytes(), deleted)
        if key not in self.known:
            states = self.bert(
                input_ids=torch.from_numpy(ids.astype(np.int64))[None],
                attention_mask=torch.from_numpy(~np.isin(ids, deleted)).long()[None],
                position_ids=torch.arange(len(ids))[None],
                output_hidden_states=True,
            ).hidden_states
            self.known[key] = states[self.number][0].numpy().astype(np.float64)
        return self.known[key]


def held_values(
    trunk: HeldTrunk, ids: Cell, event: tuple[int, ...], reading: Reading, vocabulary: GeneVocabulary
) -> tuple[list[float], list[float]]:
    """An event's values and its gene values, one position at a time."""
    before, after = trunk.hidden(ids, ()), trunk.hidden(ids, event)
    genes = gene_positions(ids, vocabulary)
    left = [position for position in genes if int(ids[position]) not in event]
    gene_values = [cosine(after[position], before[position]) for position in left]
    if reading.embedding == "cls":
        cells = after[0], before[0]
    else:
        counted = genes if reading.comparison == "upstream" else left
        cells = after[left].mean(axis=0), before[counted].mean(axis=0)
    if reading.states:
        return [cosine(cells[0], state) - cosine(cells[1], state) for state in reading.states.values()], gene_values
    return [cosine(*cells) if reading.embedding == "cls" else float(np.mean(gene_values))], gene_values


def plans(ids: Cell, vocabulary: GeneVocabulary) -> list[PerturbationPlan]:
    genes = [int(ids[position]) for position in gene_positions(ids, vocabulary)]
    few = (genes[4], genes[0], genes[-1])
    options: list[dict[str, object]] = [
        {},
        {"genes": few},
        {"genes": few, "together": True},
        {"genes": few, "combine": 2},
        {"anchor": genes[2]},
        {"sets": ((genes[3], genes[1]), (genes[5],))},
    ]
    return [PerturbationPlan(ranks="hold", **given) for given in options]  # type: ignore[arg-type]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("special", [False, True])
def test_every_reading_of_every_deletion(
    special: bool,
    layer: int,
    model_directory: Path,
    special_model_directory: Path,
    vocabulary: GeneVocabulary,
    special_vocabulary: GeneVocabulary,
) -> None:
    """Mean and CLS, both comparisons, with and without states, gene shifts, one gene and several."""
    directory, known = (special_model_directory, special_vocabulary) if special else (model_directory, vocabulary)
    encoder, trunk = Encoder.load(directory, layer=layer, execution=EXECUTION), HeldTrunk(directory, layer)
    (ids,) = random_cells(known, np.random.default_rng(1), [9])
    embeddings = ["mean", "cls"] if special else ["mean"]
    for plan, embedding, comparison, states, gene_shifts in itertools.product(
        plans(ids, known), embeddings, COMPARISONS, ({}, STATES), (False, True)
    ):
        reading = Reading(embedding, comparison, states, gene_shifts)
        ours = shift_cell(encoder, ids, plan, reading, known)
        assert len(ours) == len(cell_events(ids, plan, known))
        expected = [held_values(trunk, ids, event, reading, known) for event in ours.genes]
        np.testing.assert_allclose(ours.values_ES, [values for values, _ in expected], atol=TOLERANCE)
        if gene_shifts:
            assert ours.gene_values is not None
            for mine, (_, theirs) in zip(ours.gene_values, expected, strict=True):
                np.testing.assert_allclose(mine, theirs, atol=TOLERANCE)


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GeneVocabulary]:
    """A model for cells long enough that their events share a first layer."""
    directory = tmp_path_factory.mktemp("long")
    names = ["<pad>", "<mask>", "<cls>", *(f"GENE{number:03d}" for number in range(300))]
    vocabulary = GeneVocabulary({name: number for number, name in enumerate(names)}, max_length=280)
    torch.manual_seed(1)
    model = new_model(vocabulary, layers=2, width=16, heads=2, feed_forward=24)
    randomise(model, 0.25)
    save_model(model, vocabulary, directory)
    return directory, vocabulary


def test_long_cells_and_batches(long_model: tuple[Path, GeneVocabulary]) -> None:
    """What the events of a long cell share is shared with ranks held as well; batches and neighbours change nothing."""
    directory, vocabulary = long_model
    cells = random_cells(vocabulary, np.random.default_rng(2), [270, 12, 1])
    encoder, trunk, plan = Encoder.load(directory, execution=EXECUTION), HeldTrunk(directory, -1), HOLD
    reading = Reading(states=STATES)
    found = shift_cells(encoder, cells, plan, reading, vocabulary)
    assert [(len(cell), cell.empty) for cell in found] == [(270, 0), (12, 0), (0, 1)]
    for number in (0, 31, 32, 200, 269):
        values, _ = held_values(trunk, cells[0], found[0].genes[number], reading, vocabulary)
        np.testing.assert_allclose(found[0].values_ES[number], values, atol=TOLERANCE)
    for tokens in (1, 700, 10**6):
        again = shift_cells(encoder, cells, plan, reading, vocabulary, budget=TokenBudget(tokens))
        for ours, theirs in zip(again, found, strict=True):
            assert ours.genes == theirs.genes
            np.testing.assert_allclose(ours.values_ES, theirs.values_ES, atol=1e-6)


def test_batches_are_cut_with_their_ranks(special_vocabulary: GeneVocabulary) -> None:
    (ids,) = random_cells(special_vocabulary, np.random.default_rng(3), [5])
    (batch,) = cell_events(ids, HOLD, special_vocabulary).batches(10)
    assert batch.ranks_EL is not None
    assert batch.ranks_EL[1].tolist() == [0, 1, 3, 4, 5, 6]
    first, second = batch.halves()
    assert first.ranks_EL is not None
    assert second.ranks_EL is not None
    assert np.concatenate([first.ranks_EL, second.ranks_EL]).tolist() == batch.ranks_EL.tolist()
    (shifted,) = cell_events(ids, PerturbationPlan(), special_vocabulary).batches(10)
    assert shifted.ranks_EL is None
    assert [half.ranks_EL for half in shifted.halves()] == [None, None]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ranks": "keep"}, "--ranks: got keep; takes one of shift, hold"),
        ({"perturbation": "overexpress", "ranks": "hold"}, "--ranks: got hold with --perturbation overexpress"),
        ({"perturbation": "inhibit", "ranks": "hold"}, "takes hold with deletions alone"),
    ],
)
def test_only_deletions_hold_ranks(options: dict[str, str], text: str) -> None:
    with pytest.raises(InputError, match=text):
        PerturbationPlan(**options)


# ------------------------------------------------------------------ what a shift is made of


def test_a_shift_is_the_gene_and_its_rank(special_model_directory: Path, special_vocabulary: GeneVocabulary) -> None:
    """The two parts add up; the last gene of a cell without an end token has nothing behind it that moves."""
    encoder = Encoder.load(special_model_directory, execution=EXECUTION)
    cells = random_cells(special_vocabulary, np.random.default_rng(4), [9, 5])
    cells[1] = cells[1][:-1]
    reading, names = Reading(states=STATES), np.array(special_vocabulary.names, dtype=object)
    full, gene = shift_decomposed(encoder, cells, PerturbationPlan(), reading, special_vocabulary)
    held = shift_cells(encoder, cells, HOLD, reading, special_vocabulary)
    for ours, theirs in zip(gene, held, strict=True):
        np.testing.assert_array_equal(ours.values_ES, theirs.values_ES)
    assert np.abs(gene[1].values_ES[-1] - full[1].values_ES[-1]).max() < 1e-6
    assert np.abs(gene[0].values_ES - full[0].values_ES).max() > 1e-3

    rows = decomposed_rows(["x", "y"], full, gene, ["a", "b"], names)
    assert rows.schema == CELL_SHIFTS
    assert rows.num_rows == 3 * 2 * (9 + 5)
    assert rows.slice(0, 28) == cell_shift_rows(["x", "y"], full, ["a", "b"], names)
    read = {name: read_shift_rows(rows, measure=name, states=["a"]) for name in ("shift", "shift_gene", "shift_rank")}
    total = read["shift_gene"].value_N + read["shift_rank"].value_N
    np.testing.assert_allclose(total, read["shift"].value_N, atol=1e-7)
    assert read["shift_rank"].genes == read["shift"].genes
    for gene, cell, value in zip(
        read["shift_gene"].gene_N, read["shift_gene"].cell_N, read["shift_gene"].value_N, strict=True
    ):
        token = special_vocabulary.tokens[read["shift_gene"].genes[gene]]
        assert value == held[cell].values_ES[held[cell].genes.index((token,)), 0]


def test_parts_of_different_events_do_not_add(vocabulary: GeneVocabulary) -> None:
    one, other = (CellShifts([(gene,)], np.ones((1, 1), np.float32)) for gene in (2, 3))
    with pytest.raises(ValueError, match="other events"):
        decompose(one, other)
    with pytest.raises(InputError, match="--decompose: got a screen without states; takes shifts to states"):
        decomposed_rows(["x"], [one], [one], [], np.array(vocabulary.names, dtype=object))
    assert isinstance(decomposed_rows([], [], [], ["a"], np.array([], dtype=object)), pa.Table)


def test_only_deletions_are_decomposed(model_directory: Path, vocabulary: GeneVocabulary) -> None:
    encoder = Encoder.load(model_directory, execution=EXECUTION)
    for plan in (PerturbationPlan("activate"), HOLD):
        with pytest.raises(InputError, match="--decompose"):
            shift_decomposed(encoder, [], plan, Reading(states=STATES), vocabulary)
    with pytest.raises(InputError, match="--decompose"):
        shift_decomposed(encoder, [], PerturbationPlan(), Reading(), vocabulary)
