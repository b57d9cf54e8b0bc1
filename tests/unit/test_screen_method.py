"""How a screen measures its cells, by the worker and by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from geneformer_ray.compute.decomposition import MEASURES, decomposed_rows
from geneformer_ray.compute.encoder import Encoder
from geneformer_ray.compute.first_order import FirstOrderShifts, first_order_cells
from geneformer_ray.compute.first_order_figures import first_order_figures, merge_figures
from geneformer_ray.compute.perturbation import PerturbationPlan
from geneformer_ray.compute.screen_method import ScreenedCell, ScreenMethod
from geneformer_ray.compute.shift_tables import CELL_SHIFTS, cell_shift_rows
from geneformer_ray.compute.shifts import CellShifts, shift_cells
from tests.unit.estimated_cells import ESTIMATES, FULL, HOLD, READING, SETTINGS, STATES, EstimatedCells

LENGTHS = [120, 5, 90, 110]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> EstimatedCells:
    return EstimatedCells(tmp_path_factory.mktemp("methods"), LENGTHS)


def written(output: Path) -> pa.Table:
    return pq.read_table(output / "cell_shifts").replace_schema_metadata(None)


@pytest.mark.parametrize("plan", [FULL, HOLD], ids=["shift", "hold"])
def test_a_worker_writes_what_first_order_gives(
    setting: EstimatedCells, plan: PerturbationPlan, tmp_path: Path
) -> None:
    counts = setting.worker(tmp_path, ESTIMATES, plan)({"item": 0, "rows": [0, 1, 2, 3]})
    direct = first_order_cells(setting.encoder, setting.cells, plan, READING, setting.vocabulary, SETTINGS)
    shifts = [cell.shifts for cell in direct]
    expected = cell_shift_rows(setting.ids, shifts, list(STATES), setting.names)
    exact = np.concatenate([np.repeat(cell.exact_E, 2) for cell in direct])
    table = written(tmp_path)
    assert table.column_names == [*CELL_SHIFTS.names, "exact"]
    assert table.drop_columns("exact").equals(expected)
    assert table["exact"].to_pylist() == exact.tolist()
    assert 0 < exact.sum() < len(exact)
    assert counts["estimated"] == [0, 2, 3]  # five genes are not worth an estimate
    figures = counts["first_order"]
    assert figures["passes"] == pytest.approx(sum(cell.passes for cell in direct))
    assert figures["exact_passes"] == sum(LENGTHS) + len(LENGTHS)
    assert figures["passes"] < 0.6 * figures["exact_passes"]
    (errors,) = figures["errors"]
    assert errors["sum"] == pytest.approx(sum(cell.error for cell in direct))
    assert errors["over_tolerance"] == sum(cell.error > 0.3 for cell in direct)
    assert (counts["events"], counts["rows"], counts["cells"]) == (sum(LENGTHS), 2 * sum(LENGTHS), len(LENGTHS))


def test_a_worker_takes_estimates_apart(setting: EstimatedCells, tmp_path: Path) -> None:
    method = ScreenMethod(decompose=True, first_order=SETTINGS)
    counts = setting.worker(tmp_path, method)({"item": 0, "rows": [0, 1]})
    reading = READING
    full, gene = (
        first_order_cells(setting.encoder, setting.cells[:2], plan, reading, setting.vocabulary, SETTINGS)
        for plan in (FULL, HOLD)
    )
    parts = [[cell.shifts for cell in cells] for cells in (full, gene)]
    table = written(tmp_path)
    assert table.drop_columns("exact").equals(decomposed_rows(setting.ids[:2], *parts, list(STATES), setting.names))
    frame = table.to_pandas()
    assert frame["measure"].unique().tolist() == list(MEASURES)
    exact = {measure: frame.loc[frame["measure"] == measure, "exact"].to_numpy() for measure in MEASURES}
    np.testing.assert_array_equal(exact["shift"], np.concatenate([np.repeat(cell.exact_E, 2) for cell in full]))
    np.testing.assert_array_equal(exact["shift_gene"], np.concatenate([np.repeat(cell.exact_E, 2) for cell in gene]))
    np.testing.assert_array_equal(exact["shift_rank"], exact["shift"] & exact["shift_gene"])
    assert exact["shift"].sum() > exact["shift_rank"].sum() > 0
    assert counts["first_order"]["exact_passes"] == 2 * (120 + 1 + 5 + 1)
    assert counts["first_order"]["passes"] == pytest.approx(sum(cell.passes for cell in [*full, *gene]))
    assert [error["sum"] for error in counts["first_order"]["errors"]] == [full[0].error, gene[0].error]
    merged = merge_figures([counts["first_order"]])
    assert merged["error_max"] == pytest.approx(full[0].error, rel=1e-5)
    assert merged["shift_gene"]["error_max"] == pytest.approx(gene[0].error, rel=1e-5)


def test_exact_deletions_taken_apart(setting: EstimatedCells, tmp_path: Path) -> None:
    counts = setting.worker(tmp_path, ScreenMethod(decompose=True))({"item": 0, "rows": [1, 2]})
    assert not {"first_order", "estimated"} & counts.keys()
    frame = written(tmp_path).to_pandas()
    assert frame.columns.tolist() == CELL_SHIFTS.names
    values = {measure: frame.loc[frame["measure"] == measure, "value"].to_numpy() for measure in MEASURES}
    np.testing.assert_allclose(values["shift_gene"] + values["shift_rank"], values["shift"], atol=1e-6)
    for measure, plan in (("shift", FULL), ("shift_gene", HOLD)):
        cells = shift_cells(setting.encoder, setting.cells[1:3], plan, READING, setting.vocabulary)
        assert values[measure].tolist() == np.concatenate([cell.values_ES.ravel() for cell in cells]).tolist()
    assert np.abs(values["shift_rank"]).max() > 1e-3
    part = setting.worker(tmp_path / "part", ScreenMethod(decompose=True))({"item": 0, "rows": [2], "part": [32, 64]})
    assert (part["events"], part["rows"]) == (32, 3 * 2 * 32)


def test_a_cell_that_fails_is_set_aside_alone(
    setting: EstimatedCells, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured together with it, the others raise as well: they are measured again, each alone."""
    feared = int(setting.cells[2][7])
    screen = ScreenMethod.screen

    def fearful(self: ScreenMethod, encoder: Encoder, sequences: Any, *rest: Any, **options: Any) -> Any:
        if any(len(ids) == 90 and (ids == feared).any() for ids in sequences):
            raise ZeroDivisionError("by a feared gene")
        return screen(self, encoder, sequences, *rest, **options)

    monkeypatch.setattr(ScreenMethod, "screen", fearful)
    counts = setting.worker(tmp_path, ESTIMATES)({"item": 0, "rows": [0, 1, 2, 3]})
    assert counts["rejected"] == {"2": "ZeroDivisionError: by a feared gene"}
    assert (counts["estimated"], counts["events_rejected"], counts["first_order"]["cells"]) == ([0, 3], 90, 3)
    assert set(written(tmp_path)["cell_id"].to_pylist()) == {"cell0", "cell1", "cell3"}


