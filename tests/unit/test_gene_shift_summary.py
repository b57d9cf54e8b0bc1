"""Gene shifts summed up over cells, against plain lists."""

from __future__ import annotations

import statistics

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from hypothesis import given, settings
from hypothesis import strategies as st

from geneformer_ray.compute.gene_shift_summary import BUCKETS, GENE_SHIFTS_SUMMARY, pair_sums, summary_of_bucket
from geneformer_ray.compute.shifts import CellShifts

NAMES = np.array([f"G{number}" for number in range(200)], dtype=object)
values = st.floats(-1, 1, width=32)
events = st.lists(st.integers(4, 199), unique=True, min_size=1, max_size=3).map(tuple)


@st.composite
def cells(draw: st.DrawFn) -> list[CellShifts]:
    made = []
    for _ in range(draw(st.integers(0, 5))):
        genes = draw(st.lists(events, unique=True, max_size=4))
        affected = [np.array(draw(st.lists(st.integers(4, 12), unique=True, min_size=1)), np.int32) for _ in genes]
        numbers = [np.array([draw(values) for _ in kept], np.float32) for kept in affected]
        made.append(CellShifts(genes, np.zeros((len(genes), 1), np.float32), affected, numbers))
    return made


def summary(items: list[list[CellShifts]]) -> list[dict[str, object]]:
    tables = [pair_sums(item) for item in items]
    parts = []
    for bucket in range(BUCKETS):
        chosen = [table.filter(pc.equal(table["bucket"], bucket)) for table in tables]
        parts.append(summary_of_bucket(chosen, NAMES))
    assert all(part.schema == GENE_SHIFTS_SUMMARY for part in parts)
    return pa.concat_tables(parts).to_pylist()


@given(made=cells(), cut=st.integers(0, 5))
@settings(max_examples=40)
def test_every_pair_has_its_count_mean_and_deviation(made: list[CellShifts], cut: int) -> None:
    pairs: dict[tuple[tuple[str, ...], str], list[float]] = {}
    for cell in made:
        for genes, kept, numbers in zip(cell.genes, cell.affected or [], cell.gene_values or [], strict=True):
            for gene, value in zip(kept.tolist(), numbers.tolist(), strict=True):
                pairs.setdefault((tuple(NAMES[list(genes)]), NAMES[gene]), []).append(value)
    rows = summary([made[:cut], made[cut:]])
    assert {(tuple(row["genes"]), row["affected"]) for row in rows} == pairs.keys()  # type: ignore[arg-type]
    assert len(rows) == len(pairs)
    for row in rows:
        seen = pairs[tuple(row["genes"]), row["affected"]]  # type: ignore[arg-type, index]
        assert row["count"] == len(seen)
        np.testing.assert_allclose(row["mean"], statistics.fmean(seen), atol=1e-12)
        np.testing.assert_allclose(row["deviation"], statistics.pstdev(seen), atol=1e-7)


def test_tiny_deviations_near_one_survive() -> None:
    near = [np.array([value], np.float32) for value in (0.999999, 0.999998, 0.999997)]
    made = [CellShifts([(5,)], np.zeros((1, 1), np.float32), [np.array([6], np.int32)], [value]) for value in near]
    (row,) = summary([made])
    expected = np.std([float(value[0]) for value in near])
    assert abs(row["deviation"] - expected) < 1e-3 * expected  # type: ignore[operator]
