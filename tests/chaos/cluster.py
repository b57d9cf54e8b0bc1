"""A cluster of several nodes on this machine, which lives on when jobs come and go, and what they leave on it."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.left_over import ACTORS_OF_RAY
from tests.integration.processes import REPOSITORY, end_processes_of, processes_of

OBJECT_STORE_BYTES = 100 * 2**20
AT_WORK = re.compile(r"^ray::|-m ray_jobs\.")
# Workers without work, and what Ray keeps one of on each node or cluster.
OF_RAY = re.compile(rf"^ray::(IDLE|DashboardAgent|RuntimeEnvAgent|{'|'.join(ACTORS_OF_RAY)})")


def free_port() -> int:
    """Find a port that nobody listens on, above the range that Ray gives to its workers."""
    while True:
        port = 20_000 + secrets.randbelow(20_000)
        with socket.socket() as listener:
            if listener.connect_ex(("127.0.0.1", port)) != 0:
                return port


class LivingCluster:
    """A head, nodes beside it, and what a job needs in its environment to find them."""

    def __init__(self, folder: Path, *, head_cpus: int) -> None:
        from ray.cluster_utils import Cluster

        self._folder = folder
        port = free_port()
        head = {"num_cpus": head_cpus, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": True}
        self._cluster = Cluster(initialize_head=True, head_node_args={**head, "dashboard_port": port})
        self.dashboard = f"http://127.0.0.1:{port}"
        # The token, and the switch that keeps a cluster of one machine on loopback: both sides need the same.
        shared = ("RAY_AUTH", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
        given = {name: value for name, value in os.environ.items() if name.startswith(shared)}
        self.environment = {"RAY_ADDRESS": self._cluster.address, **given}

    def add_node(self) -> Any:
        """Add a node of one CPU."""
        return self._cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE_BYTES)

    def kill_node(self, node: Any) -> None:
        """End all processes of a node with SIGKILL."""
        self._cluster.remove_node(node, allow_graceful=False)

    def shutdown(self) -> None:
        self._cluster.shutdown()

    def ask(self, *arguments: str) -> dict[str, Any]:
        """Run :mod:`tests.chaos.left_over` on the cluster."""
        done = subprocess.run(
            [sys.executable, "-m", "tests.chaos.left_over", *arguments], cwd=REPOSITORY,
            env={**os.environ, **self.environment}, capture_output=True, text=True, check=False, timeout=180,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def seconds_until_free(self, within: float) -> float:
        """Wait until nothing of the cluster is taken, and no process works for a job; give how long it took."""
        started = time.monotonic()
        answer = self.ask("free", str(within))
        answer.pop("seconds")
        assert not any(answer.values()), f"still taken after {within:g} s: {answer}"
        while left := self._at_work():
            assert time.monotonic() - started < within, f"still there after {within:g} s: {left}"
            time.sleep(0.2)
        return time.monotonic() - started

    def _at_work(self) -> dict[int, str]:
        """Drivers, and workers that have a task or an actor: whether or not the cluster knows of them."""
        found = processes_of(self._folder)
        return {pid: title for pid, title in found.items() if AT_WORK.search(title) and not OF_RAY.search(title)}


@contextmanager
def living_cluster(folder: Path, *, head_cpus: int) -> Iterator[LivingCluster]:
    """Start a cluster whose files lie in a folder; end it when the block is left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(folder))
        cluster = LivingCluster(folder, head_cpus=head_cpus)
        try:
            yield cluster
        finally:
            cluster.shutdown()
            end_processes_of(folder)  # of the dashboard, which take their time; all is in order when this is reached
