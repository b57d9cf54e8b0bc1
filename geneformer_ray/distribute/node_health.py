"""Whether the nodes of a cluster answer, run the same code, and share the storage and the artifacts of jobs."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from geneformer_ray.errors import InputError
from geneformer_ray.finding import Finding, fault, note, ok, warning
from geneformer_ray.manage.gpu import check_gpu
from geneformer_ray.manage.installation import check_byte_code, installed_here
from geneformer_ray.manage.machine import check_ray_folder, check_shared_memory
from geneformer_ray.manage.places import leave_word, lent_folder, read_word
from geneformer_ray.manage.ports import is_listening
from geneformer_ray.manage.store_health import is_local, keeps_artifacts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = [
    "Node",
    "alive_nodes",
    "check_artifacts_of_nodes",
    "check_installations",
    "check_nodes",
    "check_reachable",
    "check_shared",
    "dashboard_address",
]

STATUS_SECONDS = 30.0
# A worker process imports Ray, torch and MLflow: from a cold disk, and on a node under load, that takes minutes.
TASK_SECONDS = 180.0
SAME_CODE = "install the same on every node: make setup there, or one image; then restart Ray on it"


@dataclass(frozen=True)
class Node:
    """A node that is alive: its id, the name that findings give it, and its resources."""

    id: str
    name: str
    resources: dict[str, float]


def check_reachable(address: str) -> Iterator[Finding]:
    """Ask a cluster for its status, in a process of its own: Ray ends one that connects to what is no cluster.

    Parameters
    ----------
    address
        As in ``RAY_ADDRESS``: ``HOST:PORT``, ``auto`` or ``ray://HOST:PORT``.
    """
    name = "cluster.reachable"
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit() and not is_listening(host, int(port)):
        do = "ray start --head there, or correct RAY_ADDRESS (unset: each job starts a local cluster)"
        yield fault(name, f"nothing listens at {address}", do)
        return
    if address.startswith("ray://"):
        found = f"{address} answers; jobs are drivers of their own, for which Ray's client protocol was not made"
        yield warning(name, found, "ray job submit --working-dir . -- python -m ray_jobs.doctor")
        return
    asked = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=STATUS_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        do = "correct RAY_ADDRESS: the port of the head's GCS (6379 by default), not the dashboard's"
        yield fault(name, f"{address} listens, but is no Ray cluster that answers within {STATUS_SECONDS:g} s", do)
        return
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        do = "export RAY_AUTH_MODE=token and the head's token (RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token), the same Ray"
        yield fault(name, f"{address}: {lines[-1][:200]}", do)
        return
    yield ok(name, f"{address} answers")
    failures = done.stdout.partition("Recent failures:")[2].partition("\n\n")[0].strip()
    if failures and failures != "(no failures)":
        yield warning("cluster.autoscaler", f"recent failures: {' '.join(failures.split())[:200]}", "ray status -v")


def check_nodes() -> Iterator[Finding]:
    """List the nodes of the connected cluster: alive, dead, and what they have."""
    every, alive = ray.nodes(), alive_nodes()
    for node in alive:
        yield ok("cluster.node", f"{node.name}: {_shown(node.resources)}")
    if dead := len(every) - len(alive):
        yield note("cluster.dead", f"{dead} nodes are gone: an idle one that was taken away, or one that was lost")
    if not sum(node.resources.get("CPU", 0) for node in alive):
        found = "no CPU on any node now: jobs wait until the autoscaler brings a worker, which was not looked at here"
        yield note("cluster.workers", found, "ray status; repeat this while a job runs")


def dashboard_address() -> str | None:
    """Give the dashboard of the connected cluster, as its head has bound it; None where there is none."""
    from ray._private.worker import get_dashboard_url  # Ray has no public way to ask once connected

    url = get_dashboard_url()
    return f"http://{url}" if url else None


def alive_nodes() -> list[Node]:
    """Give the nodes that are alive, the head first."""
    found = []
    for entry in ray.nodes():
        if entry["Alive"]:
            resources = dict(entry["Resources"])
            head = "node:__internal_head__" in resources
            name = f"{'head' if head else 'worker'} {entry['NodeManagerAddress']} ({entry['NodeID'][:6]})"
            found.append((not head, Node(entry["NodeID"], name, resources)))
    return [node for _, node in sorted(found, key=lambda item: (item[0], item[1].name))]


def check_installations(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Compare Python, packages and our code on every node with this process's, and look at each node's machine."""
    mine, same = installed_here(), []
    reports, unheard = _on_each(nodes, _look_around)
    yield from unheard
    for node in nodes:
        if node.id not in reports:
            continue
        theirs, findings = reports[node.id]
        names = [name for name in sorted(mine.keys() | theirs.keys()) if mine.get(name) != theirs.get(name)]
        if names:
            pairs = [f"{name} {theirs.get(name, 'missing')} (here {mine.get(name, 'missing')})" for name in names]
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            yield fault("cluster.versions", f"{node.name} differs: {', '.join(pairs[:4])}{more}", SAME_CODE)
        else:
            same.append(node.name)
        for one in findings:
            if one.status in ("warning", "fault"):
                yield Finding(f"cluster.{one.name.replace('.', '_')}", one.status, f"{node.name}: {one.found}", one.do)
    if same:
        yield ok("cluster.versions", f"the same Python, {len(mine) - 2} packages and code on {_listed(same)}")


