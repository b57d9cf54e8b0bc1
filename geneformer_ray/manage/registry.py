"""The MLflow store: opening it, what it says when it cannot be reached, and the registered models in it."""

from __future__ import annotations

import os
import re
import sqlite3
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from geneformer_ray.errors import InputError, RegistryUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = [
    "EXPERIMENT",
    "NOT_THERE",
    "WEIGHTS_TAG",
    "ModelVersion",
    "check_name",
    "find_registered",
    "is_registry_uri",
    "local_source",
    "open_store",
    "pinned_uri",
    "reaching_store",
    "use_store",
    "version_of_alias",
    "versions_of",
    "weights_of",
    "without_credentials",
]

EXPERIMENT = "geneformer-ray"
# A version's tag with the hash of its weights and configuration.
WEIGHTS_TAG = "weights_digest"
# How MLflow says that a model or an alias does not exist, by kind of store.
NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
# Seconds to wait for the SQLite file that another process has locked.
LOCKED_AT_MOST = 10.0
# Pickles are never read from a store that others can write to, whatever the environment says; MLflow reads this when
# it loads a model. Every module of this package that imports MLflow imports this one.
os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
# Several processes of one machine share the SQLite file, and our own progress is enough.
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# It prints a link to each run, with the user and password of the store in it.
os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
# MLflow's seven retries take four minutes, in which a person thinks that the job hangs. Nothing is lost by giving up
# after a quarter of a minute: `ray_jobs.register` finishes what could not be recorded.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")


@dataclass(frozen=True)
class ModelVersion:
    """A registered version: its name, number, and what it was measured at."""

    name: str
    version: int
    tags: Mapping[str, str]
    run_id: str


@contextmanager
def reaching_store(then: str) -> Iterator[None]:
    """Turn what MLflow, its database and its files raise into one error.

    Parameters
    ----------
    then
        What is safe, and which command finishes the job.

    Raises
    ------
    RegistryUnavailable
        The store is down, locked, or refuses.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    # Errors of the network are OSErrors too.
    except (MlflowException, SQLAlchemyError, sqlite3.Error, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        store = os.environ.get("MLFLOW_TRACKING_URI", "its default place")
        why = _short(without_credentials(lines[0]))
        raise RegistryUnavailable(without_credentials(store), why, then) from error


def without_credentials(uri: str) -> str:
    """Give a tracking URI, or a text with one, as it may be printed and kept: without user and password."""
    return re.sub(r"//[^/@\s]*@", "//", uri)


def _short(text: str, longest: int = 240) -> str:
    return text if len(text) <= longest else text[:longest].rsplit(" ", 1)[0] + " ..."


def open_store(default_directory: str) -> str:
    """Open the tracking store of ``MLFLOW_TRACKING_URI``, else an SQLite file; give its URI.

    The database is made here, once, before any worker: several processes that make it at once break it.

    Parameters
    ----------
    default_directory
        Where ``mlflow.db`` goes without ``MLFLOW_TRACKING_URI``; an absolute local path.

    Raises
    ------
    RegistryUnavailable
        The store does not answer, or is locked.
    """
    import logging

    # MLflow's own lines say what ours say again: which version was made, that the package itself is a requirement.
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    # A traceback of every error of the database, which is raised as well.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a line for each retry
    uri = os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{default_directory}/mlflow.db")
    with reaching_store("nothing has been lost: repeat the command once it answers"):
        _open(uri)
    return uri


def _open(uri: str) -> None:
    import mlflow

    artifacts = None
    if uri.startswith("sqlite:///"):
        file = Path(uri.removeprefix("sqlite:///")).absolute()
        file.parent.mkdir(parents=True, exist_ok=True)
        _check_unlocked(file)
        # Beside the database: MLflow's own default would be the working directory of whoever comes first.
        artifacts = (file.parent / "artifacts").as_uri()
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient()
    if client.get_experiment_by_name(EXPERIMENT) is None:
        client.create_experiment(EXPERIMENT, artifact_location=artifacts)
    mlflow.set_experiment(EXPERIMENT)


def _check_unlocked(file: Path) -> None:
    """Read a line of the database: MLflow itself tries a locked one ten times, for minutes."""
    if file.exists():
        with closing(sqlite3.connect(file, timeout=LOCKED_AT_MOST)) as connection:
            connection.execute("SELECT name FROM sqlite_master LIMIT 1").fetchall()


def check_name(name: str, flag: str = "--registered-model") -> str:
    """Check a registered model's name: it is also part of ``models:/NAME@ALIAS``."""
    if not re.fullmatch(r"[\w.\- ]+", name):
        raise InputError(flag, repr(name), "a name of letters, digits, dots, dashes, underscores and spaces")
    return name


