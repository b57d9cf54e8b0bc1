"""Outputs: claimed once, resumed by the same plan only, never mixed; and shards that vouch for themselves."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from geneformer_ray.data import storage
from geneformer_ray.data.shards import finished_items, mark_finished, write_shard
from geneformer_ray.errors import InputError

PLAN: dict[str, Any] = {"job": "screen", "cells": "abc", "filter": {"state": ("alpha", "beta")}, "layer": -1}


@pytest.fixture
def output(tmp_path: Path) -> str:
    return str(tmp_path / "runs" / "output")


def refusal(output: str, plan: dict[str, Any], **options: bool) -> str:
    """Claim in vain, and give the one line that says why; nothing there is touched."""
    before = {path: path.read_bytes() for path in Path(output).rglob("*") if path.is_file()}
    with pytest.raises(InputError) as raised:
        storage.claim_output(output, plan, **({"overwrite": False, "resume": True} | options))
    assert {path: path.read_bytes() for path in Path(output).rglob("*") if path.is_file()} == before
    assert len(str(raised.value).splitlines()) == 1
    assert raised.value.field == "--output"
    return str(raised.value)


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_fresh_output_is_made(output: str, there: bool, overwrite: bool) -> None:
    if there:
        Path(output).mkdir(parents=True)
    assert storage.claim_output(output, PLAN, overwrite=overwrite, resume=True) is False
    assert Path(output).is_dir()


def test_a_finished_run_is_refused_and_the_way_out_is_named(output: str) -> None:
    storage.claim_output(output, PLAN, overwrite=False)
    storage.finish_output(output, PLAN, {"rows": 3})
    for resume in (True, False):
        error = refusal(output, PLAN, resume=resume)
        assert "finished" in error
        assert "--overwrite" in error
        assert output in error


def test_overwrite_leaves_nothing_of_the_old_run(output: str) -> None:
    storage.claim_output(output, PLAN, overwrite=False)
    write_shard(output, "cell_shifts", 4, pa.table({"value": [1.0]}))
    mark_finished(output, 4, {"rows": 1})
    storage.finish_output(output, PLAN, {})
    assert storage.claim_output(output, PLAN | {"layer": 0}, overwrite=True, resume=True) is False
    assert finished_items(output) == {}
    assert not (Path(output) / "cell_shifts").exists()
    assert storage.claim_output(output, PLAN | {"layer": 0}, overwrite=False, resume=True) is True


def test_an_unfinished_run_of_the_same_plan_is_resumed(output: str) -> None:
    storage.claim_output(output, PLAN, overwrite=False, resume=True)
    mark_finished(output, 0, {"rows": 1})
    # A plan as a new process makes it: other objects, another order, tuples where JSON has lists.
    again = {"layer": -1, "filter": {"state": ["alpha", "beta"]}, "cells": "abc", "job": "screen"}
    assert storage.claim_output(output, again, overwrite=False, resume=True) is True
    assert finished_items(output).keys() == {0}


def test_a_job_that_cannot_resume_refuses_an_unfinished_run(output: str) -> None:
    storage.claim_output(output, PLAN, overwrite=False)
    assert "--overwrite" in refusal(output, PLAN, resume=False)


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (PLAN | {"layer": 0}, "layer was -1, is 0"),
        (PLAN | {"cells": "def"}, "cells was 'abc', is 'def'"),
        (PLAN | {"seed": 1}, "seed was None, is 1"),
        ({key: value for key, value in PLAN.items() if key != "cells"}, "cells was 'abc', is None"),
    ],
)
def test_another_plan_is_refused_and_the_difference_named(output: str, plan: dict[str, Any], says: str) -> None:
    storage.claim_output(output, PLAN, overwrite=False, resume=True)
    error = refusal(output, plan)
    assert says in error
    assert "--overwrite" in error


def test_files_of_someone_else_are_refused(output: str) -> None:
    Path(output).mkdir(parents=True)
    (Path(output) / "thesis.tex").write_text("years of work")
    assert "--overwrite" in refusal(output, PLAN)


def test_a_file_is_no_output_even_to_overwrite(tmp_path: Path) -> None:
    file = tmp_path / "output"
    file.write_text("x")
    for overwrite in (False, True):
        assert "not a file" in refusal(str(file), PLAN, overwrite=overwrite)
    assert file.read_text() == "x"


# ---------------------------------------------------------------------- JSON and paths


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1', b"\xff\xfe"])
def test_broken_json_is_one_line(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "broken.json"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"--states: got .*broken\.json; takes a readable JSON") as raised:
        storage.read_json(str(file), "--states")
    assert len(str(raised.value).splitlines()) == 1


def test_missing_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.json; takes a file that exists"):
        storage.read_json(str(tmp_path / "nowhere.json"))


def test_json_comes_back_as_it_went(tmp_path: Path) -> None:
    content = {"β": [1, 2.5, None], "a": {"nested": "ζ"}}
    path = storage.join(str(tmp_path), "new", "folders", "content.json")
    storage.write_json(path, content)
    assert storage.read_json(path) == content
    assert "β" in Path(path).read_text(encoding="utf-8")


def test_paths_and_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs") == str(tmp_path / "runs")
    assert storage.absolute("s3://bucket/key") == "s3://bucket/key"
    storage.write_bytes("runs/b.txt", b"b")
    storage.write_bytes(f"file://{tmp_path}/runs/a.txt", b"a")
    (tmp_path / "runs" / "folder.txt").mkdir()
    assert storage.list_files("runs", ".txt") == ["runs/a.txt", "runs/b.txt"]
    assert storage.list_files("nowhere") == []
    assert storage.read_bytes("runs/a.txt") == b"a"
    assert (storage.exists("runs/a.txt"), storage.exists("runs/c.txt")) == (True, False)
    assert (storage.is_directory("runs"), storage.is_directory("runs/a.txt")) == (True, False)
    with pytest.raises(InputError, match="nosuch://x"):
        storage.exists("nosuch://x")


# ---------------------------------------------------------------------- shards


def test_shards_are_one_table_and_doing_one_again_replaces_it(output: str) -> None:
    for number, values in [(0, [1, 2]), (1, [3]), (0, [4, 5])]:
        write_shard(output, "cells", number, pa.table({"value": values}))
        mark_finished(output, number, {"rows": len(values)})
    assert sorted(ds.dataset(storage.join(output, "cells")).to_table()["value"].to_pylist()) == [3, 4, 5]
    assert {number: counts["rows"] for number, counts in finished_items(output).items()} == {0: 2, 1: 1}


def test_what_vouches_for_shards_is_no_part_of_the_table(output: str) -> None:
    """Readers of Parquet directories pass over the names that begin with an underscore."""
    storage.claim_output(output, PLAN, overwrite=False)
    write_shard(output, "", 0, pa.table({"value": [1]}))
    mark_finished(output, 0, {})
    storage.finish_output(output, PLAN, {})
    assert ds.dataset(output, format="parquet").to_table()["value"].to_pylist() == [1]


def test_a_shard_alone_is_not_finished(output: str) -> None:
    write_shard(output, "cells", 0, pa.table({"value": [1]}))
    assert finished_items(output) == {}


@pytest.mark.parametrize("left", [0, 1, 10, -2])
def test_a_half_written_progress_file_counts_for_nothing(output: str, left: int) -> None:
    """What a worker that was killed while writing leaves behind: its item is done again."""
    mark_finished(output, 0, {"rows": 1})
    mark_finished(output, 1, {"rows": 1})
    (file,) = [path for path in Path(output).rglob("*.json") if json.loads(path.read_text())["item"] == 1]
    file.write_bytes(file.read_bytes().rstrip()[:left])
    assert finished_items(output).keys() == {0}
    mark_finished(output, 1, {"rows": 1})
    assert finished_items(output).keys() == {0, 1}


def test_overwrite_deletes_only_what_a_run_made(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="--overwrite"):
        storage.claim_output(str(tmp_path), {}, overwrite=True)
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize("output", ["data/cells", "data/cells/screen", "data"])
def test_an_output_never_holds_or_lies_in_an_input(tmp_path: Path, output: str) -> None:
    cells = tmp_path / "data" / "cells"
    cells.mkdir(parents=True)
    with pytest.raises(InputError, match="--output"):
        storage.claim_output(str(tmp_path / output), {}, overwrite=True, inputs=[str(cells), None])
    storage.claim_output(str(tmp_path / "data" / "cells2"), {}, overwrite=False, inputs=[str(cells)])


# ---------------------------------------------------------------------- what a reader found


@pytest.mark.parametrize("form", ["relative", "link", "uri"])
def test_an_output_that_is_also_read_is_refused_by_whatever_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    output = tmp_path / "vocabulary"
    storage.claim_output(str(output), {"job": "vocabulary"}, overwrite=False)
    (output / "vocabulary.json").write_text("{}")
    (tmp_path / "link").symlink_to(output)
    monkeypatch.chdir(tmp_path)
    source = {"relative": "vocabulary", "link": str(tmp_path / "link"), "uri": output.as_uri()}[form]
    with pytest.raises(InputError, match="which the job reads"):
        storage.claim_output(str(output), {"job": "tokenize"}, overwrite=True, inputs=[source])
    assert (output / "vocabulary.json").exists()


def test_a_directory_is_stamped_by_the_files_in_it(tmp_path: Path) -> None:
    store = tmp_path / "cells.zarr"
    (store / "X" / "data").mkdir(parents=True)
    chunk = store / "X" / "data" / "0"
    chunk.write_bytes(b"one")
    before, top = storage.stamp(str(store)), store.stat().st_mtime_ns
    assert storage.stamp(str(store)) == before
    chunk.write_bytes(b"other")
    os.utime(store, ns=(top, top))
    assert storage.stamp(str(store)) != before


def test_a_place_that_cannot_be_written_is_one_line() -> None:
    with pytest.raises(InputError, match=r"--output: got /dev/null/x; takes a place that can be written") as raised:
        storage.claim_output("/dev/null/x", {}, overwrite=False)
    assert len(str(raised.value).splitlines()) == 1


def test_remove_takes_files_directories_and_nothing(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_text("x")
    storage.remove(str(tmp_path / "a" / "b" / "file"))
    assert not (tmp_path / "a" / "b" / "file").exists()
    storage.remove(str(tmp_path / "a"))
    storage.remove(str(tmp_path / "a"))
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """A write that fails leaves what was there, and nothing beside it."""
    file = tmp_path / "shard.parquet"
    storage.write_bytes(str(file), b"first")
    with pytest.raises(TypeError):
        storage.write_bytes(str(file), 5)  # type: ignore[arg-type]
    assert file.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_killed_process_left_is_cleared_when_its_run_goes_on(output: str) -> None:
    storage.claim_output(output, PLAN, overwrite=False, resume=True)
    left = Path(output, "cells", ".part-000001.parquet.0123abcd.part")
    left.parent.mkdir()
    left.write_bytes(b"half")
    write_shard(output, "cells", 0, pa.table({"value": [1]}))
    assert ds.dataset(storage.join(output, "cells")).to_table().num_rows == 1
    assert storage.claim_output(output, PLAN, overwrite=False, resume=True)
    assert not left.exists()
    assert storage.list_files(storage.join(output, "cells")) == [storage.join(output, "cells", "part-000000.parquet")]
