"""What of a cluster listens, where, and what it answers to who has no token, or a wrong one."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
import ray
import yaml
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from geneformer_ray.compute.classifier import new_classifier
from geneformer_ray.data.vocabulary import GeneVocabulary
from tests.integration.head import Head, free_ports, running_head
from tests.integration.listeners import Listener, listeners
from tests.integration.processes import Job, end_processes_of, processes_of, titles_below
from tests.integration.small_data import SmallData

pytestmark = pytest.mark.integration

REPOSITORY = Path(__file__).resolve().parents[2]
# What SECURITY.md says is answered without a token: the dashboard's empty page with its files, whether Ray is alive,
# and whether a token is asked for.
OPEN = {
    "/",
    "/favicon.ico",
    "/api/authentication_mode",
    "/api/gcs_healthz",
    "/api/healthz",
    "/api/local_raylet_healthz",
}
# Without a token, and with a wrong one.
STRANGERS = ({}, {"Authorization": "Bearer nobodys-token"})
REFUSED = (401, 403)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with running_head() as head:
        yield head


@pytest.fixture(scope="module")
def sockets(head: Head) -> list[Listener]:
    found = listeners(processes_of(head.folder))
    assert len(found) >= 8
    return found


def routes(kind: str) -> list[tuple[str, str]]:
    """Every HTTP route of Ray's own dashboard ("head") or of its agents, from Ray's source: newer ones are found."""
    folder = Path(ray.__file__).parent / "dashboard"
    pattern = re.compile(r'@routes\.(get|post|put|delete|patch)\(\s*"([^"]+)"')
    files = [path for path in folder.rglob(f"*_{kind}.py") if path.is_file()]
    found = {match for path in files for match in pattern.findall(path.read_text(encoding="utf-8"))}
    return sorted((method.upper(), re.sub(r"\{\w+(:[^}]*)?\}", "x", path)) for method, path in found)


def answers(base: str, method: str, path: str) -> list[int]:
    return [httpx.request(method, base + path, headers=headers, timeout=20).status_code for headers in STRANGERS]


def answered(base: str, asked: list[tuple[str, str]]) -> set[str]:
    """The paths of which a stranger gets more than that he is one."""
    with httpx.Client(base_url=base, timeout=20) as client:
        return {
            path
            for method, path in asked
            for headers in STRANGERS
            if client.request(method, path, headers=headers).status_code not in REFUSED
        }


def test_the_dashboard_and_its_apis_answer_nobody_without_the_token(head: Head) -> None:
    asked = routes("head")
    paths = {path for _, path in asked}
    # Jobs, packages, Serve's REST, the State API, logs, profiles.
    assert paths >= {"/api/jobs/", "/api/jobs/x/logs", "/api/packages/x/x", "/api/serve/applications/"}
    assert paths >= {"/api/v0/actors", "/api/v0/logs/x", "/worker/traceback", "/api/version"}
    # They are there: it is the token that is missing.
    with_token = {"Authorization": f"Bearer {head.token}"}
    for path in ("/api/jobs/", "/api/serve/applications/", "/api/v0/actors", "/api/version"):
        assert httpx.get(head.address + path, headers=with_token, timeout=20).status_code == 200
    assert answered(head.address, asked) == OPEN & paths
    assert answers(head.address, "GET", "/api/jobs/") == [*REFUSED]


def test_the_agents_answer_nobody_without_the_token(head: Head, sockets: list[Listener]) -> None:
    # Of an agent's ports one is HTTP, one gRPC, and one exports metrics; the runtime environment's agent has another.
    open_ports = {}
    for one in (one for one in sockets if "Agent" in one.title):
        try:
            open_ports[one.port] = answers(f"http://{one.address}:{one.port}", "GET", "/metrics"), one
        except httpx.RemoteProtocolError:
            continue  # gRPC
    refused = [one for status, one in open_ports.values() if status == [401, 403]]
    assert {one.title for one in refused} == {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}
    # The metrics export asks for no token: numbers, names of nodes and deployments, and no secrets.
    ((status, exporter),) = [pair for pair in open_ports.values() if pair[0] != [401, 403]]
    assert (status, exporter.title) == ([200, 200], "ray::DashboardAgent")
    assert head.token not in httpx.get(f"http://{exporter.address}:{exporter.port}/metrics", timeout=20).text

    (agent,) = [one for one in refused if one.title == "ray::DashboardAgent"]
    asked = routes("agent")
    assert ("POST", "/api/job_agent/jobs/") in asked
    base = f"http://{agent.address}:{agent.port}"
    assert answered(base, asked) == OPEN & {path for _, path in asked}


def test_the_control_plane_answers_nobody_without_the_token(sockets: list[Listener]) -> None:
    (gcs,) = [one for one in sockets if "gcs_server" in one.title]
    with grpc.insecure_channel(f"{gcs.address}:{gcs.port}") as channel:
        nodes = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        for metadata in ((), (("authorization", "Bearer nobodys-token"),)):
            with pytest.raises(grpc.RpcError) as refused:
                nodes.GetAllNodeInfo(gcs_service_pb2.GetAllNodeInfoRequest(), metadata=metadata, timeout=10)
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_a_head_of_one_machine_is_kept_on_loopback(sockets: list[Listener]) -> None:
    assert [one for one in sockets if not one.on_loopback] == []


def test_a_jobs_own_cluster_listens_on_loopback_alone(ray_cluster: None) -> None:
    worker = ray.get(ray.remote(lambda: os.getpid()).remote())
    assert worker in titles_below(os.getpid())
    found = listeners([os.getpid(), *titles_below(os.getpid())])
    for part in ("gcs_server", "raylet", "DashboardAgent", "ray::IDLE"):
        assert any(part in one.title for one in found), part
    assert [one for one in found if not one.on_loopback] == []


@pytest.mark.slow
def test_of_a_training_only_torchs_store_listens_on_all_interfaces(small_data: SmallData, tmp_path: Path) -> None:
    """Torch's rendezvous store cannot be told where to listen; it is there while the workers of a training are."""
    with Job("tokenize", "--input", small_data.h5ad, "--vocabulary", small_data.vocabulary,
             "--output", str(tmp_path / "cells")) as job:  # fmt: skip
        assert job.finished().code == 0
    shape = ("--layers", "1", "--width", "8", "--heads", "1", "--feed-forward", "8", "--epochs", "20")
    beyond: dict[int, str] = {}
    with Job("pretrain", "--cells", str(tmp_path / "cells"), "--vocabulary", small_data.vocabulary,
             "--output", str(tmp_path / "model"), *shape, "--num-workers", "2",
             MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db") as job:  # fmt: skip
        while job.process.poll() is None:
            found = listeners(titles_below(job.process.pid))
            beyond |= {one.port: one.title for one in found if not one.on_loopback}
            time.sleep(0.2)
        assert job.finished().code == 0
    assert len(beyond) <= 1, beyond
    assert all("RayTrainWorker" in title or "_setup_torch_process_group" in title for title in beyond.values()), beyond


@pytest.mark.slow
def test_the_service_in_its_own_ray_can_be_kept_on_loopback(
    model_directory: Path, vocabulary: GeneVocabulary, tmp_path: Path
) -> None:
    """``serve run`` starts Ray before it imports ours, so that its environment has to say so: see SECURITY.md."""
    classifier, own = new_classifier(model_directory, vocabulary, ["alpha", "beta"], "mean")
    classifier.save(tmp_path / "islets", own)
    (port,) = free_ports(1)
    settings = yaml.safe_load((REPOSITORY / "serve" / "config.yaml").read_text(encoding="utf-8"))
    settings["http_options"]["port"] = port
    settings["applications"][0]["args"]["model"] = str(tmp_path / "islets")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "GENEFORMER_"))}
    # Not pytest's own folder: Ray's sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="gfr", ignore_cleanup_errors=True) as folder:
        environment |= {
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_TMPDIR": folder,
        }  # fmt: skip
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("serve")), "run", str(tmp_path / "config.yaml")], cwd=REPOSITORY,
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 120
            found: list[Listener] = []
            while not any("ServeReplica" in one.title for one in found) or not any(one.port == port for one in found):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(1)
                found = listeners([process.pid, *titles_below(process.pid)])
            assert [one for one in found if not one.on_loopback] == []
        finally:
            process.kill()
            process.wait()
            end_processes_of(Path(folder))
