"""A decomposed screen: its statistics are those of the full shift; beside them, what the genes do by themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from geneformer_ray.compute.cell_values import aggregate_tables
from geneformer_ray.compute.combination import combination_table
from geneformer_ray.compute.concordance import concordance_table
from geneformer_ray.compute.decomposition import MEASURES
from geneformer_ray.compute.exact_values import exact_sentence, exact_share
from geneformer_ray.compute.impact_mixture import mixture_table
from geneformer_ray.compute.null_comparison import vs_null_table
from geneformer_ray.compute.rank_share import HITS, rank_of_top, rank_sentence
from geneformer_ray.compute.shift_anndata import shift_anndata
from geneformer_ray.compute.shift_rows import PARTS, read_shift_rows
from geneformer_ray.compute.statistics import goal_shift_table
from geneformer_ray.errors import InputError
from tests.unit.simulated_screens import decomposed, frame_of, only, shift_table

if TYPE_CHECKING:
    from collections.abc import Callable

EXTRA = ["shift_gene_to_beta", "shift_rank_to_beta", "rank_share", "gene_p", "gene_fdr", "hit"]
GROUPS = {f"cell{cell}": f"donor{cell % 3}" for cell in range(14)}


def goal_table(shifts: pa.Table, **options: Any) -> pd.DataFrame:
    standard: dict[str, Any] = {"goal": "beta", "start": "alpha", "bootstrap": 20}
    return goal_shift_table(shifts, **(standard | options))


def joint(shifts: pa.Table) -> pa.Table:
    """The same cells with pairs of genes, each measure of its own."""
    frame = shifts.to_pandas()
    one, two = (frame[frame["genes"].str[0] == gene] for gene in ("GENE3", "GENE5"))
    both = one.merge(two, on=["cell_id", "measure", "state"], suffixes=("", "_2"))
    both = both.assign(genes=[["GENE3", "GENE5"]] * len(both), value=both["value"] + 0.5 * both["value_2"])
    return pa.Table.from_pandas(both[frame.columns], schema=shifts.schema, preserve_index=False)


# Every mode that reads cell shifts, on a screen and a second one.
MODES: dict[str, Callable[..., list[pd.DataFrame]]] = {
    "goal_shift": lambda shifts, _, **options: [goal_table(shifts, groups=GROUPS, **options)],
    "vs_null": lambda shifts, other, **options: [vs_null_table(shifts, other, state="beta", bootstrap=20, **options)],
    "mixture": lambda shifts, _, **options: [mixture_table(shifts, state="beta", **options)[0]],
    "aggregate": lambda shifts, _, **options: list(aggregate_tables(shifts, state="beta", groups=GROUPS, **options)),
    "combination": lambda shifts, _, **options: [
        combination_table(joint(shifts), shifts, state="beta", bootstrap=20, **options)
    ],
}


def concordance(shifts: pa.Table, other: pa.Table) -> list[pd.DataFrame]:
    return [concordance_table(shifts, other, state="beta")]


@pytest.mark.parametrize("mode", [*MODES, "concordance"])
def test_the_statistics_of_the_full_shift_are_those_of_a_screen_without_parts(mode: str) -> None:
    """Byte for byte: written as CSV, and as numbers."""
    shifts, other = decomposed(0), decomposed(1)
    run = concordance if mode == "concordance" else MODES[mode]
    expected = run(only(shifts, "shift"), only(other, "shift"))
    for found, plain in zip(run(shifts, other), expected, strict=True):
        assert list(found.columns) == [*plain.columns, *(EXTRA if mode == "goal_shift" else [])]
        same = found[plain.columns]
        pd.testing.assert_frame_equal(same, plain, check_exact=True)
        assert same.to_csv(index=False).encode() == plain.to_csv(index=False).encode()


@pytest.mark.parametrize("measure", ["shift_gene", "shift_rank"])
@pytest.mark.parametrize("mode", MODES)
def test_a_part_is_tested_as_the_full_shift_is(mode: str, measure: str) -> None:
    shifts, other = decomposed(0), decomposed(1)
    renamed = [only(table, measure, called="shift") for table in (shifts, other)]
    for found, plain in zip(MODES[mode](shifts, other, measure=measure), MODES[mode](*renamed), strict=True):
        names = {f"shift_to_{state}": f"{measure}_to_{state}" for state in ("beta", "alpha")}
        pd.testing.assert_frame_equal(found, plain.rename(columns=names), check_exact=True)


def test_the_parts_equal_a_loop_over_genes() -> None:
    shifts = decomposed(0)
    table = goal_table(shifts).set_index("gene")
    frame = frame_of(shifts).query("state == 'beta'").set_index("measure")
    pool = frame.loc["shift_gene", "value"].to_numpy()
    p = {}
    for gene, row in table.iterrows():
        own = {measure: part["value"] for measure, part in frame[frame["gene"] == gene].groupby(level=0)}
        means = {measure: own[measure].mean() for measure in PARTS}
        assert row["shift_gene_to_beta"] == pytest.approx(means["shift_gene"], abs=1e-12)
        assert row["shift_rank_to_beta"] == pytest.approx(means["shift_rank"], abs=1e-9)
        assert row["shift_gene_to_beta"] + row["shift_rank_to_beta"] == pytest.approx(row["shift_to_beta"], abs=1e-15)
        whole = abs(means["shift_gene"]) + abs(means["shift_rank"])
        assert row["rank_share"] == pytest.approx(abs(means["shift_rank"]) / whole, rel=1e-6)
        p[gene] = stats.ranksums(pool, own["shift_gene"]).pvalue
        assert row["gene_p"] == pytest.approx(p[gene], rel=1e-9)
    assert table["gene_fdr"].tolist() == pytest.approx(stats.false_discovery_control(table["gene_p"].to_numpy()))
    assert table["rank_share"].between(0, 1).all()
    # The same test as of the measure alone.
    alone = goal_table(shifts, measure="shift_gene").set_index("gene").loc[table.index]
    assert (alone["p_beta"] == table["gene_p"]).all()
    assert (alone["fdr_beta"] == table["gene_fdr"]).all()


# Gene -> (gene effect, rank shift) of the genes beside forty that do nothing.
MADE = {
    "own": (0.04, 0.01),
    "mixed": (0.04, 0.06),
    "ranked": (0.0, 0.06),
    "turned": (-0.04, 0.10),
    "masked": (0.04, -0.04),
}  # fmt: skip


def made_screen(cells: int = 30) -> pa.Table:
    rng = np.random.default_rng(2)
    effects = MADE | {f"nothing{number}": (0.0, 0.0) for number in range(40)}
    parts = {
        (f"c{cell}", name): (gene + rng.normal(scale=0.004), rank + rng.normal(scale=0.004))
        for name, (gene, rank) in effects.items()
        for cell in range(cells)
    }
    tables = []
    for measure, value in zip(PARTS, (sum, lambda part: part[0], lambda part: part[1]), strict=True):
        rows = [(cell, [name], "beta", value(part)) for (cell, name), part in parts.items()]
        tables.append(shift_table(rows, measure=measure))
    return pa.concat_tables(tables)


def test_each_kind_of_hit_is_told() -> None:
    table = goal_table(made_screen(), start=None).set_index("gene")
    kinds = ["gene", "both", "rank", "rank", "hidden"]
    assert table.loc[list(MADE), "hit"].tolist() == kinds
    assert table.loc[list(MADE)[:4], "significant"].all()
    assert not table.loc["masked", "significant"]
    assert set(kinds) | {"none"} == set(HITS)
    assert (table.drop(index=list(MADE))["hit"] == "none").all()
    assert table.loc["turned", "gene_fdr"] < 0.05  # significant, but the other way
    assert table.loc["ranked", "rank_share"] > 0.9 > table.loc["mixed", "rank_share"] > 0.5 > 0.3 > table.loc[
        "own", "rank_share"
    ]  # fmt: skip


def test_what_the_top_is_made_of_is_told_in_a_sentence() -> None:
    table = goal_table(made_screen(), start=None)
    about = rank_of_top(table, "beta", top=3)
    chosen = table[table["gene"].isin(["mixed", "ranked", "turned"])]
    assert about["rank_share"] == pytest.approx(sorted(chosen["rank_share"])[1])
    assert (about["genes"], about["hits"], about["mostly_rank"], about["keep"]) == (3, True, 3, 1)
    assert about["of_all"] == {"gene": 1, "both": 1, "rank": 2, "hidden": 1, "none": 40}
    assert rank_sentence(about) == (
        "Of the shift of the 3 strongest hits, 72% is rank shift (median); it is the larger part in 3 of them, and 1 "
        "stays significant, in the same direction, with ranks held."
    )
    assert rank_of_top(table, "beta")["genes"] == 4  # the hits there are, and no other gene to make it twenty
    alone = rank_of_top(table, "beta", top=1)
    assert rank_sentence(alone) == (
        "Of the shift of the strongest hit, 59% is rank shift, and it stays significant with ranks held."
    )
    none = rank_of_top(table.assign(significant=False, hit="none"), "beta", top=2)
    assert rank_sentence(none).endswith("; it is the larger part in 2 of them. No gene is significant.")
    still = table.assign(rank_share=np.nan)
    assert rank_sentence(rank_of_top(still, "beta")) == "No gene shifts cells, neither by itself nor by its rank."


def test_parts_of_other_events_are_refused() -> None:
    shifts = decomposed(0)
    is_gene = pa.compute.equal(shifts["measure"], "shift_gene").to_numpy()
    missing = np.ones(len(shifts), dtype=bool)
    missing[np.flatnonzero(is_gene)[:4]] = False
    with pytest.raises(InputError, match=r"shifts: got \d+ rows of shift_gene beside \d+ of shift to 'beta'"):
        goal_table(shifts.filter(pa.array(missing)))
    frame = shifts.to_pandas()
    frame.loc[is_gene, "cell_id"] = frame.loc[is_gene, "cell_id"] + "x"  # as many, of other cells
    with pytest.raises(InputError, match="of other events"):
        goal_table(pa.Table.from_pandas(frame, schema=shifts.schema, preserve_index=False))


def test_a_measure_that_is_not_there_is_refused_with_those_that_are() -> None:
    plain, parts = only(decomposed(0), "shift"), decomposed(0)
    there = r"measure: got shift_gene; takes a measure of the screen \(shift\): screen --decompose writes the others"
    for mode, run in MODES.items():
        with pytest.raises(InputError, match=there):
            run(plain, plain, measure="shift_gene")
        if mode == "vs_null":
            with pytest.raises(InputError, match="null: got a table with shift; takes one with shift_gene"):
                run(parts, plain, measure="shift_gene")
    with pytest.raises(InputError, match="goal: got 'gamma'; takes a state of the table"):
        goal_table(parts, measure="shift_gene", goal="gamma")
    similarity = shift_table([("c", ["A"], "", 0.9)], measure="similarity")
    with pytest.raises(InputError, match="measure: got shift_rank; takes shift: without states"):
        mixture_table(similarity, measure="shift_rank")


def test_the_measures_are_those_that_a_decomposition_writes() -> None:
    assert PARTS == MEASURES


def test_an_anndata_has_the_parts_as_layers() -> None:
    shifts = decomposed(0)
    ranked = goal_table(shifts)
    for measure in PARTS:
        found = shift_anndata(shifts, ranked, state="beta", measure=measure)
        plain = shift_anndata(only(shifts, measure, called="shift"), ranked, state="beta")
        np.testing.assert_array_equal(found.X, plain.X)
        assert set(found.layers) == set(PARTS) - {measure}
        assert not plain.layers
    full = shift_anndata(shifts, ranked, state="beta")
    np.testing.assert_allclose(full.layers["shift_gene"] + full.layers["shift_rank"], full.X, atol=1e-7)


# ---------------------------------------------------------------------- estimates


def marked(shifts: pa.Table, genes: tuple[str, ...], cells: tuple[str, ...] = ()) -> pa.Table:
    """Mark the values of some genes in all cells, and of all genes in some cells, as exact."""
    frame = shifts.to_pandas()
    exact = frame["genes"].str[0].isin(genes) | frame["cell_id"].isin(cells)
    return shifts.append_column("exact", pa.array(exact.to_numpy()))


@pytest.mark.parametrize("parts", [False, True])
def test_a_gene_says_how_many_of_its_values_are_exact(parts: bool) -> None:
    shifts = decomposed(0) if parts else only(decomposed(0), "shift")
    table = goal_table(marked(shifts, ("GENE3",), ("cell0", "cell1")))
    plain = goal_table(shifts)
    assert list(table.columns) == [*plain.columns, "exact_share"]
    pd.testing.assert_frame_equal(table[plain.columns], plain, check_exact=True)
    cells = frame_of(only(shifts, "shift")).query("state == 'beta'").groupby("gene")["cell_id"].agg(set)
    for row in table.itertuples():
        expected = 1.0 if row.gene == "GENE3" else len(cells[row.gene] & {"cell0", "cell1"}) / row.cells
        assert row.exact_share == pytest.approx(expected)
    assert table["exact_share"].between(0, 1).all()


@pytest.mark.parametrize("mode", [*MODES, "concordance"])
def test_every_mode_reads_a_table_of_estimates(mode: str) -> None:
    shifts, other = decomposed(0), decomposed(1)
    run = concordance if mode == "concordance" else MODES[mode]
    added = {"goal_shift": ["exact_share"], "aggregate": ["exact"]}.get(mode, [])
    estimated = run(marked(shifts, ("GENE3",)), marked(other, ("GENE3",)))
    for found, plain in zip(estimated, run(shifts, other), strict=True):
        assert [name for name in found.columns if name not in plain.columns] in ([], added)
        pd.testing.assert_frame_equal(found[plain.columns], plain, check_exact=True)
    if mode == "aggregate":
        assert set(estimated[1].loc[estimated[1]["exact"], "gene"]) == {"GENE3"}


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(12)), st.lists(st.booleans(), min_size=12, max_size=12))
def test_exact_stays_with_its_row_in_any_order(order: list[int], exact: list[bool]) -> None:
    rows = [(f"c{number % 4}", [f"G{number // 4}"], "beta", number / 8) for number in range(12)]
    table = shift_table(rows).append_column("exact", pa.array(exact)).take(order)
    found = read_shift_rows(table, measure="shift", states=["beta"])
    assert found.exact_N is not None
    assert {value * 8: truth for value, truth in zip(found.value_N, found.exact_N, strict=True)} == dict(
        enumerate(exact)
    )


def test_the_share_of_exact_values_is_told() -> None:
    shifts = marked(decomposed(0), ("GENE3",))
    rows = frame_of(only(decomposed(0), "shift")).query("state == 'beta'")
    share = exact_share(shifts, "beta", "shift_gene")
    assert share == pytest.approx((rows["gene"] == "GENE3").mean())
    assert exact_share(decomposed(0), "beta") is None
    assert exact_share(shifts, "nowhere") is None
    table = goal_table(shifts)
    hits = int(table["significant"].sum())
    assert hits
    assert exact_sentence(0.125, table) == (
        "12.5% of the values are exact; the others are first-order estimates. All values are exact of 1 of "
        f"{len(table)} genes, and of 1 of {hits} hits."
    )
    assert exact_sentence(0.5) == "50.0% of the values are exact; the others are first-order estimates."
    assert exact_sentence(1.0, table) == "All values are exact."


@pytest.mark.parametrize(
    ("column", "text"),
    [
        (lambda rows: pa.array([1.0] * rows), "exact: got a column of double; takes true or false"),
        (lambda rows: pa.array([None] + [True] * (rows - 1)), "exact: got an empty value"),
    ],
)
def test_marks_that_are_no_truth_values_are_refused(column: Callable[[int], pa.Array], text: str) -> None:
    shifts = only(decomposed(0), "shift")
    with pytest.raises(InputError, match=text):
        goal_table(shifts.append_column("exact", column(len(shifts))))
