"""How well hidden genes are named: against one cell at a time, whatever the batches, and never a special token."""

from __future__ import annotations

from functools import reduce
from itertools import chain
from operator import add
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertForMaskedLM

from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.compute.masked_scores import (
    NAMED,
    MaskedSums,
    count_genes,
    frequency_ranking,
    hidden_positions,
    score_masked_genes,
)
from geneformer_ray.compute.model_directory import load_weights
from geneformer_ray.compute.pretraining import MaskedGeneModel
from geneformer_ray.data.vocabulary import GeneVocabulary
from tests.conftest import random_cells
from tests.reference import Cell, gene_positions

EXECUTION = choose_execution(cpus=1)
SEED = 7
LENGTHS = [9, 3, 15, 1, 6, 9, 12, 14, 2, 16, 11, 7] * 4


class Measured:
    """A random masked-gene model whose bias favours some genes, its vocabulary, cells to train and cells held out."""

    def __init__(self, directory: Path, vocabulary: GeneVocabulary) -> None:
        self.vocabulary = vocabulary
        self.model = load_weights(MaskedGeneModel, directory)
        with torch.no_grad():
            self.model.cls.predictions.bias += torch.linspace(6, 0, len(vocabulary))
        rng = np.random.default_rng(0)
        # Genes of low number are in more of the cells, as in tissue some are in nearly all.
        share = np.linspace(0.9, 0.05, len(vocabulary.genes))
        self.train = [self._cell(rng, share) for _ in range(60)]
        self.held_out = random_cells(vocabulary, rng, LENGTHS[:24]) + [self._cell(rng, share) for _ in range(24)]
        self.numbers = np.arange(1000, 1000 + len(self.held_out))
        self.ranking = frequency_ranking(count_genes(self.train, vocabulary), vocabulary)

    def _cell(self, rng: np.random.Generator, share: np.ndarray) -> Cell:
        genes = [
            self.vocabulary.tokens[gene] for gene in np.array(self.vocabulary.genes)[rng.random(len(share)) < share]
        ]
        whole = [self.vocabulary.cls_id, *rng.permutation(genes or [self.vocabulary.tokens["GENE00"]])[:14]]
        return np.array([i for i in [*whole, self.vocabulary.eos_id] if i is not None], dtype=np.int32)

    def score(self, chosen: slice | np.ndarray = slice(None), tokens_per_batch: int = 100) -> MaskedSums:
        cells = [self.held_out[i] for i in np.arange(len(self.held_out))[chosen]]
        return score_masked_genes(
            self.model, cells, self.numbers[chosen], self.ranking, self.vocabulary,
            seed=SEED, execution=EXECUTION, tokens_per_batch=tokens_per_batch,
        )  # fmt: skip


@pytest.fixture(scope="module", params=["plain", "special"])
def measured(
    request: pytest.FixtureRequest,
    model_directory: Path,
    special_model_directory: Path,
    vocabulary: GeneVocabulary,
    special_vocabulary: GeneVocabulary,
) -> Measured:
    if request.param == "plain":
        return Measured(model_directory, vocabulary)
    return Measured(special_model_directory, special_vocabulary)


def slow_sums(measured: Measured) -> MaskedSums:
    """One unpadded cell at a time, stock transformers, Python's sort."""
    vocabulary = measured.vocabulary
    stock = BertForMaskedLM(measured.model.config).eval()
    stock.load_state_dict(measured.model.state_dict())
    genes = sorted(vocabulary.tokens[gene] for gene in vocabulary.genes)
    having = {gene: sum(gene in cell.tolist() for cell in measured.train) for gene in genes}
    hidden = first = among = baseline_first = baseline_among = 0
    for number, cell in zip(measured.numbers, measured.held_out, strict=True):
        positions = hidden_positions(cell, int(number), vocabulary, SEED).tolist()
        seen = cell.astype(np.int64)
        seen[positions] = vocabulary.mask_id
        with torch.inference_mode():
            logits = stock(input_ids=torch.from_numpy(seen)[None]).logits[0].tolist()
        visible = set(seen.tolist())
        frequent = sorted((gene for gene in genes if gene not in visible), key=lambda gene: (-having[gene], gene))
        for position in positions:
            truth, row = int(cell[position]), logits[position]
            named = sorted(range(len(row)), key=lambda token, row=row: (-row[token], token))
            hidden += 1
            first += named[0] == truth
            among += truth in named[:10]
            baseline_first += frequent[0] == truth
            baseline_among += truth in frequent[:10]
    return MaskedSums(len(measured.held_out), hidden, first, among, baseline_first, baseline_among)


