"""Edits of cells: which sequences they make, and which positions compare."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from geneformer_ray.compute.perturbation import (
    EventBatch,
    PerturbationPlan,
    cell_events,
    count_events,
    genes_in_enough_cells,
)
from geneformer_ray.data.vocabulary import CLS, EOS, MASK, PAD, GeneVocabulary
from geneformer_ray.errors import InputError, NotThereYetError

Cell = NDArray[np.int32]
GENES = [f"G{number:02d}" for number in range(20)]


def vocabulary_of(specials: list[str]) -> GeneVocabulary:
    return GeneVocabulary({name: number for number, name in enumerate([PAD, MASK, *specials, *GENES])})


VOCABULARIES = [vocabulary_of(specials) for specials in ([], [CLS], [EOS], [CLS, EOS])]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Cell, PerturbationPlan, GeneVocabulary]:
    """A cell, an edit that may name genes it does not hold, and the vocabulary of both."""
    vocabulary = draw(st.sampled_from(VOCABULARIES))
    tokens = [vocabulary.tokens[gene] for gene in GENES]
    held = draw(st.lists(st.sampled_from(tokens), unique=True, max_size=9))
    front = [] if vocabulary.cls_id is None else [vocabulary.cls_id]
    behind = [] if vocabulary.eos_id is None else [vocabulary.eos_id]
    some = st.lists(st.sampled_from([*held, *held, *tokens]), unique=True, min_size=1, max_size=4).map(tuple)
    genes = draw(st.none() | some)
    together = genes is not None and draw(st.booleans())
    anchor = draw(st.none() | st.sampled_from([*held, *held, *tokens]))
    plan = PerturbationPlan(genes=genes, together=together, anchor=anchor)
    return np.array([*front, *held, *behind], dtype=np.int32), plan, vocabulary


def batches(cell: Cell, plan: PerturbationPlan, vocabulary: GeneVocabulary, size: int = 3) -> list[EventBatch]:
    return list(cell_events(cell, plan, vocabulary).batches(size))


def events(
    cell: Cell, plan: PerturbationPlan, vocabulary: GeneVocabulary
) -> list[tuple[list[int], list[int], list[int], list[int]]]:
    """Each event as (perturbed genes, new sequence, kept positions before, kept positions after)."""
    return [
        (genes.tolist(), ids.tolist(), before.tolist(), after.tolist())
        for batch in batches(cell, plan, vocabulary)
        for genes, ids, before, after in zip(
            batch.genes_EG, batch.input_ids_EL, batch.kept_original_EK, batch.kept_perturbed_EK, strict=True
        )
    ]


@given(case=cases())
@settings(max_examples=60)
def test_a_deletion_takes_its_genes_and_nothing_else(case: tuple[Cell, PerturbationPlan, GeneVocabulary]) -> None:
    """The others keep their order and the special tokens their places."""
    cell, plan, vocabulary = case
    for genes, ids, before, after in events(cell, plan, vocabulary):
        assert ids == [token for token in cell.tolist() if token not in genes]
        assert set(genes) <= set(cell.tolist()) - vocabulary.special_ids
        # Kept positions name the same genes on both sides: all genes that no one perturbed, in order.
        others = [token for token in ids if token not in vocabulary.special_ids]
        assert [int(cell[position]) for position in before] == others
        assert [ids[position] for position in after] == others


@given(case=cases())
@settings(max_examples=60)
def test_events_are_those_whose_genes_the_cell_holds(case: tuple[Cell, PerturbationPlan, GeneVocabulary]) -> None:
    cell, plan, vocabulary = case
    held = [token for token in cell.tolist() if token not in vocabulary.special_ids]
    anchor = [] if plan.anchor is None else [plan.anchor]
    listed = [gene for gene in (held if plan.genes is None else plan.genes) if gene not in anchor]
    wanted = [[*anchor, *listed]] if plan.together else [[*anchor, gene] for gene in listed]
    expected = [genes for genes in wanted if set(genes) <= set(held)]
    assert [genes for genes, *_ in events(cell, plan, vocabulary)] == expected


@given(cases=st.lists(cases(), min_size=1, max_size=5))
@settings(max_examples=60)
def test_events_are_counted_without_making_them(
    cases: list[tuple[Cell, PerturbationPlan, GeneVocabulary]],
) -> None:
    _, plan, vocabulary = cases[0]
    cells = [cell for cell, _, its in cases if its is vocabulary]
    counted = count_events(cells, plan, vocabulary)
    assert counted.tolist() == [len(cell_events(cell, plan, vocabulary)) for cell in cells]


@given(case=cases(), size=st.integers(1, 30))
@settings(max_examples=60)
def test_batches_put_together_are_the_same(case: tuple[Cell, PerturbationPlan, GeneVocabulary], size: int) -> None:
    cell, plan, vocabulary = case
    made = batches(cell, plan, vocabulary, size)
    assert all(1 <= len(batch.genes_EG) <= size for batch in made)
    single = batches(cell, plan, vocabulary, 1)
    for name in ("genes_EG", "input_ids_EL", "kept_original_EK", "kept_perturbed_EK"):
        rows = [row.tolist() for batch in made for row in getattr(batch, name)]
        assert rows == [row.tolist() for batch in single for row in getattr(batch, name)]


def test_an_absent_gene_gives_no_event() -> None:
    vocabulary = VOCABULARIES[3]
    cell = np.array([2, 4, 5, 6, 3], dtype=np.int32)
    assert [genes for genes, *_ in events(cell, PerturbationPlan(genes=(5, 9)), vocabulary)] == [[5]]
    assert events(cell, PerturbationPlan(genes=(5, 9), together=True), vocabulary) == []
    assert events(cell, PerturbationPlan(genes=(5,), anchor=9), vocabulary) == []
    assert events(cell, PerturbationPlan(genes=(2, 3)), vocabulary) == []  # special tokens are no genes


def test_an_anchor_run_makes_the_joint_events_only() -> None:
    cell = np.array([2, 4, 5, 6, 3], dtype=np.int32)
    made = events(cell, PerturbationPlan(anchor=5), VOCABULARIES[3])
    assert [(genes, ids) for genes, ids, *_ in made] == [([5, 4], [2, 6, 3]), ([5, 6], [2, 4, 3])]


def test_the_last_gene_leaves_nothing_to_compare() -> None:
    ((genes, ids, before, after),) = events(np.array([2, 4, 3]), PerturbationPlan(), VOCABULARIES[3])
    assert (genes, ids, before, after) == ([4], [2, 3], [], [])


def test_genes_in_enough_cells() -> None:
    vocabulary = VOCABULARIES[3]
    cells = [np.array(cell, dtype=np.int32) for cell in ([2, 4, 5, 6, 3], [2, 6, 4, 3], [2, 4, 3])]
    assert genes_in_enough_cells(cells, vocabulary, 1) == (4, 5, 6)
    assert genes_in_enough_cells(cells, vocabulary, 2) == (4, 6)
    assert genes_in_enough_cells(cells, vocabulary, 3) == (4,)
    with pytest.raises(InputError, match="--min-cells: got 4; takes at most 3"):
        genes_in_enough_cells(cells, vocabulary, 4)


def test_a_plan_that_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="--perturbation: got silence; takes one of delete"):
        PerturbationPlan("silence")
    with pytest.raises(InputError, match="--together"):
        PerturbationPlan(together=True)


@pytest.mark.parametrize("perturbation", ["overexpress", "inhibit", "activate"])
def test_what_is_not_there_yet_says_so(perturbation: str) -> None:
    with pytest.raises(NotThereYetError, match=perturbation):
        PerturbationPlan(perturbation)
