"""Tables of tokenised cells: ours, and other people's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geneformer_ray.data.cell_schema import cells_schema
from geneformer_ray.data.cells import CellTable
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError, VocabularyMismatch

rng = np.random.default_rng(7)
SEQUENCES = [rng.integers(2, 42, size).tolist() for size in rng.integers(0, 9, 23)]
STATES = [["beta", "alpha", "delta"][number % 3] for number in range(23)]
IDS = [f"cell {number}" for number in range(23)]


def table(start: int = 0, stop: int = 23, digest: str = "abc", **kinds: pa.DataType) -> pa.Table:
    """Some rows of the table that all tests know, as the tokenize job writes it."""
    schema = cells_schema(digest, {"state": pa.string(), "donor": pa.int64()})
    columns = {
        "cell_id": IDS[start:stop],
        "input_ids": SEQUENCES[start:stop],
        "length": [len(ids) for ids in SEQUENCES[start:stop]],
        "state": STATES[start:stop],
        "donor": [number // 10 for number in range(start, stop)],
    }
    return pa.table(columns, schema=schema)


def one_file(directory: Path) -> str:
    pq.write_table(table(), directory / "cells.parquet")
    return str(directory / "cells.parquet")


def row_groups(directory: Path) -> str:
    with pq.ParquetWriter(directory / "cells.parquet", table().schema) as writer:
        for start, stop in ((0, 5), (5, 6), (6, 13), (13, 15), (15, 23)):
            writer.write_table(table(start, stop))
    return str(directory)


def several_files(directory: Path) -> str:
    # Written in another order than their names', which alone counts.
    for name, start, stop in (("part-2", 11, 23), ("part-0", 0, 4), ("part-1", 4, 11)):
        pq.write_table(table(start, stop), directory / f"{name}.parquet", row_group_size=2)
    (directory / "notes.txt").write_text("not a table")
    (directory / "below").mkdir()
    pq.write_table(table(), directory / "below" / "part-0.parquet")
    return str(directory)


def hugging_face(directory: Path) -> str:
    import datasets

    datasets.disable_progress_bars()
    dataset = datasets.Dataset(table())
    dataset.save_to_disk(directory / "saved", num_shards=2)
    return str(directory / "saved")


FORMS = pytest.mark.parametrize("form", [one_file, row_groups, several_files, hugging_face])
Form = Callable[[Path], str]


def test_schema_of_tokenised_cells() -> None:
    schema = cells_schema("abc", {"state": pa.string()})
    assert schema.names == ["cell_id", "input_ids", "length", "state"]
    assert [schema.field(name).type for name in schema.names[:3]] == [pa.string(), pa.list_(pa.int32()), pa.int32()]


@FORMS
def test_every_form_holds_the_same_table(tmp_path: Path, form: Form) -> None:
    cells = CellTable(form(tmp_path))
    assert len(cells) == 23
    assert cells.cell_ids.tolist() == IDS
    assert cells.lengths.tolist() == [len(ids) for ids in SEQUENCES]
    assert cells.column("state", "--label").tolist() == STATES
    whole = cells.read(np.arange(23), ["state", "donor"])
    assert [ids.tolist() for ids in whole.input_ids] == SEQUENCES
    assert {ids.dtype for ids in whole.input_ids} == {np.dtype(np.int32)}
    assert whole.cell_ids == IDS
    assert whole.columns["donor"].tolist() == [number // 10 for number in range(23)]
    assert whole.lengths.tolist() == cells.lengths.tolist()


@FORMS
def test_every_form_has_the_same_digest(tmp_path: Path, form: Form) -> None:
    (tmp_path / "reference").mkdir()
    assert CellTable(form(tmp_path)).digest == CellTable(one_file(tmp_path / "reference")).digest


def test_digest_depends_on_ids_and_tokens_in_order(tmp_path: Path) -> None:
    digests = set()
    variants: dict[str, pa.Table] = {
        "whole": table(),
        "shorter": table(0, 22),
        "turned": table().take(list(reversed(range(23)))),
        "renamed": table().set_column(0, "cell_id", pa.array([*IDS[:-1], "other"])),
        "moved": table().set_column(1, "input_ids", pa.array([*SEQUENCES[1:], SEQUENCES[0]], pa.list_(pa.int32()))),
    }
    for name, variant in variants.items():
        pq.write_table(variant, tmp_path / f"{name}.parquet")
        digests.add(CellTable(str(tmp_path / f"{name}.parquet")).digest)
    assert len(digests) == len(variants)


@pytest.fixture(scope="module", params=[row_groups, several_files, hugging_face])
def cells(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CellTable:
    return CellTable(request.param(tmp_path_factory.mktemp("cells")))


@settings(max_examples=25)
@given(rows=st.lists(st.integers(0, 22), max_size=30))
def test_any_rows_in_any_order_equal_the_whole(cells: CellTable, rows: list[int]) -> None:
    read = cells.read(np.array(rows, dtype=np.int64), ["state"])
    assert read.cell_ids == [IDS[row] for row in rows]
    assert [ids.tolist() for ids in read.input_ids] == [SEQUENCES[row] for row in rows]
    assert read.columns["state"].tolist() == [STATES[row] for row in rows]
    assert len(read) == len(rows)
    assert cells.ids_of(np.array(rows, dtype=np.int64)) == read.cell_ids


def test_the_ids_may_be_asked_for_as_a_column(cells: CellTable) -> None:
    read = cells.read(np.array([20, 3]), ["cell_id"])
    assert read.columns["cell_id"].tolist() == read.cell_ids == ["cell 20", "cell 3"]


@pytest.mark.parametrize("layout", ["row groups", "files"])
def test_other_row_groups_are_not_read_for_a_few_cells(tmp_path: Path, layout: str) -> None:
    """So that what a worker holds does not grow with the table: twice the same id elsewhere goes unnoticed."""
    whole = table().set_column(0, "cell_id", pa.array([*IDS[:10], "twin", "twin", *IDS[12:]]))
    if layout == "files":
        for number, start in enumerate(range(0, 23, 5)):
            pq.write_table(whole.slice(start, 5), tmp_path / f"part-{number}.parquet")
    else:
        pq.write_table(whole, tmp_path / "cells.parquet", row_group_size=5)
    cells = CellTable(str(tmp_path))
    assert cells.read(np.array([22, 4, 9])).cell_ids == cells.ids_of(np.array([22, 4, 9])) == [
        "cell 22", "cell 4", "cell 9",
    ]  # fmt: skip
    for of_all in (lambda: cells.cell_ids, lambda: cells.digest):
        with pytest.raises(InputError, match="cell id twin 2 times"):
            of_all()


def test_row_groups_that_are_not_needed_may_be_unreadable(tmp_path: Path) -> None:
    file = tmp_path / "cells.parquet"
    pq.write_table(table().drop_columns("length"), file, row_group_size=10, compression="none")
    group = pq.ParquetFile(file).metadata.row_group(1)
    content = bytearray(file.read_bytes())
    for number in range(group.num_columns):
        column = group.column(number)
        start = column.dictionary_page_offset or column.data_page_offset
        content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    file.write_bytes(content)
    cells = CellTable(str(file))
    assert cells.read(np.array([21, 3]), ["state"]).cell_ids == ["cell 21", "cell 3"]
    for of_all in (lambda: cells.cell_ids, lambda: cells.lengths):
        with pytest.raises(OSError, match="page header"):
            of_all()


# ---------------------------------------------------------------------- other people's files


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint16(), pa.int32(), pa.int64()])
def test_any_integer_width_and_neither_id_nor_length(tmp_path: Path, kind: pa.DataType) -> None:
    for part, (start, stop) in enumerate([(0, 9), (9, 23)]):
        lists = pa.array(SEQUENCES[start:stop], pa.list_(kind))
        pq.write_table(pa.table({"input_ids": lists}), tmp_path / f"{part}.parquet")
    cells = CellTable(str(tmp_path))
    assert cells.vocabulary_digest is None
    assert cells.cell_ids.tolist() == [str(number) for number in range(23)]
    assert cells.lengths.tolist() == [len(ids) for ids in SEQUENCES]
    read = cells.read(np.array([22, 9, 8]))
    assert read.cell_ids == cells.ids_of(np.array([22, 9, 8])) == ["22", "9", "8"]
    assert [ids.tolist() for ids in read.input_ids] == [SEQUENCES[22], SEQUENCES[9], SEQUENCES[8]]
    assert read.input_ids[0].dtype == np.int32


def test_lengths_are_counted_in_a_hugging_face_directory_too(tmp_path: Path) -> None:
    import datasets

    dataset = datasets.Dataset(table().select(["input_ids"]))
    dataset.save_to_disk(tmp_path / "saved", num_shards=3)
    cells = CellTable(str(tmp_path / "saved"))
    assert cells.lengths.tolist() == [len(ids) for ids in SEQUENCES]
    assert cells.read(np.array([20, 1])).cell_ids == ["20", "1"]


@pytest.mark.parametrize("kind", [pa.int8(), pa.int64(), pa.uint32(), pa.string(), pa.large_string(), "categories"])
def test_ids_of_any_kind_are_text(tmp_path: Path, kind: Any) -> None:
    ids = pa.array([7, 5, 11, 9])
    ids = ids.cast(pa.string()).dictionary_encode() if kind == "categories" else ids.cast(kind)
    for number, start in enumerate((0, 2)):
        part = pa.table({"cell_id": ids[start : start + 2], "input_ids": [[2], [3]]})
        pq.write_table(part, tmp_path / f"{number}.parquet")
    cells = CellTable(str(tmp_path))
    assert cells.cell_ids.tolist() == ["7", "5", "11", "9"]
    assert cells.read(np.array([3, 0])).cell_ids == cells.ids_of(np.array([3, 0])) == ["9", "7"]


def test_a_number_reads_the_same_whatever_other_files_hold(tmp_path: Path) -> None:
    for number, ids in enumerate([pa.array([7, 5]), pa.array([11.0, 9.5])]):
        pq.write_table(pa.table({"cell_id": ids, "input_ids": [[2], [3]]}), tmp_path / f"{number}.parquet")
    cells = CellTable(str(tmp_path))
    assert cells.read(np.array([0, 1])).cell_ids == cells.cell_ids[:2].tolist()


def test_a_cell_without_an_id_is_refused(tmp_path: Path) -> None:
    for number, ids in enumerate([[7, 5], [11, None]]):
        pq.write_table(pa.table({"cell_id": ids, "input_ids": [[2], [3]]}), tmp_path / f"{number}.parquet")
    cells = CellTable(str(tmp_path))
    assert cells.read(np.array([1, 0])).cell_ids == ["5", "7"]
    for of_all in (lambda: cells.cell_ids, lambda: cells.read(np.array([3])), lambda: cells.ids_of(np.array([2, 3]))):
        with pytest.raises(InputError, match=r"--cells: got .* with a cell without cell_id; takes a table where"):
            of_all()


def test_files_of_one_table_may_differ_in_types(tmp_path: Path) -> None:
    """A block of cells whose column is all missing is written without a type."""
    parts = [
        {"input_ids": pa.array([[2, 3]], pa.list_(pa.int32())), "tissue": pa.array(["islet"])},
        {"input_ids": pa.array([[4]], pa.list_(pa.int64())), "tissue": pa.nulls(1)},
    ]
    for number, part in enumerate(parts):
        pq.write_table(pa.table(part), tmp_path / f"{number}.parquet")
    cells = CellTable(str(tmp_path))
    assert cells.column("tissue", "--label").tolist() == ["islet", None]
    assert cells.lengths.tolist() == [2, 1]
    assert [ids.tolist() for ids in cells.read(np.array([1, 0]), ["tissue"]).input_ids] == [[4], [2, 3]]


def test_categories_are_read_as_their_names(tmp_path: Path) -> None:
    for number, states in enumerate([["beta", "alpha"], ["delta", "beta"]]):
        part = {"input_ids": [[2], [3]], "state": pa.array(states).dictionary_encode()}
        pq.write_table(pa.table(part), tmp_path / f"{number}.parquet")
    cells = CellTable(str(tmp_path))
    assert cells.column("state", "--label").tolist() == ["beta", "alpha", "delta", "beta"]
    assert cells.read(np.array([2, 1]), ["state"]).columns["state"].tolist() == ["delta", "alpha"]
    assert cells.select({"state": ["beta"]}).tolist() == [0, 3]


# ---------------------------------------------------------------------- vocabularies


@pytest.mark.parametrize("form", [one_file, row_groups, several_files])
def test_the_vocabulary_digest_travels_with_the_files(tmp_path: Path, form: Form) -> None:
    assert CellTable(form(tmp_path)).vocabulary_digest == "abc"


def test_check_compares_digests_or_else_ids(tmp_path: Path, vocabulary: GeneVocabulary) -> None:
    def written(digest: str | None, highest: int) -> CellTable:
        file = tmp_path / f"{digest}-{highest}.parquet"
        schema = cells_schema(digest) if digest else cells_schema("").remove_metadata()
        columns = {"cell_id": ["a", "b"], "input_ids": [[2, highest], [3]], "length": [2, 1]}
        pq.write_table(pa.table(columns, schema=schema), file)
        return CellTable(str(file))

    written(vocabulary.digest, 41).check(vocabulary)
    written(vocabulary.digest, 41).check(vocabulary.with_cls())
    written(None, 41).check(vocabulary)
    with pytest.raises(VocabularyMismatch, match="someone"):
        written("someone", 41).check(vocabulary)
    with pytest.raises(VocabularyMismatch, match="token id 42"):
        written(None, 42).check(vocabulary)


# ---------------------------------------------------------------------- choosing cells


def test_select(cells: CellTable) -> None:
    assert cells.select({}).tolist() == list(range(23))
    assert cells.select({"state": ["alpha", "delta"]}).tolist() == [i for i in range(23) if STATES[i] != "beta"]
    both = cells.select({"state": ["alpha"], "donor": ["1", "9"]})
    assert both.tolist() == [row for row in range(10, 20) if STATES[row] == "alpha"]
    with pytest.raises(InputError, match=r"--filter: got state=gamma; takes .*at least one cell"):
        cells.select({"state": ["gamma"]})
    with pytest.raises(InputError, match=r"--filter: got tissue; takes a column .*state, donor"):
        cells.select({"tissue": ["islet"]})


@pytest.mark.parametrize("name", ["tissue", "input_ids"])
def test_a_column_that_is_not_there_is_named_with_its_flag(cells: CellTable, name: str) -> None:
    with pytest.raises(InputError, match=rf"--label: got {name}; takes a column .*cell_id, state, donor"):
        cells.column(name, "--label")


def test_in_state_keeps_the_start(cells: CellTable) -> None:
    rows = np.array([0, 1, 2, 3, 4])
    kept = cells.in_state(rows, "state", "beta", {"--goal": ["alpha"], "--alternatives": ["delta"]})
    assert kept.tolist() == [0, 3]
    # A goal's cells need not be among the chosen ones.
    assert cells.in_state(np.array([0]), "state", "beta", {"--goal": ["alpha"]}).tolist() == [0]


@pytest.mark.parametrize(
    ("start", "towards", "flag", "missing"),
    [
        ("gamma", {}, "--start", "gamma"),
        ("delta", {}, "--start", "delta"),  # in the table, but not among the chosen rows
        ("beta", {"--goal": ["gamma"]}, "--goal", "gamma"),
        ("beta", {"--goal": ["alpha"], "--alternatives": ["alpha", "pp"]}, "--alternatives", "pp"),
    ],
)
def test_in_state_names_a_state_that_no_cell_has(
    cells: CellTable, start: str, towards: dict[str, list[str]], flag: str, missing: str
) -> None:
    with pytest.raises(InputError, match=rf"{flag}: got '{missing}', which no cell has in state; takes .*alpha, beta"):
        cells.in_state(np.array([0, 1]), "state", start, towards)


# ---------------------------------------------------------------------- what is refused


def no_such_path(directory: Path) -> str:
    return str(directory / "nowhere")


def empty_directory(directory: Path) -> str:
    return str(directory)


def not_parquet(directory: Path) -> str:
    (directory / "cells.parquet").write_text("cell_id,input_ids\n" * 9)
    return str(directory)


def cut_short(directory: Path) -> str:
    path = Path(one_file(directory))
    path.write_bytes(path.read_bytes()[:-20])
    return str(path)


def no_tokens(directory: Path) -> str:
    pq.write_table(pa.table({"cell_id": ["a"]}), directory / "cells.parquet")
    return str(directory)


def two_tables(directory: Path) -> str:
    one_file(directory)
    pq.write_table(table().drop_columns("donor"), directory / "other.parquet")
    return str(directory)


def two_vocabularies(directory: Path) -> str:
    one_file(directory)
    pq.write_table(table(digest="def"), directory / "other.parquet")
    return str(directory)


def two_splits(directory: Path) -> str:
    import datasets

    datasets.disable_progress_bars()
    splits = {name: datasets.Dataset(table()) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(directory / "saved")
    return str(directory / "saved")


@pytest.mark.parametrize(
    ("form", "says"),
    [
        (no_such_path, "nowhere"),
        (empty_directory, "without Parquet files"),
        (not_parquet, "readable Parquet"),
        (cut_short, "readable Parquet"),
        (no_tokens, "input_ids"),
        (two_tables, "other columns"),
        (two_vocabularies, "several vocabularies"),
        (two_splits, "splits train, test"),
    ],
)
def test_what_is_no_table_of_cells_is_one_line(tmp_path: Path, form: Form, says: str) -> None:
    with pytest.raises(InputError, match=says) as raised:
        CellTable(form(tmp_path), flag="--my-cells")
    assert raised.value.field == "--my-cells"
    assert len(str(raised.value).splitlines()) == 1


def test_cells_in_memory_know_their_lengths(cells: CellTable) -> None:
    nothing: Any = cells.read(np.array([], dtype=np.int64))
    assert len(nothing) == 0
    assert nothing.lengths.tolist() == []


def test_a_cell_id_stands_once(tmp_path: Path) -> None:
    pq.write_table(pa.table({"cell_id": ["a", "b", "a"], "input_ids": [[2], [3], [4]]}), tmp_path / "cells.parquet")
    with pytest.raises(InputError, match="cell id a 2 times"):
        _ = CellTable(str(tmp_path / "cells.parquet")).cell_ids


def test_negative_ids_are_refused(tmp_path: Path, vocabulary: GeneVocabulary) -> None:
    pq.write_table(pa.table({"input_ids": [[2, -1]]}), tmp_path / "cells.parquet")
    with pytest.raises(InputError, match="negative"):
        CellTable(str(tmp_path / "cells.parquet")).check(vocabulary)
