"""Where a served model lies: a directory, a hub id, or a version that MLflow has registered."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from geneformer_ray.compute.model_directory import find_model, weights_digest
from geneformer_ray.errors import InputError, RegistryUnavailable
from geneformer_ray.manage import registry
from serve.model_cache import ModelCache

__all__ = ["FoundModel", "ModelSource", "find_served_model"]

logger = logging.getLogger(__name__)

_REGISTERED = re.compile(r"^models:/(?P<name>[^/@]+)(?:@(?P<alias>[\w.-]+)|/(?P<version>\d+))$")
_GOES_ON = "what is served goes on"


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


class ModelSource:
    """Where a service's model comes from, and whether another one has taken its place there.

    Parameters
    ----------
    model
        ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, a directory or URI, or a hub id.
    tracking_uri
        The MLflow store of registered models; by default ``MLFLOW_TRACKING_URI``.
    cache
        Where copies of registered models are kept; None keeps none.
    """

    def __init__(self, model: str, tracking_uri: str | None, cache: ModelCache | None) -> None:
        self.model = model
        self._tracking_uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
        self._cache = cache
        self._name, self._alias, self._version = "", None, None
        if registry.is_registry_uri(model):
            match = _REGISTERED.match(model)
            if match is None:
                raise InputError("model", model, "models:/NAME@ALIAS or models:/NAME/VERSION")
            self._name, self._alias = match["name"], match["alias"]
            self._version = int(match["version"]) if match["version"] else None

    @property
    def moves(self) -> bool:
        """Whether what it names may change: an alias does."""
        return self._alias is not None

    def find(self) -> FoundModel:
        """Find the model.

        Raises
        ------
        RegistryUnavailable
            If it is registered, and the registry does not answer.
        InputError
            If there is no such model, or it is not what was registered.
        """
        if not self._name:
            directory = find_model(self.model, "model")
            return FoundModel(directory, directory.name, None)
        version = self.version()
        if version is None:
            raise InputError("model", self.model, f"a registered model with the alias {self._alias}")
        return self.fetch(version)

    def last_served(self) -> FoundModel | None:
        """Give this machine's copy of what served last as what was asked for; None where there is none."""
        if self._cache is None or not self._name:
            return None
        version = self._cache.last(self._name, self._wanted)
        copy = None if version is None else self._cache.copy_of(self._name, version)
        return None if copy is None else FoundModel(copy, self._name, version)

    def serves(self, version: int | None) -> None:
        """Note that a version serves: a start without the registry goes on with it."""
        if self._cache is not None and self._name and version is not None:
            try:
                self._cache.note(self._name, self._wanted, version)
            except OSError as error:
                logger.warning("what serves could not be noted (%s): a start needs the registry", error)

    @property
    def _wanted(self) -> str:
        return self._alias or str(self._version)

    def version(self) -> int | None:
        """Ask the registry which version is named now; None where the alias names none.

        Raises
        ------
        RegistryUnavailable
            If it does not answer.
        """
        if self._alias is None:
            return self._version
        self._open()
        with registry.reaching_store(_GOES_ON):
            return registry.version_of_alias(self._name, self._alias)

    def fetch(self, version: int) -> FoundModel:
        """Get a version, and check that its weights are those that were registered.

        Raises
        ------
        RegistryUnavailable
            If the registry does not answer.
        InputError
            If the version is not whole, or its weights are others.
        """
        self._open()
        uri = f"models:/{self._name}/{version}"
        with registry.reaching_store(_GOES_ON):
            registered = registry.weights_of(self._name, version, "model")
        copy = None
        if self._cache is not None and registered is not None:
            copy = self._cache.copy_of(self._name, version, registered)
        if copy is None and self._cache is not None:
            copy = self._kept(uri, version, registered, self._cache)
        if copy is None:
            copy = registry.find_registered(uri, "model")
            self._check(uri, copy, registered)
        return FoundModel(copy, self._name, version)

    def _kept(self, uri: str, version: int, registered: str | None, cache: ModelCache) -> Path | None:
        try:
            with tempfile.TemporaryDirectory(prefix="geneformer-ray-") as folder:
                directory = registry.find_registered(uri, "model", into=folder)
                self._check(uri, directory, registered)
                return cache.keep(self._name, version, directory)
        except OSError as error:
            logger.warning("no copy of %s could be kept (%s): a start needs the registry", uri, error)
            return None

    @staticmethod
    def _check(uri: str, directory: Path, registered: str | None) -> None:
        digest = weights_digest(directory)
        if registered is None:
            logger.warning("%s says no digest of its weights: they are taken as they are", uri)
        elif digest != registered:
            raise InputError("model", f"{uri} with weights {digest}", f"{registered}, which were registered")

    def _open(self) -> None:
        uri = self._tracking_uri
        file = uri.removeprefix("sqlite:///")
        if not uri:
            raise InputError("tracking_uri", "nothing", "an MLflow store that exists, or a model directory as model")
        if file != uri and not Path(file).exists():
            # MLflow would make an empty database, and several replicas that do so at once break it.
            raise RegistryUnavailable(uri, "there is no such file", _GOES_ON)
        # A replica's environment is its node's; the store was chosen where the service was started.
        registry.use_store(uri)


def find_served_model(model: str, tracking_uri: str | None = None) -> FoundModel:
    """Find a model where it lies, without keeping a copy: see :class:`ModelSource`."""
    try:
        return ModelSource(model, tracking_uri, None).find()
    except RegistryUnavailable as error:
        raise InputError("tracking_uri", error.store, f"an MLflow store that answers ({error.why})") from error
