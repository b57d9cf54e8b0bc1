"""Edits of cells: which sequences they make, and which positions compare."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from geneformer_ray.compute.cell_events import EventBatch, cell_events, count_events
from geneformer_ray.compute.perturbation import PerturbationPlan, genes_in_enough_cells
from geneformer_ray.data.vocabulary import CLS, EOS, MASK, PAD, GeneVocabulary
from geneformer_ray.errors import InputError

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
    wanted = [[*anchor, *listed]] if plan.together and listed else [[*anchor, gene] for gene in listed]
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


# ---------------------------------------------------------------------- overexpression and moves

VOCABULARY = VOCABULARIES[3]
TOKENS = [VOCABULARY.tokens[gene] for gene in GENES]


@st.composite
def edits(draw: st.DrawFn) -> tuple[Cell, PerturbationPlan, int]:
    """A cell, any edit of it that may name genes it does not hold, and an input size that it fits into."""
    held = draw(st.lists(st.sampled_from(TOKENS), unique=True, max_size=9))
    cell = np.array([2, *held, 3], dtype=np.int32)
    some = st.lists(st.sampled_from([*held, *TOKENS]), unique=True, min_size=1, max_size=4).map(tuple)
    what = draw(st.sampled_from(["all", "listed", "together", "combined", "sets"]))
    options: dict[str, object] = {} if what in ("all", "sets") else {"genes": draw(some)}
    options |= {"together": True} if what == "together" else {}
    options |= {"sets": tuple(draw(st.lists(some, min_size=1, max_size=3)))} if what == "sets" else {}
    anchor = draw(st.none() | st.sampled_from([*held, *TOKENS]))
    if what == "combined":
        listed = [gene for gene in options["genes"] if gene != anchor]  # type: ignore[attr-defined]
        options |= {"combine": draw(st.integers(1, max(1, len(listed))))} if listed else {}
    kind = draw(st.sampled_from(["delete", "overexpress", "inhibit", "activate"]))
    plan = PerturbationPlan(kind, anchor=anchor, rank_shift=draw(st.integers(1, 3)), **options)  # type: ignore[arg-type]
    return cell, plan, len(cell) + draw(st.integers(0, 6))


@given(case=edits(), size=st.integers(1, 5))
@settings(max_examples=150)
def test_what_any_edit_leaves_as_it_is(case: tuple[Cell, PerturbationPlan, int], size: int) -> None:
    """Special tokens keep their places; genes that no one perturbed keep their order and are the same on both sides."""
    cell, plan, max_length = case
    made = cell_events(cell, plan, VOCABULARY, max_length)
    numbers = []
    for batch in made.batches(size):
        original = np.delete(cell, batch.cut)
        for row, number in enumerate(batch.numbers_E.tolist()):
            numbers.append(number)
            event, ids = made.events[number], batch.input_ids_EL[row]
            assert batch.genes_EG[row].tolist() == list(event)
            assert len(ids) <= max_length or not batch.kept_original_EK.size
            assert len(set(ids.tolist())) == len(ids)
            assert (ids[0], ids[-1]) == (2, 3)
            kept = original[batch.kept_original_EK[row]].tolist()
            assert kept == ids[batch.kept_perturbed_EK[row]].tolist()
            assert kept == [token for token in original.tolist()[1:-1] if token not in event]
            assert ids[batch.genes_perturbed_EN[row]].tolist() == [token for token in ids.tolist() if token > 3]
            assert set(event).isdisjoint(kept)
            if plan.perturbation == "delete":
                assert set(event).isdisjoint(ids.tolist())
            else:
                assert set(event) <= set(ids.tolist()) or len(event) > max_length - 2
            if plan.perturbation != "overexpress":
                assert len(batch.cut) == 0
    assert sorted(numbers) == list(range(len(made)))


@given(case=edits())
@settings(max_examples=100)
def test_overexpressed_genes_come_first_in_the_order_given(case: tuple[Cell, PerturbationPlan, int]) -> None:
    cell, plan, max_length = case
    plan = PerturbationPlan("overexpress", plan.genes, plan.together, plan.anchor, plan.combine, plan.sets)
    made = cell_events(cell, plan, VOCABULARY, max_length)
    for batch in made.batches(4):
        for event, ids in zip(batch.genes_EG.tolist(), batch.input_ids_EL.tolist(), strict=True):
            assert ids[1 : 1 + len(event)] == event
            # Exactly the overflow is cut, and from the end.
            new = len(set(event) - set(cell.tolist()))
            others = [token for token in cell.tolist()[1:-1] if token not in event]
            assert len(batch.cut) == min(len(others), max(0, len(cell) + new - max_length))
            assert ids[1 + len(event) : -1] == others[: len(others) - len(batch.cut)]
    if plan.anchor is None and plan.genes is not None and not plan.together and plan.combine == 1:
        assert [event for (event,) in made.events] == list(plan.genes)  # in every cell, whether it holds them or not
        assert made.skipped == 0


@pytest.mark.parametrize(
    ("kind", "shift", "rank", "expected"),
    [
        # Eight genes, two a quartile: the middles of the quartiles are ranks 1, 3, 5 and 7.
        ("activate", 1, 7, 5), ("activate", 1, 6, 5), ("activate", 1, 5, 3), ("activate", 2, 7, 3),
        ("activate", 1, 3, 1), ("activate", 1, 1, 0), ("activate", 3, 7, 1), ("activate", 3, 4, 0),
        ("inhibit", 1, 0, 3), ("inhibit", 1, 1, 3), ("inhibit", 2, 0, 5), ("inhibit", 3, 1, 7),
        ("inhibit", 1, 6, 7), ("inhibit", 1, 5, 7), ("inhibit", 2, 4, 7),
    ],
)  # fmt: skip
def test_a_gene_moves_to_the_middle_of_a_quartile(kind: str, shift: int, rank: int, expected: int) -> None:
    cell = np.array([2, *TOKENS[:8], 3], dtype=np.int32)
    gene = TOKENS[rank]
    (batch,) = cell_events(cell, PerturbationPlan(kind, (gene,), rank_shift=shift), VOCABULARY).batches(1)
    genes = batch.input_ids_EL[0].tolist()[1:-1]
    assert genes.index(gene) == expected
    assert [token for token in genes if token != gene] == [token for token in TOKENS[:8] if token != gene]


def test_two_genes_that_want_one_rank_lie_side_by_side() -> None:
    cell = np.array([2, *TOKENS[:8], 3], dtype=np.int32)
    plan = PerturbationPlan("activate", (TOKENS[7], TOKENS[6]), together=True)
    (batch,) = cell_events(cell, plan, VOCABULARY).batches(1)
    first, second = TOKENS[7], TOKENS[6]
    assert batch.input_ids_EL[0].tolist() == [2, *TOKENS[:5], first, second, TOKENS[5], 3]


@given(case=edits())
@settings(max_examples=80)
def test_what_is_skipped_and_what_is_made_is_all_that_was_asked_for(case: tuple[Cell, PerturbationPlan, int]) -> None:
    cell, plan, max_length = case
    held = [token for token in cell.tolist() if token > 3]
    made = cell_events(cell, plan, VOCABULARY, max_length)
    listed = [gene for gene in (held if plan.genes is None else plan.genes) if gene != plan.anchor]
    size = len(listed) if plan.together else plan.combine
    asked = math.comb(len(listed), size) if size else 0
    if plan.sets is not None:
        asked = sum(bool(set(group) - {plan.anchor}) for group in plan.sets)
    assert len(made) + made.skipped == asked
    for event in made.events:
        assert (plan.perturbation == "overexpress" and plan.anchor is None) or set(event) <= set(held)
        assert plan.anchor is None or event[0] == plan.anchor


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"combine": 2}, "--combine: got 2; takes a list of genes"),
        ({"combine": 3, "genes": (4, 5)}, "--combine: got 3; takes 1 to 2"),
        ({"combine": 2, "genes": (4, 5), "anchor": 4}, "--combine: got 2; takes 1 to 1"),
        ({"sets": ((4,),), "genes": (4,)}, "--gene-sets"),
        ({"rank_shift": 4}, "--rank-shift: got 4; takes 1, 2 or 3"),
    ],
)
def test_plans_that_contradict_themselves_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(InputError, match=text):
        PerturbationPlan("inhibit", **options)  # type: ignore[arg-type]


def test_a_move_does_not_pass_a_special_token() -> None:
    with pytest.raises(InputError, match="special token between genes"):
        cell_events(np.array([4, 2, 5]), PerturbationPlan("overexpress"), VOCABULARY)
