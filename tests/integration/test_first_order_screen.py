"""Screens that estimate, on a real cluster: the right numbers in the right rows, whatever is killed on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from geneformer_ray.compute.cell_states import states_file
from geneformer_ray.compute.first_order import FirstOrder, first_order_cells
from geneformer_ray.compute.model_directory import weights_digest
from geneformer_ray.compute.shifts import shift_cells
from geneformer_ray.errors import InputError
from ray_jobs import screen, screen_flags
from ray_jobs.command_line import build
from tests.integration.processes import Job
from tests.integration.screen_setting import assert_same, items_done
from tests.unit.estimated_cells import FULL, READING, STATES, EstimatedCells

pytestmark = pytest.mark.integration

VERIFIED = {"method": "verified", "top": 4, "controls": 5, "control_cells": 2, "tolerance": 0.3, "held_out": 4}


class StatedCells(EstimatedCells):
    """With the states' embeddings in a file, so that no job computes them."""

    def __init__(self, folder: Path, lengths: list[int], **shape: int) -> None:
        super().__init__(folder, lengths, **shape)
        made_with = {"model": weights_digest(folder / "model"), "embedding": "mean", "layer": -1}
        (folder / "states.json").write_text(json.dumps(states_file(STATES, made_with)))

    @property
    def flags(self) -> dict[str, str]:
        places = {name: str(self.folder / name) for name in ("cells", "model")}
        states = {
            "state_column": "state",
            "start": "a",
            "goal": "b",
            "state_embeddings": str(self.folder / "states.json"),
        }
        return places | states


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> StatedCells:
    """Five cells, one too small to be estimated, and a sixth that the model cannot take."""
    return StatedCells(tmp_path_factory.mktemp("estimated"), [120, 100, 5, 90, 110, 140])


def run_screen(setting: StatedCells, output: Path, **flags: Any) -> dict[str, Any]:
    return screen.run(
        build(screen_flags.ScreenConfig, {**setting.flags, "output": str(output), "max_rejected": 0.5, **flags})
    )


def frame_of(output: Path) -> pd.DataFrame:
    frame = pq.read_table(output / "cell_shifts").to_pandas()
    return frame.assign(gene=frame["genes"].str[0]).set_index(["cell_id", "gene", "measure", "state"])