def check_shared(name: str, place: str, nodes: Sequence[Node]) -> Iterator[Finding]:
    """Let every node read what this process writes at a place, and the other way round; then clear it.

    Parameters
    ----------
    name
        Of the finding.
    place
        A local path or URI.
    nodes
        Which ones.
    """
    do = "a path that is mounted on every node (NFS, EFS, FSx), or a URI: s3://, gs://"
    apart: list[str] = []
    try:
        with lent_folder(place) as folder:
            leave_word(folder, "driver")
            answers, unheard = _on_each(nodes, _exchange, folder)
            yield from unheard
            for node in nodes:
                if node.id not in answers:
                    continue
                why = answers[node.id] or read_word(folder, node.id)
                if why:
                    apart.append(node.name)
                    yield fault(name, f"{place} is not the same place for {node.name}: {why[:200]}", do)
    except (OSError, InputError) as error:
        yield fault(name, f"{place}: {' '.join(str(error).split())}", do)
        return
    together = [node.name for node in nodes if node.id in answers and node.name not in apart]
    if together:
        yield ok(name, f"{place}: written here and read there, and the other way round: {_listed(together)}")


def check_artifacts_of_nodes(location: str, tracking_uri: str, nodes: Sequence[Node]) -> Iterator[Finding]:
    """Let every node keep a file where runs keep theirs."""
    if is_local(location):
        yield from check_shared("registry.artifacts_of_nodes", location, nodes)
        return
    answers, unheard = _on_each(nodes, keeps_artifacts, location, tracking_uri)
    yield from unheard
    for node in nodes:
        if answers.get(node.id):
            do = "name the server by an address that every node reaches, and give nodes its credentials"
            yield fault("registry.artifacts_of_nodes", f"{node.name} cannot write: {answers[node.id][:200]}", do)
    fine = [node.name for node in nodes if answers.get(node.id) == ""]
    if fine:
        yield ok("registry.artifacts_of_nodes", f"written and cleared from {_listed(fine)}")


def _on_each(
    nodes: Sequence[Node], work: Callable[..., Any], *arguments: object
) -> tuple[dict[str, Any], list[Finding]]:
    """Run a function on each node; give the answers by node, and what kept others from answering."""
    # No CPU: it also runs on a head without any, and on nodes that are busy.
    task = ray.remote(num_cpus=0, max_retries=0)(work)
    here = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(*arguments): node
        for node in nodes
    }
    done, late = ray.wait(list(here), num_returns=len(here), timeout=TASK_SECONDS) if here else ([], [])
    answers, unheard = {}, []
    for reference in done:
        try:
            answers[here[reference].id] = ray.get(reference)
        except (ray.exceptions.RayError, ImportError) as error:
            why = str(error).strip().splitlines()[-1][:200]
            do = f"the code must be importable there: ray job submit --working-dir ., or {SAME_CODE}"
            unheard.append(fault("cluster.task", f"{here[reference].name} failed a task: {why}", do))
    for reference in late:
        ray.cancel(reference, force=True)
        found = f"{here[reference].name} did not finish a task within {TASK_SECONDS:g} s"
        unheard.append(fault("cluster.task", found, "ray status; ray logs cluster raylet.err on that node"))
    return answers, unheard


def _look_around() -> tuple[dict[str, str], list[Finding]]:
    """Look at a node from inside: what is installed, its disk, shared memory, byte-code and GPU."""
    own = next(node for node in alive_nodes() if node.id == ray.get_runtime_context().get_node_id())
    store = int(own.resources.get("object_store_memory", 0))
    findings = [*check_ray_folder(), *check_byte_code(), *check_shared_memory(needed=store, running=True)]
    if own.resources.get("GPU"):
        # Ray hides the GPUs from a task that asks for none, and this one must not wait for a free one.
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        findings += check_gpu()
    return installed_here(), findings


def _exchange(folder: str) -> str:
    """Read the driver's word and leave the node's own; an empty answer means that both went well."""
    why = read_word(folder, "driver")
    if why:
        return why  # nothing is left at what is another place
    leave_word(folder, ray.get_runtime_context().get_node_id())
    return ""


def _shown(resources: dict[str, float]) -> str:
    memory = f"{resources.get('memory', 0) / 1024**3:.0f} GiB"
    store = f"{resources.get('object_store_memory', 0) / 1024**2:.0f} MiB object store"
    gpus = f", {resources['GPU']:g} GPUs" if resources.get("GPU") else ""
    return f"{resources.get('CPU', 0):g} CPUs, {memory}, {store}{gpus}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} nodes"
