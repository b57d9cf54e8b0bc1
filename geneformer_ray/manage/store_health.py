"""Whether MLflow's store can be used: it answers, takes a tag and a model, keeps artifacts, and has a champion."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import sqlite3
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from geneformer_ray.errors import InputError, RegistryUnavailable
from geneformer_ray.finding import Finding, fault, note, ok, warning
from geneformer_ray.manage.places import check_place
from geneformer_ray.manage.ports import who_holds
from geneformer_ray.manage.promotion import CHAMPION
from geneformer_ray.manage.registry import (
    EXPERIMENT,
    reaching_store,
    use_store,
    version_of_alias,
    versions_of,
    without_credentials,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "artifact_location",
    "check_artifacts",
    "check_registered",
    "check_store",
    "is_local",
    "keeps_artifacts",
    "sqlite_file",
]

ANSWER_SECONDS = 5.0
LOCKED_AT_MOST = 2.0
TAG = "geneformer-ray.doctor"
# What MLflow takes as a store without a scheme; any other such text is a folder's path.
NAMED_STORES = ("databricks", "databricks-uc", "uc")
START_SERVER = (
    "mlflow server --backend-store-uri sqlite:////ABSOLUTE/mlflow.db --artifacts-destination /ABSOLUTE/artifacts; "
    "export MLFLOW_TRACKING_URI=http://HOST:5000"
)


def check_store(uri: str) -> Iterator[Finding]:
    """Reach a tracking store and write to it, its registry included; everything is left as it was.

    After a fault, and where there is no database yet, nothing more can be asked of it.
    """
    name = "registry.store"
    shown = without_credentials(uri)
    if uri not in NAMED_STORES and is_local(uri):
        found = f"{shown} is a folder of files, which MLflow no longer takes"
        yield fault(name, found, "export MLFLOW_TRACKING_URI=sqlite:////ABSOLUTE/mlflow.db, or a server's address")
        return
    file = sqlite_file(uri)
    if file is not None and not (file.exists() and file.stat().st_size):
        # Written to, but not made: the first job does that, once and before its workers.
        place = list(check_place(name, str(file.parent), "choose a folder that can be written: MLFLOW_TRACKING_URI"))
        yield from (one for one in place if one.status == "fault")
        if place[-1].status == "ok":
            yield note(name, f"{shown}: no database yet, the first job makes it")
        return
    problem = _why_not_sqlite(file) if file is not None else _why_not_server(uri)
    if problem is not None:
        yield fault(name, f"{shown}: {problem[0]}", problem[1])
        return
    left: list[str] = []
    try:
        with reaching_store(""):
            _write_and_clear(uri, left)
    except RegistryUnavailable as error:
        old = "out-of-date" in error.why or "schema" in error.why
        upgrade = f"mlflow db upgrade '{shown}' (copy the database first)"
        do = upgrade if old else "mend what MLflow names; its server's log says more"
        yield fault(name, f"{shown}: {'; '.join([error.why, *left])}", do)
        return
    if left:
        yield fault("registry.cleared", f"{shown}: {'; '.join(left)}", "delete it by hand; this user may not")
    if file is not None and not uri.startswith("sqlite:////"):
        found = f"{shown} is relative: another working directory, and every worker, has another"
        options = "".join(uri.partition("?")[1:])
        yield warning("registry.place", found, f"export MLFLOW_TRACKING_URI='sqlite:///{file}{options}'")
    yield ok(name, f"{shown}: a tag and a registered model were made{'' if left else ' and deleted again'}")


def artifact_location() -> str:
    """Give where the runs of the store in use keep their files: those of our experiment, else of MLflow's own."""
    import mlflow

    client = mlflow.MlflowClient()
    with reaching_store(""):
        experiment = client.get_experiment_by_name(EXPERIMENT) or client.get_experiment("0")
    return str(experiment.artifact_location)


def check_artifacts(location: str) -> Iterator[Finding]:
    """Write a file to where runs keep theirs, from this process, and delete it again."""
    name = "registry.artifacts"
    if is_local(location):
        yield from check_place(name, location, f"make it writable, or keep artifacts in a server: {START_SERVER}")
        return
    why = keeps_artifacts(location, None)
    if why:
        do = "the server's --artifacts-destination and its log, or the credentials of the object store"
        yield fault(name, f"{without_credentials(location)} cannot be written and cleared: {why}", do)
    else:
        yield ok(name, f"{without_credentials(location)}: written and cleared by this process")