def test_verified_is_exact_where_it_says_so_and_estimated_elsewhere(
    setting: StatedCells, ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    summary = run_screen(setting, output, **VERIFIED)
    frame = frame_of(output)
    settings = FirstOrder(tolerance=0.3, held_out=4)
    estimated = first_order_cells(setting.encoder, setting.cells[:5], FULL, READING, setting.vocabulary, settings)
    measured = shift_cells(setting.encoder, setting.cells[:5], FULL, READING, setting.vocabulary)
    estimates = np.concatenate([cell.shifts.values_ES.ravel() for cell in estimated])
    exact = np.concatenate([cell.values_ES.ravel() for cell in measured])
    was_exact = np.concatenate([np.repeat(cell.exact_E, 2) for cell in estimated])
    chosen = json.loads((output / "_chosen.json").read_text())
    assert (len(chosen["top"]), len(chosen["controls"]), len(chosen["control_cells"])) == (4, 5, 2)
    cell, gene = frame.index.get_level_values("cell_id"), frame.index.get_level_values("gene")
    control = cell.isin([f"cell{row}" for row in chosen["control_cells"]])
    verified = (control | gene.isin([*chosen["top"], *chosen["controls"]])) & (cell != "cell2")  # that one is exact
    np.testing.assert_allclose(frame["value"][verified], exact[verified], atol=2e-6)
    np.testing.assert_allclose(frame["value"][~verified], estimates[~verified], atol=2e-6)
    np.testing.assert_array_equal(frame["exact"], verified | was_exact)
    assert np.abs(exact - estimates)[verified].max() > 1e-3
    assert 0 < verified.sum() < len(frame)

    said = capsys.readouterr().err
    for stage in ("estimates", "choosing genes", "exact: control cells", "exact: chosen genes", "tables"):
        assert f"{stage}: " in said
    found = summary["verification"]
    assert (found["top"], found["controls"], found["control_cells"]) == (4, 5, 2)
    assert found["per_cell"]["cells"] == 2
    assert found["control_genes"]["genes"] == 5
    assert ("warning" in found) == ("warning: first order is not to be trusted" in said)
    events = {row: len(setting.cells[row]) for row in range(5)}
    of_controls = sum(events[row] + 1 for row in chosen["control_cells"])
    genes = {setting.vocabulary.tokens[name] for name in (*chosen["top"], *chosen["controls"])}
    others = [row for row in (0, 1, 3, 4) if row not in chosen["control_cells"]]
    of_genes = sum(len(genes & set(setting.cells[row].tolist())) + 1 for row in others)
    passes = sum(one.passes for one in estimated) + of_controls + of_genes
    assert found["passes"] == pytest.approx(passes, abs=0.1)
    assert found["exact_passes"] == sum(events.values()) + 5
    assert summary["first_order"]["cells_estimated"] == 4
    assert (summary["events"], summary["rows"], summary["rejected"]) == (425, 850, 1)
    (rejected,) = pq.read_table(output / "_rejects").to_pylist()
    assert rejected["cell_id"] == "cell5" and "140 tokens" in rejected["reason"]
    assert "1 of 6 cells set aside" in said
    manifest = json.loads((output / "_manifest.json").read_text())
    assert manifest["finished"] and manifest["plan"]["method"] == "verified"
    assert sorted(path.name for path in output.iterdir()) == [
        "_chosen.json", "_manifest.json", "_progress", "_rejects", "_vocabulary", "cell_shifts", "states.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"method": "first_order", "combine": 2, "genes": "GENE001,GENE002"}, "--genes: got several genes"),
        ({"method": "verified", "gene_shifts_summary": True}, "--gene-shifts-summary: "),
        ({"decompose": True, "perturbation": "overexpress"}, "--decompose: "),
        ({"ranks": "hold", "perturbation": "activate"}, "--ranks: "),
        ({"tolerance": 0.2}, "--tolerance: "),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    setting: StatedCells, tmp_path: Path, flags: dict[str, Any], text: str
) -> None:
    with pytest.raises(InputError, match=f"^{text}"):
        run_screen(setting, tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_hold_goes_with_what_exact_screens_do(setting: StatedCells, ray_cluster: None, tmp_path: Path) -> None:
    """Gene shifts and their summary, several genes in one event, an anchor; the ranks make a difference."""
    genes = [setting.vocabulary.names[token] for token in setting.cells[0][:4].tolist()]
    options = {"genes": ",".join(genes[:3]), "combine": 2, "anchor": genes[3], "gene_shifts": True}
    held = run_screen(setting, tmp_path / "out", gene_shifts_summary=True, **options, ranks="hold")
    moved = run_screen(setting, tmp_path / "moved", **options)
    assert held["events"] == moved["events"] > 0
    assert held["gene_rows"] == moved["gene_rows"] > 0
    values = [pq.read_table(tmp_path / name / "cell_shifts")["value"].to_numpy() for name in ("out", "moved")]
    assert np.abs(values[0] - values[1]).max() > 1e-3
    assert "gene_shifts_summary" in held["tables"]


# ---------------------------------------------------------------------- what is killed


@pytest.mark.slow
def test_a_verified_screen_that_is_killed_twice_and_has_one_worker(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """In its first stage and among its exact ones: in the end the same shards, and what was chosen stays chosen."""
    folder = tmp_path_factory.mktemp("killed")
    lengths = np.random.default_rng(4).integers(200, 240, size=90).tolist()
    setting = StatedCells(folder, lengths, genes=300, longest=240)
    # A high price that no cell has to pay makes small items.
    flags = {
        **setting.flags, "method": "verified", "top": "40", "controls": "40", "control_cells": "3", "tolerance": "10",
        "most_cost": "1",
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in ("--" + name.replace("_", "-"), value)]
    whole, output = tmp_path / "whole", tmp_path / "out"
    with Job("screen", *words, "--output", str(whole)) as job:
        run = job.finished()
    assert run.code == 0, run.errors
    assert items_done(whole) >= 4

    one_worker = (*words, "--output", str(output), "--max-workers", "1")
    with Job("screen", *one_worker) as job:
        job.wait_until(lambda: items_done(output / "_estimates") >= 2)
        job.kill()
    assert items_done(output / "_estimates") < items_done(whole)
    assert not (output / "_chosen.json").exists()
    with Job("screen", *one_worker) as job:
        job.wait_until(lambda: items_done(output / "_exact_cells") >= 1)
        job.kill()
    chosen = (output / "_chosen.json").read_bytes()
    assert not json.loads((output / "_manifest.json").read_text())["finished"]
    assert items_done(output) == 0
    # A plan of which more would be measured is another plan.
    with Job("screen", *[word if word != "40" else "41" for word in one_worker]) as job:
        refused = job.finished()
    assert refused.code == 2
    assert "controls was 40, is 41" in refused.errors
    with Job("screen", *one_worker) as job:
        again = job.finished()
    assert again.code == 0, again.errors
    assert (output / "_chosen.json").read_bytes() == chosen == (whole / "_chosen.json").read_bytes()
    assert_same(output, whole)
    for part in ("first_order", "verification"):
        assert again.summary[part] == run.summary[part]
