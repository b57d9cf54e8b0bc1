"""Verified screens without Ray: what is chosen, what belongs together, and what is written in the end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geneformer_ray.compute.first_order import FirstOrder
from geneformer_ray.compute.perturbation import PerturbationPlan
from geneformer_ray.compute.reading import Reading
from geneformer_ray.compute.screen_method import ScreenMethod
from geneformer_ray.compute.verification import ControlCells, Verification
from geneformer_ray.data.shards import finished_items, read_shard, shard_file, write_shard
from geneformer_ray.distribute.screen import Screen
from geneformer_ray.distribute.screen_agreement import cost_statement, verification_statement
from geneformer_ray.distribute.screen_chosen import CHOSEN, Chosen
from geneformer_ray.distribute.screen_items import CellCounts, ScreenItems
from geneformer_ray.distribute.screen_merge import MergeWorker, merge_items
from geneformer_ray.distribute.screen_totals import ScreenTotals
from geneformer_ray.distribute.screen_verified import VerifiedScreen
from geneformer_ray.errors import InputError
from tests.unit.estimated_cells import ESTIMATES, STATES, EstimatedCells

LENGTHS = [120, 5, 90, 110, 100]
KEY = ["cell_id", "gene", "measure", "state"]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> EstimatedCells:
    return EstimatedCells(tmp_path_factory.mktemp("verified"), LENGTHS)


def frame_of(table: pa.Table) -> pd.DataFrame:
    frame = table.to_pandas()
    assert (frame["genes"].map(len) == 1).all()
    return frame.assign(gene=frame["genes"].map(lambda genes: genes[0])).set_index(KEY)


# ---------------------------------------------------------------------- what belongs together


@given(st.lists(st.tuples(st.integers(0, 4_000), st.integers(1, 4_000)), max_size=30), st.data())
def test_each_item_is_told_where_its_exact_values_lie(cells: list[tuple[int, int]], data: st.DataObject) -> None:
    """Whatever cells the exact screen has, in whatever items, and of large cells in parts."""
    events, lengths = np.array(cells, dtype=np.int64).reshape(-1, 2).T
    rows = 3 * np.arange(len(cells)) + 7
    shape = {"layers": 5, "width": 256, "feed_forward": 512}
    estimates = ScreenItems(
        rows, CellCounts(events, lengths, 0), **shape, method=ScreenMethod(first_order=FirstOrder()), states=2
    )
    chosen = np.array(data.draw(st.lists(st.booleans(), min_size=len(cells), max_size=len(cells))), dtype=bool)
    exact = ScreenItems(rows[chosen], CellCounts(events[chosen] // 2, lengths[chosen], 0), **shape)
    rejected = {str(row): "why" for row in rows[::4].tolist()}
    items = list(merge_items(estimates, {"there": exact}, rejected))
    assert [item["item"] for item in items] == list(range(len(list(estimates))))
    shards = list(exact)
    event_of = dict(zip(rows.tolist(), events.tolist(), strict=True))
    for item, estimated in zip(items, estimates, strict=True):
        wanted = [part["item"] for part in shards if set(part["rows"]) & set(estimated["rows"])]
        assert wanted == item["exact"]["there"]  # and no others, however far apart the cells of one item lie
        assert item["rejected"] == {str(row): "why" for row in estimated["rows"] if str(row) in rejected}
        assert item["events_rejected"] == sum(event_of[int(row)] for row in item["rejected"])


# ---------------------------------------------------------------------- what is chosen


def write_estimates(folder: Path, setting: EstimatedCells) -> np.ndarray:
    counts = [
        setting.worker(folder, ESTIMATES)({"item": number, "rows": rows})
        for number, rows in enumerate([[0, 1], [2, 3, 4]])
    ]
    return np.concatenate([np.array(one["estimated"], dtype=np.int64) for one in counts])


def test_genes_are_chosen_by_their_mean_and_cells_among_the_estimated(setting: EstimatedCells, tmp_path: Path) -> None:
    estimates = tmp_path / "_estimates"
    estimated = write_estimates(estimates, setting)
    assert estimated.tolist() == [0, 2, 3, 4]
    verification = Verification(top=6, controls=7, control_cells=2, seed=5)

    def choose(seed: int = 5, output: Path = tmp_path) -> Chosen:
        wanted = replace(verification, seed=seed)
        return Chosen.once(str(output), str(estimates), estimated, "b", wanted, setting.vocabulary)

    chosen = choose()
    frame = pq.read_table(estimates / "cell_shifts").to_pandas()
    frame = frame[frame["state"] == "b"]
    means = frame.assign(gene=frame["genes"].str[0]).groupby("gene")["value"].mean()
    strongest = means.abs().sort_values(ascending=False).index[:6]
    assert sorted(setting.vocabulary.names[token] for token in chosen.top) == sorted(strongest)
    assert {means[gene] > 0 for gene in strongest} == {True, False}
    assert len(chosen.controls) == 7
    assert not set(chosen.controls) & set(chosen.top)
    assert len(chosen.rows) == 2
    assert set(chosen.rows.tolist()) < set(estimated.tolist())
    others = [choose(seed, tmp_path / str(seed)) for seed in (6, 7, 8)]
    assert all(other.controls != chosen.controls for other in others)
    assert any(other.rows.tolist() != chosen.rows.tolist() for other in others)

    # What was chosen stays chosen, even where it would be chosen otherwise now.
    table = read_shard(str(estimates), "cell_shifts", 0)
    turned = table.set_column(4, "value", pa.array(-1 / (1e-3 + table["value"].to_numpy())))
    write_shard(str(estimates), "cell_shifts", 0, turned)
    again = choose()
    assert (again.top, again.controls, again.rows.tolist()) == (chosen.top, chosen.controls, chosen.rows.tolist())
    assert choose(output=tmp_path / "new").top != chosen.top
    written = json.loads((tmp_path / CHOSEN).read_text())
    assert written["top"] == [setting.vocabulary.names[token] for token in chosen.top]


def test_where_nothing_is_estimated_nothing_is_chosen_among_cells(setting: EstimatedCells, tmp_path: Path) -> None:
    setting.worker(tmp_path / "_estimates", ESTIMATES)({"item": 0, "rows": [1]})
    nobody = np.empty(0, dtype=np.int64)
    chosen = Chosen.once(str(tmp_path), str(tmp_path / "_estimates"), nobody, "b", Verification(), setting.vocabulary)
    assert chosen.rows.tolist() == []
    assert len(chosen.top) == 5


@pytest.mark.parametrize("flag", ["--top", "--controls", "--control-cells"])
def test_how_many_there_can_be(flag: str) -> None:
    with pytest.raises(InputError, match=f"{flag}: got -1; takes at least"):
        Verification(**{flag.lstrip("-").replace("-", "_"): -1})


@pytest.mark.parametrize("perturbation", ["delete", "overexpress"])
def test_chosen_genes_are_measured_where_they_are_estimated(perturbation: str) -> None:
    """Of all genes of a cell: in those that hold them. Of listed ones, overexpressed: in every cell."""
    chosen, held = Chosen((4, 9), (7,), np.array([0])), [3, 4, 5, 7]
    items = ScreenItems(np.arange(1), CellCounts(np.array([4]), np.array([4]), 0), 5, 256, 512)
    for genes, wanted in ((None, [(4,), (7,)]), ((4, 5, 7, 9), [(4,), (9,), (7,)])):
        plan = PerturbationPlan(perturbation, genes)
        screen = Screen("cells", items, {}, plan, Reading(states=STATES), "out", method=ESTIMATES)
        of_chosen = VerifiedScreen(screen, Verification(), "b", 130).plan_of(chosen)
        estimated = set(plan.events(held)[0])
        expected = wanted if perturbation == "overexpress" else [(4,), (7,)]
        assert of_chosen.events(held)[0] == expected
        assert set(expected) <= estimated


# ---------------------------------------------------------------------- what is written


@pytest.mark.parametrize("decompose", [False, True])
def test_exact_values_take_the_place_of_estimates(setting: EstimatedCells, decompose: bool, tmp_path: Path) -> None:
    """Of a chosen gene in every cell, of every gene in a control cell; a cell that failed since is gone."""
    exact, estimates = ScreenMethod(decompose), replace(ESTIMATES, decompose=decompose)
    genes = tuple(setting.cells[0][[3, 50, 70]].tolist())
    names = [setting.vocabulary.names[token] for token in genes]
    setting.worker(tmp_path / "estimates", estimates)({"item": 0, "rows": [0, 1, 2, 3, 4]})
    cells, rest = setting.worker(tmp_path / "cells", exact), setting.worker(
        tmp_path / "genes", exact, PerturbationPlan(genes=genes)
    )  # fmt: skip
    cells({"item": 0, "rows": [2], "part": [0, 32]})
    cells({"item": 1, "rows": [2], "part": [32, 90]})
    rest({"item": 0, "rows": [0, 3]})  # and not the last: of that nothing is known
    worker = MergeWorker(
        cells=str(setting.folder / "cells"), estimates=str(tmp_path / "estimates"), output=str(tmp_path / "out"),
        vocabulary=setting.vocabulary.digest, goal="b", controls=names[1:],
        rows_an_event=(3 if decompose else 1) * len(STATES),
    )  # fmt: skip
    shards = {str(tmp_path / "cells"): [0, 1], str(tmp_path / "genes"): [0]}
    item = {"item": 0, "exact": shards, "rejected": {"3": "why"}, "events_rejected": 110}
    assert worker(item) == {"item": 0}
    ours = frame_of(read_shard(str(tmp_path / "out"), "cell_shifts", 0))
    before = frame_of(read_shard(str(tmp_path / "estimates"), "cell_shifts", 0))
    setting.worker(tmp_path / "exact", exact)({"item": 0, "rows": [0, 1, 2, 3, 4]})
    theirs = frame_of(read_shard(str(tmp_path / "exact"), "cell_shifts", 0))
    before, theirs = (one.drop("cell3", level="cell_id") for one in (before, theirs))
    assert ours.index.equals(before.index)  # rows stay where they were
    gene, cell = ours.index.get_level_values("gene"), ours.index.get_level_values("cell_id")
    verified = gene.isin(names) & (cell == "cell0") | (cell == "cell2")
    theirs = theirs.loc[ours.index]
    np.testing.assert_allclose(ours["value"][verified], theirs["value"][verified], atol=1e-6)
    assert ours["exact"][verified].all()
    np.testing.assert_array_equal(ours["value"][~verified], before["value"][~verified])
    np.testing.assert_array_equal(ours["exact"][~verified], before["exact"][~verified])
    assert not ours["exact"].all()
    assert not before["exact"][verified].all()
    assert (before["value"] - theirs["value"])[verified].abs().max() > 1e-4

    counts = finished_items(str(tmp_path / "out"))[0]
    assert (counts["cells"], counts["events"], counts["rows"]) == (4, 315, 315 * worker.rows_an_event)
    assert (counts["events_rejected"], counts["rejected"]) == (110, {"3": "why"})
    assert pq.read_table(tmp_path / "out" / "_rejects").to_pylist() == [{"cell_id": "cell3", "reason": "why"}]
    for name in names[1:]:
        chosen = verified & (gene == name) & (ours.index.get_level_values("measure") == "shift")
        chosen &= ours.index.get_level_values("state") == "b"
        rows, estimate, value = counts["control_genes"][name]
        assert rows == chosen.sum() > 0
        assert (estimate, value) == pytest.approx((before["value"][chosen].sum(), ours["value"][chosen].sum()))
    assert counts["control_genes"].keys() == set(names[1:])
    digest = pq.read_schema(shard_file(str(tmp_path / "out"), "cell_shifts", 0)).metadata[b"vocabulary_digest"]
    assert digest.decode() == setting.vocabulary.digest


# ---------------------------------------------------------------------- what is said


def control(noise: float, cells: int = 3, genes: int = 40) -> ControlCells:
    """Cells whose estimates are the exact values and so much noise."""
    rng = np.random.default_rng(1)
    exact = rng.normal(size=cells * genes)
    estimate = exact + noise * rng.normal(size=len(exact))
    return ControlCells(np.repeat(np.arange(cells), genes), np.tile(np.arange(genes), cells), exact, estimate)


def test_a_model_that_is_not_to_be_trusted_is_warned_of() -> None:
    genes = [{"A": [2, 1.0, 1.1], "B": [1, 0.2, 0.3]}, {"A": [1, 0.7, 0.6], "C": [4, -2.0, -1.0]}]
    means = np.array([[1.7 / 3, 1.7 / 3], [0.2, 0.3], [-0.5, -0.25]])
    pearson = pytest.approx(np.corrcoef(means.T)[0, 1], rel=1e-5)
    good = verification_statement({"shift": control(0.05)}, genes, top=10)
    assert "warning" not in good
    assert good["control_genes"] == {"genes": 3, "spearman": 1.0, "pearson": pearson}
    assert good["per_cell"]["cells"] == 3
    assert 0.9 < good["per_cell"]["spearman_min"] <= good["per_cell"]["spearman_median"] < 1
    assert (good["aggregated"]["genes"], good["aggregated"]["top"]) == (40, 10)
    bad = verification_statement({"shift": control(0.05), "shift_rank": control(2.0)}, [], top=10)
    assert "not to be trusted" in bad["warning"]
    assert "shift_rank (0." in bad["warning"]
    assert bad["shift_rank"]["aggregated"]["spearman"] < 0.9 < bad["aggregated"]["spearman"]
    assert "control_genes" not in bad
    assert "not to be trusted" in verification_statement({"shift": control(2.0)}, [], top=10)["warning"]
    assert verification_statement({}, [], top=10) == {}


def test_cells_that_do_not_agree_are_seen_behind_means_that_do() -> None:
    """What is wrong in each cell may cancel out over all of them."""
    cells = control(0.0, cells=4, genes=60)
    noise = np.random.default_rng(2).normal(size=60)
    wrong = replace(cells, estimate_N=cells.exact_N + 3 * np.concatenate([noise, -noise, noise, -noise]))
    assert wrong.of_genes(10).trusted
    assert not wrong.trusted(10)
    assert "not to be trusted" in verification_statement({"shift": wrong}, [], top=10)["warning"]


def test_one_cell_that_is_far_off_spoils_the_means() -> None:
    cells = control(0.01, cells=5, genes=60)
    far = np.where(cells.cell_N == 4, 100 * np.random.default_rng(3).normal(size=300), 0)
    wrong = replace(cells, estimate_N=cells.estimate_N + far)
    assert [one.trusted for one in wrong.of_cells(10)] == [True] * 4 + [False]
    assert not wrong.trusted(10)
    stated = wrong.statement(10)
    assert stated["per_cell"]["spearman_min"] < 0.5 < 0.9 < stated["per_cell"]["spearman_median"]


def test_what_does_not_vary_is_unknown_in_json() -> None:
    flat = ControlCells(np.zeros(4, int), np.arange(4), np.ones(4), np.zeros(4))
    stated = verification_statement({"shift": flat}, [{"A": [1, 0.0, 0.0]}], top=2)
    assert stated["per_cell"]["spearman_median"] is stated["aggregated"]["pearson"] is None
    assert stated["control_genes"] == {"genes": 1, "spearman": None, "pearson": None}
    assert "unknown over the cells" in stated["warning"]
    json.dumps(stated, allow_nan=False)


def test_what_all_stages_cost() -> None:
    def totals(**counts: Any) -> ScreenTotals:
        made = ScreenTotals(cells=counts.pop("cells", 0))
        made.counts.update(counts)
        return made

    first = ScreenTotals(figures=[{"passes": 30.5, "exact_passes": 400}, {"passes": 10.0, "exact_passes": 200}])
    exact = [totals(cells=2, events=50), totals(cells=3, events=20)]
    assert cost_statement(first, exact, 1) == {"passes": 115.5, "exact_passes": 600, "share_of_exact": 0.1925}
    assert cost_statement(first, exact, 2)["passes"] == 190.5
    assert cost_statement(ScreenTotals(), [], 1) == {"passes": 0, "exact_passes": 0, "share_of_exact": None}