def test_sums_are_those_of_one_cell_at_a_time(measured: Measured) -> None:
    expected = slow_sums(measured)
    # Each count is one of its own, so that none can stand for another.
    assert 0 < expected.first < expected.among < expected.hidden
    assert 0 < expected.baseline_first < expected.baseline_among < expected.hidden
    assert measured.score() == expected
    scores = expected.scores()
    assert scores["masked_accuracy"] == expected.first / expected.hidden
    assert scores["masked_top10_accuracy"] == expected.among / expected.hidden
    assert scores["baseline_accuracy"] == expected.baseline_first / expected.hidden
    assert scores["baseline_top10_accuracy"] == expected.baseline_among / expected.hidden
    assert (scores["masked_genes"], scores["cells"]) == (expected.hidden, len(measured.held_out))


@pytest.mark.parametrize("tokens_per_batch", [1, 64, 10_000])
@pytest.mark.parametrize("workers", [1, 3])
def test_neither_batches_nor_workers_change_what_is_measured(
    measured: Measured, tokens_per_batch: int, workers: int
) -> None:
    torch.manual_seed(tokens_per_batch)
    parts = [measured.score(slice(rank, None, workers), tokens_per_batch) for rank in range(workers)]
    assert reduce(add, parts) == measured.score()


def test_special_tokens_are_never_hidden(special_vocabulary: GeneVocabulary) -> None:
    """Nor, in many draws, is any gene never hidden; and the share is that of training."""
    cell = random_cells(special_vocabulary, np.random.default_rng(0), [14])[0]
    assert (cell[0], cell[-1]) == (special_vocabulary.cls_id, special_vocabulary.eos_id)
    drawn = [hidden_positions(cell, number, special_vocabulary, SEED).tolist() for number in range(300)]
    assert set(chain.from_iterable(drawn)) == set(gene_positions(cell, special_vocabulary)) == set(range(1, 15))
    assert {len(positions) for positions in drawn} == {2}  # 15 % of 14
    nothing = np.array([special_vocabulary.cls_id, special_vocabulary.eos_id], dtype=np.int32)
    assert len(hidden_positions(nothing, 0, special_vocabulary, SEED)) == 0


def test_what_is_hidden_depends_on_the_seed_and_the_cell_alone(vocabulary: GeneVocabulary) -> None:
    cell = random_cells(vocabulary, np.random.default_rng(0), [15])[0]
    draws = {tuple(hidden_positions(cell, number, vocabulary, seed)) for number in range(20) for seed in range(20)}
    assert len(draws) > 80
    assert tuple(hidden_positions(cell, 3, vocabulary, 4)) == tuple(hidden_positions(cell, 3, vocabulary, 4))


def test_the_model_sees_a_mask_for_every_hidden_gene(measured: Measured) -> None:
    """And every special token."""
    seen: list[torch.Tensor] = []
    hook = measured.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        measured.score()
    finally:
        hook.remove()
    special, hidden = set(measured.vocabulary.special_ids) - {measured.vocabulary.mask_id}, 0
    for batch in seen:
        for row in batch.tolist():
            hidden += row.count(measured.vocabulary.mask_id)
            assert not special - set(row) - {measured.vocabulary.pad_id}
    assert hidden == measured.score().hidden


