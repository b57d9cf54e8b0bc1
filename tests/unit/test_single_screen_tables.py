"""One screen's other tables: the mixture, the values of single cells, pairs of genes, AnnData."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from geneformer_ray.compute import gene_pairs
from geneformer_ray.compute.cell_values import aggregate_tables
from geneformer_ray.compute.gene_pairs import gene_shift_table
from geneformer_ray.compute.gene_shift_summary import GENE_SHIFTS_SUMMARY
from geneformer_ray.compute.impact_mixture import ImpactMixture, mixture_table
from geneformer_ray.compute.shift_anndata import shift_anndata, write_anndata
from geneformer_ray.compute.shift_tables import GENE_SHIFTS
from geneformer_ray.errors import InputError
from tests.unit.simulated_screens import Row, frame_of, shift_table, similarities

# ---------------------------------------------------------------------- mixture


def mixed_means(seed: int, genes: int = 500, share: float = 0.1) -> tuple[pa.Table, set[str]]:
    """Similarities near 1, as real ones lie; a tenth of the genes with a loss ten times as large."""
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    affected = set()
    for gene in range(genes):
        hit = rng.random() < share
        loss = rng.normal(1e-3, 1e-4) if hit else rng.normal(1e-4, 2e-5)
        if hit:
            affected.add(f"G{gene}")
        rows.extend((f"c{cell}", [f"G{gene}"], "", 1 - loss + rng.normal(scale=1e-5)) for cell in range(3))
    return shift_table(rows, measure="similarity"), affected


@pytest.mark.parametrize("seed", range(12))
def test_the_component_of_the_lower_similarity_is_the_one_with_impact(seed: int) -> None:
    shifts, affected = mixed_means(seed)
    table, mixture = mixture_table(shifts, seed=seed)
    assert set(table.loc[table["impact_component"], "gene"]) == affected
    assert mixture.mean[0] == pytest.approx(1e-4, rel=0.1)
    assert mixture.mean[1] == pytest.approx(1e-3, rel=0.1)
    assert mixture.weight[1] == pytest.approx(len(affected) / 500, abs=1e-6)
    assert table["impact_component"].is_monotonic_decreasing
    for _, part in table.groupby("impact_component"):
        assert part["similarity"].is_monotonic_increasing


def test_mixture_columns_equal_a_loop_over_genes() -> None:
    shifts, _ = mixed_means(0, genes=60)
    table, mixture = mixture_table(shifts, symbols={"G3": "INS"})
    frame = frame_of(shifts)
    for row in table.itertuples():
        own = frame.loc[frame["gene"] == row.gene, "value"]
        assert row.similarity == pytest.approx(own.mean(), rel=1e-12)
        assert row.cells == len(own)
        assert row.impact_share == np.mean([mixture.probability(np.array([1 - v]))[0] > 0.5 for v in own])
        assert row.impact_component == (row.impact_probability > 0.5)
    assert table.set_index("gene").loc["G3", "symbol"] == "INS"


def test_impact_of_shifts_is_their_size() -> None:
    rng = np.random.default_rng(0)
    size = {f"G{i}": rng.normal(0, 1e-3) if i > 9 else (-1) ** i * rng.normal(0.05, 2e-3) for i in range(200)}
    shifts = shift_table(
        (f"c{cell}", [gene], state, value) for gene, value in size.items() for cell in range(2)
        for state in ("alpha", "beta")
    )  # fmt: skip
    table, _ = mixture_table(shifts, state="beta")
    assert set(table.loc[table["impact_component"], "gene"]) == {f"G{i}" for i in range(10)}
    assert set(np.sign(table["shift_to_beta"].head(10))) == {-1.0, 1.0}


@settings(deadline=None, max_examples=50)
@given(
    st.floats(-1, 1), st.floats(1e-3, 1), st.floats(1e-2, 1), st.floats(1e-2, 1), st.floats(0.01, 0.99),
    st.lists(st.floats(-3, 3), min_size=1, max_size=20),
)  # fmt: skip
def test_impact_probability_is_bayes_between_the_means_and_certain_outside(
    low: float, gap: float, a: float, b: float, weight: float, values: list[float]
) -> None:
    mixture = ImpactMixture((low, low + gap), (a, b), (1 - weight, weight))
    value = np.array([*values, low + gap / 2, low + gap / 3])
    found = mixture.probability(value)
    assert ((found >= 0) & (found <= 1)).all()
    assert (found[value > low + gap] == 1).all()
    assert (found[value < low] == 0).all()
    for v, p in zip(value, found, strict=True):
        if low < v < low + gap:
            log = stats.norm.logpdf(v, [low, low + gap], [a, b]) + np.log([1 - weight, weight])
            assert p == pytest.approx(np.exp(log[1] - np.logaddexp(*log)), rel=1e-6, abs=1e-9)


def test_mixture_refuses_what_has_no_two_components() -> None:
    one = shift_table([("c1", ["A"], "", 0.5), ("c1", ["B"], "", 0.5)], measure="similarity")
    with pytest.raises(InputError, match="shifts: got 2 genes of one impact"):
        mixture_table(one)
    with pytest.raises(InputError, match="shifts: got a table with no shifts to states"):
        mixture_table(one, state="beta")


# ---------------------------------------------------------------------- single cells


@pytest.mark.parametrize("state", [None, "beta"])
def test_aggregate_gives_each_cell_and_what_they_come_to(state: str | None) -> None:
    shifts = similarities(genes=6)
    if state:
        rows = frame_of(shifts)
        shifts = shift_table(
            (row.cell_id, row.genes, one, row.value) for row in rows.itertuples() for one in ("alpha", state)
        )
    groups = {f"cell{i}": f"donor{i % 3}" for i in range(12)}
    summary, cells = aggregate_tables(shifts, state=state, symbols={"GENE3": "INS"}, groups=groups)
    name = "similarity" if state is None else "shift_to_beta"
    assert list(cells.columns) == ["cell_id", "group", "gene", "symbol", name]
    frame = frame_of(shifts)
    expected = frame[frame["state"] == (state or "")].set_index(["gene", "cell_id"])["value"]
    found = cells.set_index(["gene", "cell_id"])[name]
    pd.testing.assert_series_equal(found.sort_index(), expected.sort_index(), check_names=False)
    assert (cells["group"] == cells["cell_id"].map(groups)).all()
    for row in summary.itertuples():
        own = expected[row.gene]
        numbers = (row.mean, row.deviation, row.median, row.minimum, row.maximum, row.cells)
        assert numbers == pytest.approx((own.mean(), own.std(ddof=0), own.median(), own.min(), own.max(), len(own)))
    assert summary["mean"].is_monotonic_increasing if state is None else summary["mean"].is_monotonic_decreasing
    assert cells["gene"].drop_duplicates().tolist() == summary["gene"].tolist()
    assert set(cells.loc[cells["gene"] == "GENE3", "symbol"]) == {"INS"}
    with pytest.raises(InputError, match="groups"):
        aggregate_tables(shifts, state=state, groups={})


# ---------------------------------------------------------------------- pairs of genes


def gene_rows(seed: int = 0, cells: int = 9) -> pa.Table:
    rng = np.random.default_rng(seed)
    genes = list("ABCD")
    rows = []
    for cell in range(cells):
        for event in (["A"], ["B"], ["A", "C"] if cell % 2 else ["C", "A"]):
            for affected in genes:
                if affected not in event and rng.random() < 0.8:
                    rows.append((f"c{cell}", event, affected, 1 - abs(rng.normal(scale=1e-3))))
    return pa.table([list(column) for column in zip(*rows, strict=True)], schema=GENE_SHIFTS)


def check_pairs(table: Any, rows: pa.Table) -> None:
    expected = frame_of(rows).groupby(["gene", "affected"])["value"].agg(["mean", "count", lambda v: v.std(ddof=0)])
    found = table.astype({"perturbed": str, "affected": str}).set_index(["perturbed", "affected"])
    assert found.index.is_unique
    assert set(found.index) == set(expected.index)
    expected = expected.loc[found.index]
    np.testing.assert_allclose(found["mean"], expected["mean"], atol=1e-12)
    np.testing.assert_allclose(found["deviation"], expected["<lambda_0>"], atol=1e-10)
    assert found["cells"].tolist() == expected["count"].tolist()
    assert table["mean"].is_monotonic_increasing


def test_pairs_equal_a_loop_in_one_table_or_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = gene_rows()
    table = gene_shift_table(rows, symbols={"A": "x", "B": "x"})
    check_pairs(table, rows)
    assert dict(zip(table["perturbed"], table["perturbed_symbol"], strict=True)) == {"A": "x", "B": "x", "A+C": "x+C"}
    assert dict(zip(table["affected"], table["affected_symbol"], strict=True)) == {
        "A": "x",
        "B": "x",
        "C": "C",
        "D": "D",
    }
    monkeypatch.setattr(gene_pairs, "ROWS_HELD", 10)
    for part in range(7):
        pq.write_table(rows.slice(part * 15, 15 if part < 6 else None), tmp_path / f"part-{part}.parquet")
    check_pairs(gene_shift_table(ds.dataset(tmp_path)), rows)


def test_pairs_that_a_screen_summed_up_are_the_same() -> None:
    rows = gene_rows()
    grouped = frame_of(rows).groupby(["gene", "affected"])["value"]
    summary = pa.table(
        [
            [gene.split("+") for gene, _ in grouped.groups],
            [affected for _, affected in grouped.groups],
            grouped.size().tolist(),
            grouped.mean().tolist(),
            grouped.std(ddof=0).tolist(),
        ],
        schema=GENE_SHIFTS_SUMMARY,
    )
    check_pairs(gene_shift_table(summary), rows)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda rows: rows.slice(0, 0), "no gene shifts; takes a screen with --gene-shifts"),
        (lambda rows: rows.drop_columns(["affected"]), "shifts: got a table without affected"),
        (lambda rows: rows.set_column(3, "value", pa.array([float("nan")] * len(rows), pa.float32())), "value: got"),
        (lambda rows: rows.set_column(2, "affected", pa.nulls(len(rows), pa.string())), "affected: got an empty value"),
    ],
)
def test_broken_pairs_are_refused(change: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        gene_shift_table(change(gene_rows()))


# ---------------------------------------------------------------------- AnnData


def test_anndata_keeps_cells_genes_and_what_is_absent(tmp_path: Path) -> None:
    shifts = similarities(genes=6)
    frame = frame_of(shifts)
    ranked = pd.DataFrame({"gene": ["GENE5", "GENE3", "GENE1"], "symbol": ["E", "INS", "A"], "p_T/NK": [0.1, 0.2, 0.3]})
    cells = [f"cell{i}" for i in reversed(range(13))]
    obs = pd.DataFrame({"donor/id": ["d"] * 13, "age": range(13)}, index=cells)
    write_anndata(shift_anndata(shifts, ranked, obs=obs, about={"layer": -1}), str(tmp_path / "deep" / "x.h5ad"))
    found = anndata.read_h5ad(tmp_path / "deep" / "x.h5ad")
    assert found.obs_names.tolist() == cells[1:]  # cell12 was not screened
    assert found.obs["age"].tolist() == list(range(1, 13))
    assert found.var_names.tolist() == ["GENE5", "GENE3", "GENE1"]
    assert found.var["symbol"].tolist() == ["E", "INS", "A"]
    assert found.varm["statistics"]["p_T_NK"].tolist() == [0.1, 0.2, 0.3]
    assert json.loads(found.uns["screen"]) == {"layer": -1}
    assert found.X.dtype == np.float32
    values = {(row.cell_id, row.gene): row.value for row in frame.itertuples()}
    expected = [[values.get((cell, gene), np.nan) for gene in found.var_names] for cell in found.obs_names]
    np.testing.assert_array_equal(found.X, np.array(expected, dtype=np.float32))


def test_anndata_refuses_cells_that_obs_lacks() -> None:
    ranked = pd.DataFrame({"gene": ["GENE1"], "symbol": ["A"]})
    with pytest.raises(InputError, match="obs: got 1 of the 12 screened cells"):
        shift_anndata(similarities(), ranked, obs=pd.DataFrame(index=["cell0", "cell99"]))
