"""MLflow runs and registered versions, each made once: what a broken attempt left is found and finished."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geneformer_ray.manage.registry import EXPERIMENT, NOT_THERE, ModelVersion

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from matplotlib.figure import Figure
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run

__all__ = ["DIGEST_TAG", "PARENT_TAG", "RunRecord", "log_run", "register"]

# On every run, logged model and version: what it is a record of.
DIGEST_TAG = "trial_digest"
# How MLflow knows the run that another belongs to.
PARENT_TAG = "mlflow.parentRunId"
ENTRIES_AT_ONCE = 500  # MLflow takes 1,000 metrics at once
PARAMETERS_AT_ONCE = 100
LONGEST_PARAMETER = 500


@dataclass(frozen=True)
class RunRecord:
    """All that a finished run logs.

    Parameters
    ----------
    name
        The run's name.
    digest
        What tells this run from every other: logging it again gives the same run.
    parameters, metrics, tags
        As MLflow has them.
    curves
        One mapping a step, with a key ``step``; whatever else in it is a number becomes a curve.
    figures, documents, files
        File name -> figure, JSON content, content as it is.
    """

    name: str
    digest: str
    parameters: Mapping[str, Any]
    metrics: Mapping[str, float]
    curves: Sequence[Mapping[str, Any]] = ()
    figures: Mapping[str, Figure] = field(default_factory=dict)
    documents: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


def log_run(record: RunRecord) -> str:
    """Log a finished run and give its id; one that is there already is left as it is, or finished."""
    import mlflow

    client = mlflow.MlflowClient()
    run = _started(client, record)
    run_id = str(run.info.run_id)
    if run.info.status != "FINISHED":
        _log_numbers(client, run, record)
        with tempfile.TemporaryDirectory() as folder:
            _write_files(Path(folder), record)
            client.log_artifacts(run_id, folder)
        # Last: a run that is not finished is known by that.
        client.set_terminated(run_id, "FINISHED")
    return run_id


def _experiment(client: MlflowClient) -> str:
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        raise RuntimeError("open_store makes the experiment, and comes first")
    return str(experiment.experiment_id)


def _started(client: MlflowClient, record: RunRecord) -> Run:
    """Find the record's run, or start it."""
    experiment = _experiment(client)
    found = client.search_runs([experiment], f"tags.{DIGEST_TAG} = '{record.digest}'")
    if found:
        return min(found, key=lambda run: (run.info.status != "FINISHED", run.info.start_time))
    tags = {**record.tags, DIGEST_TAG: record.digest}
    return client.create_run(experiment, tags=tags, run_name=record.name)


def _log_numbers(client: MlflowClient, run: Run, record: RunRecord) -> None:
    from mlflow.entities import Metric, Param

    # All at one time, that of the run's start: MLflow drops what it has already, so that logging twice adds nothing.
    when = run.info.start_time
    metrics = [Metric(key, float(value), when, 0) for key, value in record.metrics.items()]
    metrics += [
        Metric(key, float(value), when, int(point["step"]))
        for point in record.curves
        for key, value in point.items()
        if key != "step" and isinstance(value, int | float)
    ]
    parameters = [
        Param(key, str(value)[:LONGEST_PARAMETER])
        for key, value in record.parameters.items()
        if key not in run.data.params
    ]
    for part in _parts(parameters, PARAMETERS_AT_ONCE):
        client.log_batch(run.info.run_id, params=part)
    for part in _parts(metrics, ENTRIES_AT_ONCE):
        client.log_batch(run.info.run_id, metrics=part)


def _parts(entries: list[Any], size: int) -> Iterable[list[Any]]:
    return (entries[start : start + size] for start in range(0, len(entries), size))


def _write_files(folder: Path, record: RunRecord) -> None:
    for name, figure in record.figures.items():
        figure.savefig(folder / name)
    for name, content in record.documents.items():
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, file in record.files.items():
        (folder / name).write_bytes(file)


def register(
    run_id: str,
    digest: str,
    directory: Path,
    name: str,
    tags: Mapping[str, str],
    example: Sequence[Sequence[int]],
    *,
    flavour: str = "pyfunc_model",
) -> ModelVersion:
    """Register a self-contained model directory as a new version, or give the version that it already is.

    Parameters
    ----------
    run_id
        The run that made it.
    digest
        What tells this model from every other.
    directory
        The model directory.
    name
        The registered model's name.
    tags
        Metrics and digests of the version.
    example
        Token id lists of some cells: the model's input example.
    flavour
        The file beside this one that MLflow runs to load the model.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    client = mlflow.MlflowClient()
    found = client.search_model_versions(f"name = '{name}' and tag.{DIGEST_TAG} = '{digest}'")
    if found:
        made = min(found, key=lambda version: int(version.version))
        return ModelVersion(name, int(made.version), dict(made.tags), str(made.run_id))
    model = _logged_model(client, run_id, digest, directory, example, flavour)
    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code not in NOT_THERE:
            raise
        client.create_registered_model(name)
    texts = {**{key: str(value) for key, value in tags.items()}, DIGEST_TAG: digest}
    made = client.create_model_version(name, model.model_uri, run_id=run_id, tags=texts, model_id=model.model_id)
    return ModelVersion(name, int(made.version), texts, run_id)


def _logged_model(
    client: MlflowClient, run_id: str, digest: str, directory: Path, example: Sequence[Sequence[int]], flavour: str
) -> LoggedModel:
    """Find the run's uploaded model, or upload it.

    In steps of our own rather than by ``mlflow.pyfunc.log_model``, which would load every model that comes with an
    input example, and predict: seconds and gigabytes for each version.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    experiment = _experiment(client)
    for found in client.search_logged_models([experiment], f"tags.{DIGEST_TAG} = '{digest}'"):
        if found.status == LoggedModelStatus.READY:
            return found
        client.delete_logged_model(found.model_id)  # half an upload
    model = client.create_logged_model(experiment, "classifier", source_run_id=run_id, tags={DIGEST_TAG: digest})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        _save_pyfunc(path, model, run_id, directory, example, flavour)
        client.log_model_artifacts(model.model_id, str(path))
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    return client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


def _save_pyfunc(
    path: Path, model: LoggedModel, run_id: str, directory: Path, example: Sequence[Sequence[int]], flavour: str
) -> None:
    from importlib.metadata import version

    import mlflow
    import pandas as pd
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, Schema

    mlflow.pyfunc.save_model(
        str(path),
        mlflow_model=Model(artifact_path=model.artifact_location, run_id=run_id, model_id=model.model_id),
        python_model=str(Path(__file__).with_name(f"{flavour}.py")),
        artifacts={"model": str(directory)},
        # What loads it beside this package, which has to be installed there.
        pip_requirements=[f"{name}=={version(name)}" for name in ("mlflow", "torch", "transformers")],
        signature=ModelSignature(inputs=Schema([ColSpec(Array(DataType.long), name="input_ids")])),
        input_example=pd.DataFrame({"input_ids": [[int(token) for token in cell] for cell in example]}),
    )
