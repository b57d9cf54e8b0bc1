"""A screen's pictures show what they are given, whatever that is; the report leaves out what there is no number of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection

from geneformer_ray.compute.screen_output import ScreenOutput
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError
from geneformer_ray.manage.affected_genes_plot import affected_heat_map
from geneformer_ray.manage.figure_style import shortened
from geneformer_ray.manage.screen_report import write_screen_report
from geneformer_ray.manage.shift_plots import Measure, ranked_bars, volcano
from geneformer_ray.manage.statistics_report import write_statistics_report
from geneformer_ray.manage.violin_plot import CELLS_OF_A_VIOLIN, violin_by_group

TO_BETA = Measure.shift_to("beta")
LONG = "GOBP_POSITIVE_REGULATION_OF_INSULIN_SECRETION_INVOLVED_IN_CELLULAR_RESPONSE_TO_GLUCOSE_STIMULUS"


def statistics(genes: int, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    shift = np.sort(rng.standard_t(2, genes) * 0.004)[::-1]
    fdr = np.exp(-np.abs(shift) * 400)
    names = [f"ENSG{number:05d}" for number in range(genes)]
    return pd.DataFrame(
        {
            "gene": names,
            "symbol": [f"GENE{number}" for number in range(genes)],
            "shift_to_beta": shift,
            "p_beta": fdr / 2,
            "fdr_beta": fdr,
            "effect": shift * 100,
            "ci_low": shift * 90,
            "ci_high": shift * 110,
            "cells": rng.integers(2, 300, genes),
            "significant": fdr < 0.05,
        }
    )


def cell_values(genes: list[str], cells: dict[str, int], seed: int = 0) -> pd.DataFrame:
    """Shifts of each gene in the cells of each group."""
    rng = np.random.default_rng(seed)
    parts = [
        pd.DataFrame({"gene": gene, "group": group, "value": rng.normal(0.01, 0.005, count)})
        for gene in genes
        for group, count in cells.items()
    ]
    return pd.concat(parts, ignore_index=True)


def gene_pairs(perturbed: list[str], affected: list[str], seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    grid = pd.MultiIndex.from_product([perturbed, affected], names=["perturbed", "affected"]).to_frame(index=False)
    mean = 1 - rng.gamma(0.4, 0.01, len(grid))
    return grid.assign(mean=mean, count=rng.integers(5, 90, len(grid)))


def report(output: Path, table: pd.DataFrame, measure: Measure = TO_BETA, **options: Any) -> dict[str, str]:
    given: dict[str, Any] = {"title": "Screen", "lead": "What was compared.", "facts": {"model": "abc", "seed": "0"}}
    return write_screen_report(str(output), table=table, measure=measure, **given, **options)


def words(axes: Axes) -> list[str]:
    return [tick.get_text() for tick in axes.get_xticklabels()]


@pytest.mark.parametrize("similarity", [False, True])
def test_similarities_are_drawn_as_one_minus_them(similarity: bool) -> None:
    table = pd.DataFrame({"gene": list("abc"), "symbol": list("abc"), "similarity": [0.99, 0.5, 0.9999], "cells": 3})
    measure = Measure.effect_of("similarity") if similarity else Measure("similarity", "similarity")
    axes = ranked_bars(table, measure).axes[0]
    expected = {"b": 0.5, "a": 0.01, "c": 0.0001} if similarity else {"c": 0.9999, "a": 0.99, "b": 0.5}
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(expected)
    bars: Any = axes.patches
    assert [bar.get_width() for bar in bars] == pytest.approx(list(expected.values()))
    assert ("1 \N{MINUS SIGN}" in axes.get_xlabel()) is similarity


def test_a_gene_that_dwarfs_all_others_does_not_hide_them() -> None:
    """On a linear axis, the other genes would lie within a tenth of it."""
    table = statistics(200)
    table["shift_to_beta"] = np.linspace(0.01, -0.01, 200)
    table.loc[0, "shift_to_beta"] = 1.0
    axes = volcano(table, TO_BETA).axes[0]
    pixels = axes.transData.transform(np.column_stack([table["shift_to_beta"], np.zeros(200)]))[:, 0]
    assert np.ptp(pixels[1:]) > 0.25 * np.ptp(pixels)
    assert "stretched" in axes.get_xlabel()
    assert "stretched" not in volcano(table.iloc[1:], TO_BETA).axes[0].get_xlabel()


def test_violins_of_many_cells_and_points_of_few() -> None:
    values = cell_values(["a", "b"], {"donor1": CELLS_OF_A_VIOLIN, "donor2": 5, "donor3": 300})
    values.loc[0, "group"] = None  # a cell without a donor
    values.loc[400, "value"] = np.nan
    figure = violin_by_group(values, ["b", "a", "not there"], "shift", symbols={"b": "Beta"}, group="donor")
    first, second = figure.axes
    assert [axes.get_title(loc="left") for axes in (first, second)] == ["Beta", "a"]
    assert words(first) == ["donor1\n(20)", "donor2\n(5)", "donor3\n(299)"]
    assert words(second) == ["donor1\n(19)", "donor2\n(5)", "donor3\n(300)"]

    def points(axes: Axes) -> list[int]:
        drawn: Any = [dots for dots in axes.collections if isinstance(dots, PathCollection)]
        return [np.asarray(dots.get_offsets()).shape[0] for dots in drawn]

    assert points(first) == [5]
    assert points(second) == [19, 5]


def test_violins_take_the_largest_groups_and_none_at_all() -> None:
    many = cell_values(["a"], {f"donor{number:02d}": number + 1 for number in range(20)})
    assert words(violin_by_group(many, ["a"], "shift").axes[0])[0] == "donor12 (13)"
    without = violin_by_group(many.drop(columns="group"), ["a"], "shift").axes[0]
    assert words(without) == ["a\n(210)"]
    with pytest.raises(InputError, match="no rows"):
        violin_by_group(many, ["b"], "shift")


def test_the_heat_map_orders_rows_as_given_and_columns_by_change() -> None:
    pairs = pd.DataFrame(
        {
            "perturbed": ["p", "p", "p", "q", "q", "q"],
            "affected": ["x", "y", "z", "x", "y", "w"],
            "mean": [0.9, 0.8, 0.2, 0.7, 0.5, np.nan],
            "count": [9, 9, 2, 9, 5, 9],
        }
    )
    figure = affected_heat_map(pairs, ["q", "p", "r"], symbols={"q": "Q"})
    axes = figure.axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["Q", "p"]
    assert words(axes) == ["y", "x"]
    shown: Any = axes.images[0].get_array()
    np.testing.assert_allclose(np.asarray(shown), [[0.5, 0.3], [0.2, 0.1]])
    # Without a pair of five cells, the few that there are count.
    few = affected_heat_map(pairs[pairs["affected"] == "z"]).axes[0]
    assert words(few) == ["z"]


def test_names_are_shortened_in_the_middle() -> None:
    assert shortened("INS") == "INS"
    assert shortened("α-cell β\n2") == "α-cell β 2"
    assert len(shortened(LONG)) == 26
    assert shortened(LONG + "_1") != shortened(LONG + "_2")
    assert shortened("基因") == 2 * "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    "case", ["one gene", "thousands", "all equal", "no FDR", "no value", "odd names", "similarities", "zero"]
)
def test_the_report_copes_with(case: str, tmp_path: Path) -> None:
    table = statistics({"one gene": 1, "thousands": 5_000}.get(case, 40))
    measure = TO_BETA
    if case in ("all equal", "zero"):
        table["shift_to_beta"] = 0.01 if case == "all equal" else 0.0
    if case in ("no FDR", "no value"):
        table["fdr_beta"] = np.nan
        table["significant"] = False
    if case == "no value":
        table["shift_to_beta"] = np.nan
    if case == "odd names":
        table["symbol"] = [f"{LONG}_{number}" if number % 2 else f"基因 Ω$^{number}<b>" for number in range(len(table))]
    values = cell_values(table["gene"].head(8).tolist(), {"Spender Jürgen": 40, LONG: 3, "c": 25})
    if case == "similarities":
        table = table[["gene", "symbol", "cells"]].assign(similarity=1 - table["effect"].abs() / 1e4)
        measure, values = Measure.effect_of("similarity"), values.drop(columns="group").assign(value=0.999)
    options: dict[str, Any] = {"values": values, "group": "donor"}
    options["pairs"] = gene_pairs(table["gene"].head(60).tolist(), [f"X{number}" for number in range(80)])
    expected = {"volcano-plot", "ranked-genes", "spread-over-cells", "affected-genes"}
    if case in ("similarities", "no FDR", "no value"):
        expected.remove("volcano-plot")
    if case == "no value":
        expected -= {"ranked-genes", "spread-over-cells"}
    if case in ("thousands", "all equal", "zero", "no FDR"):
        # Pictures of the table alone: the others are drawn in the other cases, and drawing is slow.
        options, expected = {}, expected - {"spread-over-cells", "affected-genes"}
    written = report(tmp_path, table, measure, **options)
    html = Path(written["report"]).read_text(encoding="utf-8")
    assert Path(written.pop("report")) == tmp_path / "report.html"
    assert set(written) == expected
    for name, path in written.items():
        assert Path(path) == tmp_path / "figures" / f"{name}.png"
        assert Path(path).read_bytes().startswith(b"\x89PNG")
    assert html.count("<img") == len(expected)
    assert "<b>" not in html
    assert ("The first 50 of 5,000 rows" in html) is (case == "thousands")


def test_what_was_not_measured_has_no_picture(tmp_path: Path) -> None:
    assert set(report(tmp_path, statistics(5))) == {"report", "volcano-plot", "ranked-genes"}
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Spread" not in html
    assert "Affected" not in html


def test_the_strongest_genes_are_significant_ones_first() -> None:
    table = pd.DataFrame(
        {"shift_to_beta": [0.5, -0.1, np.nan, 0.2], "significant": [False, True, True, True], "gene": list("abcd")}
    )
    assert table["gene"].iloc[TO_BETA.strongest(table, 3)].tolist() == ["d", "b", "a"]


def screen_output(folder: Path, state: str | None) -> ScreenOutput:
    """A screen as its job leaves it: three genes in thirty cells, and what two of them do to others."""
    vocabulary = GeneVocabulary({name: number for number, name in enumerate(["<pad>", "<mask>", *"ABCX"])})
    vocabulary.save(str(folder / "_vocabulary"))
    rng = np.random.default_rng(0)
    cells = [f"c{number}" for number in range(30)]
    rows = pd.DataFrame({"cell_id": cells * 3, "genes": [[gene] for gene in "ABC" for _ in cells]})
    rows["measure"], rows["state"] = ("similarity", "") if state is None else ("shift", state)
    rows["value"] = rng.normal(0.9, 0.01, 90).astype(np.float32)
    pairs = pd.DataFrame({"genes": [["A"], ["B"]], "affected": "X", "count": 9, "mean": [0.5, 0.9], "deviation": 0.1})
    for name, table in (("cell_shifts", rows), ("gene_shifts_summary", pairs)):
        (folder / name).mkdir()
        table.to_parquet(folder / name / "part-000000.parquet", index=False)
    plan = {"job": "screen", "goal": state, "genes": ["A", "B", "C"], "gene_shifts_summary": True}
    (folder / "_manifest.json").write_text(json.dumps({"finished": True, "plan": plan}))
    return ScreenOutput.open(str(folder), "--shifts")


@pytest.mark.parametrize(
    ("test", "state", "columns", "label"),
    [
        ("goal_shift", "beta", {"shift_to_beta": 0.1, "fdr_beta": 0.01}, "mean shift to beta (cosine)"),
        ("vs_null", None, {"difference": -0.1, "fdr": 0.5}, "mean cosine similarity, less the null's"),
        ("mixture", None, {"similarity": 0.9}, "1 \N{MINUS SIGN} mean cosine similarity"),
        ("aggregate", "beta", {"mean": 0.9}, "mean shift to beta (cosine)"),
        ("combination", "beta", {"joint_minus_sum": 0.1, "fdr": 0.5}, "joint effect less the sum of the single ones"),
        ("concordance", "beta", {"shift_delete": 0.1, "shift_activate": -0.1}, "mean shift to beta (cosine), delete"),
        ("gene_shifts", None, {}, "1 \N{MINUS SIGN} mean cosine similarity"),
    ],
)
def test_every_test_has_its_pictures(
    test: str, state: str | None, columns: dict[str, float], label: str, tmp_path: Path
) -> None:
    screen = screen_output(tmp_path / "screen", state)
    table = pd.DataFrame({"gene": list("ABC"), "symbol": list("ABC"), **columns, "cells": 30})
    if "fdr" in "".join(columns):
        table["significant"] = True
    if test == "gene_shifts":
        named = {"perturbed": ["A", "B", "B"], "perturbed_symbol": ["A", "B", "B"], "affected": ["X", "X", "C"]}
        table = pd.DataFrame(
            named | {"affected_symbol": named["affected"], "mean": [0.5, 0.8, 0.2], "cells": [9, 8, 4]}
        )
    groups = {f"c{number}": f"donor{number % 2}" for number in range(30)}
    written = write_statistics_report(
        str(tmp_path / "out"), test=test, table=table, screen=screen, state=state, options={"seed": 0, "group": None},
        groups=groups, group="donor",
    )  # fmt: skip
    expected = {"report", "ranked-genes", "affected-genes"} | (
        {"spread-over-cells"} if test != "gene_shifts" else set()
    )
    assert set(written) == expected | ({"volcano-plot"} if "fdr" in "".join(columns) else set())
    html = Path(written["report"]).read_text(encoding="utf-8")
    assert f"{label}: " in html.replace("&#39;", "'")
    for fact in ("screen: genes", "A, B, C", "statistics: seed"):
        assert fact in html
    assert "statistics: group" not in html
    if test == "gene_shifts":
        # B: (8 x 0.8 + 4 x 0.2) / 12 cells.
        assert "0.6000" in html
