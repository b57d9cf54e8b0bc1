"""cluster.yaml and cluster-local.yaml, judged offline by Ray's own validator, and by what our code asks for.

These tests import ray: its schema is the only authority on the files. No Ray is started, and no cloud is asked.
"""

from __future__ import annotations

import shlex
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from geneformer_ray.settings import FILE_VARIABLE, Settings
from tests.unit.asked_resources import asked_for, is_offered

ROOT = Path(__file__).parents[2]
FILES = ("cluster.yaml", "cluster-local.yaml")
CHECKOUT = "~/geneformer-ray"
both = pytest.mark.parametrize("name", FILES)


def read(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / name).read_text(encoding="utf-8")))


@pytest.fixture
def cluster() -> dict[str, Any]:
    return read("cluster.yaml")


def prepare_and_validate(cluster: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(deepcopy(cluster))
    validate_config(prepared)
    return dict(prepared)


def worker_types(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    types = cluster["available_node_types"]
    return {name: node for name, node in types.items() if name != cluster["head_node_type"]}


def start(cluster: dict[str, Any], which: str) -> tuple[dict[str, str], list[str]]:
    """Give the environment and the flags of the one ``ray start`` among the commands."""
    lines = [line for line in cluster[f"{which}_start_ray_commands"] if "ray start" in line]
    assert len(lines) == 1
    words = shlex.split(lines[0].split(";")[-1])
    at = words.index("ray")
    return dict(word.split("=", 1) for word in words[:at]), words[at + 2 :]


@both
def test_ray_accepts_the_file(name: str) -> None:
    prepared = prepare_and_validate(read(name))
    assert prepared["head_node_type"] in prepared["available_node_types"]


def test_ray_refuses_an_unknown_field(cluster: dict[str, Any]) -> None:
    """The validator is awake: what these files say is really looked at."""
    cluster["available_node_types"]["cpu_worker"]["max_worker"] = 3
    with pytest.raises(Exception, match="max_worker"):
        prepare_and_validate(cluster)
    local = read("cluster-local.yaml") | {"idle_timeout": 5}
    with pytest.raises(Exception, match="idle_timeout"):
        prepare_and_validate(local)


def test_every_machine_of_ones_own_joins_at_once() -> None:
    local = read("cluster-local.yaml")
    prepared = prepare_and_validate(local)
    node = prepared["available_node_types"][prepared["head_node_type"]]
    assert node["min_workers"] == node["max_workers"] == len(local["provider"]["worker_ips"])


def test_head_offers_no_work_to_do(cluster: dict[str, Any]) -> None:
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"]["CPU"] == 0
    assert "GPU" not in head["resources"]


def test_workers_scale_from_zero_and_go_when_idle(cluster: dict[str, Any]) -> None:
    workers = worker_types(cluster)
    assert {name: node["min_workers"] for name, node in workers.items()} == dict.fromkeys(workers, 0)
    assert all(0 < node["max_workers"] <= cluster["max_workers"] for node in workers.values())
    assert 0 < cluster["idle_timeout_minutes"] <= 15


def test_some_worker_offers_cpus_alone_and_some_a_gpu(cluster: dict[str, Any]) -> None:
    offered = [node["resources"] for node in worker_types(cluster).values()]
    assert any(resources.get("GPU", 0) >= 1 and resources["CPU"] >= 1 for resources in offered)
    assert any("GPU" not in resources and resources["CPU"] >= 1 for resources in offered)


def test_whatever_jobs_and_the_service_ask_for_is_in_some_node(cluster: dict[str, Any]) -> None:
    offered = {name: node["resources"] for name, node in worker_types(cluster).items()}
    for who, asked in asked_for().items():
        assert any(is_offered(asked, resources) for resources in offered.values()), f"{who} asks for {asked}"


def test_what_is_asked_for_is_read_from_the_code() -> None:
    """The test above compares with something: GPUs and CPUs, for training, screens and replicas."""
    asked = asked_for()
    assert asked["a worker of a training on a GPU"] == {"CPU": 1, "GPU": 1}
    assert asked["an actor of a pool on a GPU"] == {"CPU": 1, "GPU": 1}
    assert asked["a replica of serve/config.yaml"]["CPU"] >= 1
    assert any(who.startswith("num_cpus, num_gpus in geneformer_ray/distribute/") for who in asked)
    assert not is_offered({"GPU": 2}, {"CPU": 8, "GPU": 1})


def test_spot_machines_are_none_but_workers_with_a_gpu(cluster: dict[str, Any]) -> None:
    """Jobs resume from a lost worker; without the head there is no cluster."""
    spot = {
        name: node.get("node_config", {}).get("InstanceMarketOptions", {}).get("MarketType")
        for name, node in cluster["available_node_types"].items()
    }
    assert spot == {"head": None, "cpu_worker": None, "gpu_worker": "spot"}


def test_nodes_have_private_addresses_and_one_subnet_to_name(cluster: dict[str, Any]) -> None:
    assert cluster["provider"]["use_internal_ips"] is True
    # How `ray up` gets there from outside: by the node's id, for no address can be reached.
    assert cluster["auth"]["ssh_proxy_use_node_id"] is True
    assert "ssm start-session --target %h" in cluster["auth"]["ssh_proxy_command"]
    configs = [node["node_config"] for node in cluster["available_node_types"].values()]
    assert len({tuple(config["SubnetIds"]) for config in configs}) == 1
    assert (ROOT / "cluster.yaml").read_text(encoding="utf-8").count("subnet-") == 1
    assert not any("NetworkInterfaces" in config for config in configs)  # could ask for public addresses


def test_only_the_head_may_launch_machines(cluster: dict[str, Any]) -> None:
    profiles = {
        name: node["node_config"]["IamInstanceProfile"] for name, node in cluster["available_node_types"].items()
    }
    assert all(profile != profiles["head"] for name, profile in profiles.items() if name != "head")
    assert len({str(profile) for profile in profiles.values()}) == 2


@both
@pytest.mark.parametrize("which", ["head", "worker"])
def test_every_node_starts_with_authentication_settings_and_time_to_stop(name: str, which: str) -> None:
    cluster = read(name)
    environment, _ = start(cluster, which)
    assert environment["RAY_AUTH_MODE"] == "token"
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) == 60
    assert environment["PATH"] == f"{CHECKOUT}/.venv/bin:$PATH"
    assert environment[FILE_VARIABLE] == f"{CHECKOUT}/deploy/settings.yaml"
    assert cluster["file_mounts"][CHECKOUT] == "."


@both
def test_dashboard_and_jobs_listen_on_loopback_and_the_head_does_no_work(name: str) -> None:
    _, flags = start(read(name), "head")
    assert {"--head", "--num-cpus=0", "--dashboard-host=127.0.0.1", "--dashboard-port=8265"} <= set(flags)


@both
def test_nodes_install_what_the_lock_pins(name: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"make -C {CHECKOUT} setup" in read(name)["setup_commands"]
    assert "-r requirements.lock" in makefile


def test_both_files_set_nodes_up_alike() -> None:
    """Settings, mounts, set-up and start: what is tried on one's own machines holds on AWS."""
    shared = [
        "cluster_name", "file_mounts", "rsync_exclude", "rsync_filter", "setup_commands",
        "head_start_ray_commands", "worker_start_ray_commands",
    ]  # fmt: skip
    aws, local = (read(name) for name in FILES)
    assert {key: aws[key] for key in shared} == {key: local[key] for key in shared}


def test_results_and_environments_are_not_copied_to_nodes() -> None:
    for name in FILES:
        assert {".git/", ".venv/", "runs/"} <= set(read(name)["rsync_exclude"])


def test_storage_and_mlflow_stand_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """No address of a store stands anywhere else in the cluster files; the settings file is one that is accepted."""
    file = ROOT / "deploy" / "settings.yaml"
    settings = Settings.read({FILE_VARIABLE: str(file)})
    assert settings.storage and settings.tracking_uri and settings.registered_model
    for path in [*map(ROOT.joinpath, FILES), *sorted((ROOT / "deploy").glob("*.yaml"))]:
        if path != file:
            text = path.read_text(encoding="utf-8")
            assert not any(word in text for word in ("s3://", "gs://", "MLFLOW_TRACKING_URI", "GENEFORMER_STORAGE"))
