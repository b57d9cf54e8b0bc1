"""Items of a screen: bounded work, every event once, whatever the cells."""

from __future__ import annotations

import io
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geneformer_ray.compute.first_order import FirstOrder
from geneformer_ray.compute.model_directory import weights_digest
from geneformer_ray.compute.perturbation import PerturbationPlan
from geneformer_ray.compute.screen_method import ScreenMethod
from geneformer_ray.compute.shifts import EVENTS_THAT_SHARE
from geneformer_ray.data.cells import CellTable
from geneformer_ray.data.shards import write_shard
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.distribute.screen_items import (
    CELLS_PER_ITEM,
    FLOPS_PER_ITEM,
    METHOD_CODE,
    SCREEN_CODE,
    CellCounts,
    ScreenItems,
    count_cells,
    screen_code,
)
from geneformer_ray.distribute.worker_model import open_runner
from geneformer_ray.errors import InputError
from geneformer_ray.progress import Progress
from tests.conftest import random_cells

V1_10M = {"layers": 5, "width": 256, "feed_forward": 512}


def items_of(cells: list[tuple[int, int]], **shape: int) -> ScreenItems:
    """Items of cells of so many events and tokens, at rows 10, 11, ..."""
    events, lengths = np.array(cells, dtype=np.int64).reshape(-1, 2).T
    return ScreenItems(np.arange(len(cells)) + 10, CellCounts(events, lengths, 0), **(V1_10M | shape))


@given(st.lists(st.tuples(st.integers(0, 9_000), st.integers(0, 4_096)), max_size=40))
def test_every_event_is_in_one_item_and_no_item_is_too_large(cells: list[tuple[int, int]]) -> None:
    items = items_of(cells)
    seen = {row: [] for row in items.rows.tolist()}
    flops = items.flops(items.counts.lengths)
    for number, item in enumerate(items):
        assert item["item"] == number
        parts = [item.get("part", [0, cells[row - 10][0]]) for row in item["rows"]]
        for row, part in zip(item["rows"], parts, strict=True):
            seen[row].append(part)
        work = sum((stop - start) * flops[row - 10] for row, (start, stop) in zip(item["rows"], parts, strict=True))
        group = EVENTS_THAT_SHARE * flops[item["rows"][0] - 10]  # no part is smaller than a group
        assert work <= max(FLOPS_PER_ITEM, group) * (1 + 1e-9)
        assert len(item["rows"]) <= CELLS_PER_ITEM
    for row, parts in seen.items():
        assert parts[0][0] == 0
        assert parts[-1][1] == cells[row - 10][0]
        assert [stop for _, stop in parts[:-1]] == [start for start, _ in parts[1:]]
        assert all(start % EVENTS_THAT_SHARE == 0 for start, _ in parts)
    assert [item["rows"] for item in items] == [item["rows"] for item in items]


def test_large_cells_are_split_and_small_ones_joined() -> None:
    items = list(items_of([(4_000, 4_000), *[(10, 10)] * 50]))
    large = [item for item in items if item["rows"] == [10]]
    assert len(large) > 10
    assert [item["rows"] for item in items[len(large) :]] == [list(range(11, 61))]


def test_longer_cells_and_larger_models_make_smaller_items() -> None:
    """Attention grows with the square of the length: as many tokens in longer cells are more work."""
    short = len(list(items_of([(2_048, 1_024)] * 64)))
    long = len(list(items_of([(512, 4_096)] * 64)))
    larger = len(list(items_of([(2_048, 1_024)] * 64, layers=11, width=768, feed_forward=3_072)))
    assert short < long < larger


def test_cells_to_compare_are_spread() -> None:
    compared = [item["rows"] for item in items_of([(2_000, 2_000)] * 40) if item.get("compare")]
    assert compared == [[10], [20], [30], [40]]
    assert [item.get("compare") for item in items_of([(2, 5)] * 3)] == [True]


