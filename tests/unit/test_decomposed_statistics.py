"""The statistics job on a decomposed screen, and on one of estimates: its tables, its report and its summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex

from geneformer_ray.compute.rank_share import HITS, rank_sentence
from geneformer_ray.compute.statistics import goal_shift_table
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError
from geneformer_ray.manage.figure_style import BLUE, VERMILLION
from geneformer_ray.manage.rank_shift_plot import KINDS, gene_against_rank
from ray_jobs import statistics
from ray_jobs.command_line import build
from ray_jobs.statistics_flags import check_flags
from tests.unit.simulated_screens import decomposed, only

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLAN = {
    "job": "screen", "cells": "c", "model": "m", "rows": "r", "perturbation": "delete", "state_column": "cell_type",
    "start": "alpha", "goal": "beta", "alternatives": [], "states": "s", "embedding": "mean", "layer": -1,
}  # fmt: skip


def screen(folder: Path, shifts: pa.Table, **plan: Any) -> str:
    """A screen as its job leaves it."""
    names = ["<pad>", "<mask>", *(f"GENE{number}" for number in range(15))]
    GeneVocabulary({name: number for number, name in enumerate(names)}).save(str(folder / "_vocabulary"))
    (folder / "cell_shifts").mkdir()
    # Parts of a table lie in files of their own, as items of a screen do.
    for number, part in enumerate((shifts.slice(0, 300), shifts.slice(300))):
        pq.write_table(part, folder / "cell_shifts" / f"{number}.parquet")
    (folder / "_manifest.json").write_text(json.dumps({"finished": True, "plan": PLAN | plan}))
    return str(folder)


def run(shifts: str, output: Path, **flags: Any) -> tuple[dict[str, Any], pd.DataFrame]:
    usual = {"shifts": shifts, "output": str(output), "bootstrap": 20}
    summary = statistics.run(build(statistics.StatisticsConfig, {**usual, **flags}))
    json.dumps(summary, allow_nan=False)
    written = pd.read_csv(output / "statistics.csv")
    pd.testing.assert_frame_equal(
        written, pq.read_table(summary["tables"]["statistics"]).to_pandas(), check_dtype=False
    )
    return summary, written


@pytest.fixture(scope="module")
def screens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    shifts, other = decomposed(0), decomposed(1)
    exact = pa.array((np.arange(len(shifts)) % 4 == 0).tolist())
    tables = {
        "parts": shifts,
        "plain": only(shifts, "shift"),
        "null": other,
        "plain_null": only(other, "shift"),
        "estimates": shifts.append_column("exact", exact),
    }
    return {name: screen(tmp_path_factory.mktemp(name), table) for name, table in tables.items()}


@pytest.mark.parametrize("test", ["goal_shift", "vs_null", "mixture", "aggregate"])
def test_the_job_writes_the_same_bytes_for_the_full_shift(test: str, screens: dict[str, str], tmp_path: Path) -> None:
    files = []
    for name, null in (("plain", "plain_null"), ("parts", "null")):
        flags = {"null": screens[null]} if test == "vs_null" else {}
        _, table = run(screens[name], tmp_path / name, test=test, **flags)
        files.append(((tmp_path / name / "statistics.csv").read_bytes(), table))
    (plain_bytes, plain), (found_bytes, found) = files
    if test != "goal_shift":
        assert found_bytes == plain_bytes
    else:
        assert [name for name in found if name not in plain] == list(found.columns[len(plain.columns) :])
        behind = sum(len(name) + 1 for name in found.columns[len(plain.columns) :])
        lines = [line.split(b",") for line in found_bytes.splitlines()]
        cut = b"\n".join(b",".join(line[: len(plain.columns)]) for line in lines) + b"\n"
        assert behind > 0
        assert cut == plain_bytes


def test_a_reader_is_told_what_is_gene_and_what_is_rank(screens: dict[str, str], tmp_path: Path) -> None:
    summary, table = run(screens["parts"], tmp_path / "out", anndata=True)
    about = dict(summary["rank_shift"])
    told = about.pop("told")
    assert told == rank_sentence(about)
    assert about["of_all"] == {kind: int((table["hit"] == kind).sum()) for kind in HITS}
    by_gene = table.set_index("gene")["hit"]
    assert by_gene[["GENE3", "GENE5"]].tolist() == ["gene", "rank"]
    page = Path(summary["report"]).read_text(encoding="utf-8")
    assert page.count(told) == 2  # on top, and beside the picture
    assert "Rank shift" in page
    assert (tmp_path / "out" / "figures" / "gene-or-rank.png").read_bytes().startswith(b"\x89PNG")
    assert "gene-or-rank" in summary["figures"]
    found = anndata.read_h5ad(summary["anndata"])
    assert set(found.layers) == {"shift_gene", "shift_rank"}
    assert found.varm["statistics"]["hit"].tolist() == table["hit"].tolist()
    summary, _ = run(screens["plain"], tmp_path / "plain")
    assert "rank_shift" not in summary
    assert "exact_share" not in summary
    page = Path(summary["report"]).read_text(encoding="utf-8")
    assert "Gene or rank" not in page
    assert "gene-or-rank" not in summary["figures"]


@pytest.mark.parametrize("test", ["goal_shift", "vs_null", "mixture", "aggregate"])
def test_another_measure_is_tested(test: str, screens: dict[str, str], tmp_path: Path) -> None:
    flags = {"null": screens["null"]} if test == "vs_null" else {}
    summary, table = run(screens["parts"], tmp_path / "out", test=test, measure="shift_gene", **flags)
    assert summary["measure"] == "shift_gene"
    rows = only(decomposed(0), "shift_gene").to_pandas().query("state == 'beta'")
    means = rows.astype({"value": float}).groupby(rows["genes"].str[0])["value"].mean()
    column = "mean" if test in ("vs_null", "aggregate") else "shift_gene_to_beta"
    assert table.set_index("gene")[column].to_dict() == pytest.approx(means.to_dict(), abs=1e-12)
    assert "rank_share" not in table
    assert "shift_to_beta" not in table
    page = Path(summary["report"]).read_text(encoding="utf-8")
    assert "With all ranks held: the shifts are those that genes make alone." in page
    assert "mean shift by the gene alone to beta" in page
    if test == "goal_shift":
        # GENE5 is a hit by its rank alone.
        assert table.set_index("gene").loc[["GENE3", "GENE5"], "significant"].tolist() == [True, False]


@pytest.mark.parametrize(
    ("name", "flags", "text"),
    [
        ("plain", {"measure": "shift_gene"}, r"--measure: got shift_gene; takes a measure of the screen \(shift\)"),
        ("plain", {"measure": "shift_rank", "test": "mixture"}, r"--measure: got shift_rank; takes .* \(shift\)"),
        ("parts", {"measure": "shift_gene", "test": "gene_shifts"}, "--measure: got shift_gene beside --test gene_sh"),
        (
            "parts",
            {"measure": "shift_gene", "test": "concordance", "against": "null"},
            "--measure: got shift_gene beside --test concordance; takes --test goal_shift or vs_null or mixture",
        ),
        (
            "parts",
            {"measure": "shift_gene", "test": "vs_null", "null": "plain_null"},
            "--null: got a table with shift",
        ),
        ("parts", {"measure": "similarity"}, "--measure: .*similarity"),
    ],
)
def test_a_measure_that_is_not_there_is_bad_input(
    name: str, flags: dict[str, Any], text: str, screens: dict[str, str], tmp_path: Path
) -> None:
    flags = {key: screens.get(value, value) if key in ("null", "against") else value for key, value in flags.items()}
    with pytest.raises(InputError, match=text):
        run(screens[name], tmp_path / "out", **flags)
    assert not list((tmp_path / "out").iterdir()) if (tmp_path / "out").exists() else True


@pytest.mark.parametrize("test", ["goal_shift", "vs_null", "mixture", "aggregate"])
def test_estimates_are_called_estimates(test: str, screens: dict[str, str], tmp_path: Path) -> None:
    flags = {"null": screens["null"]} if test == "vs_null" else {}
    summary, table = run(screens["estimates"], tmp_path / "out", test=test, **flags)
    rows = pq.read_table(Path(screens["estimates"]) / "cell_shifts").to_pandas()
    rows = rows[(rows["measure"] == "shift") & (rows["state"] == "beta")]
    assert summary["exact_share"] == pytest.approx(rows["exact"].mean())
    assert "other_exact_share" not in summary
    page = Path(summary["report"]).read_text(encoding="utf-8")
    assert f"{rows['exact'].mean():.1%} of the values are exact; the others are first-order estimates." in page
    if test == "goal_shift":
        share = rows.groupby(rows["genes"].str[0])["exact"].mean()
        assert table.set_index("gene")["exact_share"].to_dict() == pytest.approx(share.to_dict())


def test_the_report_of_a_screen_with_ranks_held_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "held"
    folder.mkdir()
    summary, _ = run(screen(folder, only(decomposed(0), "shift"), ranks="hold"), tmp_path / "out")
    page = Path(summary["report"]).read_text(encoding="utf-8")
    assert "All ranks were held: the shifts are those that genes make alone." in page
    assert "screen: ranks" in page


# ---------------------------------------------------------------------- the picture


def points(axes: Axes) -> dict[str, tuple[np.ndarray, str]]:
    """Label -> points and colour."""
    drawn: Any = [dots for dots in axes.collections if isinstance(dots, PathCollection)]
    return {dots.get_label(): (np.asarray(dots.get_offsets()), to_hex(dots.get_facecolor()[0])) for dots in drawn}


def test_the_picture_sets_gene_against_rank() -> None:
    table = goal_shift_table(decomposed(0), goal="beta", start="alpha", bootstrap=0)
    figure = gene_against_rank(table, "beta")
    left, right = figure.axes
    found = points(left)
    counts = table["hit"].value_counts()
    assert set(found) == {f"{name} ({counts[kind]})" for kind, (name, _, _) in KINDS.items() if kind in counts}
    for kind, (name, colour, _) in KINDS.items():
        if kind in counts:
            own = table[table["hit"] == kind]
            xy, drawn = found[f"{name} ({counts[kind]})"]
            np.testing.assert_allclose(xy, own[["shift_gene_to_beta", "shift_rank_to_beta"]].to_numpy())
            assert drawn == colour.lower()
    # One scale on both axes: a diagonal is a diagonal.
    assert left.get_xlim() == left.get_ylim() == pytest.approx((-left.get_xlim()[1], left.get_xlim()[1]))
    bars: Any = right.patches
    names = [tick.get_text() for tick in right.get_yticklabels()]
    ranked = table.set_index("symbol").loc[names]
    assert ranked["shift_to_beta"].is_monotonic_decreasing
    assert {"GENE3", "GENE5"} <= set(names)
    for place, row in enumerate(ranked.to_dict("records")):
        gene, rank = bars[2 * place], bars[2 * place + 1]
        assert gene.get_width() == pytest.approx(row["shift_gene_to_beta"])
        assert rank.get_width() == pytest.approx(row["shift_rank_to_beta"])
        alike = row["shift_gene_to_beta"] * row["shift_rank_to_beta"] > 0
        assert rank.get_x() == pytest.approx(row["shift_gene_to_beta"] if alike else 0)
        assert [to_hex(bar.get_facecolor()) for bar in (gene, rank)] == [
            BLUE.lower(), VERMILLION.lower(),
        ]  # fmt: skip


@pytest.mark.parametrize("case", ["one gene", "zeros", "rank dwarfs", "outlier", "even", "odd names", "nothing"])
def test_the_picture_copes_with(case: str) -> None:
    table = goal_shift_table(decomposed(0), goal="beta", start="alpha", bootstrap=0)
    parts = ["shift_gene_to_beta", "shift_rank_to_beta"]
    if case == "one gene":
        table = table.head(1)
    if case == "zeros":
        table[[*parts, "shift_to_beta"]] = 0.0
        table["rank_share"] = np.nan
    if case == "rank dwarfs":
        table[parts[0]] /= 1_000
    if case == "outlier":
        table.loc[0, parts] = [3.0, -1.0]
    if case in ("even", "odd names"):
        table[parts] = np.linspace([-0.02, 0.01], [0.03, -0.02], len(table))
    if case == "odd names":
        table["symbol"] = [f"$x_{number}$ 基因 {'A' * 60}" for number in range(len(table))]
    if case == "nothing":
        table[parts] = np.nan
        with pytest.raises(InputError, match="no rows"):
            gene_against_rank(table, "beta")
        return
    figure = gene_against_rank(table, "beta")
    figure.canvas.draw()
    left = figure.axes[0]
    stretched = case in ("one gene", "rank dwarfs", "outlier")
    assert [("stretched" in label) for label in (left.get_xlabel(), left.get_ylabel())] == [stretched, stretched]
    # With equal scales, gene equal to rank lies on the picture's diagonal, stretched or not.
    corner = left.get_xlim()[1]
    for share in (0.01, 0.2, 1.0):
        x, y = left.transAxes.inverted().transform(left.transData.transform((share * corner, share * corner)))
        assert x == pytest.approx(y)


@pytest.mark.parametrize("test", ["concordance", "gene_shifts"])
def test_tests_of_the_full_shift_alone_need_not_say_so(test: str) -> None:
    flags = {"against": "other"} if test == "concordance" else {}
    config = build(statistics.StatisticsConfig, {"shifts": "s", "output": "o", "test": test, **flags})
    check_flags(config)
    with pytest.raises(InputError, match="--measure: got shift_gene beside"):
        check_flags(config.model_copy(update={"measure": "shift_gene"}))
