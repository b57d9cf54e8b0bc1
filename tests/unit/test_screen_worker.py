"""One worker of a screen, without Ray: cells that raise are set aside, and what is not a cell's fault is not."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from geneformer_ray.compute.encoder import Encoder
from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.compute.perturbation import PerturbationPlan
from geneformer_ray.compute.reading import Reading
from geneformer_ray.data.shards import finished_items, write_shard
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.distribute.screen_worker import LOST_ALONE, LOST_TOGETHER, ScreenWorker
from geneformer_ray.errors import InputError

FEARED = 30


class Fearful(Encoder):
    """Fails at one token, as a defect might that only some cell brings out."""

    error: Exception = ZeroDivisionError("by a feared gene")

    def hidden(self, groups: Sequence[Any], *, first_only: bool = False) -> list[torch.Tensor]:
        if any((group == FEARED).any() for group in groups):
            raise self.error
        return super().hidden(groups, first_only=first_only)


@pytest.fixture
def worker(model_directory: Path, vocabulary: GeneVocabulary, tmp_path: Path) -> ScreenWorker:
    cells = [[2, 3, 4, 5], [6, FEARED, 7], [8, 9, 10], list(range(2, 19)), [4, 5]]
    table = pa.table({"cell_id": list("abcde"), "input_ids": cells})
    write_shard(str(tmp_path / "cells"), "", 0, table, vocabulary=vocabulary.digest)
    made = ScreenWorker(
        cells=str(tmp_path / "cells"),
        runner={"model": str(model_directory), "cpus": 1, "gpu": False},
        plan=asdict(PerturbationPlan()),
        reading=asdict(Reading()),
        output=str(tmp_path / "out"),
        tables=["cell_shifts"],
    )
    made.runner.encoder = Fearful.load(model_directory, execution=choose_execution(cpus=1, gpu=False))
    return made


def test_only_the_cells_that_fail_are_set_aside(worker: ScreenWorker) -> None:
    counts = worker({"item": 3, "rows": [0, 1, 2, 3]})
    assert finished_items(worker.output) == {3: counts}
    assert counts["rejected"].keys() == {"1", "3"}
    assert counts["rejected"]["1"] == "ZeroDivisionError: by a feared gene"
    assert "17 tokens" in counts["rejected"]["3"]
    assert (counts["events"], counts["events_rejected"]) == (7, 3)  # a cell that is too long has no events
    shifts = pq.read_table(f"{worker.output}/cell_shifts")
    assert sorted(set(shifts["cell_id"].to_pylist())) == ["a", "c"]
    rejects = pq.read_table(f"{worker.output}/_rejects").to_pylist()
    assert rejects == [{"cell_id": "b", "reason": counts["rejected"]["1"]},
                       {"cell_id": "d", "reason": counts["rejected"]["3"]}]  # fmt: skip


def test_an_item_of_bad_cells_alone_is_finished(worker: ScreenWorker) -> None:
    counts = worker({"item": 0, "rows": [1]})
    assert (counts["events"], counts["rows"], counts["events_rejected"]) == (0, 0, 3)


def test_a_part_of_a_cell_has_its_events_alone(worker: ScreenWorker) -> None:
    counts = worker({"item": 0, "rows": [0], "part": [1, 3]})
    assert pq.read_table(f"{worker.output}/cell_shifts")["genes"].to_pylist() == [["GENE01"], ["GENE02"]]
    assert (counts["events"], counts["rows"]) == (2, 2)
    assert worker({"item": 1, "rows": [1], "part": [0, 2]})["events_rejected"] == 2


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (MemoryError(), InputError),  # of the machine: another one may have more
        (OSError("store is gone"), OSError),
        (InputError("--embedding", "cls", "mean"), InputError),
        (RuntimeError("CUDA error: device-side assert triggered"), RuntimeError),
    ],
)
def test_what_is_not_a_cells_fault_ends_the_run(
    worker: ScreenWorker, monkeypatch: pytest.MonkeyPatch, error: Exception, raised: type[Exception]
) -> None:
    monkeypatch.setattr(Fearful, "error", error)
    with pytest.raises(raised):
        worker({"item": 0, "rows": np.arange(3).tolist()})
    assert finished_items(worker.output) == {}


def test_a_cell_in_parts_counts_once_and_its_tokens_with_each_event(worker: ScreenWorker) -> None:
    first = worker({"item": 0, "rows": [0], "part": [0, 1]})
    other = worker({"item": 1, "rows": [0], "part": [1, 4]})
    assert (first["cells"], other["cells"]) == (1, 0)
    assert 3 * first["tokens"] == other["tokens"] == 3 * len(worker.table.read(np.array([0])).input_ids[0])


def test_a_part_is_set_aside_with_the_rest_of_its_cell(worker: ScreenWorker) -> None:
    worker({"item": 0, "rows": [0], "part": [0, 2]})
    worker({"item": 1, "rows": [0], "part": [2, 4]})
    first = worker({"item": 0, "rows": [0], "part": [0, 2], "reason": "its last event"})
    second = worker({"item": 1, "rows": [0], "part": [2, 4], "reason": "its last event"})
    assert [(one["events"], one["rows"], one["events_rejected"]) for one in (first, second)] == [(0, 0, 2)] * 2
    assert finished_items(worker.output) == {0: first, 1: second}
    assert pq.read_table(f"{worker.output}/cell_shifts").num_rows == 0
    # One cell, one row.
    assert pq.read_table(f"{worker.output}/_rejects").to_pylist() == [{"cell_id": "a", "reason": "its last event"}]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_cell_that_ends_its_process_is_set_aside(worker: ScreenWorker) -> None:
    """Nothing can be caught there: only what lies on disk tells the next process."""

    def end(self: Fearful, groups: Sequence[Any], **options: Any) -> list[torch.Tensor]:
        if any((group == FEARED).any() for group in groups):
            os._exit(9)
        return Encoder.hidden(self, groups, **options)

    worker.runner.encoder.hidden = end.__get__(worker.runner.encoder)
    ended = 0
    for _ in range(20):
        child = os.fork()
        if child == 0:
            worker({"item": 4, "rows": [0, 1, 2]})
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            break
        ended += 1
        assert finished_items(worker.output) == {}
    assert ended == LOST_TOGETHER + LOST_ALONE
    (counts,) = finished_items(worker.output).values()
    assert counts["rejected"].keys() == {"1"}
    assert "ended the process" in counts["rejected"]["1"]
    assert sorted(set(pq.read_table(f"{worker.output}/cell_shifts")["cell_id"].to_pylist())) == ["a", "c"]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_an_item_that_no_cell_alone_ends_is_given_up(worker: ScreenWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells are screened, but what is written of them together ends the process: no one cell is to blame."""
    monkeypatch.setattr(worker, "_write", lambda *_: os._exit(9))
    for _ in range(1 + LOST_TOGETHER + LOST_ALONE * 2):
        child = os.fork()
        if child == 0:
            worker({"item": 4, "rows": [0, 2]})
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    with pytest.raises(InputError, match="rows 0 to 2, which ended their process"):
        worker({"item": 4, "rows": [0, 2]})


def test_an_item_that_ends_leaves_no_attempt_behind(worker: ScreenWorker) -> None:
    worker({"item": 0, "rows": [0, 1, 2]})
    assert not list(Path(worker.output, "_attempts").iterdir())
