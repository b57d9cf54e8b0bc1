"""An autoscaling cluster on one machine: Ray's own autoscaler, whose nodes are processes here (its fake provider)."""

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
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SECONDS_TO_END = 30
OBJECT_STORE_BYTES = 80_000_000


@dataclass(frozen=True)
class FakeCluster:
    """A running head that offers no CPU, and what a job or a client of it has in its environment.

    Parameters
    ----------
    dashboard, token
        Where its API answers, and to whom.
    environment
        With ``RAY_ADDRESS`` and the token.
    """

    dashboard: str
    token: str
    environment: dict[str, str]


@contextlib.contextmanager
def fake_cluster(cpus_of_node: int, most_nodes: int, idle_minutes: float) -> Iterator[FakeCluster]:
    """Start a head without CPUs that adds nodes as they are asked for, and takes them away when idle."""
    # Of its own: Ray's sockets need a short path, and its processes are found by it.
    with tempfile.TemporaryDirectory(prefix="gfr", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        port, dashboard, client, agent = _free_ports(4)
        (folder / "cluster.json").write_text(json.dumps(_config(port, cpus_of_node, most_nodes, idle_minutes)))
        token = secrets.token_hex(16)
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "GENEFORMER_"))}
        environment |= {
            "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}", "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [
            Path(sys.executable).with_name("ray"), "start", "--head", f"--autoscaling-config={folder / 'cluster.json'}",
            f"--port={port}", "--num-cpus=0", f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={folder}",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}",
            f"--dashboard-agent-listen-port={agent}", "--disable-usage-stats",
        ]  # fmt: skip
        fake = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        try:
            subprocess.run(command, env={**environment, **fake}, check=True, capture_output=True, timeout=120)
            address = f"http://127.0.0.1:{dashboard}"
            yield FakeCluster(address, token, {**environment, "RAY_ADDRESS": f"127.0.0.1:{port}"})
        finally:
            _end(folder)


def _config(port: int, cpus: int, most_nodes: int, idle_minutes: float) -> dict[str, object]:
    lists = (
        "cluster_synced_files rsync_exclude rsync_filter initialization_commands setup_commands head_setup_commands "
        "worker_setup_commands head_start_ray_commands worker_start_ray_commands"
    )
    return {
        "cluster_name": "fake",
        "max_workers": most_nodes,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": idle_minutes,
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "cpu_worker": {
                "resources": {"CPU": cpus},
                "node_config": {},
                "min_workers": 0,
                "max_workers": most_nodes,
            },
        },
        "provider": {
            "type": "fake_multinode",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": f"127.0.0.1:{port}",
        },
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in lists.split()},
    }


def _free_ports(number: int) -> list[int]:
    """Find ports above those that Ray gives to its workers."""
    found: list[int] = []
    candidate = 20_000 + secrets.randbelow(20_000)
    while len(found) < number:
        candidate += 1
        with socket.socket() as listener:
            if listener.connect_ex(("127.0.0.1", candidate)) != 0:
                found.append(candidate)
    return found


def _end(folder: Path) -> None:
    """End the cluster's processes, which have its folder in their command lines."""
    deadline = time.monotonic() + SECONDS_TO_END
    while (pids := _processes(folder)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)


def _processes(folder: Path) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if str(folder).encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found
