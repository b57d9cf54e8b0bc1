"""deploy/: the image and the KubeRay manifests, judged offline.

No Kubernetes is there to ask. What can be asked is: Ray's own reading of a RayCluster (what its autoscaler makes of
one), Serve's schema, the parsers of our jobs and our settings. The names of KubeRay's fields are those of its API
ray.io/v1, release 1.6, as far as they are used here.
"""

from __future__ import annotations

import fnmatch
import functools
import re
import shlex
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from geneformer_ray.settings import FILE_VARIABLE, VARIABLES
from ray_jobs.command_line import JobConfig, parse
from ray_jobs.finetune import FinetuneConfig
from ray_jobs.screen_flags import ScreenConfig
from serve.settings import ENVIRONMENT_PREFIX, ServeSettings
from tests.unit.asked_resources import asked_by_the_service, asked_for, is_offered

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KINDS = {
    "raycluster.yaml": "RayCluster",
    "rayjob-finetune.yaml": "RayJob",
    "rayjob-screen.yaml": "RayJob",
    "rayservice.yaml": "RayService",
}
JOBS: dict[str, type[JobConfig]] = {"ray_jobs.finetune": FinetuneConfig, "ray_jobs.screen": ScreenConfig}
# KubeRay's fields, by the place they stand at.
FIELDS = {
    "cluster": {"rayVersion", "enableInTreeAutoscaling", "authOptions", "autoscalerOptions", "headGroupSpec"}
    | {"workerGroupSpecs"},
    "authOptions": {"mode"},
    "autoscalerOptions": {"version", "idleTimeoutSeconds", "upscalingMode", "securityContext", "resources"},
    "headGroupSpec": {"serviceType", "enableIngress", "rayStartParams", "template"},
    "workerGroupSpecs": {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"},
    "RayJob": {"entrypoint", "submissionMode", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished"}
    | {"rayClusterSpec", "submitterPodTemplate"},
    "RayService": {"upgradeStrategy", "excludeHeadPodFromServeSvc", "serveConfigV2", "rayClusterConfig"},
}
# Ours and Ray's own that a manifest may set.
ENVIRONMENT = {FILE_VARIABLE, "RAY_JOB_STOP_WAIT_TIME_S", *VARIABLES.values()} | {
    ENVIRONMENT_PREFIX + name.upper() for name in ServeSettings.model_fields
}
every = pytest.mark.parametrize("name", KINDS)
jobs = pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind == "RayJob"])


