"""First-order overexpression against the exact engine: genes of the cell, and genes that it lacks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from geneformer_ray.compute.encoder import LAYERS, Encoder
from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.compute.first_order import FirstOrder, FirstOrderShifts, check_first_order, first_order_cells
from geneformer_ray.compute.perturbation import PerturbationPlan
from geneformer_ray.compute.reading import COMPARISONS, Reading
from geneformer_ray.compute.shifts import CellShifts, shift_cells
from geneformer_ray.compute.token_budget import TokenBudget
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError
from tests.conftest import random_cells
from tests.unit.test_first_order import STATES, model_of

EXECUTION = choose_execution(cpus=1)
PLAN = PerturbationPlan("overexpress")
ROUGH = FirstOrder(tolerance=10)

Model = tuple[Path, GeneVocabulary]


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return model_of(tmp_path_factory.mktemp("over"), genes=500, length=202)


def both(
    model: Model, ids: np.ndarray, plan: PerturbationPlan, reading: Reading, settings: FirstOrder, layer: int = -1
) -> tuple[CellShifts, FirstOrderShifts]:
    encoder = Encoder.load(model[0], layer=layer, execution=EXECUTION)
    (exact,) = shift_cells(encoder, [ids], plan, reading, model[1])
    return exact, first_order_cells(encoder, [ids], plan, reading, model[1], settings)[0]


def off(exact: CellShifts, found: FirstOrderShifts) -> float:
    """The largest of the states' errors, as a share of the effects' deviation."""
    off_S = np.sqrt(((found.shifts.values_ES - exact.values_ES) ** 2).mean(axis=0)) / exact.values_ES.std(axis=0)
    return float(off_S.max())


def lacking(ids: np.ndarray, number: int) -> tuple[int, ...]:
    """Genes that a cell does not have."""
    return tuple(token for token in range(4, 504) if token not in ids)[:number]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("comparison", COMPARISONS)
@pytest.mark.parametrize("genes", [150, 200], ids=["room", "full"])
def test_genes_that_the_cell_lacks(long_model: Model, genes: int, comparison: str, layer: int) -> None:
    """At full length the last gene falls out, and the original is compared without it."""
    (ids,) = random_cells(long_model[1], np.random.default_rng(2), [genes])
    plan, reading = replace(PLAN, genes=lacking(ids, 250)), Reading("mean", comparison, STATES)
    exact, found = both(long_model, ids, plan, reading, ROUGH, layer)
    assert found.shifts.genes == exact.genes
    np.testing.assert_allclose(found.shifts.values_ES[found.exact_E], exact.values_ES[found.exact_E], atol=2e-6)
    assert found.exact_E.sum() == ROUGH.held_out + 5
    assert found.passes < 40
    assert off(exact, found) < 0.15
    assert found.error < 0.3
    assert all(spearmanr(a, b)[0] > 0.98 for a, b in zip(found.shifts.values_ES.T, exact.values_ES.T, strict=True))


def test_as_many_take_the_place_as_there_is_room_for(long_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    (ids,) = random_cells(long_model[1], np.random.default_rng(3), [60])
    plan, reading = replace(PLAN, genes=lacking(ids, 400)), Reading(states=STATES)
    _, whole = both(long_model, ids, plan, reading, ROUGH)
    monkeypatch.setattr("geneformer_ray.compute.overexpression_path.ALTERNATES_A_TOKEN", 1)
    _, cut = both(long_model, ids, plan, reading, ROUGH)
    assert cut.passes > whole.passes
    assert (cut.exact_E == whole.exact_E).all()
    np.testing.assert_allclose(cut.shifts.values_ES, whole.shifts.values_ES, atol=1e-6)


def test_listed_genes_keep_their_order(long_model: Model) -> None:
    """Some of them in the cell, some not, and too few of one kind to estimate."""
    (ids,) = random_cells(long_model[1], np.random.default_rng(4), [200])
    reading, own = Reading(states=STATES), ids[1:201].tolist()
    for inside, outside in ((own, lacking(ids, 200)), (own[:4], lacking(ids, 200)), (own, lacking(ids, 3)), ([], ())):
        listed = tuple(np.random.default_rng(5).permutation([*inside, *outside]).astype(int).tolist())
        exact, found = both(long_model, ids, replace(PLAN, genes=listed), reading, ROUGH)
        assert found.shifts.genes == exact.genes == [(token,) for token in listed]
        np.testing.assert_allclose(found.shifts.values_ES[found.exact_E], exact.values_ES[found.exact_E], atol=2e-6)
        estimated = {event[0] for event, known in zip(exact.genes, found.exact_E, strict=True) if not known}
        assert bool(estimated & set(inside)) == (len(inside) == 200)
        assert bool(estimated & set(outside)) == (len(outside) == 200)
        if listed:
            assert off(exact, found) < 0.7


def test_the_first_gene_is_in_front_already(long_model: Model) -> None:
    (ids,) = random_cells(long_model[1], np.random.default_rng(6), [180])
    for comparison in COMPARISONS:
        _, found = both(long_model, ids, PLAN, Reading("mean", comparison, STATES), ROUGH)
        np.testing.assert_allclose(found.shifts.values_ES[0], 0, atol=2e-7)


def test_where_ranks_say_nothing(tmp_path: Path) -> None:
    """No position differs from another: a gene that the cell has is moved for nothing, two of one embedding are one."""
    model, reading = model_of(tmp_path, genes=260, length=130, alike=True), Reading(states=STATES)
    inside = np.array([2, *range(4, 114), 3], dtype=np.int32)
    outside = np.array([2, *range(30, 140), 3], dtype=np.int32)
    inserted = replace(PLAN, genes=(*range(4, 30), *range(140, 250)))
    exact, found = both(model, outside, inserted, reading, replace(ROUGH, seed=1))
    equal = [found.shifts.genes.index((token,)) for token in (10, 20)]
    assert not found.exact_E[equal].any()
    np.testing.assert_allclose(*found.shifts.values_ES[equal], atol=1e-6)
    spread = float(exact.values_ES.std(axis=0).min())
    assert spread > 1e-4
    exact, found = both(model, inside, PLAN, reading, ROUGH)
    np.testing.assert_allclose(exact.values_ES, 0, atol=1e-6)
    np.testing.assert_allclose(found.shifts.values_ES, 0, atol=0.5 * spread)
    assert found.shifts.values_ES.std() < 0.1 * spread


def test_neither_neighbours_nor_batches_change_a_cell(long_model: Model) -> None:
    directory, vocabulary = long_model
    cells = random_cells(vocabulary, np.random.default_rng(7), [100, 5, 120, 1, 0])
    encoder, settings = Encoder.load(directory, execution=EXECUTION), FirstOrder(tolerance=0.05, most_cost=0.5)
    for plan, comparison in zip((PLAN, replace(PLAN, genes=tuple(range(4, 130)))), COMPARISONS, strict=True):
        reading = Reading("mean", comparison, STATES)
        together = first_order_cells(encoder, cells, plan, reading, vocabulary, settings)
        tight = first_order_cells(encoder, cells, plan, reading, vocabulary, settings, budget=TokenBudget(1))
        alone = [first_order_cells(encoder, [ids], plan, reading, vocabulary, settings)[0] for ids in cells]
        exact = shift_cells(encoder, cells, plan, reading, vocabulary)
        for others in (tight, alone):
            for ours, theirs in zip(together, others, strict=True):
                assert ours.exact_E.tolist() == theirs.exact_E.tolist()
                assert (ours.anchors, ours.passes) == (theirs.anchors, theirs.passes)
                np.testing.assert_allclose(ours.shifts.values_ES, theirs.shifts.values_ES, atol=2e-6)
        for ours, slow in zip(together, exact, strict=True):
            assert ours.shifts.genes == slow.genes
            assert (ours.shifts.empty, ours.shifts.skipped) == (slow.empty, slow.skipped)


def test_what_stands_behind_a_cls_is_not_estimated() -> None:
    with pytest.raises(InputError, match="--embedding: got cls with --perturbation overexpress"):
        check_first_order(PLAN, Reading("cls", states=STATES))


def test_bfloat16_is_near(long_model: Model) -> None:
    directory, vocabulary = long_model
    (ids,) = random_cells(vocabulary, np.random.default_rng(10), [200])
    for plan in (PLAN, replace(PLAN, genes=lacking(ids, 250))):
        values = []
        for precision in ("fp32", "bf16"):
            encoder = Encoder.load(directory, execution=choose_execution(precision, cpus=1))
            (found,) = first_order_cells(encoder, [ids], plan, Reading(states=STATES), vocabulary, ROUGH)
            values.append(found.shifts.values_ES)
        assert 0 < np.abs(values[0] - values[1]).max() < 0.5 * values[0].std()