def test_the_ranking_counts_cells_and_no_special_token(special_vocabulary: GeneVocabulary) -> None:
    a, b, c = (special_vocabulary.tokens[f"GENE0{number}"] for number in range(3))
    front, behind = special_vocabulary.cls_id, special_vocabulary.eos_id
    # c stands three times in one cell, which counts once; b in two cells.
    cells = [np.array([front, b, c, c, c, behind]), np.array([front, b, behind])]
    ranking = frequency_ranking(count_genes(cells, special_vocabulary), special_vocabulary).tolist()
    assert ranking[:3] == [b, c, a]  # a is the first of those that no cell has
    assert sorted(ranking) == sorted(special_vocabulary.tokens[gene] for gene in special_vocabulary.genes)
    parts = [count_genes([cell], special_vocabulary) for cell in cells]
    np.testing.assert_array_equal(sum(parts), count_genes(cells, special_vocabulary))


class Constant(torch.nn.Module):
    """A model that gives the same logits everywhere."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, masked_BL: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(int(masked_BL.sum()), -1)


def score_of(logits: torch.Tensor, cells: list[Cell], vocabulary: GeneVocabulary) -> MaskedSums:
    ranking = frequency_ranking(count_genes(cells, vocabulary), vocabulary)
    return score_masked_genes(
        Constant(logits), cells, range(len(cells)), ranking, vocabulary, seed=SEED, execution=EXECUTION
    )


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 0.0])
def test_a_model_that_knows_nothing_gets_no_credit(vocabulary: GeneVocabulary, broken: float) -> None:
    """Neither one that diverged, nor one to which all is the same: ties go to the lower id, which is no gene."""
    cells = random_cells(vocabulary, np.random.default_rng(0), LENGTHS)
    sums = score_of(torch.full((len(vocabulary),), broken), cells, vocabulary)
    below_ten = [vocabulary.tokens[gene] for gene in vocabulary.genes if vocabulary.tokens[gene] < NAMED]
    hidden = [int(cell[i]) for n, cell in enumerate(cells) for i in hidden_positions(cell, n, vocabulary, SEED)]
    expected = 0 if np.isnan(broken) else sum(gene in below_ten for gene in hidden)
    assert (sums.first, sums.among, sums.hidden) == (0, expected, len(hidden))


def test_a_model_of_frequencies_differs_from_the_baseline_by_what_is_visible(vocabulary: GeneVocabulary) -> None:
    """Naming the most frequent gene where it stands in plain sight is what the baseline does not do."""
    genes = np.array([vocabulary.tokens[f"GENE{number:02d}"] for number in range(12)])
    rng = np.random.default_rng(0)
    cells = [rng.permutation(genes).astype(np.int32) for _ in range(40)]
    logits = torch.zeros(len(vocabulary))
    logits[genes] = torch.linspace(2, 1, 12)
    sums = score_of(logits, cells, vocabulary)
    # Two of twelve are hidden, which the baseline finds among the two that are left; one of them it names first.
    assert (sums.hidden, sums.baseline_first, sums.baseline_among) == (80, 40, 80)
    assert sums.first < 20
    assert 50 < sums.among < 80


@given(st.lists(st.integers(0, 2), min_size=12, max_size=12), st.integers(2, 11))
@settings(max_examples=40)
def test_ties_go_to_the_lower_token(values: list[int], truth: int) -> None:
    from geneformer_ray.compute.masked_scores import _places

    logits = torch.tensor([values], dtype=torch.float32)
    named = sorted(range(12), key=lambda token: (-values[token], token))
    assert int(_places(logits, torch.tensor([truth]))[0]) == named.index(truth)


def test_no_cells_give_no_scores(measured: Measured) -> None:
    assert measured.score(slice(0, 0)) == MaskedSums()
    assert set(MaskedSums().scores().values()) == {0}
