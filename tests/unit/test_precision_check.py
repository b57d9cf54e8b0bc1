"""The error of lower precision, as a screen states it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from geneformer_ray.compute.cell_events import cell_events
from geneformer_ray.compute.model_runner import ModelRunner
from geneformer_ray.compute.perturbation import PerturbationPlan
from geneformer_ray.compute.precision_check import EVENTS_A_CELL, compare_precision, merge_precision
from geneformer_ray.compute.reading import Reading
from geneformer_ray.compute.shifts import shift_cells
from geneformer_ray.data.vocabulary import GeneVocabulary
from tests.conftest import random_cells

STATES = {"goal": np.random.default_rng(0).normal(size=16).astype(np.float32)}


@pytest.mark.parametrize("states", [{}, STATES], ids=["similarity", "states"])
def test_the_error_is_that_of_the_same_events(
    model_directory: Path, vocabulary: GeneVocabulary, states: dict[str, np.ndarray]
) -> None:
    runner = ModelRunner(str(model_directory), precision="bf16", cpus=1)
    exact, plan, reading = runner.exact_encoder(), PerturbationPlan(), Reading(states=states)
    cells = random_cells(vocabulary, np.random.default_rng(1), [16, 9])
    found = compare_precision(runner.encoder, exact, cells, plan, reading, vocabulary)
    ours, theirs = (
        np.concatenate([cell.values_ES.ravel() for cell in shift_cells(encoder, cells, plan, reading, vocabulary)])
        for encoder in (runner.encoder, exact)
    )
    error = np.abs(ours - theirs)
    assert 1e-5 < error.max() < 0.1
    assert found["events"] == 25
    assert found["largest_error"] == pytest.approx(error.max())
    assert found["largest_value"] == pytest.approx(np.abs(theirs if states else 1 - theirs).max())
    merged = merge_precision([found, {**found, "largest_error": 1.0}])
    assert merged is not None
    assert merged["events"] == 50
    assert merged["largest_error"] == 1.0
    assert merged["root_mean_square_error"] == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-5)


def test_without_a_comparison_there_is_no_statement() -> None:
    assert merge_precision([]) is None


def test_a_sample_spreads_over_all_events(vocabulary: GeneVocabulary) -> None:
    ids = random_cells(vocabulary, np.random.default_rng(2), [16])[0]
    events = cell_events(ids, PerturbationPlan(), vocabulary)
    assert events.sample(None) is events
    assert events.sample(16) is events
    assert [event[0] for event in events.sample(4).events] == ids[[0, 4, 8, 12]].tolist()
    assert EVENTS_A_CELL > 16


def test_some_events_have_the_numbers_they_have_among_all(model_directory: Path, vocabulary: GeneVocabulary) -> None:
    encoder = ModelRunner(str(model_directory), cpus=1).encoder
    cells = random_cells(vocabulary, np.random.default_rng(3), [16, 5])
    some, whole = (
        shift_cells(encoder, cells, PerturbationPlan(), Reading(), vocabulary, most_events=most) for most in (6, None)
    )
    assert [len(cell) for cell in some] == [6, 5]
    value_of = dict(zip(whole[0].genes, whole[0].values_ES[:, 0], strict=True))
    np.testing.assert_allclose(some[0].values_ES[:, 0], [value_of[genes] for genes in some[0].genes], atol=1e-6)
