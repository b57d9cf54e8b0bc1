"""The other front door: ``ray job submit --working-dir .`` on a running cluster with token authentication."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.integration.small_data import SmallData

pytestmark = pytest.mark.integration

REPOSITORY = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).with_name("ray"))


def free_ports(number: int) -> list[int]:
    """Find ports that nobody listens on, above the range that Ray gives to its workers."""
    found: list[int] = []
    candidate = 20_000 + secrets.randbelow(20_000)
    while len(found) < number:
        candidate += 1
        with socket.socket() as listener:
            if listener.connect_ex(("127.0.0.1", candidate)) != 0:
                found.append(candidate)
    return found


@dataclass(frozen=True)
class Head:
    """A running cluster."""

    address: str
    environment: dict[str, str]

    def submit(self, *entrypoint: str, **variables: str) -> subprocess.CompletedProcess[str]:
        runtime = json.dumps({"env_vars": variables})
        return subprocess.run(
            [RAY, "job", "submit", "--working-dir", ".", "--runtime-env-json", runtime, "--", *entrypoint],
            cwd=REPOSITORY, env=self.environment, text=True, capture_output=True, timeout=240, check=False,
        )  # fmt: skip

    def exit_code(self, output: str) -> int | None:
        """The command line returns 1 for every failure; the job's own code is in its information."""
        found = re.search(r"raysubmit_\w+", output)
        assert found, output
        script = (
            "from ray.job_submission import JobSubmissionClient; "
            f"print(JobSubmissionClient('{self.address}').get_job_info('{found.group()}').driver_exit_code)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], env=self.environment, text=True, capture_output=True, check=True
        )
        return int(done.stdout)


def processes_below(folder: Path) -> list[int]:
    """Find the cluster's processes by its own folder, which stands in their command lines."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if str(folder).encode() in command:
                found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    import tempfile

    # Not pytest's own folder: Ray's sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="gfr", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        port, dashboard, client, agent = free_ports(4)
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
        environment |= {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        }  # fmt: skip
        started = subprocess.run(
            [RAY, "start", "--head", f"--port={port}", "--num-cpus=2", "--object-store-memory=100000000",
             f"--temp-dir={folder}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
             f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}", "--disable-usage-stats"],
            env=environment, text=True, capture_output=True, timeout=120, check=False,
        )  # fmt: skip
        try:
            assert started.returncode == 0, started.stderr
            yield Head(f"http://127.0.0.1:{dashboard}", environment)
        finally:
            for pid in processes_below(folder):
                os.kill(pid, signal.SIGKILL)
            deadline = time.monotonic() + 20
            while processes_below(folder) and time.monotonic() < deadline:
                time.sleep(0.2)


def test_a_submitted_job_runs_on_the_cluster(head: Head, small_data: SmallData, tmp_path: Path) -> None:
    done = head.submit(
        "python", "-m", "ray_jobs.tokenize", "--input", small_data.h5ad, "--vocabulary", small_data.vocabulary,
        "--output", str(tmp_path / "cells"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert pq.read_table(tmp_path / "cells").num_rows == small_data.cells
    # It joined the cluster rather than starting one of its own.
    assert "Ray: a local cluster" not in done.stdout + done.stderr


def test_a_relative_output_would_be_thrown_away(head: Head, small_data: SmallData) -> None:
    done = head.submit(
        "python", "-m", "ray_jobs.tokenize", "--input", small_data.h5ad, "--vocabulary", small_data.vocabulary,
        "--output", "runs/cells",
    )  # fmt: skip
    assert done.returncode != 0
    assert head.exit_code(done.stdout) == 2
    assert "--output" in done.stdout + done.stderr


def test_a_store_in_the_copy_would_be_thrown_away(head: Head) -> None:
    done = head.submit("python", "-m", "ray_jobs.promote", "--registered-model", "small")
    assert head.exit_code(done.stdout) == 2
    assert "MLFLOW_TRACKING_URI" in done.stdout + done.stderr


def test_the_jobs_api_wants_the_token(head: Head) -> None:
    import httpx

    assert httpx.get(f"{head.address}/api/jobs/").status_code == 401


@pytest.mark.slow
def test_a_submitted_training_finds_its_workers_on_the_cluster(
    head: Head, small_data: SmallData, tmp_path: Path
) -> None:
    cells = tmp_path / "cells"
    table = ("tokenize", "--input", small_data.h5ad, "--vocabulary", small_data.vocabulary, "--output", str(cells))
    done = head.submit("python", "-m", f"ray_jobs.{table[0]}", *table[1:])
    assert done.returncode == 0, done.stdout + done.stderr
    done = head.submit(
        "python", "-m", "ray_jobs.pretrain", "--cells", str(cells), "--vocabulary", small_data.vocabulary,
        "--output", str(tmp_path / "model"), "--layers", "1", "--width", "8", "--heads", "1", "--feed-forward", "8",
        "--epochs", "1", "--num-workers", "2",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "model" / "model" / "model.safetensors").exists()