def test_unfit_cells_are_counted_and_have_no_events(vocabulary: GeneVocabulary, tmp_path: Path) -> None:
    cells = random_cells(vocabulary, np.random.default_rng(0), [5, 17, 3])
    cells.append(np.array([2, 999], dtype=np.int32))
    table = pa.table({"input_ids": [cell.tolist() for cell in cells]})
    write_shard(str(tmp_path), "", 0, table, vocabulary=vocabulary.digest)
    counts = count_cells(CellTable(str(tmp_path)), np.array([3, 0, 1]), PerturbationPlan(), vocabulary, 16)
    assert (counts.events.tolist(), counts.lengths.tolist(), counts.unfit) == ([0, 5, 0], [2, 5, 17], 2)


def test_a_worker_takes_the_model_of_the_run_alone(model_directory: Path) -> None:
    digest = weights_digest(model_directory)
    assert open_runner({"model": str(model_directory), "digest": digest, "cpus": 1}).vocabulary.max_length == 16
    with pytest.raises(InputError, match=f"--model: got .*{digest} on .*; takes 0123, the digest"):
        open_runner({"model": str(model_directory), "digest": "0123"})


def test_progress_counts_an_earlier_run_as_done_but_not_for_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, said = iter([0.0, 10.0, 10.0]), io.StringIO()
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    Progress("screen", 1_000, "events", said, done=800).advance(50)
    assert said.getvalue() == "screen: 850 of 1,000 events, 5/s, 30 s left\n"


def imported(module: str) -> set[str]:
    """The modules of the compute floor that one of them imports."""
    compute = Path(__file__).parents[2] / "geneformer_ray" / "compute"
    lines = [line.strip() for line in (compute / f"{module}.py").read_text().splitlines()]
    names = [line.split()[1] for line in lines if line.startswith("from geneformer_ray.compute.")]
    return {name.rsplit(".", 1)[1] for name in names}


def test_the_digest_of_the_code_covers_what_a_worker_imports() -> None:
    """Modules of the compute floor that these import decide numbers too; of the exact engine, none of the others."""
    assert not set(SCREEN_CODE) & set(METHOD_CODE)
    for name in (*SCREEN_CODE, *METHOD_CODE):
        assert imported(name) <= {*SCREEN_CODE, *METHOD_CODE}, name
        # These two alone know of both.
        assert name in METHOD_CODE or name in ("screen_method", "precision_check") or imported(name) <= set(SCREEN_CODE)
    exact, *others = [
        screen_code(method)
        for method in (ScreenMethod(), ScreenMethod(decompose=True), ScreenMethod(first_order=FirstOrder()))
    ]
    assert exact not in others


@given(st.lists(st.tuples(st.integers(0, 4_000), st.integers(0, 4_000)), max_size=40), st.booleans())
def test_a_cell_that_is_estimated_is_in_one_item(cells: list[tuple[int, int]], decompose: bool) -> None:
    method = ScreenMethod(decompose, FirstOrder())
    items = replace(items_of(cells, layers=11, width=768, feed_forward=3_072), method=method, states=2)
    work = items.flops(items.counts.lengths) * method.most_passes(items.counts.events, items.plan, 2)
    listed = list(items)
    assert [row for item in listed for row in item["rows"]] == items.rows.tolist()
    for item in listed:
        assert "part" not in item
        assert len(item["rows"]) == 1 or sum(work[row - 10] for row in item["rows"]) <= FLOPS_PER_ITEM * (1 + 1e-9)


def test_what_costs_less_makes_fewer_items() -> None:
    """Estimates of long cells, and twice the work where deletions are taken apart."""
    usual = items_of([(2_000, 2_000)] * 40)
    number = {
        name: len(list(replace(usual, method=method, states=2)))
        for name, method in {
            "exact": ScreenMethod(),
            "apart": ScreenMethod(decompose=True),
            "estimated": ScreenMethod(first_order=FirstOrder(most_cost=0.05)),
        }.items()
    }
    assert number["apart"] > 1.8 * number["exact"]
    assert number["estimated"] < 0.1 * number["exact"]