@functools.cache
def read(name: str) -> dict[str, Any]:
    """Read a manifest of one document, its anchors resolved."""
    return dict(yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8")))


def cluster_of(name: str) -> dict[str, Any]:
    spec = read(name)["spec"]
    return dict({"RayCluster": spec}.get(KINDS[name]) or spec.get("rayClusterSpec") or spec["rayClusterConfig"])


def pods(name: str) -> dict[str, dict[str, Any]]:
    """Give the pods' specifications by what they are: head, groups by name, submitter."""
    cluster = cluster_of(name)
    templates = {"head": cluster["headGroupSpec"]["template"]}
    templates |= {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    if KINDS[name] == "RayJob":
        templates["submitter"] = read(name)["spec"]["submitterPodTemplate"]
    return {who: template["spec"] for who, template in templates.items()}


def containers(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for who, pod in pods(name).items():
        for container in pod["containers"]:
            yield who, container


def locked(package: str) -> str:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return next(line.split("==")[1] for line in lines if line.startswith(f"{package}=="))


@functools.cache
def offered(name: str) -> dict[str, dict[str, float]]:
    """Give what Ray's own autoscaler reads out of the manifest: the resources of every worker group."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    made = {"metadata": {"name": "geneformer", "namespace": "default"}, "spec": deepcopy(cluster_of(name))}
    config = _derive_autoscaling_config_from_ray_cr(made)  # validates by Ray's schema
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"]["CPU"] == 0
    return {group: node["resources"] for group, node in types.items() if group != config["head_node_type"]}


def test_every_manifest_is_looked_at() -> None:
    assert {file.name for file in DEPLOY.glob("*.yaml")} == {*KINDS, "settings.yaml"}


@every
def test_kind_version_and_fields_are_kuberays(name: str) -> None:
    manifest, cluster = read(name), cluster_of(name)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", KINDS[name])
    assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
    if KINDS[name] != "RayCluster":
        assert set(manifest["spec"]) == FIELDS[KINDS[name]]
    assert set(cluster) == FIELDS["cluster"]
    for part in ("authOptions", "autoscalerOptions", "headGroupSpec"):
        assert set(cluster[part]) == FIELDS[part]
    assert all(set(group) == FIELDS["workerGroupSpecs"] for group in cluster["workerGroupSpecs"])


@every
def test_containers_are_named_as_ray_finds_them_and_made_of_one_image(name: str) -> None:
    """KubeRay takes the first container of a pod for Ray's."""
    first = {who: pod["containers"][0]["name"] for who, pod in pods(name).items()}
    wanted = {"head": "ray-head", "submitter": "ray-job-submitter"}
    assert first == {who: wanted.get(who, "ray-worker") for who in first}
    images = {container["image"] for other in KINDS for _, container in containers(other)}
    assert len(images) == 1
    assert re.fullmatch(r"REGISTRY/geneformer-ray:\d+\.\d+\.\d+", images.pop())


@every
def test_ray_is_the_one_of_the_lock(name: str) -> None:
    assert cluster_of(name)["rayVersion"] == locked("ray")


@every
def test_token_authentication_and_autoscaler_v2(name: str) -> None:
    cluster = cluster_of(name)
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert 0 < cluster["autoscalerOptions"]["idleTimeoutSeconds"] <= 900


@every
def test_whatever_jobs_and_the_service_ask_for_is_in_some_group(name: str) -> None:
    groups = offered(name)
    for who, asked in asked_for().items():
        assert any(is_offered(asked, resources) for resources in groups.values()), f"{who} asks for {asked}"


@every
def test_ray_offers_what_the_pod_is_given(name: str) -> None:
    """Nothing in rayStartParams says otherwise; but for the head, which is told to offer no CPU."""
    cluster = cluster_of(name)
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    groups = offered(name)
    for group in cluster["workerGroupSpecs"]:
        assert group["rayStartParams"] == {}
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert groups[group["groupName"]]["CPU"] == int(limits["cpu"])
        assert groups[group["groupName"]].get("GPU", 0) == int(limits.get("nvidia.com/gpu", 0))
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@every
def test_pods_with_a_gpu_tolerate_machines_that_are_kept_for_those(name: str) -> None:
    for pod in pods(name).values():
        has_gpu = "nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]
        assert has_gpu == ("nvidia.com/gpu" in str(pod.get("tolerations")))


@every
def test_containers_run_confined_and_not_as_root(name: str) -> None:
    confined = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert cluster_of(name)["autoscalerOptions"]["securityContext"] == confined
    for pod in pods(name).values():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(pod)
        assert all("hostPath" not in volume for volume in pod.get("volumes", []))
    assert all(container["securityContext"] == confined for _, container in containers(name))


@every
def test_requests_are_limits(name: str) -> None:
    resources = [container["resources"] for _, container in containers(name)]
    for each in [*resources, cluster_of(name)["autoscalerOptions"]["resources"]]:
        assert each["requests"] == each["limits"]
        assert {"cpu", "memory"} <= set(each["limits"])


@every
def test_only_the_head_talks_to_kubernetes(name: str) -> None:
    """Its autoscaler asks for workers, by the account that KubeRay makes for it."""
    for who, pod in pods(name).items():
        assert "serviceAccountName" not in pod
        assert pod.get("automountServiceAccountToken") is (None if who == "head" else False)


@every
def test_nothing_is_reached_from_outside_the_cluster(name: str) -> None:
    head = cluster_of(name)["headGroupSpec"]
    assert (head["serviceType"], head["enableIngress"]) == ("ClusterIP", False)
    text = (DEPLOY / name).read_text(encoding="utf-8")
    assert not re.search(r"LoadBalancer|NodePort|hostPort|kind: Ingress", text)


@every
def test_environment_is_ours_and_holds_no_secret(name: str) -> None:
    for who, container in containers(name):
        env = {entry["name"]: entry["value"] for entry in container.get("env", [])}
        assert set(env) <= ENVIRONMENT
        assert not any(re.search("TOKEN|PASSWORD|SECRET|API_KEYS$", variable) for variable in env)
        if who != "submitter":
            assert env["RAY_JOB_STOP_WAIT_TIME_S"] == "60"
            assert container["envFrom"] == [{"secretRef": {"name": "geneformer-credentials", "optional": True}}]
    manifest = read(name)
    assert manifest["kind"] != "Secret"
    assert "stringData" not in str(manifest)


@every
def test_files_that_variables_name_are_mounted(name: str) -> None:
    mounted = 0
    for who, container in containers(name):
        volumes = {volume["name"]: volume for volume in pods(name)[who].get("volumes", [])}
        mounts = {mount["mountPath"]: mount for mount in container.get("volumeMounts", [])}
        assert {mount["name"] for mount in mounts.values()} == set(volumes)
        assert all(mount["readOnly"] is True for mount in mounts.values())
        for entry in container.get("env", []):
            if entry["value"].startswith("/"):
                volume = volumes[mounts[str(Path(entry["value"]).parent)]["name"]]
                # Keys of clients come out of a Secret, settings out of a ConfigMap.
                assert ("secret" in volume) == ("API_KEYS" in entry["name"])
                mounted += 1
    assert mounted >= 3


@every
def test_a_pod_that_is_stopped_has_longer_than_a_job(name: str) -> None:
    assert all(pod["terminationGracePeriodSeconds"] > 60 for who, pod in pods(name).items() if who != "submitter")


@jobs
def test_entry_points_are_jobs_of_ours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FILE_VARIABLE, raising=False)
    python, flag, module, *flags = shlex.split(read(name)["spec"]["entrypoint"])
    assert (python, flag) == ("python", "-m")
    config = parse(JOBS[module], flags)
    # From no worker at all a cluster has no GPU, and is asked for one only by name.
    needs = config.workers().gpu if isinstance(config, FinetuneConfig) else getattr(config, "gpus_per_worker", 0)
    assert needs
    # Relative paths, which lie below the storage that the settings name.
    assert not any(word.startswith("/") or "://" in word for word in flags)


@jobs
def test_killed_jobs_are_started_again_and_clusters_go(name: str) -> None:
    spec = read(name)["spec"]
    assert spec["submissionMode"] == "K8sJobMode"
    assert spec["backoffLimit"] >= 1
    assert spec["shutdownAfterJobFinishes"] is True
    assert 0 < spec["ttlSecondsAfterFinished"] <= 3_600
    assert pods(name)["submitter"]["restartPolicy"] == "Never"
    assert all(group["minReplicas"] == 0 for group in cluster_of(name)["workerGroupSpecs"])


def test_the_service_is_the_one_of_serve_config() -> None:
    from ray.serve.schema import ServeDeploySchema

    text = read("rayservice.yaml")["spec"]["serveConfigV2"]
    ours = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text(encoding="utf-8"))
    there = yaml.safe_load(text)
    ServeDeploySchema.model_validate(there)
    # Behind a Service of Kubernetes the proxies listen in every pod that holds a replica, on its address.
    assert there.pop("proxy_location") == "EveryNode"
    assert there["http_options"].pop("host") == "0.0.0.0"
    del ours["proxy_location"], ours["http_options"]["host"]
    assert there == ours


def test_the_service_that_is_open_to_the_cluster_asks_for_keys() -> None:
    for _, container in containers("rayservice.yaml"):
        assert "GENEFORMER_SERVE_API_KEYS_FILE" in {entry["name"] for entry in container["env"]}
    secrets = [volume["secret"] for volume in pods("rayservice.yaml")["cpu"]["volumes"] if "secret" in volume]
    assert [secret["secretName"] for secret in secrets] == ["geneformer-api-keys"]
    # Not to be had without: a pod waits for its Secret.
    assert not any(secret.get("optional") for secret in secrets)


def test_the_service_is_upgraded_beside_the_one_that_answers() -> None:
    spec = read("rayservice.yaml")["spec"]
    assert spec["upgradeStrategy"] == {"type": "NewCluster"}
    assert spec["excludeHeadPodFromServeSvc"] is True
    groups = {group["groupName"]: group for group in spec["rayClusterConfig"]["workerGroupSpecs"]}
    args = yaml.safe_load(spec["serveConfigV2"])["applications"][0]["args"]
    assert groups["cpu"]["minReplicas"] >= args["min_replicas"]
    room = groups["cpu"]["maxReplicas"] * offered("rayservice.yaml")["cpu"]["CPU"]
    assert room >= args["max_replicas"] * asked_by_the_service(args)["CPU"]


# The image.


@pytest.fixture(scope="module")
def stages() -> list[list[list[str]]]:
    """Read the Dockerfile as stages of instructions, each its name and the rest."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found: list[list[list[str]]] = [[]]
    for line in filter(str.strip, joined.splitlines()):
        name, rest = line.split(maxsplit=1)
        if name == "FROM":
            found.append([])
        found[-1].append([name, rest])
    return found


def rest_of(stage: list[list[str]], instruction: str) -> list[str]:
    return [rest for name, rest in stage if name == instruction]


def test_image_is_pinned_to_the_lock(stages: list[list[list[str]]]) -> None:
    _, build, _ = stages
    installs = [part for run in rest_of(build, "RUN") for part in run.split("&&") if "pip install" in part]
    assert len(installs) == 3
    assert "grep '^torch==' requirements.lock" in installs[0]
    assert all("--constraint requirements.lock" in install for install in installs[1:])
    assert locked("torch") and locked("setuptools") and locked("boto3")


def test_image_is_for_cpu_or_cuda_by_argument(stages: list[list[list[str]]]) -> None:
    _, build, last = stages
    assert {"DEVICE=cuda", 'TORCH_INDEX_URL=""'} <= set(rest_of(build, "ARG"))
    assert "DEVICE=cuda" in rest_of(last, "ARG")
    assert "torch.version.cuda" in " ".join(rest_of(build, "RUN"))


def test_image_compiles_its_byte_code(stages: list[list[list[str]]]) -> None:
    _, build, last = stages
    compiling = [part for part in rest_of(build, "RUN")[-1].split("&&") if "compileall" in part]
    assert "/opt/venv/lib " in compiling[0]
    assert all(f"site-packages/{package}" in compiling[1] for package in ("geneformer_ray", "ray_jobs", "serve"))
    assert not any("PYTHONDONTWRITEBYTECODE" in rest for stage in (build, last) for rest in rest_of(stage, "ENV"))


def test_image_runs_as_the_user_of_the_manifests(stages: list[list[list[str]]]) -> None:
    last = stages[-1]
    user = rest_of(last, "USER")
    assert len(user) == 1
    names = [name for name, _ in last]
    assert not {"RUN", "COPY"} & set(names[names.index("USER") :])
    contexts = {tuple(pod["securityContext"].items()) for name in KINDS for pod in pods(name).values()}
    assert len(contexts) == 1
    context = dict(contexts.pop())
    assert user[0] == f"{context['runAsUser']}:{context['runAsGroup']}"


def test_image_has_what_kuberay_calls(stages: list[list[list[str]]]) -> None:
    last = stages[-1]
    assert "wget" in rest_of(last, "RUN")[0]
    environment = rest_of(last, "ENV")[0]
    assert "PATH=/opt/venv/bin:$PATH" in environment
    assert "RAY_AUTH_MODE=token" in environment
    assert rest_of(last, "COPY") == ["--from=build /opt/venv /opt/venv"]
    assert not rest_of(last, "ENTRYPOINT")  # KubeRay gives the command


def test_image_holds_no_secret_and_nothing_but_the_packages(stages: list[list[list[str]]]) -> None:
    declared = " ".join(rest for stage in stages for name in ("ARG", "ENV") for rest in rest_of(stage, name))
    assert not re.search("PASSWORD|SECRET|KEY|AUTH_TOKEN", declared)
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    let_in = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    copied = {source for rest in rest_of(stages[1], "COPY") for source in rest.split()[:-1]}
    assert copied == let_in
    assert all((ROOT / name).exists() for name in let_in)
    assert not any(fnmatch.fnmatch(name, pattern) for name in let_in for pattern in ("tests", "*.pem", ".*", "runs"))
