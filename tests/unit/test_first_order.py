"""First-order screens against the exact engine."""

from __future__ import annotations

import itertools
import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from geneformer_ray.compute import first_order
from geneformer_ray.compute.decomposition import decompose
from geneformer_ray.compute.encoder import LAYERS, Encoder
from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.compute.first_order import FirstOrder, FirstOrderShifts, check_first_order, first_order_cells
from geneformer_ray.compute.first_order_cell import FirstOrderCell
from geneformer_ray.compute.held_ranks import HeldRanks
from geneformer_ray.compute.linear_trunk import Point, passes_of
from geneformer_ray.compute.model_directory import save_model
from geneformer_ray.compute.perturbation import PerturbationPlan
from geneformer_ray.compute.pretraining import new_model
from geneformer_ray.compute.reading import COMPARISONS, Reading
from geneformer_ray.compute.shifts import CellShifts, shift_cells
from geneformer_ray.compute.token_budget import TokenBudget
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError
from tests.conftest import random_cells, randomise

EXECUTION = choose_execution(cpus=1)
STATES = {name: np.random.default_rng(number).normal(size=16).astype(np.float32) for number, name in enumerate("ab")}
FULL, HOLD = PerturbationPlan(), PerturbationPlan(ranks="hold")
OVER = PerturbationPlan("overexpress")
PLANS = {"shift": FULL, "hold": HOLD, "moved": OVER}
EMBEDDINGS = ("mean", "cls")

Model = tuple[Path, GeneVocabulary]


def model_of(directory: Path, *, genes: int, length: int, alike: bool = False) -> Model:
    """A model of its own for longer cells; `alike` gives all positions and two genes one embedding each."""
    names = ["<pad>", "<mask>", "<cls>", "<eos>", *(f"GENE{number:03d}" for number in range(genes))]
    vocabulary = GeneVocabulary({name: number for number, name in enumerate(names)}, max_length=length)
    torch.manual_seed(1)
    model = new_model(vocabulary, layers=3, width=16, heads=2, feed_forward=24)
    randomise(model, 0.25)
    if alike:
        with torch.no_grad():
            embeddings = model.bert.embeddings
            embeddings.position_embeddings.weight[:] = embeddings.position_embeddings.weight[0].clone()
            embeddings.word_embeddings.weight[10] = embeddings.word_embeddings.weight[20].clone()
    save_model(model, vocabulary, directory)
    return directory, vocabulary


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return model_of(tmp_path_factory.mktemp("long"), genes=260, length=220)


def both(
    model: Model,
    cells: list[np.ndarray],
    plan: PerturbationPlan,
    reading: Reading,
    settings: FirstOrder,
    layer: int = -1,
) -> tuple[list[CellShifts], list[FirstOrderShifts]]:
    encoder = Encoder.load(model[0], layer=layer, execution=EXECUTION)
    exact = shift_cells(encoder, cells, plan, reading, model[1])
    return exact, first_order_cells(encoder, cells, plan, reading, model[1], settings)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("plan", "embedding"), [*itertools.product(("shift", "hold"), EMBEDDINGS), ("moved", "mean")])
def test_estimates_are_near_the_exact_engine(long_model: Model, plan: str, embedding: str, layer: int) -> None:
    """Random weights are a hard case: no two positions are alike, and what attention does is large."""
    cells = random_cells(long_model[1], np.random.default_rng(5), [200, 150])
    for comparison in COMPARISONS:
        reading = Reading(embedding, comparison, STATES)
        # Ranks held: no more than is measured in any case.
        settings = FirstOrder(tolerance=99 if plan == "hold" else 1e-9, most_cost=0.6, anchors=9)
        for exact, found in zip(*both(long_model, cells, PLANS[plan], reading, settings, layer), strict=True):
            assert found.shifts.genes == exact.genes
            assert found.shifts.values_ES.dtype == np.float32
            np.testing.assert_allclose(found.shifts.values_ES[found.exact_E], exact.values_ES[found.exact_E], atol=2e-6)
            assert 0 < found.exact_E.sum() < len(exact) / 2
            assert found.passes < 0.6 * len(exact)
            off = np.sqrt(((found.shifts.values_ES - exact.values_ES) ** 2).mean(axis=0)) / exact.values_ES.std(axis=0)
            assert off.max() < 0.2, off
            assert found.error < 0.4
            for state in range(2):
                assert spearmanr(found.shifts.values_ES[:, state], exact.values_ES[:, state])[0] > 0.97


