"""Statistics of a screen: equal to upstream's and to scipy's gene by gene, whatever the order of the rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geneformer_ray.compute.bootstrap import bootstrap_effect_interval, bootstrap_mean_interval
from geneformer_ray.compute.statistics import goal_shift_table, sign_consistency
from geneformer_ray.errors import InputError
from tests.unit.simulated_screens import CELL_SHIFTS, Row, frame_of, shift_table

if TYPE_CHECKING:
    from collections.abc import Callable

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"


def random_screen(seed: int = 0, cells: int = 12, genes: int = 15, seen: float = 0.7) -> pa.Table:
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for cell in range(cells):
        for gene in np.flatnonzero(rng.random(genes) < seen):
            towards = 0.02 * (gene == 3) - 0.02 * (gene == 5)
            for state, direction in (("beta", 1.0), ("alpha", -1.0), ("delta", 0.0)):
                value = direction * towards + rng.normal(scale=0.01)
                rows.append((f"cell{cell}", [f"GENE{gene}"], state, value))
    return shift_table(rows)


def table_of(shifts: pa.Table | ds.Dataset, **options: Any) -> Any:
    standard: dict[str, Any] = {"goal": "beta", "start": "alpha", "alternatives": ["delta"], "bootstrap": 50}
    return goal_shift_table(shifts, **(standard | options))


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_golden_statistics_equal_upstream(version: str) -> None:
    folder = GOLDEN / version / "isp"
    if not folder.is_dir():
        pytest.skip(f"golden numbers are not at {GOLDEN}")
    states = json.loads((folder / "delete_all_states.options.json").read_text())["cell_states_to_model"]
    shifts = shift_table(
        (row["cell_id"], [str(token) for token in row["perturbed"]], row["target"], row["value"])
        for row in pq.read_table(folder / "delete_all_states.parquet").to_pylist()
    )
    alternative = states["alt_states"][0]
    ours = goal_shift_table(
        shifts,
        goal=states["goal_state"],
        start=states["start_state"],
        alternatives=[alternative],
        bootstrap=0,
    )
    upstream = pd.read_csv(folder / "stats_goal_state_shift.csv")

    same_columns = {
        f"shift_to_{states['goal_state']}": "Shift_to_goal_end",
        f"p_{states['goal_state']}": "Goal_end_vs_random_pval",
        f"fdr_{states['goal_state']}": "Goal_end_FDR",
        f"shift_to_{alternative}": f"Shift_to_alt_end_{alternative}",
        f"p_{alternative}": f"Alt_end_vs_random_pval_{alternative}",
        f"fdr_{alternative}": f"Alt_end_FDR_{alternative}",
    }
    assert ours["gene"].tolist() == upstream["Gene"].astype(str).tolist()  # the order is upstream's, too
    for column, name in same_columns.items():
        np.testing.assert_allclose(ours[column], upstream[name], rtol=1e-9, atol=1e-12, err_msg=column)
    assert ours["cells"].tolist() == upstream["N_Detections"].tolist()
    assert ours["significant"].tolist() == upstream["Sig"].astype(bool).tolist()


def test_columns_and_order() -> None:
    table = table_of(random_screen(), symbols={"GENE3": "INS"})
    states = [f"{kind}_{state}" for state in ("beta", "alpha", "delta") for kind in ("shift_to", "p", "fdr")]
    assert list(table.columns) == [
        "gene", "symbol", *states, "effect", "ci_low", "ci_high", "cells", "significant",
    ]  # fmt: skip
    assert table["significant"].dtype == bool
    assert table["cells"].dtype == np.int64
    significant = table["significant"].to_numpy()
    assert significant.any()
    assert not significant.all()
    assert (np.diff(significant.astype(int)) <= 0).all()
    for part in (table[significant], table[~significant]):
        assert (np.diff(part["shift_to_beta"]) <= 0).all()
    assert table.loc[0, ["gene", "symbol"]].tolist() == ["GENE3", "INS"]
    assert (table["gene"] == table["symbol"]).sum() == len(table) - 1


def test_row_order_and_files_do_not_matter(tmp_path: Path) -> None:
    shifts = random_screen()
    expected = table_of(shifts)
    order = np.random.default_rng(1).permutation(len(shifts))
    shuffled = shifts.take(order)
    pd.testing.assert_frame_equal(table_of(shuffled), expected, check_exact=True)
    for part in range(3):
        pq.write_table(shuffled.slice(part * 200, 200 if part < 2 else None), tmp_path / f"part-{part}.parquet")
    pd.testing.assert_frame_equal(table_of(ds.dataset(tmp_path)), expected, check_exact=True)


def test_sets_of_genes_are_one_event_in_any_order() -> None:
    rows: list[Row] = [
        ("c1", ["B", "A"], "beta", 0.1),
        ("c2", ["A", "B"], "beta", 0.3),
        ("c1", ["C"], "beta", 0.0),
        ("c2", ["D+E"], "beta", 0.0),  # a key that holds the joiner stays one key
    ]
    options: dict[str, Any] = {"start": None, "alternatives": [], "symbols": {"A": "x", "B": "y", "D+E": "z"}}
    table = table_of(shift_table(rows), **options).set_index("gene")
    assert set(table.index) == {"A+B", "C", "D+E"}
    assert table.loc["A+B", "symbol"] == "x+y"
    assert table.loc["A+B", "cells"] == 2
    assert table.loc["A+B", "shift_to_beta"] == pytest.approx(0.2)
    assert table.loc["D+E", "symbol"] == "z"


def test_effect_is_the_distance_from_the_pool_in_its_deviations() -> None:
    shifts = random_screen()
    table = table_of(shifts).set_index("gene")
    frame: Any = shifts.to_pandas()
    goal = frame[frame["state"] == "beta"].astype({"value": float})
    own = goal["value"][goal["genes"].str[0] == "GENE3"]
    expected = (own.mean() - goal["value"].mean()) / goal["value"].std(ddof=0)
    assert table.loc["GENE3", "effect"] == pytest.approx(expected, rel=1e-12)
    assert table.loc["GENE3", "ci_low"] < expected < table.loc["GENE3", "ci_high"]


def test_bootstrap_follows_the_seed_and_not_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    shifts = random_screen()
    once, again, other = table_of(shifts, seed=1), table_of(shifts, seed=1), table_of(shifts, seed=2)
    pd.testing.assert_frame_equal(once, again, check_exact=True)
    assert not np.allclose(once["ci_low"], other["ci_low"], equal_nan=True)
    monkeypatch.setattr("geneformer_ray.compute.bootstrap.BLOCK_NUMBERS", 100)
    blocks = table_of(shifts, seed=1)
    np.testing.assert_allclose(blocks["ci_low"], once["ci_low"], rtol=1e-12)
    np.testing.assert_allclose(blocks["ci_high"], once["ci_high"], rtol=1e-12)


def slow_interval(value: Any, gene: Any, unit: Any, n_genes: int, replicates: int, seed: int) -> Any:
    """Draw the units one by one, copy their rows, and compute the effects as the docstring says."""
    effects = []
    n_units = unit.max() + 1
    for replicate in range(replicates):
        drawn = np.random.default_rng([seed, replicate]).integers(n_units, size=n_units)
        rows = np.concatenate([np.flatnonzero(unit == u) for u in drawn])
        v, g = value[rows], gene[rows]
        present = set(g)
        means = [v[g == k].mean() if k in present else np.nan for k in range(n_genes)]
        effects.append((np.array(means) - v.mean()) / v.std())
    return np.nanquantile(np.array(effects), [0.025, 0.975], axis=0)


def test_bootstrap_equals_a_slow_one() -> None:
    rng = np.random.default_rng(4)
    gene, unit = (a.ravel() for a in np.indices((6, 7)))
    keep = rng.random(gene.size) < 0.6
    gene, unit = gene[keep], unit[keep]
    value = rng.normal(size=gene.size) + 5
    low, high = bootstrap_effect_interval(value, gene, unit, 6, 80, 9)
    expected_low, expected_high = slow_interval(value, gene, unit, 6, 80, 9)
    alone = np.array([np.unique(unit[gene == k]).size < 2 for k in range(6)])
    np.testing.assert_allclose(low[~alone], expected_low[~alone], rtol=1e-9)
    np.testing.assert_allclose(high[~alone], expected_high[~alone], rtol=1e-9)
    assert np.isnan(low[alone]).all()


def test_bootstrap_of_means_equals_a_slow_one() -> None:
    rng = np.random.default_rng(5)
    gene, unit = (a.ravel() for a in np.indices((4, 6)))
    keep = rng.random(gene.size) < 0.7
    gene, unit = gene[keep], unit[keep]
    value = rng.normal(size=gene.size) + 5
    means = []
    for replicate in range(60):
        drawn = np.random.default_rng([3, replicate]).integers(unit.max() + 1, size=unit.max() + 1)
        rows = np.concatenate([np.flatnonzero(unit == u) for u in drawn])
        means.append([value[rows][gene[rows] == k].mean() if k in gene[rows] else np.nan for k in range(4)])
    expected = np.nanquantile(np.array(means), [0.025, 0.975], axis=0)
    np.testing.assert_allclose(bootstrap_mean_interval(value, gene, unit, 4, 60, 3), expected, rtol=1e-9)
    assert np.isnan(bootstrap_mean_interval(value, gene, unit * 0, 4, 60, 3)).all()
    assert np.isnan(bootstrap_mean_interval(value[:0], gene[:0], unit[:0], 4, 60, 3)).all()


def test_bootstrap_covers_a_known_effect() -> None:
    """Gene 0 of 20 lies one deviation above the rest; in most repeated screens the interval holds that."""
    genes, cells, screens = 20, 60, 60
    # The pool is a mixture: its mean is 1/20, its variance 1 + (1/20)(19/20).
    truth = (1 - 1 / genes) / np.sqrt(1 + (1 / genes) * (1 - 1 / genes))
    gene, cell = (a.ravel() for a in np.indices((genes, cells)))
    covered = 0
    for screen in range(screens):
        value = np.random.default_rng([7, screen]).normal(size=gene.size) + (gene == 0)
        low, high = bootstrap_effect_interval(value, gene, cell, genes, 200, screen)
        covered += bool(low[0] < truth < high[0])
    assert covered >= 0.85 * screens


def test_groups_widen_an_interval_that_cells_make_too_narrow() -> None:
    rng = np.random.default_rng(0)
    donors = [f"donor{i}" for i in range(6)]
    donor_effect = dict(zip(donors, rng.normal(scale=1.0, size=6), strict=True))
    rows: list[Row] = []
    groups = {}
    for cell in range(120):
        donor = donors[cell % 6]
        groups[f"c{cell}"] = donor
        rows.append((f"c{cell}", ["A"], "beta", donor_effect[donor] + rng.normal(scale=0.1)))
        rows.extend((f"c{cell}", [f"B{i}"], "beta", rng.normal(scale=1.0)) for i in range(4))
    options: dict[str, Any] = {"start": None, "alternatives": [], "bootstrap": 300}
    by_cell = table_of(shift_table(rows), **options).set_index("gene").loc["A"]
    by_group = table_of(shift_table(rows), groups=groups, **options).set_index("gene").loc["A"]
    assert by_group["effect"] == by_cell["effect"]
    assert by_group["ci_high"] - by_group["ci_low"] > 1.5 * (by_cell["ci_high"] - by_cell["ci_low"])


def test_groups_tell_in_how_many_donors_the_sign_holds() -> None:
    shifts = random_screen(cells=20)
    groups = {f"cell{cell}": f"donor{cell % 4}" for cell in range(20)}
    table = table_of(shifts, groups=groups)
    plain = table_of(shifts)
    assert list(table.columns) == [*plain.columns, "sign_consistency", "groups"]
    frame = frame_of(shifts).query("state == 'beta'")
    frame["donor"] = frame["cell_id"].map(groups)
    for row in table.itertuples():
        own = frame[frame["gene"] == row.gene]
        means = own.groupby("donor")["value"].mean()
        assert row.groups == len(means)
        assert row.sign_consistency == pytest.approx((np.sign(means) == np.sign(own["value"].mean())).mean())
    assert table.set_index("gene").loc["GENE3", "sign_consistency"] == 1


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(-2, 2)), max_size=30),
    st.permutations(range(4)),
)
def test_sign_consistency_is_a_share_that_names_of_groups_do_not_change(rows: Any, renamed: list[int]) -> None:
    gene, group, value = (np.array([row[i] for row in rows], dtype=np.int64) for i in range(3))
    share, groups = sign_consistency(value.astype(float), gene, group, 4)
    tested = ~np.isnan(share)
    assert ((share[tested] >= 0) & (share[tested] <= 1)).all()
    assert groups.tolist() == [np.unique(group[gene == code]).size for code in range(4)]
    again, _ = sign_consistency(value.astype(float), gene, np.array(renamed)[group], 4)
    np.testing.assert_array_equal(again, share)
    mirrored, _ = sign_consistency(-value.astype(float), gene, group, 4)
    np.testing.assert_array_equal(mirrored, share)


def test_one_cell_has_no_interval() -> None:
    rows: list[Row] = [("c1", ["A"], "beta", 0.1), ("c1", ["B"], "beta", 0.2), ("c2", ["B"], "beta", 0.4)]
    table = table_of(shift_table(rows), start=None, alternatives=[]).set_index("gene")
    assert table.loc["A", ["ci_low", "ci_high"]].isna().all()
    assert table.loc["B", ["ci_low", "ci_high"]].notna().all()
    assert table.loc["A", "effect"] < 0 < table.loc["B", "effect"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"goal": "gamma"}, "goal"),
        ({"start": "gamma"}, "start"),
        ({"alternatives": ["gamma"]}, "alternatives"),
        ({"start": "beta"}, "start"),
        ({"bootstrap": -1}, "bootstrap"),
        ({"fdr_level": 0.0}, "fdr_level"),
        ({"groups": {"cell0": "donor"}}, "groups"),
    ],
)
def test_wrong_options_name_the_field(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as caught:
        table_of(random_screen(), **change)
    assert caught.value.field == field


def test_an_unknown_goal_names_the_states_there_are() -> None:
    with pytest.raises(InputError, match=r"'gamma'.*alpha, beta, delta"):
        table_of(random_screen(), goal="gamma")


def broken_column(shifts: pa.Table) -> pa.Table:
    return shifts.drop_columns(["state"])


def broken_value(shifts: pa.Table) -> pa.Table:
    return pa.concat_tables([shifts, shift_table([("c", ["A"], "beta", float("nan"))])])


def broken_genes(shifts: pa.Table) -> pa.Table:
    empty = {"cell_id": "c", "genes": [None], "measure": "shift", "state": "beta", "value": 0.0}
    return pa.concat_tables([shifts, pa.Table.from_pylist([empty], schema=CELL_SHIFTS)])


def two_runs(shifts: pa.Table) -> pa.Table:
    return pa.concat_tables([shifts, shifts.slice(5, 2)])


@pytest.mark.parametrize(
    ("breaks", "field"),
    [(broken_column, "shifts"), (broken_value, "value"), (broken_genes, "genes"), (two_runs, "shifts")],
)
def test_a_broken_table_is_refused(breaks: Callable[[pa.Table], pa.Table], field: str) -> None:
    with pytest.raises(InputError) as caught:
        table_of(breaks(random_screen()))
    assert caught.value.field == field