def test_lower_precision_is_held_against_the_same_estimates(setting: EstimatedCells, tmp_path: Path) -> None:
    method = ScreenMethod(first_order=replace(SETTINGS, tolerance=10))
    counts = setting.worker(tmp_path, method, precision="bf16")({"item": 0, "rows": [0, 1], "compare": True})
    stated = counts["precision"]
    settings = method.first_order
    (exact,) = first_order_cells(setting.encoder, setting.cells[:1], FULL, READING, setting.vocabulary, settings)
    ours = written(tmp_path)["value"].to_numpy()[: 2 * LENGTHS[0]]
    error = np.abs(ours - exact.shifts.values_ES.ravel())
    assert (stated["events"], stated["values"]) == (120, 240)
    assert stated["largest_error"] == pytest.approx(error.max(), rel=1e-3)
    assert 0 < stated["largest_error"] < stated["largest_value"]


def test_there_are_no_parts_of_an_estimate(setting: EstimatedCells) -> None:
    method = ESTIMATES
    assert not method.cuts_cells
    with pytest.raises(ValueError, match="parts of cells"):
        method.screen(setting.encoder, setting.cells[:1], FULL, READING, setting.vocabulary, parts=[range(3)])


def test_what_cells_cost(setting: EstimatedCells) -> None:
    """A cell costs about what it is weighed by, in whatever way it is measured."""
    events = np.array([0, 5, 120, 2_000])
    exact, apart = ScreenMethod(), ScreenMethod(decompose=True)
    assert exact.most_passes(events, FULL, 2).tolist() == [1, 6, 121, 2_001]
    assert apart.most_passes(events, FULL, 2).tolist() == [2, 12, 242, 4_002]
    quick = ESTIMATES
    assert quick.most_passes(events, FULL, 2).tolist() == [1, 6, 4 + 2 + 4 * 5.5, 0.2 * 2_000]
    assert quick.most_passes(events, HOLD, 2).tolist() == [1, 6, 0.2 * 120, 0.2 * 2_000]
    for method, plan in ((quick, FULL), (quick, HOLD), (ScreenMethod(True, SETTINGS), FULL)):
        found = method.screen(setting.encoder, setting.cells, plan, READING, setting.vocabulary)
        most = method.most_passes(np.array(LENGTHS), plan, 2)
        assert all(cell.passes <= 1.3 * limit for cell, limit in zip(found, most.tolist(), strict=True))
        assert sum(cell.passes for cell in found) > 0.5 * most.sum()


