"""The pool of actors: threads, results, and bad input on the way."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
import torch

from geneformer_ray.distribute import fan_out as fan_out_module
from geneformer_ray.distribute.board import Board, Line
from geneformer_ray.distribute.fan_out import Pool, fan_out
from geneformer_ray.errors import InputError

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]


class Doubler:
    """Doubles numbers, and tells what it computes with."""

    def __init__(self, refused: int | None = None, model: str = "mine") -> None:
        if model != "mine":
            raise InputError("--model", model, "mine")
        self.refused = refused

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        if item["number"] == self.refused:
            raise InputError("number", item["number"], "another")
        if item.get("full"):
            raise OSError(errno.ENOSPC, "No space left on device")
        threads = [torch.get_num_threads(), int(os.environ["OMP_NUM_THREADS"])]
        return {"number": item["number"], "double": 2 * item["number"], "threads": threads}


@pytest.mark.parametrize("cpus", [1, 2])
def test_every_item_is_done_once_on_the_cpus_given(cpus: int) -> None:
    items = [{"number": number} for number in range(7)]
    results = list(fan_out(Doubler, {}, items, Pool(1, 2 // cpus, cpus=cpus)))
    assert sorted(result["number"] for result in results) == list(range(7))
    assert all(result["double"] == 2 * result["number"] for result in results)
    assert {tuple(result["threads"]) for result in results} == {(cpus, cpus)}


def test_bad_input_in_a_worker_keeps_its_field() -> None:
    with pytest.raises(InputError, match="number: got 3; takes another"):
        list(fan_out(Doubler, {"refused": 3}, [{"number": number} for number in range(5)], Pool(1, 1)))


def test_nothing_to_do_starts_nothing() -> None:
    assert list(fan_out(Doubler, {}, [], Pool(1, 2))) == []


def test_a_worker_that_cannot_start_says_why() -> None:
    with pytest.raises(InputError, match="--model: got theirs; takes mine"):
        list(fan_out(Doubler, {"model": "theirs"}, [{"number": 1}], Pool(1, 1)))


def test_a_full_disk_in_a_worker_is_told_as_such() -> None:
    with pytest.raises(OSError, match="No space left on device"):
        list(fan_out(Doubler, {}, [{"number": 1, "full": True}], Pool(1, 1)))


@pytest.mark.slow
def test_items_are_taken_as_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fan_out_module, "ITEMS_A_PIPELINE", 3)
    taken: list[int] = []

    def items() -> Iterator[dict[str, Any]]:
        for number in range(7):
            taken.append(number)
            yield {"number": number}

    results = fan_out(Doubler, {}, items(), Pool(1, 2))
    first = next(results)["number"]
    assert taken == [0, 1, 2]
    assert sorted([first, *(result["number"] for result in results)]) == list(range(7))


def test_a_pool_fits_the_cluster_or_is_refused() -> None:
    pool = Pool.of_cluster(model=True, largest=1)
    assert (pool.smallest, pool.largest, pool.execution()) == (1, 1, {"cpus": 1, "gpu": False})
    assert Pool.of_cluster(model=False, smallest=1).largest == 2
    with pytest.raises(InputError, match=r"--min-workers.*got 3 .*at most 2"):
        Pool.of_cluster(model=True, smallest=3)
    with pytest.raises(InputError, match=r"--gpus-per-worker.*at most 0"):
        Pool.of_cluster(model=True, gpus=0.5)


@pytest.mark.parametrize("seconds", [0.02, 0.2])
def test_a_run_hears_that_it_is_to_stop_however_often_it_tells(seconds: float) -> None:
    """Each step tells anew, and the answer to what was told last is never there yet."""
    board = ray.remote(num_cpus=0)(Board).remote()
    line = Line(board, "run")
    ray.get(board.join.remote("run", None))
    line.tell(0, "")
    assert ray.get(board.save.remote()) == ["run"]
    for step in range(1, 100):
        line.tell(step, "")
        if line.asked_to_stop():
            break
        time.sleep(seconds)
    assert step <= 3
    line.safe()
    assert ray.get(board.save.remote()) == []
    ray.kill(board)
