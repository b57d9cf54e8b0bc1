"""Every test of the statistics job, on screens that the screen job has run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from scipy import stats

from geneformer_ray.compute.model_directory import save_model
from geneformer_ray.compute.pretraining import new_model
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError, OutputExistsError, VocabularyMismatch
from ray_jobs import screen, screen_flags, statistics, tokenize
from ray_jobs.command_line import build
from tests.integration.small_data import SmallData

# Seven screens to start with: minutes. The tables themselves are tested without Ray.
pytestmark = [pytest.mark.integration, pytest.mark.slow]
REPOSITORY = Path(__file__).resolve().parents[2]
GENES = "GENE00,GENE01,GENE02,GENE03,GENE20"
STATES = {"state_column": "cell_type", "start": "alpha", "goal": "beta"}
# Each in the same cells.
SCREENS: dict[str, dict[str, Any]] = {
    "states": STATES,
    "decomposed": {**STATES, "decompose": True},
    "joint_states": {**STATES, "genes": GENES, "combine": 2},
    "raised": {**STATES, "genes": GENES, "perturbation": "overexpress"},
    "plain": {"gene_shifts": True},
    "null": {"perturbation": "inhibit", "gene_shifts_summary": True},
    "anchored": {"genes": GENES, "anchor": "GENE04"},
}


@dataclass(frozen=True)
class Screens:
    """The outputs of all screens, below one folder."""

    folder: Path

    def at(self, name: str) -> str:
        return str(self.folder / name)

    def rows(self, name: str, table: str = "cell_shifts") -> Any:
        frame = pq.read_table(self.folder / name / table).to_pandas()
        frame["gene"] = ["+".join(sorted(genes)) for genes in frame["genes"]]
        return frame.astype({"value": float})


@pytest.fixture(scope="module")
def screens(small_data: SmallData, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Screens:
    found = Screens(tmp_path_factory.mktemp("screens"))
    vocabulary = GeneVocabulary.load(small_data.vocabulary)
    model = new_model(vocabulary, layers=2, width=16, heads=2, feed_forward=32, initializer_range=0.2)
    save_model(model, vocabulary, found.folder / "model")
    tokenize.run(build(tokenize.TokenizeConfig, {
        "input": [small_data.h5ad], "vocabulary": small_data.vocabulary, "output": found.at("cells"),
        "obs_columns": ["cell_type", "donor"],
    }))  # fmt: skip
    for name, flags in SCREENS.items():
        usual = {"cells": found.at("cells"), "model": found.at("model"), "output": found.at(name)}
        chosen = {"filter": {"cell_type": ["alpha"]}}
        screen.run(build(screen_flags.ScreenConfig, {**usual, **chosen, **flags}))
    return found


@pytest.fixture
def run(screens: Screens, tmp_path: Path) -> Any:
    def run_on(shifts: str, **flags: Any) -> tuple[dict[str, Any], Any]:
        """Run the job on one of the screens; give its summary and its ranked table."""
        for name in ("null", "against", "cells"):
            if name in flags and "/" not in flags[name]:
                flags[name] = screens.at(flags[name])
        usual = {"shifts": screens.at(shifts), "output": str(tmp_path / "out"), "bootstrap": 30}
        summary = statistics.run(build(statistics.StatisticsConfig, {**usual, **flags}))
        table = pq.read_table(summary["tables"]["statistics"]).to_pandas()
        written = pd.read_csv(tmp_path / "out" / "statistics.csv")
        pd.testing.assert_frame_equal(written, table, check_dtype=False)
        assert json.loads((tmp_path / "out" / "_manifest.json").read_text())["finished"]
        json.dumps(summary, allow_nan=False)
        return summary, table

    return run_on


def changed_copy(screens: Screens, folder: Path, **change: Any) -> None:
    """Copy the plain screen, with another plan."""
    shutil.copytree(screens.at("plain"), folder / "changed")
    manifest = json.loads((folder / "changed" / "_manifest.json").read_text())
    manifest["plan"].update(change)
    (folder / "changed" / "_manifest.json").write_text(json.dumps(manifest))


def test_goal_shift_over_donors_with_an_anndata(screens: Screens, run: Any) -> None:
    summary, table = run("states", cells="cells", group="donor", anndata=True)
    assert {"shift_to_beta", "p_beta", "fdr_beta", "effect", "ci_low", "ci_high", "cells"} <= set(table.columns)
    rows = screens.rows("states").query("state == 'beta'")
    donors = dict(
        zip(*pq.read_table(screens.at("cells"), columns=["cell_id", "donor"]).to_pydict().values(), strict=True)
    )
    for row in table.head(5).itertuples():
        own = rows[rows["gene"] == row.gene].assign(donor=lambda frame: frame["cell_id"].map(donors))
        assert row.shift_to_beta == pytest.approx(own["value"].mean(), abs=1e-9)
        means = own.groupby("donor")["value"].mean()
        assert (row.groups, row.cells) == (len(means), len(own))
        assert row.sign_consistency == pytest.approx((np.sign(means) == np.sign(row.shift_to_beta)).mean())
    found = anndata.read_h5ad(summary["anndata"])
    assert found.var_names.tolist() == table["gene"].tolist()
    assert set(found.obs_names) == set(rows["cell_id"])
    assert found.obs["donor"].astype(str).to_dict() == {cell: donors[cell] for cell in found.obs_names}
    gene, cell = found.var_names[0], rows.loc[rows["gene"] == found.var_names[0], "cell_id"].iloc[0]
    expected = rows.set_index(["gene", "cell_id"]).loc[(gene, cell), "value"]
    assert found[cell, gene].X.item() == pytest.approx(expected)
    assert np.isnan(found.X).sum() == found.n_obs * found.n_vars - len(rows)
    assert found.varm["statistics"]["effect"].tolist() == pytest.approx(table["effect"].tolist(), nan_ok=True)
    assert json.loads(found.uns["screen"])["goal"] == "beta"


def test_a_decomposed_screen_has_the_same_numbers_and_its_parts_beside_them(screens: Screens, run: Any) -> None:
    _, plain = run("states")
    summary, table = run("decomposed", overwrite=True)
    assert summary["rank_shift"]["told"] in Path(summary["report"]).read_text()
    pd.testing.assert_frame_equal(table[plain.columns], plain, check_exact=True)
    rows = screens.rows("decomposed").query("state == 'beta'").groupby(["measure", "gene"])["value"].mean()
    found = table.set_index("gene")
    for part in ("gene", "rank"):
        expected = rows[f"shift_{part}"].to_dict()
        assert found[f"shift_{part}_to_beta"].to_dict() == pytest.approx(expected, abs=1e-7)
    assert found["rank_share"].between(0, 1).all()
    _, alone = run("decomposed", measure="shift_gene", overwrite=True)
    means = alone.set_index("gene")["shift_gene_to_beta"].to_dict()
    assert means == pytest.approx(found["shift_gene_to_beta"].to_dict())


def test_vs_null(screens: Screens, run: Any) -> None:
    summary, table = run("plain", test="vs_null", null="null")
    mine, null = (screens.rows(name).set_index(["gene", "cell_id"])["value"] for name in ("plain", "null"))
    row = table.iloc[0]
    a, b = mine[row["gene"]], null[row["gene"]]
    assert row["difference"] == pytest.approx(a.mean() - b.mean(), abs=1e-9)
    assert row["p"] == pytest.approx(stats.ranksums(a, b).pvalue)
    assert (row["cells"], row["null_cells"], row["paired_cells"]) == (
        len(a),
        len(b),
        len(a.index.intersection(b.index)),
    )
    assert summary["genes"] == len(table) == mine.index.get_level_values(0).nunique()


def test_a_null_screen_may_be_of_other_cells(screens: Screens, run: Any, tmp_path: Path) -> None:
    changed_copy(screens, tmp_path, rows="other")
    assert run("plain", test="vs_null", null=str(tmp_path / "changed"))[0]["significant"] == 0


def test_vs_null_of_shifts(screens: Screens, run: Any) -> None:
    summary, table = run("states", test="vs_null", null="raised", state="alpha", cells="cells", group="donor")
    assert summary["state"] == "alpha"
    assert (table["null_cells"] > 0).sum() == len(GENES.split(","))
    mine = screens.rows("states").query("state == 'alpha'").groupby("gene")["value"].mean()
    assert table.set_index("gene")["mean"].to_dict() == pytest.approx(mine.to_dict(), abs=1e-9)


@pytest.mark.parametrize(("name", "column"), [("plain", "similarity"), ("states", "shift_to_beta")])
def test_mixture(run: Any, name: str, column: str) -> None:
    summary, table = run(name, test="mixture", anndata=True)
    assert summary["with_impact"] == table["impact_component"].sum() > 0
    low, high = summary["impact_of_components"]["mean"]
    assert low < high
    impact = 1 - table[column] if name == "plain" else table[column].abs()
    with_impact = table["impact_component"]
    assert impact[with_impact].min() > impact[~with_impact].max()
    assert np.isnan(anndata.read_h5ad(summary["anndata"]).X).any()


def test_aggregate(screens: Screens, run: Any) -> None:
    summary, table = run("raised", test="aggregate", cells="cells", group="donor")
    assert set(table["gene"]) == set(GENES.split(","))
    assert table["mean"].is_monotonic_decreasing
    cells = pq.read_table(summary["tables"]["cells"]).to_pandas()
    expected = screens.rows("raised").query("state == 'beta'").set_index(["gene", "cell_id"])["value"]
    assert cells.set_index(["gene", "cell_id"])["shift_to_beta"].to_dict() == expected.to_dict()
    assert set(cells["group"]) == {"donor1", "donor2", "donor3"}
    for row in table.itertuples():
        own = expected[row.gene]
        assert (row.mean, row.deviation, row.cells) == pytest.approx((own.mean(), own.std(ddof=0), len(own)))
    assert summary["rows"] == len(expected)


def test_gene_shifts_from_rows_and_from_their_summary(screens: Screens, run: Any, tmp_path: Path) -> None:
    _, table = run("plain", test="gene_shifts", output=str(tmp_path / "out"))
    grouped = screens.rows("plain", "gene_shifts").groupby(["gene", "affected"])["value"]
    found = table.set_index(["perturbed", "affected"])
    assert found["mean"].to_dict() == pytest.approx(grouped.mean().to_dict(), abs=1e-9)
    assert found["cells"].to_dict() == grouped.size().to_dict()
    assert table["mean"].is_monotonic_increasing
    summed_up = pq.read_table(Path(screens.at("null")) / "gene_shifts_summary").to_pandas()
    _, table = run("null", test="gene_shifts", overwrite=True)
    assert len(table) == len(summed_up)
    expected = {(row.genes[0], row.affected): row.deviation for row in summed_up.itertuples()}
    assert table.set_index(["perturbed", "affected"])["deviation"].to_dict() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(("joint", "single", "state"), [("anchored", "plain", ""), ("joint_states", "states", "beta")])
def test_combination(screens: Screens, run: Any, joint: str, single: str, state: str) -> None:
    summary, table = run(joint, test="combination", against=single, cells="cells", group="donor")
    alone = {(r.cell_id, r.gene): r.value for r in screens.rows(single).query("state == @state").itertuples()}
    rows = screens.rows(joint).query("state == @state")
    assert len(table) == rows["gene"].nunique() == summary["genes"]
    for row in table.itertuples():
        a, b = row.gene.split("+")
        own = rows[rows["gene"] == row.gene]
        first, second = (np.array([alone[cell, gene] for cell in own["cell_id"]]) for gene in (a, b))
        total = first + second if state else 1 - ((1 - first) + (1 - second))
        assert row.joint_minus_sum == pytest.approx((own["value"] - total).mean(), abs=1e-9)
        assert (row.single_1, row.single_2) == pytest.approx((first.mean(), second.mean()), abs=1e-9)
        assert (row.cells, row.cells_left_out) == (len(own), 0)
    assert table["p"].between(0, 1).all()


def test_concordance(screens: Screens, run: Any) -> None:
    summary, table = run("states", test="concordance", against="raised")
    assert set(table["gene"]) == set(GENES.split(","))
    keys = ["gene", "cell_id"]
    mine, theirs = (
        screens.rows(name).query("state == 'beta'").set_index(keys)["value"] for name in ("states", "raised")
    )
    both = pd.concat([mine, theirs], axis=1, keys=["a", "b"]).dropna().groupby("gene").mean()
    for row in table.itertuples():
        assert (row.shift_delete, row.shift_overexpress) == pytest.approx(tuple(both.loc[row.gene]), abs=1e-9)
        assert row.concordant == (row.shift_delete * row.shift_overexpress < 0)
    assert summary["concordant"] == table["concordant"].sum()
    assert summary["rank_correlation"] == pytest.approx(stats.spearmanr(both["a"], both["b"])[0])


@pytest.mark.parametrize(
    ("shifts", "flags", "text"),
    [
        ("plain", {}, "--shifts: got .*plain, a screen without states; takes one with --state-column"),
        ("plain", {"test": "concordance", "against": "raised"}, "--shifts: .* without states"),
        ("plain", {"test": "vs_null"}, "--null: got nothing; takes the output of ray_jobs.screen"),
        ("plain", {"test": "combination"}, "--against: got nothing"),
        (
            "plain",
            {"test": "mixture", "null": "null"},
            "--null: got .* beside --test mixture; takes --test vs_null",
        ),
        (
            "states",
            {"test": "concordance", "against": "raised", "group": "donor", "cells": "cells"},
            "--group: got donor",
        ),
        ("states", {"group": "donor"}, "--cells: got nothing"),
        ("states", {"cells": "cells"}, "--cells: got .* alone; takes --group or --anndata"),
        ("states", {"cells": "cells", "group": "type"}, "--group: got type; takes a column .* cell_type"),
        ("states", {"measure": "shift_gene"}, r"--measure: got shift_gene; takes a measure of the screen \(shift\)"),
        ("states", {"state": "beta"}, "--state: got beta beside --test goal_shift"),
        ("states", {"test": "mixture", "state": "gamma"}, "--state: got 'gamma'; takes one of beta, alpha"),
        ("plain", {"test": "mixture", "state": "beta"}, "--state: got 'beta'; takes none"),
        ("plain", {"test": "vs_null", "null": "states"}, "--null: got .* another --state-column .*cell_type"),
        ("plain", {"test": "vs_null", "null": "cells"}, "--null: got .* output of ray_jobs.tokenize"),
        ("plain", {"test": "vs_null", "null": "/nowhere"}, "--null: got /nowhere; takes the output directory"),
        ("plain", {"test": "combination", "against": "null"}, r"--against: got .* another --perturbation \(inhibit\)"),
        ("plain", {"test": "combination", "against": "plain"}, "--shifts: got single genes such as GENE00"),
        ("anchored", {"test": "combination", "against": "anchored"}, "--against: got no cell with every single gene"),
        (
            "states",
            {"test": "concordance", "against": "joint_states"},
            "--against: .* a screen of delete; takes overexpress",
        ),
        ("anchored", {"test": "gene_shifts"}, "--shifts: got .* without gene_shifts_summary and gene_shifts"),
    ],
)
def test_bad_input_is_refused(run: Any, tmp_path: Path, shifts: str, flags: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        run(shifts, **flags)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"cells": "other"}, InputError, "another table of cells"),
        ({"model": "other"}, InputError, "another model"),
        ({"layer": 0}, InputError, "another --layer"),
        ({"rows": "other"}, InputError, "another choice of cells"),
        ({"rank_shift": 2}, InputError, "another --rank-shift"),
    ],
)
def test_screens_that_differ_are_not_compared(
    screens: Screens, run: Any, tmp_path: Path, change: dict[str, Any], error: type, text: str
) -> None:
    changed_copy(screens, tmp_path, **change)
    with pytest.raises(error, match=f"--against: got .*{text}"):
        run("anchored", test="combination", against=str(tmp_path / "changed"))


def test_screens_of_other_vocabularies_or_that_have_not_finished_are_refused(
    screens: Screens, run: Any, tmp_path: Path
) -> None:
    shutil.copytree(screens.at("plain"), tmp_path / "changed")
    GeneVocabulary.from_medians({"A": 1.0, "B": 2.0}, max_length=8).save(str(tmp_path / "changed" / "_vocabulary"))
    with pytest.raises(VocabularyMismatch, match=r"--null: got .*a screen with the vocabulary"):
        run("plain", test="vs_null", null=str(tmp_path / "changed"))
    with pytest.raises(VocabularyMismatch, match=r"--shifts: got .* with shifts of vocabulary"):
        run(str(tmp_path / "changed"), test="mixture")
    manifest = json.loads((tmp_path / "changed" / "_manifest.json").read_text())
    (tmp_path / "changed" / "_manifest.json").write_text(json.dumps({**manifest, "finished": False}))
    with pytest.raises(InputError, match=r"--null: got .*an unfinished screen"):
        run("plain", test="vs_null", null=str(tmp_path / "changed"))


def test_cells_that_were_not_screened_are_refused(
    screens: Screens, small_data: SmallData, run: Any, tmp_path: Path
) -> None:
    data = anndata.read_h5ad(small_data.h5ad)[:50].copy()
    data.write_h5ad(tmp_path / "some.h5ad")
    tokenize.run(build(tokenize.TokenizeConfig, {
        "input": [str(tmp_path / "some.h5ad")], "vocabulary": small_data.vocabulary, "output": str(tmp_path / "cells"),
        "obs_columns": ["donor"],
    }))  # fmt: skip
    with pytest.raises(InputError, match=r"--cells: got .* other cells"):
        run("states", cells=str(tmp_path / "cells"), group="donor")


def test_a_finished_table_is_not_overwritten_by_chance(run: Any) -> None:
    run("plain", test="mixture")
    with pytest.raises(OutputExistsError, match="overwrite"):
        run("plain", test="mixture")
    run("plain", test="mixture", overwrite=True)


def test_bad_input_on_the_command_line_is_one_line_and_exit_code_2(screens: Screens, tmp_path: Path) -> None:
    flags = ["--shifts", screens.at("plain"), "--output", str(tmp_path / "out"), "--test", "vs_null"]
    command = [sys.executable, "-m", "ray_jobs.statistics", *flags]
    done = subprocess.run(command, cwd=REPOSITORY, text=True, capture_output=True, timeout=200, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "--null" in done.stderr