def test_a_value_that_is_no_number_in_either_part() -> None:
    genes, values = [(2,), (3,)], np.zeros((2, 1), np.float32)
    spoilt = values.copy()
    spoilt[1] = np.nan
    whole, bad = CellShifts(genes, values), CellShifts(genes, spoilt)
    assert [ScreenedCell(parts).not_finite() for parts in ((whole,), (whole, bad), (bad, bad))] == [0, 1, 1]


def test_figures_do_not_depend_on_their_order(setting: EstimatedCells) -> None:
    method = ESTIMATES
    cells = method.screen(setting.encoder, setting.cells, FULL, READING, setting.vocabulary)
    errors = [cell.estimates[0].error for cell in cells if cell.estimated]
    limit = float(np.median(errors))
    parts = [first_order_figures([cell], limit) for cell in cells]
    figures = merge_figures(parts)
    assert figures == merge_figures(parts[::-1]) == merge_figures([first_order_figures(cells, limit)])
    assert figures["passes_per_cell"] == pytest.approx(np.mean([cell.passes for cell in cells]), rel=1e-5)
    assert figures["exact_passes_per_cell"] == pytest.approx(np.mean(LENGTHS) + 1, rel=1e-5)
    assert figures["cells_estimated"] == 3
    assert figures["error_mean"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert figures["error_max"] == pytest.approx(max(errors), rel=1e-5)
    assert figures["over_tolerance"] == 1
    assert figures["anchors_per_cell"] >= 4


def test_a_part_that_is_all_exact_has_no_part_in_the_error_of_others() -> None:
    """Small cells are estimated with ranks held alone: their shifts are exact, and make no mean error smaller."""
    shifts = CellShifts([(2,)], np.zeros((1, 1), np.float32))
    exact = FirstOrderShifts.all_exact(shifts)
    near, far = (FirstOrderShifts(shifts, np.array([False]), error, 1.0, 2) for error in (0.1, 0.3))
    cells = [ScreenedCell((shifts, shifts), parts) for parts in ((exact, near), (far, near))]
    figures = merge_figures([first_order_figures(cells, 0.2)])
    assert (figures["cells_estimated"], figures["error_mean"], figures["over_tolerance"]) == (2, 0.3, 1)
    assert figures["shift_gene"] == {"error_mean": 0.1, "error_max": 0.1, "over_tolerance": 0}
    assert merge_figures([first_order_figures(cells[:1], 0.2)])["error_mean"] is None


def test_figures_of_no_estimate_and_of_an_endless_error() -> None:
    shifts = CellShifts([(2,)], np.zeros((1, 1), np.float32))
    nothing = merge_figures([first_order_figures([ScreenedCell((shifts,))], 0.1)])
    assert (nothing["cells_estimated"], nothing["error_mean"], nothing["anchors_per_cell"]) == (0, None, None)
    assert merge_figures([])["passes_per_cell"] is None
    endless = FirstOrderShifts(shifts, np.array([False]), math.inf, 1.0, 2)
    figures = merge_figures([first_order_figures([ScreenedCell((shifts,), (endless,))], 0.1)])
    assert (figures["error_mean"], figures["error_max"], figures["over_tolerance"]) == (None, None, 1)
