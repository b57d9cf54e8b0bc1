"""cluster.yaml, judged offline by Ray's own validator.

The one unit test that imports ray: its schema is the only authority on the file. No Ray is started, and no
cloud is asked.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

CLUSTER_YAML = Path(__file__).parents[2] / "cluster.yaml"


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load(CLUSTER_YAML.read_text(encoding="utf-8"))


def prepare_and_validate(cluster: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(deepcopy(cluster))
    validate_config(prepared)
    return prepared


def worker_types(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    types = cluster["available_node_types"]
    return {name: node for name, node in types.items() if name != cluster["head_node_type"]}


def test_ray_accepts_the_file(cluster: dict[str, Any]) -> None:
    prepared = prepare_and_validate(cluster)
    assert prepared["head_node_type"] in prepared["available_node_types"]


def test_ray_refuses_an_unknown_field(cluster: dict[str, Any]) -> None:
    """The validator is awake: what this file says is really looked at."""
    cluster["available_node_types"]["cpu_worker"]["max_worker"] = 3
    with pytest.raises(Exception, match="max_worker"):
        prepare_and_validate(cluster)


def test_head_offers_no_work_to_do(cluster: dict[str, Any]) -> None:
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"]["CPU"] == 0
    assert "GPU" not in head["resources"]
    assert any("--head" in line and "--num-cpus=0" in line for line in cluster["head_start_ray_commands"])


def test_workers_scale_from_zero_and_go_when_idle(cluster: dict[str, Any]) -> None:
    workers = worker_types(cluster)
    assert {name: node["min_workers"] for name, node in workers.items()} == dict.fromkeys(workers, 0)
    assert all(0 < node["max_workers"] <= cluster["max_workers"] for node in workers.values())
    assert 0 < cluster["idle_timeout_minutes"] <= 15


def test_some_worker_offers_cpus_alone_and_some_a_gpu(cluster: dict[str, Any]) -> None:
    offered = [node["resources"] for node in worker_types(cluster).values()]
    assert any(resources.get("GPU", 0) >= 1 and resources["CPU"] >= 1 for resources in offered)
    assert any("GPU" not in resources and resources["CPU"] >= 1 for resources in offered)


@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_every_node_starts_with_token_authentication(cluster: dict[str, Any], commands: str) -> None:
    starts = [line for line in cluster[commands] if "ray start" in line]
    assert len(starts) == 1
    assert "RAY_AUTH_MODE=token" in starts[0]
    assert any(target.endswith("/.ray/auth_token") for target in cluster["file_mounts"])


def test_dashboard_and_jobs_listen_on_loopback(cluster: dict[str, Any]) -> None:
    assert any("--dashboard-host=127.0.0.1" in line for line in cluster["head_start_ray_commands"])


def test_nodes_install_what_the_lock_pins(cluster: dict[str, Any]) -> None:
    makefile = CLUSTER_YAML.with_name("Makefile").read_text(encoding="utf-8")
    assert any(line.endswith("geneformer-ray setup") for line in cluster["setup_commands"])
    assert "-r requirements.lock" in makefile
