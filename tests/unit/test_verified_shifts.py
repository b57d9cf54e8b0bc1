"""Rows of estimates and of exact values, put together by what they are of."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geneformer_ray.compute.verified_shifts import GeneSums, exact_values, put_in_place, rows_of
from geneformer_ray.errors import InputError

Key = tuple[str, str, str, str]
KEYS = st.tuples(*(st.sampled_from(some) for some in ("abc", "GHIJ", ("shift", "shift_gene"), "xyz")))


def table_of(rows: dict[Key, float], *, exact: bool | None = None) -> pa.Table:
    cells, genes, measures, states = ([key[i] for key in rows] for i in range(4))
    columns = {
        "cell_id": pa.array(cells, pa.string()),
        "genes": pa.array([[gene] for gene in genes], pa.list_(pa.string())),
        "measure": pa.array(measures, pa.string()),
        "state": pa.array(states, pa.string()),
        "value": pa.array(list(rows.values()), pa.float32()),
    }
    return pa.table(columns | ({} if exact is None else {"exact": pa.array([exact] * len(rows), pa.bool_())}))


def numbered(keys: list[Key], first: int) -> dict[Key, float]:
    return {key: float(first + number) for number, key in enumerate(keys)}


@given(st.lists(KEYS, unique=True), st.lists(KEYS, unique=True))
def test_each_estimate_finds_its_exact_value(ours: list[Key], theirs: list[Key]) -> None:
    estimates, exact = numbered(ours, 0), numbered(theirs, 1_000)
    table = table_of(estimates, exact=False)
    found = exact_values(table, table_of(exact))
    assert found.dtype == np.float32
    assert np.isnan(found).tolist() == [key not in exact for key in ours]
    merged = put_in_place(table, found)
    assert merged.schema == table.schema
    assert merged["value"].to_pylist() == [exact.get(key, value) for key, value in estimates.items()]
    assert merged["exact"].to_pylist() == [key in exact for key in ours]
    assert merged.drop_columns(["value", "exact"]).equals(table.drop_columns(["value", "exact"]))


def test_what_was_exact_before_stays_so() -> None:
    table = table_of({("a", "G", "shift", "x"): 1.0}, exact=True)
    assert put_in_place(table, np.array([np.nan], dtype=np.float32)).equals(table)


def test_an_exact_value_stands_once() -> None:
    table = table_of({("a", "G", "shift", "x"): 1.0}, exact=False)
    with pytest.raises(InputError, match="twice"):
        exact_values(table, pa.concat_tables([table.drop_columns("exact")] * 2))


def test_events_of_several_genes_have_no_estimate() -> None:
    table = table_of({("a", "G", "shift", "x"): 1.0}, exact=False)
    several = table.set_column(1, "genes", pa.array([["G", "H"]]))
    with pytest.raises(InputError, match="several genes"):
        exact_values(several, table)


@given(st.lists(st.lists(KEYS, unique=True), max_size=4))
def test_sums_are_those_of_all_tables(parts: list[list[Key]]) -> None:
    names = ["<pad>", "J", "I", "H", "G", "F"]
    sums = GeneSums(names)
    values: dict[str, list[float]] = {}
    for number, keys in enumerate(parts):
        rows = numbered(keys, 7 * number)
        table = table_of(rows)
        chosen = table.filter(rows_of(table, "shift", "y"))
        sums.add(chosen)
        for (_, gene, measure, state), value in rows.items():
            if (measure, state) == ("shift", "y"):
                values.setdefault(gene, []).append(value)
    places, means = sums.means()
    assert {names[place]: mean for place, mean in zip(places, means, strict=True)} == pytest.approx(
        {gene: np.mean(of_gene) for gene, of_gene in values.items()}
    )
