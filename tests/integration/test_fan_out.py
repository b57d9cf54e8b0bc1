"""The pool of actors: threads, results, and bad input on the way."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from geneformer_ray.distribute.fan_out import Pool, fan_out
from geneformer_ray.errors import InputError

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]


class Doubler:
    """Doubles numbers, and tells what it computes with."""

    def __init__(self, refused: int | None = None) -> None:
        self.refused = refused

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        if item["number"] == self.refused:
            raise InputError("number", item["number"], "another")
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