def is_registry_uri(model: str) -> bool:
    """Whether a ``--model`` names a registered model."""
    return model.startswith("models:/")


def find_registered(uri: str, flag: str = "--model", into: str | None = None) -> Path:
    """Give the local directory of a registered model: ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.

    It is a copy below `into` where that is given; else where the store keeps it, or a download of its own.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        directory = Path(mlflow.artifacts.download_artifacts(uri, dst_path=into))
    except MlflowException as error:
        raise InputError(flag, uri, f"a registered model ({str(error).splitlines()[0]})") from error
    found = directory / "artifacts"
    inside = [path.parent for path in found.rglob("config.json")]
    if len(inside) != 1:
        raise InputError(flag, uri, "a model that this package registered")
    return inside[0]


def pinned_uri(uri: str, flag: str = "--model") -> str:
    """Give ``models:/NAME/VERSION`` for an alias: it may move while workers start."""
    name, at, alias = uri.removeprefix("models:/").partition("@")
    if not at:
        return uri
    version = version_of_alias(name, alias)
    if version is None:
        raise InputError(flag, uri, f"a registered model with the alias {alias}")
    return f"models:/{name}/{version}"


def local_source(source: str, tracking_uri: str | None) -> str:
    """Give what a process opens: a registered model's local directory, anything else as it is.

    Parameters
    ----------
    source
        A model directory, URI, hub id or ``models:/NAME/VERSION``.
    tracking_uri
        The store of registered models: a worker on another node has an environment of its own.
    """
    if not is_registry_uri(source):
        return source
    import mlflow

    if tracking_uri is not None:
        mlflow.set_tracking_uri(tracking_uri)
    return str(find_registered(source))


def versions_of(name: str) -> list[ModelVersion]:
    """Give a registered model's versions, the oldest first."""
    import mlflow

    found = mlflow.MlflowClient().search_model_versions(f"name='{name}'")
    versions = [ModelVersion(name, int(item.version), dict(item.tags), str(item.run_id)) for item in found]
    if not versions:
        raise InputError("--registered-model", name, "a registered model with at least one version")
    return sorted(versions, key=lambda item: item.version)


def version_of_alias(name: str, alias: str) -> int | None:
    """Give the version that an alias names, None where there is none."""
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        return int(mlflow.MlflowClient().get_model_version_by_alias(name, alias).version)
    except MlflowException as error:
        if error.error_code not in NOT_THERE:
            raise
        return None


def weights_of(name: str, version: int, flag: str = "--model") -> str | None:
    """Give the hash of the weights that were registered as a version, None where it was not told."""
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        return mlflow.MlflowClient().get_model_version(name, str(version)).tags.get(WEIGHTS_TAG)
    except MlflowException as error:
        if error.error_code not in NOT_THERE:
            raise
        raise InputError(flag, f"models:/{name}/{version}", "a registered version") from error


def use_store(uri: str) -> None:
    """Ask this store from now on, in this process; unlike :func:`open_store` it writes nothing."""
    import mlflow

    os.environ["MLFLOW_TRACKING_URI"] = uri
    mlflow.set_tracking_uri(uri)
