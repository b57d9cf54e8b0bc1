"""The doctor on real clusters: nodes that share a storage or do not, a dashboard with its token and one without."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from geneformer_ray.manage import authentication
from geneformer_ray.manage.registry import open_store
from tests.integration.head import free_ports
from tests.integration.processes import REPOSITORY, Job, Run, end_processes_of

pytestmark = [pytest.mark.integration, pytest.mark.slow]

RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True)
class Started:
    """A cluster: its folder, its address, its dashboard's, and the variables that a job needs."""

    folder: Path
    address: str
    dashboard: str
    variables: dict[str, str]

    def doctor(self, *flags: str, **variables: str) -> Run:
        with Job("doctor", *flags, RAY_ADDRESS=self.address, **self.variables, **variables) as job:
            return job.finished()


def start(folder: Path, variables: dict[str, str], *, nodes: int) -> Started:
    """Start a head, and other nodes beside it; each works in a folder of its own."""
    port, dashboard, client = free_ports(3)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    environment |= {"PYTHONPATH": str(REPOSITORY), "RAY_USAGE_STATS_ENABLED": "0", **variables}
    address = f"127.0.0.1:{port}"
    head = ("--head", f"--port={port}", f"--temp-dir={folder}", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}")  # fmt: skip
    for number in range(nodes):
        place = folder / f"node{number}"
        place.mkdir()
        done = subprocess.run(
            [RAY, "start", *(head if number == 0 else [f"--address={address}"]), "--num-cpus=1", "--min-worker-port=0",
             "--max-worker-port=0", "--object-store-memory=80000000", "--disable-usage-stats",
             f"--dashboard-agent-listen-port={free_ports(1)[0]}"],
            cwd=place, env=environment, text=True, capture_output=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    return Started(folder, address, f"http://127.0.0.1:{dashboard}", variables)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    # Not pytest's own folder: Ray's sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="gfr", ignore_cleanup_errors=True) as name:
        try:
            yield Path(name)
        finally:
            end_processes_of(Path(name))


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Started:
    """A head and a worker with a token."""
    (folder / "a").mkdir()
    return start(folder / "a", {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}, nodes=2)


def statuses(run: Run, *names: str) -> dict[str, str]:
    return {one["name"]: one["status"] for one in run.summary["checks"] if one["name"] in names}


def test_a_cluster_that_shares_all_it_needs_has_no_fault(
    cluster: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/store/mlflow.db")
    open_store(str(tmp_path / "store"))
    before = sorted(tmp_path.rglob("*"))
    run = cluster.doctor("--storage", str(tmp_path / "not" / "yet"))
    assert run.code == 0, run.errors
    assert run.summary["faults"] == 0
    names = ("cluster.reachable", "cluster.versions", "storage.shared", "registry.store", "registry.store_of_nodes",
             "registry.artifacts_of_nodes", "authentication.mode", "authentication.jobs_api")  # fmt: skip
    assert statuses(run, *names) == dict.fromkeys(names, "ok"), run.errors
    found = {one["name"]: one["found"] for one in run.summary["checks"]}
    assert "2 nodes" in found["cluster.versions"]
    assert "2 nodes" in found["storage.shared"]
    assert "401 without the token and 200 with it" in found["authentication.jobs_api"]
    assert [one["name"] for one in run.summary["checks"]].count("cluster.node") == 2
    assert cluster.variables["RAY_AUTH_TOKEN"] not in run.errors + str(run.summary)
    made = {tmp_path / "store" / "artifacts"}  # MLflow's own empty folder
    assert set(tmp_path.rglob("*")) - made == set(before) - made


def test_a_storage_that_each_node_has_for_itself_is_a_fault(cluster: Started, tmp_path: Path) -> None:
    # One path that is another folder for each node, as a local disk of each is: the folder that it was started in.
    run = cluster.doctor("--storage", "/proc/self/cwd", "--jobs-address", cluster.dashboard,
                         MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db")  # fmt: skip
    assert run.code == 1, run.errors
    assert statuses(run, "storage.written", "authentication.jobs_api") == {
        "storage.written": "ok", "authentication.jobs_api": "ok",
    }  # fmt: skip
    apart = [one for one in run.summary["checks"] if one["name"] == "storage.shared"]
    assert [one["status"] for one in apart] == ["fault", "fault"]
    assert run.summary["faults"] == 2
    assert "FileNotFoundError" in apart[0]["found"]
    assert "mounted on every node" in apart[0]["do"]
    assert [*REPOSITORY.glob(".doctor-*"), *cluster.folder.rglob(".doctor-*")] == []


def test_another_token_is_told_before_ray_is_joined(cluster: Started) -> None:
    other = replace(cluster, variables={**cluster.variables, "RAY_AUTH_TOKEN": "f" * 32})
    run = other.doctor("--jobs-address", cluster.dashboard)
    assert run.code == 1
    names = ("authentication.jobs_api", "cluster.reachable")
    assert statuses(run, *names) == dict.fromkeys(names, "fault")
    assert "f" * 32 not in run.errors + str(run.summary)


def test_a_dashboard_without_a_token_is_a_fault(folder: Path) -> None:
    (folder / "b").mkdir()
    open_to_all = start(folder / "b", {"RAY_AUTH_MODE": "disabled"}, nodes=1)
    (one,) = authentication.check_jobs_api(open_to_all.dashboard, None)
    assert (one.status, "answers without a token" in one.found) == ("fault", True)