def test_with_ranks_held_the_front_gene_and_the_largest_are_measured(long_model: Model) -> None:
    """And with each round that held-out genes ask for, more of the largest: what they are off by is nobody else's."""
    cells = random_cells(long_model[1], np.random.default_rng(5), [200, 150])
    reading = Reading("mean", "context", STATES)
    exact, first = both(long_model, cells, HOLD, reading, FirstOrder(tolerance=99))
    _, second = both(long_model, cells, HOLD, reading, FirstOrder(tolerance=1e-9, most_cost=0.2))
    for ids, theirs, ours, more in zip(cells, exact, first, second, strict=True):
        of_genes = [event[0] for event in theirs.genes]
        front = next(token for token in ids.tolist() if token in set(of_genes))
        assert ours.exact_E[of_genes.index(front)]
        for state in range(2):
            assert ours.exact_E[np.abs(theirs.values_ES[:, state]).argmax()]
            assert more.exact_E[np.argsort(-np.abs(theirs.values_ES[:, state]))[:3]].all()
        assert ours.passes < more.passes <= 0.2 * len(theirs) + 1
        assert more.exact_E.sum() > ours.exact_E.sum()
        assert (more.exact_E | ~ours.exact_E).all()
        off = [np.abs(one.shifts.values_ES - theirs.values_ES).max() for one in (ours, more)]
        assert off[1] <= off[0]


def test_an_error_that_nobody_can_judge_is_unknown(long_model: Model) -> None:
    """Both held-out genes are among the largest, which speak for no other: that is no error of 0."""
    reading, unknown = Reading(states=STATES), 0
    for seed in range(8):
        cells = random_cells(long_model[1], np.random.default_rng(seed), [12, 14])
        exact, found = both(long_model, cells, HOLD, reading, FirstOrder(held_out=2, seed=seed))
        for ours, theirs in zip(found, exact, strict=True):
            assert not ours.exact_E.all()
            assert ours.error > 0, np.abs(ours.shifts.values_ES - theirs.values_ES).max()
            unknown += math.isinf(ours.error)
    assert unknown


