"""MLflow: runs with their metrics and figures, registered model versions, and the champion alias."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from matplotlib.figure import Figure

__all__ = [
    "CHAMPION",
    "CHOOSING_METRIC",
    "PREVIOUS",
    "SPLIT_TAG",
    "ModelVersion",
    "find_registered",
    "is_registry_uri",
    "local_source",
    "log_run",
    "open_store",
    "pinned_uri",
    "promote",
    "register",
    "rollback",
    "version_of_alias",
]

CHAMPION, PREVIOUS = "champion", "previous"
CHOOSING_METRIC = "choosing_macro_f1"
SPLIT_TAG = "split_digest"
EXPERIMENT = "geneformer-ray"
# How MLflow says that a model or an alias does not exist, by kind of store.
NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
# Pickles are never read from a store that others can write to; this is read when MLflow loads a model.
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
# Several processes of one machine share the SQLite file, and our own progress is enough.
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


@dataclass(frozen=True)
class ModelVersion:
    """A registered version: its name, number, and what it was measured at."""

    name: str
    version: int
    tags: Mapping[str, str]
    run_id: str


def open_store(default_directory: str) -> str:
    """Open the tracking store of ``MLFLOW_TRACKING_URI``, else an SQLite file; give its URI.

    The database is made here, once, before any worker: several processes that make it at once break it.

    Parameters
    ----------
    default_directory
        Where ``mlflow.db`` goes without ``MLFLOW_TRACKING_URI``; an absolute local path.
    """
    import logging

    import mlflow

    # Its own lines say what ours say again: which version was made, and that the package itself is a requirement.
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    uri = os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{default_directory}/mlflow.db")
    artifacts = None
    if uri.startswith("sqlite:///"):
        # Beside the database: MLflow's own default would be the working directory of whoever comes first.
        folder = Path(uri.removeprefix("sqlite:///")).absolute().parent
        folder.mkdir(parents=True, exist_ok=True)
        artifacts = (folder / "artifacts").as_uri()
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient()
    if client.get_experiment_by_name(EXPERIMENT) is None:
        client.create_experiment(EXPERIMENT, artifact_location=artifacts)
    mlflow.set_experiment(EXPERIMENT)
    return uri


def log_run(
    name: str,
    *,
    parameters: Mapping[str, Any],
    metrics: Mapping[str, float],
    curves: Iterable[Mapping[str, float]] = (),
    figures: Mapping[str, Figure] | None = None,
    documents: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
) -> str:
    """Log one finished run; give its id.

    Parameters
    ----------
    name
        The run's name.
    parameters, metrics, tags
        As MLflow has them.
    curves
        One mapping a step, with a key ``step``.
    figures
        File name -> figure.
    documents
        File name -> JSON content.
    """
    import mlflow

    with mlflow.start_run(run_name=name) as run:
        mlflow.log_params({key: str(value)[:500] for key, value in parameters.items()})
        mlflow.log_metrics(dict(metrics))
        for point in curves:
            values = {key: float(value) for key, value in point.items() if key != "step"}
            mlflow.log_metrics(values, step=int(point["step"]))
        for file, figure in (figures or {}).items():
            mlflow.log_figure(figure, file)
        for file, content in (documents or {}).items():
            mlflow.log_dict(content, file)
        if tags:
            mlflow.set_tags(dict(tags))
        return str(run.info.run_id)


def register(run_id: str, directory: Path, name: str, tags: Mapping[str, str]) -> ModelVersion:
    """Register a self-contained model directory as a new version.

    Parameters
    ----------
    run_id
        The run that made it.
    directory
        The model directory.
    name
        The registered model's name.
    tags
        Metrics and digests of the version.
    """
    from importlib.metadata import version

    import mlflow
    from mlflow.exceptions import MlflowException

    with mlflow.start_run(run_id=run_id), warnings.catch_warnings():
        # An example would have MLflow load the model and predict, for every version; the signature says it all.
        warnings.filterwarnings("ignore", "(?s).*An input example was not provided")
        info = mlflow.pyfunc.log_model(
            name="classifier",
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts={"model": str(directory)},
            # What loads it beside this package, which has to be installed there.
            pip_requirements=[f"{name}=={version(name)}" for name in ("mlflow", "torch", "transformers")],
            signature=_signature(),
        )
    client = mlflow.MlflowClient()
    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code not in NOT_THERE:
            raise
        client.create_registered_model(name)
    texts = {key: str(value) for key, value in tags.items()}
    made = client.create_model_version(name, info.model_uri, run_id=run_id, tags=texts, model_id=info.model_id)
    return ModelVersion(name, int(made.version), texts, run_id)


def _signature() -> Any:
    """Say what the model takes: a column of token id lists."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, Schema

    return ModelSignature(inputs=Schema([ColSpec(Array(DataType.long), name="input_ids")]))


def is_registry_uri(model: str) -> bool:
    """Whether a ``--model`` names a registered model."""
    return model.startswith("models:/")


def find_registered(uri: str, flag: str = "--model") -> Path:
    """Give the local directory of a registered model: ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``."""
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        directory = Path(mlflow.artifacts.download_artifacts(uri))
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


def _versions(name: str) -> list[ModelVersion]:
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


def promote(name: str, version: int | None = None) -> tuple[ModelVersion, int | None]:
    """Make a version the champion; the former champion becomes ``previous``.

    Parameters
    ----------
    name
        The registered model.
    version
        The version; by default the one with the highest macro F1 on the choosing cells, among those with the newest
        version's split.

    Returns
    -------
    champion, former
        The champion, and the number of the version that was it before.
    """
    import mlflow

    versions = _versions(name)
    if version is None:
        # Figures compare only on the same cells: those of the newest version's split.
        split = versions[-1].tags.get(SPLIT_TAG)
        measured = [v for v in versions if CHOOSING_METRIC in v.tags and v.tags.get(SPLIT_TAG) == split]
        if not measured:
            raise InputError("--version", "nothing", f"a version: none of {name} is tagged with {CHOOSING_METRIC}")
        chosen = max(measured, key=lambda item: (float(item.tags[CHOOSING_METRIC]), item.version))
    else:
        matching = [item for item in versions if item.version == version]
        if not matching:
            raise InputError("--version", version, f"one of {', '.join(str(item.version) for item in versions)}")
        chosen = matching[0]
    client = mlflow.MlflowClient()
    former = version_of_alias(name, CHAMPION)
    if former is not None and former != chosen.version:
        client.set_registered_model_alias(name, PREVIOUS, str(former))
    client.set_registered_model_alias(name, CHAMPION, str(chosen.version))
    return chosen, former


def rollback(name: str) -> tuple[ModelVersion, int | None]:
    """Make the previous champion the champion again; the two change places."""
    _versions(name)
    previous = version_of_alias(name, PREVIOUS)
    if previous is None:
        raise InputError("--rollback", f"{name} without a previous champion", "a model that was promoted twice")
    return promote(name, previous)
