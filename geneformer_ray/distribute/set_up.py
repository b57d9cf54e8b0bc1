"""A set-up, from the installed packages to the nodes of its cluster: what is looked at, in which order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from geneformer_ray.data import storage
from geneformer_ray.finding import Finding, examine, fault, note, ok, warning
from geneformer_ray.manage import authentication, gpu, installation, machine, model_health, places, ports, store_health
from geneformer_ray.manage.registry import is_registry_uri, without_credentials
from geneformer_ray.settings import VARIABLES, Settings

__all__ = ["SetUp"]

Check = tuple[str, Callable[[], Iterator[Finding]]]

DASHBOARD_PORT = 8265
SHARED = "export GENEFORMER_STORAGE, a folder mounted on every node (NFS, EFS, FSx) or a URI (s3://, gs://)"


@dataclass(frozen=True)
class SetUp:
    """What is to be looked at.

    Parameters
    ----------
    environment
        As the person set it, before this package gave a local cluster a token of its own.
    tracking_uri
        The MLflow store that jobs use; None where they would lose it.
    host, port
        What the service listens on.
    ray_address, jobs_address, storage, registered_model, api_keys_file
        As in the settings of the installation.
    model, vocabulary
        A model to open, as a job takes it.
    local
        Whether to start a local cluster where there is no running one.
    """

    environment: dict[str, str] = field(repr=False)
    tracking_uri: str | None
    host: str
    port: int
    ray_address: str | None = None
    jobs_address: str | None = None
    storage: str | None = None
    registered_model: str | None = None
    api_keys_file: str | None = None
    model: str | None = None
    vocabulary: str | None = None
    local: bool = False

    @property
    def has_cluster(self) -> bool:
        """Whether a running cluster is named."""
        return self.ray_address not in (None, "", "local")

    def findings(self) -> Iterator[Finding]:
        """Look at everything, the quick and the near first, and give each finding as it comes, without secrets."""
        token = authentication.find_token(self.environment)
        keys = self.environment.get(VARIABLES["api_keys"], "").replace(",", " ").split()
        secrets = [secret for secret in (token.value if token else None, *keys) if secret]
        reached: list[str] = []
        for name, check in self._checks(token, reached):
            for one in examine(name, check):
                if one.name == "registry.store" and one.status == "ok":
                    reached.append(self.tracking_uri or "")
                yield replace(one, found=_without(secrets, one.found), do=_without(secrets, one.do))

    def _checks(self, token: authentication.RayToken | None, reached: list[str]) -> Iterator[Check]:
        part = functools.partial
        yield "versions.python", installation.check_python
        yield "versions.packages", installation.check_packages
        yield "byte-code.compiled", installation.check_byte_code
        yield "disk.working", part(machine.check_disk, "working", Path.cwd())
        if self.storage is not None and not storage.is_uri(self.storage):
            yield "disk.storage", part(machine.check_disk, "storage", self.storage)
        yield "disk.ray", machine.check_ray_folder
        yield "memory.shared", machine.check_shared_memory
        yield "memory.available", machine.check_memory
        yield "cpus.quota", machine.check_cpus
        yield "gpu.torch", gpu.check_gpu
        yield "ports.service", part(ports.check_port, "service", self.port, self.host)
        if not self.has_cluster and self.jobs_address is None:
            yield "ports.dashboard", part(ports.check_port, "dashboard", DASHBOARD_PORT)
        keys = self.environment.get(VARIABLES["api_keys"])
        yield "keys.service", part(authentication.check_api_keys, self.api_keys_file, keys, self.host)
        anywhere = self.has_cluster or self.jobs_address is not None
        yield "authentication.mode", part(authentication.check_token, self.environment, cluster=anywhere)
        if self.jobs_address is not None:
            yield "authentication.jobs_api", part(authentication.check_jobs_api, self.jobs_address, token)
        yield "storage.written", self._storage
        yield "registry.store", self._store
        if reached:
            yield "registry.artifacts", _artifacts
            if self.registered_model is not None:
                yield "registry.model", part(store_health.check_registered, self.registered_model)
        if self.model is not None:
            yield "model.opens", part(self._model, bool(reached))
        yield "cluster.reachable", part(self._cluster, token, bool(reached))

    def _storage(self) -> Iterator[Finding]:
        if self.storage is None:
            found = "GENEFORMER_STORAGE is not set: relative paths lie in the working directory"
            yield warning("storage.set", found, SHARED) if self.has_cluster else note("storage.set", found)
            return
        yield from places.check_place("storage.written", self.storage, SHARED)

    def _store(self) -> Iterator[Finding]:
        if self.tracking_uri is None:
            found = "MLFLOW_TRACKING_URI is not set, and a submitted job's working directory is thrown away"
            yield fault("registry.store", found, "export MLFLOW_TRACKING_URI, or tracking_uri in GENEFORMER_SETTINGS")
        else:
            yield from store_health.check_store(self.tracking_uri)

    def _model(self, has_store: bool) -> Iterator[Finding]:
        model = self.model or ""
        if is_registry_uri(model) and not has_store:
            yield fault("model.opens", f"{model}: no store to look in", "mend registry.store, see above")
            return
        yield from model_health.check_model(_placed(model), self.vocabulary and _placed(self.vocabulary))

    def _cluster(self, token: authentication.RayToken | None, has_store: bool) -> Iterator[Finding]:
        """Look at the running cluster and its nodes, or at a local one where that was asked for."""
        if not self.has_cluster and not self.local:
            found = "RAY_ADDRESS is not set: each job starts a local cluster and stops it again"
            yield note("cluster.reachable", found, "--local starts one now and looks at its worker")
            return
        # Imports Ray: where that is broken, everything else has been told by now.
        from geneformer_ray.distribute.cluster import connected
        from geneformer_ray.distribute.node_health import check_reachable, dashboard_address

        if self.has_cluster:
            answers = list(check_reachable(str(self.ray_address)))
            yield from answers
            if answers[0].status != "ok":
                return
        with connected():
            yield from self._nodes(has_store)
            address = dashboard_address() if self.has_cluster and self.jobs_address is None else None
        if not self.has_cluster:
            yield ok("cluster.local", "a local cluster was started and stopped again")
        elif self.jobs_address is None and address is not None:
            check = functools.partial(authentication.check_jobs_api, address, token, named=False)
            yield from examine("authentication.jobs_api", check)

    def _nodes(self, has_store: bool) -> Iterator[Finding]:
        from geneformer_ray.distribute import node_health as health

        part, nodes = functools.partial, health.alive_nodes()
        yield from examine("cluster.node", health.check_nodes)
        yield from examine("cluster.versions", part(health.check_installations, nodes))
        if self.storage is not None:
            yield from examine("storage.shared", part(health.check_shared, "storage.shared", self.storage, nodes))
        if not has_store or self.tracking_uri is None:
            return
        file = store_health.sqlite_file(self.tracking_uri)
        if file is not None and len(nodes) > 1:
            # Workers ask the store for registered models themselves.
            check = part(health.check_shared, "registry.store_of_nodes", str(file.parent), nodes)
            yield from examine("registry.store_of_nodes", check)
        location = store_health.artifact_location()
        check = part(health.check_artifacts_of_nodes, location, self.tracking_uri, nodes)
        yield from examine("registry.artifacts_of_nodes", check)


def _artifacts() -> Iterator[Finding]:
    yield from store_health.check_artifacts(store_health.artifact_location())


def _placed(path: str) -> str:
    """Give a path below the storage as an absolute one; a hub id or a registered model as it is."""
    below = Settings.read().below_storage(path)
    return storage.absolute(below) if not is_registry_uri(path) and storage.exists(below) else path


def _without(secrets: list[str], text: str) -> str:
    for secret in secrets:
        text = text.replace(secret, "***")
    return without_credentials(text)
