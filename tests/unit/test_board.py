"""The board of a training, and what decides where its cluster listens: no Ray is started."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from geneformer_ray.distribute.board import Board

DECIDED = ("GLOO_SOCKET_IFNAME", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")


def test_runs_that_told_something_are_unsafe_until_they_say_otherwise() -> None:
    board = Board()
    for run in ("loads", "trains", "saved", "again"):
        assert board.join(run, f"controller of {run}")
    for run in ("trains", "saved", "again"):
        assert board.tell(run, 3, "") is False
    board.safe("saved")
    board.safe("again")
    board.join("again", "controller of again")  # its group was started anew
    assert board.save() == ["again", "trains"]
    board.tell("saved", 3, "predicts")
    board.safe("trains")
    assert board.save() == ["again"]


def test_who_asks_is_told_to_stop_and_nobody_begins() -> None:
    board = Board()
    board.join("first", 1)
    board.save()
    assert board.tell("first", 1, "") is True
    assert board.join("second", 2) is False
    assert board.stop() == [1, 2]


def test_a_run_that_ends_for_an_error_elsewhere_writes_no_checkpoint() -> None:
    board = Board()
    board.join("first", 1)
    board.stop()
    assert board.tell("first", 1, "") is False
    assert board.join("second", 2) is False


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ({}, True),
        ({"RAY_ADDRESS": "local"}, True),
        ({"RAY_ADDRESS": ""}, True),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, False),
        # A worker: whoever started its cluster has decided. On loopback it would not find those of other machines.
        ({"RAY_RAYLET_PID": "1"}, False),
    ],
)
def test_only_a_cluster_of_our_own_is_kept_on_loopback(given: dict[str, str], ours: bool) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "GLOO_"))}
    script = f"import os, geneformer_ray.distribute; print([name in os.environ for name in {DECIDED}])"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env={**clean, **given}, text=True, capture_output=True, check=True)
    assert done.stdout.strip() == str([ours] * len(DECIDED))
