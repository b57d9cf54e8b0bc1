"""An MLflow server that is killed while a training runs: the models stay, one line says what finishes the job."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import httpx
import pytest

from tests.chaos.cluster import free_port
from tests.chaos.record import Record
from tests.chaos.training_setting import (
    NAME,
    TrainingSetting,
    assert_recorded_once,
    assert_same,
    trained,
    within_an_epoch,
)
from tests.integration.processes import Job, seconds_until_none

pytestmark = [pytest.mark.chaos, pytest.mark.integration, pytest.mark.timeout(1200)]


class Server:
    """``mlflow server`` over SQLite, on a free port of loopback."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()

    def _start(self) -> None:
        mlflow = str(Path(sys.executable).with_name("mlflow"))
        self._process = subprocess.Popen(
            [mlflow, "server", f"--backend-store-uri=sqlite:///{self.folder}/server.db",
             f"--artifacts-destination={self.folder}/artifacts", "--host=127.0.0.1", f"--port={self.port}",
             "--workers=1"],
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while not self.answers():
            assert time.monotonic() < deadline and self._process.poll() is None
            time.sleep(0.2)

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.uri}/health").status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """End it and its worker with SIGKILL."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def start_again(self) -> None:
        self._start()


def test_a_store_that_dies_costs_no_model_and_register_finishes(
    ray_folder: Path, tmp_path: Path, record: Callable[[Record], None]
) -> None:
    setting, whole, output = TrainingSetting.of(tmp_path), tmp_path / "whole", tmp_path / "out"
    with Server(tmp_path) as server:
        environment = {"MLFLOW_TRACKING_URI": server.uri, "RAY_TMPDIR": str(ray_folder)}
        baseline = setting.run(whole, **environment)
        assert baseline.code == 0, baseline.errors
        with setting.start(output, **environment) as job:
            job.wait_until(lambda: within_an_epoch(output))
            server.kill()
            assert not trained(output)
            without = job.finished()
        assert (without.code, without.summary) == (1, {})
        assert trained(output)
        assert "Traceback" not in without.errors
        last = without.errors.splitlines()[-1]
        command = f"python -m ray_jobs.register --output {output} --registered-model {NAME}"
        assert last.startswith(f"python -m ray_jobs.finetune: MLflow at {server.uri}")
        assert last.endswith(f"`{command}` finishes the job")

        server.start_again()
        found = re.search(r"`python -m ray_jobs\.(\w+) (.*)`", last)
        assert found
        finishing = (found.group(1), *shlex.split(found.group(2)))
        with Job(*finishing, **environment) as job:
            registered = job.finished()
        assert registered.code == 0, registered.errors
        assert_same(output, whole)
        assert_recorded_once(server.uri, 2)
        trials = [dict(line) for line in registered.summary["trials"]]
        lines = [run.summary["trials"][0] for run in (baseline, registered)]
        assert [line.pop("version") for line in lines] == [1, 2]
        run_ids = [line.pop("run_id") for line in lines]
        assert len(set(run_ids)) == 2
        assert lines[0] == lines[1]
        # Said again, it adds nothing.
        with Job(*finishing, **environment) as job:
            assert job.finished().summary["trials"] == trials
        assert_recorded_once(server.uri, 2)
    free = seconds_until_none(ray_folder, 30)
    killed = "the MLflow server, within an epoch: exit code 1; started again, and the command that the last line names"
    outcome = "the same weights, predictions and metrics to the last bit; one version"
    seconds = without.seconds + registered.seconds
    record(Record("fine-tune, MLflow server", killed, baseline.seconds, seconds, free, outcome))