def test_an_estimate_that_was_far_too_large_makes_no_error_small(
    long_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is measured, and no effect any more that others' errors are to be set against."""
    cells, reading = random_cells(long_model[1], np.random.default_rng(5), [200]), Reading(states=STATES)
    settings = FirstOrder(tolerance=99)
    usual = both(long_model, cells, HOLD, reading, settings)[1][0]
    estimates = HeldRanks._estimates

    def with_one_far_off(cell: HeldRanks) -> np.ndarray:
        shift_SE = estimates(cell)
        shift_SE[:, cell.tokens.index(most)] = 1e3
        return shift_SE

    most = usual.shifts.genes[int(np.abs(usual.shifts.values_ES[:, 0]).argmax())][0]
    monkeypatch.setattr(HeldRanks, "_estimates", with_one_far_off)
    found = both(long_model, cells, HOLD, reading, settings)[1][0]
    assert found.exact_E[[event[0] for event in found.shifts.genes].index(most)]
    assert found.error == pytest.approx(usual.error, rel=0.3)


def test_a_state_of_zeros_is_as_far_from_all(long_model: Model) -> None:
    """As the exact engine has it, and no reason to set cells aside."""
    cells = random_cells(long_model[1], np.random.default_rng(5), [60])
    for plan in PLANS.values():
        reading = Reading(states={"nothing": np.zeros(16, np.float32), **STATES})
        exact, (found,) = both(long_model, cells, plan, reading, FirstOrder())
        assert not found.exact_E.all()
        np.testing.assert_array_equal(found.shifts.values_ES[:, 0], exact[0].values_ES[:, 0])
        assert np.isfinite(found.shifts.values_ES).all()


def test_what_was_computed_is_let_go_cell_by_cell(long_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, vocabulary = long_model
    cells = random_cells(vocabulary, np.random.default_rng(7), [100] * 6)
    linear, kept, most = first_order.linearise, [], []

    def watched(*given: Any, **options: Any) -> Any:
        found = linear(*given, **options)
        kept.extend(weakref.ref(one) for one in found)
        most.append(sum(one() is not None for one in kept))
        return found

    monkeypatch.setattr(first_order, "linearise", watched)
    encoder, settings = Encoder.load(directory, execution=EXECUTION), FirstOrder(tolerance=99)
    first_order_cells(encoder, cells, HOLD, Reading(states=STATES), vocabulary, settings, budget=TokenBudget(1))
    assert len(kept) > 6 * 9
    assert max(most) <= 10  # of one cell


@pytest.mark.parametrize(("plan", "embedding"), [("shift", "mean"), ("shift", "cls"), ("moved", "mean")])
def test_with_all_anchors_the_path_is_exact(
    long_model: Model, plan: str, embedding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = random_cells(long_model[1], np.random.default_rng(6), [30, 12])
    monkeypatch.setattr(FirstOrderCell, "pays", True)
    for comparison in COMPARISONS:
        settings = FirstOrder(anchors=30, held_out=2)
        exact, found = both(long_model, cells, PLANS[plan], Reading(embedding, comparison, STATES), settings)
        for ours, theirs in zip(found, exact, strict=True):
            assert ours.exact_E.all()
            assert ours.anchors == len(theirs)
            np.testing.assert_allclose(ours.shifts.values_ES, theirs.values_ES, atol=2e-6)


def test_equal_genes_are_equal_and_equal_ranks_are_nothing(tmp_path: Path) -> None:
    """Two genes of one embedding, in a model in which no position differs from another."""
    model = model_of(tmp_path, genes=130, length=120, alike=True)
    ids = np.array([2, *(token for token in range(4, 114)), 3], dtype=np.int32)
    for embedding in EMBEDDINGS:
        reading = Reading(embedding, states=STATES)
        (full,) = both(model, [ids], FULL, reading, FirstOrder(anchors=4))[1]
        exact, (held,) = both(model, [ids], HOLD, reading, FirstOrder())
        spread = exact[0].values_ES.std(axis=0)
        # The path to one and the path to the other go past other genes; ranks held there is none.
        for found, near in ((full, 0.1 * spread.min()), (held, 1e-6)):
            equal = [found.shifts.genes.index((token,)) for token in (10, 20)]
            assert not found.exact_E[equal].any()
            first, second = found.shifts.values_ES[equal]
            np.testing.assert_allclose(first, second, atol=near)
        ranks = decompose(full.shifts, held.shifts).values_ES
        assert np.abs(ranks).max() < 0.5 * spread.min()


def test_neither_neighbours_nor_batches_change_a_cell(long_model: Model) -> None:
    directory, vocabulary = long_model
    cells = random_cells(vocabulary, np.random.default_rng(7), [120, 5, 200, 120, 1, 0])
    encoder, settings = Encoder.load(directory, execution=EXECUTION), FirstOrder(tolerance=0.05, most_cost=0.4)
    for plan, embedding in itertools.product((FULL, HOLD), EMBEDDINGS):
        reading = Reading(embedding, states=STATES)
        together = first_order_cells(encoder, cells, plan, reading, vocabulary, settings)
        tight = first_order_cells(encoder, cells, plan, reading, vocabulary, settings, budget=TokenBudget(1))
        turned = first_order_cells(encoder, cells[::-1], plan, reading, vocabulary, settings)[::-1]
        alone = [first_order_cells(encoder, [ids], plan, reading, vocabulary, settings)[0] for ids in cells]
        for others in (tight, turned, alone):
            for ours, theirs in zip(together, others, strict=True):
                assert ours.shifts.genes == theirs.shifts.genes
                assert ours.exact_E.tolist() == theirs.exact_E.tolist()
                assert (ours.anchors, ours.passes) == (theirs.anchors, theirs.passes)
                np.testing.assert_allclose(ours.shifts.values_ES, theirs.shifts.values_ES, atol=2e-6)
        assert [cell.exact_E.all() for cell in together] == [False, True, False, False, True, True]
        assert [cell.shifts.empty for cell in together] == [0, 0, 0, 0, 1, 0]


def test_more_is_computed_until_it_is_good_enough_or_too_dear(long_model: Model) -> None:
    cells = random_cells(long_model[1], np.random.default_rng(8), [200])
    reading = Reading(states=STATES)

    def run(**options: Any) -> FirstOrderShifts:
        return both(long_model, cells, FULL, reading, FirstOrder(**options))[1][0]

    rough, fine = run(tolerance=10, anchors=3), run(tolerance=1e-9, anchors=3, most_cost=0.9)
    assert rough.anchors == 3
    assert fine.anchors > 8
    assert rough.passes < 0.3 * 200 < fine.passes < 0.9 * 200
    assert fine.error < rough.error
    assert run(tolerance=rough.error * 1.01, anchors=3, most_cost=0.9).anchors == 3
    assert run(tolerance=rough.error * 0.99, anchors=3, most_cost=0.9).anchors > 3
    assert run(tolerance=1e-9, anchors=3, most_cost=0.01).anchors == 3
    one, other = run(seed=1), run(seed=2)
    assert one.exact_E.tolist() != other.exact_E.tolist()


@pytest.mark.parametrize("plan", [FULL, OVER], ids=["delete", "overexpress"])
def test_near_a_state_scouts_show_where_it_bends(
    long_model: Model, plan: PerturbationPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of the cosine with what a cell is itself is nothing; only how far it goes matters."""
    (ids,) = random_cells(long_model[1], np.random.default_rng(12), [200])
    hidden_LD = Encoder.load(long_model[0], execution=EXECUTION).hidden([ids[None].astype(np.int64)])[0][0]
    reading = Reading(states={"itself": hidden_LD[1:-1].mean(dim=0).numpy()})
    settings = FirstOrder(tolerance=0.02, most_cost=0.45, anchors=3)
    (exact,), (found,) = both(long_model, [ids], plan, reading, settings)
    monkeypatch.setattr(FirstOrderCell, "scouts_wanted", 0)
    (blind,) = both(long_model, [ids], plan, reading, settings)[1]

    def off(values_ES: np.ndarray) -> float:
        return float(np.sqrt(((values_ES - exact.values_ES) ** 2).mean()) / exact.values_ES.std())

    assert found.anchors < blind.anchors
    assert off(found.shifts.values_ES) < min(0.2, 0.7 * off(blind.shifts.values_ES))


def test_listed_genes_and_cells_that_lack_them(long_model: Model) -> None:
    """A path goes over all genes, whichever are asked for; a few of them are not worth a path."""
    (ids,) = random_cells(long_model[1], np.random.default_rng(9), [200])
    absent = next(token for token in range(4, 264) if token not in ids)
    reading, settings = Reading(states=STATES), FirstOrder(anchors=3)
    listed = tuple(ids[1:201:2].tolist())
    whole = both(long_model, [ids], FULL, reading, settings)
    exact, found = both(long_model, [ids], replace(FULL, genes=(*listed, absent)), reading, settings)
    assert found[0].shifts.genes == exact[0].genes == [(token,) for token in listed]
    assert found[0].shifts.skipped == exact[0].skipped == 1
    assert not found[0].exact_E.all()
    np.testing.assert_allclose(exact[0].values_ES, whole[0][0].values_ES[::2], atol=2e-6)
    assert spearmanr(found[0].shifts.values_ES[:, 0], exact[0].values_ES[:, 0])[0] > 0.9
    (few,) = both(long_model, [ids], replace(FULL, genes=listed[:6]), reading, settings)[1]
    assert few.exact_E.all()
    assert few.error == 0


def test_bfloat16_is_near(long_model: Model) -> None:
    directory, vocabulary = long_model
    cells, reading = random_cells(vocabulary, np.random.default_rng(10), [200]), Reading(states=STATES)
    for plan in (FULL, HOLD):
        values = []
        for precision in ("fp32", "bf16"):
            encoder = Encoder.load(directory, execution=choose_execution(precision, cpus=1))
            (found,) = first_order_cells(encoder, cells, plan, reading, vocabulary, FirstOrder(tolerance=10))
            values.append(found.shifts.values_ES)
        assert 0 < np.abs(values[0] - values[1]).max() < 0.5 * values[0].std()


def test_less_at_a_time_where_memory_is_short(long_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, vocabulary = long_model
    cells, reading = random_cells(vocabulary, np.random.default_rng(11), [150, 160]), Reading(states=STATES)
    encoder, settings = Encoder.load(directory, execution=EXECUTION), FirstOrder(tolerance=10)
    whole = first_order_cells(encoder, cells, FULL, reading, vocabulary, settings)
    linear, sizes = first_order.linearise, []

    def tight(trunk: Any, points: list[Point], *rest: Any, **options: Any) -> Any:
        sizes.append(len(points))
        if len(points) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return linear(trunk, points, *rest, **options)

    monkeypatch.setattr(first_order, "linearise", tight)
    most, budget = 2, TokenBudget(100_000)
    tried = first_order_cells(encoder, cells, FULL, reading, vocabulary, settings, budget=budget)
    assert max(sizes) > 2
    assert budget.tokens < 100_000
    for ours, theirs in zip(tried, whole, strict=True):
        np.testing.assert_allclose(ours.shifts.values_ES, theirs.shifts.values_ES, atol=2e-6)
    most = 0
    with pytest.raises(InputError, match=r"--cells: got a cell of 15\d tokens; takes memory for its gradient"):
        first_order_cells(encoder, cells, FULL, reading, vocabulary, settings)


def test_what_a_point_costs(long_model: Model) -> None:
    trunk = Encoder.load(long_model[0], execution=EXECUTION).trunk
    one, two = passes_of(trunk, 200, 0, 1), passes_of(trunk, 200, 0, 2)
    assert 2 < one < two < 2 * one
    assert passes_of(trunk, 200, 100, 1) > one


@pytest.mark.parametrize(
    ("plan", "reading", "text"),
    [
        ({"perturbation": "inhibit"}, {}, "--perturbation: got inhibit with --method first_order"),
        ({"genes": (4, 5), "combine": 2}, {}, "--genes: got several genes in one event"),
        ({"anchor": 4}, {}, "takes one gene at a time"),
        ({"sets": ((4,),)}, {}, "takes one gene at a time"),
        ({}, {"states": {}}, "takes shifts to states"),
        ({}, {"gene_shifts": True}, "--gene-shifts"),
    ],
)
def test_what_is_not_of_first_order(plan: dict[str, Any], reading: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        check_first_order(PerturbationPlan(**plan), Reading(**{"states": STATES, **reading}))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tolerance": 0}, "--tolerance"),
        ({"most_cost": 1.5}, "--most-cost"),
        ({"anchors": 1}, "--anchors: got 1; takes at least 2"),
        ({"held_out": 1}, "--held-out"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        FirstOrder(**options)
