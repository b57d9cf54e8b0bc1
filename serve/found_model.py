"""Where a served model lies: a directory, a hub id, or a version that MLflow has registered."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from geneformer_ray.compute.model_directory import find_model, weights_digest
from geneformer_ray.errors import InputError
from geneformer_ray.manage import registry

__all__ = ["FoundModel", "find_served_model"]

_REGISTERED = re.compile(r"^models:/(?P<name>[^/@]+)(?:@(?P<alias>[\w.-]+)|/(?P<version>\d+))$")


@dataclass(frozen=True)
class FoundModel:
    """Where a model lies, and what it is called.

    Parameters
    ----------
    directory
        Its local directory.
    name, version
        Its name and version in the registry; the directory's name and None for one that is not registered.
    """

    directory: Path
    name: str
    version: int | None

    @property
    def digest(self) -> str:
        """A hash of the weights and the configuration, as the jobs make it."""
        return weights_digest(self.directory)


def find_served_model(model: str, tracking_uri: str | None = None) -> FoundModel:
    """Find a model: a registered one, a directory, or a hub id.

    Parameters
    ----------
    model
        ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, a directory or URI, or a hub id.
    tracking_uri
        The MLflow store of registered models; by default ``MLFLOW_TRACKING_URI``.
    """
    if not registry.is_registry_uri(model):
        directory = find_model(model, "model")
        return FoundModel(directory, directory.name, None)
    match = _REGISTERED.match(model)
    if match is None:
        raise InputError("model", model, "models:/NAME@ALIAS or models:/NAME/VERSION")
    _open_registry(tracking_uri)
    name = match["name"]
    # An alias can move between two questions: it is asked once, and everything else goes by the number.
    version = int(match["version"]) if match["version"] else _version_of(name, match["alias"], model)
    return FoundModel(registry.find_registered(f"models:/{name}/{version}", "model"), name, version)


def _open_registry(tracking_uri: str | None) -> None:
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    file = uri.removeprefix("sqlite:///")
    if not uri or (file != uri and not Path(file).exists()):
        # MLflow would make an empty database, and several replicas that do so at once break it.
        raise InputError("tracking_uri", uri or "nothing", "an MLflow store that exists, or a model directory as model")
    # A replica's environment is its node's; the store was chosen where the service was started.
    os.environ["MLFLOW_TRACKING_URI"] = uri
    registry.open_store(str(Path.cwd() / "mlflow"))


def _version_of(name: str, alias: str, model: str) -> int:
    version = registry.version_of_alias(name, alias)
    if version is None:
        raise InputError("model", model, f"a registered model with the alias {alias}")
    return version
