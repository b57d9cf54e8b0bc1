"""A running cluster of one machine, as ``ray start --head`` makes it, and what is submitted to it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integration.processes import end_processes_of

REPOSITORY = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
OURS = ("RAY_", "MLFLOW_", "GENEFORMER_")


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


def _hear_ctrl_c() -> None:
    """As in a terminal: what a shell starts in the background ignores it, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass(frozen=True)
class Submission:
    """What ``python -m ray_jobs.submit`` ended with."""

    code: int
    out: str
    errors: str

    @property
    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return summary


@dataclass(frozen=True)
class Head:
    """A running cluster: its dashboard, what one who may use it has in the environment, and its folder."""

    address: str
    environment: dict[str, str]
    folder: Path

    @property
    def token(self) -> str:
        return self.environment["RAY_AUTH_TOKEN"]

    def start(self, *flags: str, **variables: str) -> subprocess.Popen[str]:
        """Start ``python -m ray_jobs.submit FLAGS``."""
        return subprocess.Popen(
            [sys.executable, "-m", "ray_jobs.submit", *flags], cwd=REPOSITORY, env={**self.environment, **variables},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=_hear_ctrl_c,
        )  # fmt: skip

    def submit(self, *flags: str, **variables: str) -> Submission:
        process = self.start(*flags, **variables)
        try:
            out, errors = process.communicate(timeout=240)
        finally:
            process.kill()
        return Submission(process.returncode, out, errors)


@contextlib.contextmanager
def running_head(**variables: str) -> Iterator[Head]:
    """Start a head with token authentication and two CPUs; end it by its processes."""
    # Not pytest's own folder: Ray's sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="gfr", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        port, dashboard, client, agent = free_ports(4)
        environment = {key: value for key, value in os.environ.items() if not key.startswith(OURS)}
        environment |= {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_USAGE_STATS_ENABLED": "0",
            # On loopback alone, as a job's own cluster is.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}",
        }  # fmt: skip
        address = f"http://127.0.0.1:{dashboard}"
        try:
            started = subprocess.run(
                [RAY, "start", "--head", f"--port={port}", "--num-cpus=2", "--object-store-memory=100000000",
                 f"--temp-dir={folder}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
                 f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
                 "--disable-usage-stats"],
                env={**environment, **variables}, text=True, capture_output=True, timeout=120, check=False,
            )  # fmt: skip
            assert started.returncode == 0, started.stderr
            yield Head(address, {**environment, "RAY_API_SERVER_ADDRESS": address}, folder)
        finally:
            end_processes_of(folder)