def keeps_artifacts(location: str, tracking_uri: str | None) -> str:
    """Write and delete a file through MLflow; an empty answer means that it went well, another says why not.

    Parameters
    ----------
    location
        An experiment's artifact location that is no local path.
    tracking_uri
        The store, for a worker whose environment does not name it.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    if tracking_uri is not None:
        use_store(tracking_uri)
    folder = f"doctor-{secrets.token_hex(6)}"
    with tempfile.TemporaryDirectory() as own:
        file = Path(own, "word")
        file.write_text(folder, encoding="utf-8")
        try:
            repository = get_artifact_repository(location)
            repository.log_artifact(str(file), folder)
        except (MlflowException, OSError) as error:
            return _first_line(error)
        try:
            repository.delete_artifacts(folder)
        except (MlflowException, OSError) as error:
            return f"{folder}/{file.name} was not deleted and is left ({_first_line(error)})"
    return ""


def check_registered(name: str) -> Iterator[Finding]:
    """Look for a registered model and its champion."""
    check = "registry.model"
    try:
        with reaching_store(""):
            versions = versions_of(name)
            champion = version_of_alias(name, CHAMPION)
    except InputError:
        do = f"python -m ray_jobs.finetune ... --registered-model {name}"
        yield warning(check, f"no version of {name} is registered: there is nothing to serve yet", do)
        return
    if champion is None:
        do = f"python -m ray_jobs.promote --registered-model {name}"
        yield warning(check, f"{name} has {len(versions)} versions and no alias {CHAMPION}", do)
    else:
        yield ok(check, f"{name}: {len(versions)} versions, {CHAMPION} is {champion}")


def sqlite_file(uri: str) -> Path | None:
    """Give the file of an SQLite store; None for another store."""
    path = uri.removeprefix("sqlite:///").partition("?")[0]  # ?timeout=3 and the like are for the driver
    return Path(path).absolute() if uri.startswith("sqlite:///") else None


def is_local(location: str) -> bool:
    """Whether MLflow takes a location as a path of this machine."""
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*(?=:)", location)
    return scheme is None or scheme[0].lower() == "file"


def _first_line(error: Exception) -> str:
    return without_credentials((str(error).strip().splitlines() or [type(error).__name__])[0])


def _why_not_sqlite(file: Path) -> tuple[str, str] | None:
    """Take the lock of a database that exists and give it back: MLflow itself would try for minutes."""
    address = f"file:{quote(str(file))}?mode=rw"
    try:
        with contextlib.closing(sqlite3.connect(address, uri=True, timeout=LOCKED_AT_MOST, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            tables = {row[0] for row in db.execute("SELECT name FROM sqlite_master")}
            db.execute("ROLLBACK")
    except sqlite3.Error as error:
        if "locked" in str(error):
            return f"locked by {who_holds(file) or 'a process that is not seen from here'}", "wait for it, or end it"
        return f"{error}", f"an MLflow database that can be written: ls -l {file}, or move it away and start anew"
    if tables and "experiments" not in tables:
        return "a database, but not MLflow's", "name another file in MLFLOW_TRACKING_URI"
    return None


def _why_not_server(uri: str) -> tuple[str, str] | None:
    """Ask a server whether it lives, before MLflow tries for a quarter of a minute."""
    if not uri.startswith(("http://", "https://")):
        return None
    import httpx

    try:
        status = httpx.get(f"{uri.rstrip('/')}/health", timeout=ANSWER_SECONDS).status_code
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return f"does not answer ({type(error).__name__}: {error})", f"start it, or correct the address: {START_SERVER}"
    if status in (401, 403):
        do = "MLFLOW_TRACKING_USERNAME and _PASSWORD, or MLFLOW_TRACKING_TOKEN; the server's --allowed-hosts"
        return f"answers {status}", do
    return None


def _write_and_clear(uri: str, left: list[str]) -> None:
    """Make and delete a tag in the tracking store and a model in the registry, the only things that leave no trace.

    Parameters
    ----------
    uri
        The tracking store.
    left
        Takes what could not be deleted, and why.
    """
    import mlflow

    # What is wrong is raised as well, and told in one line.
    for name in ("mlflow", "mlflow.store.db.utils", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    use_store(uri)
    if os.environ.get("MLFLOW_REGISTRY_URI"):
        mlflow.set_registry_uri(os.environ["MLFLOW_REGISTRY_URI"])
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(EXPERIMENT) or client.get_experiment("0")
    number, model = experiment.experiment_id, f"geneformer-ray-doctor-{secrets.token_hex(6)}"
    client.set_experiment_tag(number, TAG, "written")
    try:
        client.create_registered_model(model)
        left += _not_deleted(f"the registered model {model}", lambda: client.delete_registered_model(model))
    finally:
        what = f"the tag {TAG} of experiment {number}"
        left += _not_deleted(what, lambda: client.delete_experiment_tag(number, TAG))


def _not_deleted(what: str, delete: Callable[[], None]) -> list[str]:
    """Delete something that was made; where that is refused, say that it is left: the rest is deleted all the same."""
    try:
        with reaching_store(""):
            delete()
    except RegistryUnavailable as error:
        return [f"{what} was not deleted and is left ({error.why})"]
    return []
