"""Two screens side by side: against a null screen, joint against single effects, opposite perturbations."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from geneformer_ray.compute.combination import combination_table
from geneformer_ray.compute.concordance import concordance_table, rank_correlation
from geneformer_ray.compute.null_comparison import vs_null_table
from geneformer_ray.errors import InputError
from tests.unit.simulated_screens import Row, frame_of, shift_table, similarities


def shifts_to_beta(seed: int, cells: int = 12, genes: int = 15, seen: float = 0.7) -> pa.Table:
    rng = np.random.default_rng(seed)
    return shift_table(
        (f"cell{cell}", [f"GENE{gene}"], state, 0.02 * (gene == 3) + rng.normal(scale=0.01))
        for cell in range(cells)
        for gene in np.flatnonzero(rng.random(genes) < seen)
        for state in ("alpha", "beta")
    )


def signed_rank(differences: Any) -> float:
    exact = len(differences) <= 50 and np.unique(np.abs(differences)).size == len(differences)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(stats.wilcoxon(differences, method="exact" if exact else "asymptotic").pvalue)


def assert_adjusted(fdr: Any, p: Any) -> None:
    tested = p.notna()
    np.testing.assert_allclose(fdr[tested], multipletests(p[tested], method="fdr_bh")[1], rtol=1e-9)
    assert fdr[~tested].isna().all()


# ---------------------------------------------------------------------- against a null screen


@pytest.mark.parametrize("state", [None, "beta"])
def test_vs_null_equals_a_loop_over_genes(state: str | None) -> None:
    make = similarities if state is None else shifts_to_beta
    test, null = make(0), make(1, 14, 13)
    table = vs_null_table(test, null, state=state, symbols={"GENE3": "INS"}, bootstrap=20).set_index("gene")
    mine, theirs = (frame[frame["state"] == (state or "")] for frame in map(frame_of, (test, null)))
    assert set(table.index) == set(mine["gene"])
    assert table.loc["GENE3", "symbol"] == "INS"
    for gene, row in table.iterrows():
        a, b = (frame[frame["gene"] == gene].set_index("cell_id")["value"] for frame in (mine, theirs))
        assert (row["cells"], row["null_cells"]) == (len(a), len(b))
        assert row["mean"] == pytest.approx(a.mean(), rel=1e-12)
        if not len(b):
            assert row[["null_mean", "p", "fdr", "paired_p"]].isna().all()
            assert not row["significant"]
            continue
        assert row["difference"] == pytest.approx(a.mean() - b.mean(), abs=1e-12)
        assert row["p"] == pytest.approx(stats.ranksums(a, b).pvalue, rel=1e-12)
        both = (a - b).dropna()
        assert row["paired_cells"] == len(both)
        assert row["paired_difference"] == pytest.approx(both.mean(), abs=1e-12)
        assert row["paired_p"] == pytest.approx(signed_rank(both.to_numpy()), rel=1e-9)
    assert_adjusted(table["fdr"], table["p"])
    assert_adjusted(table["paired_fdr"], table["paired_p"])
    assert (table["significant"] == (table["fdr"] < 0.05)).all()
    for _, part in table.groupby("significant"):
        assert (np.diff(part["difference"].dropna()) <= 0).all()


def test_a_screen_against_itself_differs_nowhere() -> None:
    table = vs_null_table(similarities(), similarities(), bootstrap=20)
    assert (table[["difference", "paired_difference", "ci_low", "ci_high"]] == 0).all(axis=None)
    assert (table["paired_p"] == 1).all()
    assert not table["significant"].any()


def test_pairs_see_what_differences_between_cells_hide() -> None:
    """Cells differ far more from each other than the two screens do."""
    rng = np.random.default_rng(3)
    of_cell = rng.normal(size=40)
    test, null = (
        shift_table((f"c{c}", ["A"], "beta", of_cell[c] + add + rng.normal(scale=0.01)) for c in range(40))
        for add in (0.05, 0.0)
    )
    row = vs_null_table(test, null, state="beta").iloc[0]
    assert row["p"] > 0.2
    assert row["paired_p"] < 1e-6
    assert row["ci_low"] < 0.05 < row["ci_high"]
    assert row["ci_high"] - row["ci_low"] < 0.02


def test_screens_of_other_cells_have_no_pairs() -> None:
    null = shift_table(
        [(f"other{i}", genes, "", value) for i, (genes, value) in enumerate(
            zip(similarities()["genes"].to_pylist(), similarities()["value"].to_pylist(), strict=True))],
        measure="similarity",
    )  # fmt: skip
    table = vs_null_table(similarities(), null)
    assert table["p"].notna().all()
    assert (table["paired_cells"] == 0).all()
    assert table[["paired_difference", "paired_p", "ci_low"]].isna().all(axis=None)


def test_groups_widen_the_interval_of_a_difference() -> None:
    rng = np.random.default_rng(0)
    groups = {f"c{i}": f"donor{i % 5}" for i in range(100)}
    of_donor = rng.normal(size=5)
    test = shift_table((f"c{i}", ["A"], "beta", of_donor[i % 5] + rng.normal(scale=0.1)) for i in range(100))
    null = shift_table((f"c{i}", ["A"], "beta", 0.0) for i in range(100))
    by_cell, by_group = (vs_null_table(test, null, state="beta", groups=g).iloc[0] for g in (None, groups))
    assert by_group["ci_high"] - by_group["ci_low"] > 1.5 * (by_cell["ci_high"] - by_cell["ci_low"])
    with pytest.raises(InputError, match="groups: got no group for 99 cells"):
        vs_null_table(test, null, state="beta", groups={"c0": "donor"})


def test_vs_null_refuses_what_shares_nothing() -> None:
    null = shift_table([("cell0", ["OTHER"], "", 0.9)], measure="similarity")
    with pytest.raises(InputError, match="null: got perturbations such as OTHER"):
        vs_null_table(similarities(), null)
    with pytest.raises(InputError, match=r"null: got a table with shifts to alpha, beta; takes .* similarities"):
        vs_null_table(similarities(), shifts_to_beta(0))


# ---------------------------------------------------------------------- combinations


def joint_and_single(measure: str, sizes: tuple[int, ...] = (2,), seed: int = 0, noise: float = 0.01) -> Any:
    """Screens of joint and single events; A and B together do 0.1 more than their sum, all others their sum."""
    rng = np.random.default_rng(seed)
    genes = list("ABCDE")
    joint: list[Row] = []
    single: list[Row] = []
    state = "beta" if measure == "shift" else ""
    for cell in range(20):
        effect = {gene: rng.normal(0.1, 0.05) for gene in genes}
        for gene in genes:
            if rng.random() < 0.9:
                single.append((f"c{cell}", [gene], state, effect[gene]))
        for size in sizes:
            for start in range(len(genes) - size + 1):
                members = genes[start : start + size]
                total = sum(effect[g] for g in members) + 0.1 * (members == ["A", "B"]) + rng.normal(scale=noise)
                joint.append((f"c{cell}", rng.permutation(members).tolist(), state, total))
    if measure == "similarity":
        joint, single = ([(c, g, s, 1 - v) for c, g, s, v in rows] for rows in (joint, single))
    return shift_table(joint, measure), shift_table(single, measure)


@pytest.mark.parametrize("measure", ["shift", "similarity"])
@pytest.mark.parametrize("sizes", [(2,), (3,), (2, 3)])
def test_combination_equals_a_loop_over_events(measure: str, sizes: tuple[int, ...]) -> None:
    joint, single = joint_and_single(measure, sizes)
    state = "beta" if measure == "shift" else None
    table = combination_table(joint, single, state=state, symbols={"A": "a"}, bootstrap=30)
    assert ("single_1" in table) == (sizes == (2,))
    assert table["gene"].is_unique
    value = {(row.cell_id, row.gene): row.value for row in frame_of(single).itertuples()}
    for row in table.itertuples():
        members = row.gene.split("+")
        sums, joints, lacking = [], [], 0
        for event in frame_of(joint).query("gene == @row.gene").itertuples():
            found = [value.get((event.cell_id, gene)) for gene in members]
            if None in found:
                lacking += 1
                continue
            sums.append(sum(found) if state else 1 - sum(1 - one for one in found))  # upstream's sum of similarities
            joints.append(event.value)
        excess = np.array(joints) - np.array(sums)
        assert (row.cells, row.cells_left_out) == (len(excess), lacking)
        assert row.joint == pytest.approx(np.mean(joints), abs=1e-12)
        assert row.sum_of_singles == pytest.approx(np.mean(sums), abs=1e-12)
        assert row.joint_minus_sum == pytest.approx(excess.mean(), abs=1e-12)
        assert row.p == pytest.approx(signed_rank(excess), rel=1e-9)
        assert row.ci_low < row.joint_minus_sum < row.ci_high
    assert_adjusted(table["fdr"], table["p"])
    if 2 in sizes:
        assert table.loc[0, ["gene", "symbol"]].tolist() == ["A+B", "a+B"]  # the one that is more than its sum
        assert table.loc[0, "significant"]
        assert abs(table.loc[0, "joint_minus_sum"]) == pytest.approx(0.1, abs=0.02)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.sampled_from(["shift", "similarity"]))
def test_independent_genes_add_up(seed: int, measure: str) -> None:
    joint, single = joint_and_single(measure, (2, 3), seed, noise=0.0)
    table = combination_table(joint, single, state="beta" if measure == "shift" else None, bootstrap=0)
    others = table[table["gene"] != "A+B"]
    np.testing.assert_allclose(others["joint_minus_sum"].dropna(), 0, atol=1e-6)  # of float32 values


def test_single_effects_stand_in_the_order_of_the_name() -> None:
    joint = shift_table([("c1", ["B", "A"], "beta", 0.5), ("c2", ["A", "B"], "beta", 0.75), ("c1", ["A"], "beta", 9.0)])
    single = shift_table(
        [(c, [g], "beta", v) for c in ("c1", "c2") for g, v in (("A", 0.25), ("B", 0.125))]
        + [("c1", ["A", "B"], "beta", 9.0)]
    )
    table = combination_table(joint, single, state="beta", bootstrap=0)
    assert table[["gene", "single_1", "single_2", "sum_of_singles", "joint", "cells"]].values.tolist() == [
        ["A+B", 0.25, 0.125, 0.375, 0.625, 2]
    ]


def test_combination_refuses_what_it_cannot_compare() -> None:
    joint, single = joint_and_single("shift")
    with pytest.raises(InputError, match="shifts: got single genes such as A"):
        combination_table(single, single, state="beta")
    with pytest.raises(InputError, match=r"against: got no cell with every single gene of an event, such as A\+B"):
        combination_table(joint, joint, state="beta")
    with pytest.raises(InputError, match="against: got no cell"):
        combination_table(joint, shift_table([("c0", ["A"], "beta", 0.1)]), state="beta")


# ---------------------------------------------------------------------- opposite perturbations


def test_concordance_equals_a_loop_over_genes() -> None:
    delete, raised = shifts_to_beta(0), shifts_to_beta(1, 10, 12)
    table = concordance_table(delete, raised, state="beta", symbols={"GENE3": "INS"})
    mine, theirs = (
        frame[frame["state"] == "beta"].set_index(["gene", "cell_id"])["value"]
        for frame in map(frame_of, (delete, raised))
    )
    both = pd.concat([mine, theirs], axis=1, keys=["delete", "overexpress"]).dropna()
    expected = both.groupby("gene").mean()
    assert set(table["gene"]) == set(expected.index)
    for row in table.itertuples():
        a, b = expected.loc[row.gene]
        assert (row.shift_delete, row.shift_overexpress) == pytest.approx((a, b), abs=1e-12)
        assert (row.sign_delete, row.sign_overexpress) == (np.sign(a), np.sign(b))
        assert row.concordant == (a * b < 0)
        assert row.cells == len(both.loc[row.gene])
    weaker = np.minimum(table["shift_delete"].abs(), table["shift_overexpress"].abs())
    for concordant in (True, False):
        assert (np.diff(weaker[table["concordant"] == concordant]) <= 0).all()
    assert table["concordant"].is_monotonic_decreasing
    found = rank_correlation(table["shift_delete"], table["shift_overexpress"])
    assert found == pytest.approx(stats.spearmanr(table["shift_delete"], table["shift_overexpress"])[0])


def test_opposite_screens_are_concordant_throughout() -> None:
    delete = shifts_to_beta(0)
    column = delete.schema.get_field_index("value")
    raised = delete.set_column(column, "value", pa.compute.negate(delete["value"]))
    table = concordance_table(delete, raised, state="beta", names=("inhibit", "activate"))
    assert table["concordant"].all()
    assert rank_correlation(table["shift_inhibit"], table["shift_activate"]) == pytest.approx(-1)
    assert rank_correlation(table["shift_inhibit"], table["shift_activate"] * 0) is None


def test_concordance_needs_shared_cells() -> None:
    other = shift_table([("elsewhere", ["GENE3"], "beta", 0.1)])
    with pytest.raises(InputError, match="against: got perturbations such as GENE3"):
        concordance_table(shifts_to_beta(0), other, state="beta")
