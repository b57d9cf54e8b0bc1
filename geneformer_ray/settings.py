"""What the jobs, the service and the doctor of one installation share: the cluster, storage, MLflow, keys.

Each setting stands in an environment variable, or in one YAML file that ``GENEFORMER_SETTINGS`` names; the environment
wins, and a flag of a job wins over both. Ray and MLflow read the environment themselves, in every process they start:
so what the file says is put there, once, before either is imported.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

__all__ = ["FILE_VARIABLE", "VARIABLES", "Settings", "export_file"]

FILE_VARIABLE = "GENEFORMER_SETTINGS"
# Ray's and MLflow's own names where they have one.
VARIABLES = {
    "ray_address": "RAY_ADDRESS",
    "jobs_address": "RAY_API_SERVER_ADDRESS",
    "storage": "GENEFORMER_STORAGE",
    "tracking_uri": "MLFLOW_TRACKING_URI",
    "registry_uri": "MLFLOW_REGISTRY_URI",
    "registered_model": "GENEFORMER_REGISTERED_MODEL",
    "api_keys_file": "GENEFORMER_SERVE_API_KEYS_FILE",
    "api_keys": "GENEFORMER_SERVE_API_KEYS",
    "log_format": "GENEFORMER_LOG_FORMAT",
}
# The file is copied to every node, and may be kept with the code.
NOT_IN_FILE = "api_keys"


class Settings(BaseModel):
    """The settings of one installation; each also stands in the environment, see ``VARIABLES``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ray_address: str | None = Field(None, description="a running cluster (default: a local one for each job)")
    jobs_address: str | None = Field(None, description="its dashboard, which jobs are submitted to: http://HOST:8265")
    storage: str | None = Field(
        None, description="absolute path or URI (s3://, gs://) that every node reaches: relative paths lie below it"
    )
    tracking_uri: str | None = Field(None, description="the MLflow server or database (default: SQLite beside the job)")
    registry_uri: str | None = Field(None, description="the model registry, where it is not the tracking store's")
    registered_model: str | None = Field(None, description="the name that models are registered and served under")
    api_keys_file: str | None = Field(None, description="file of the service's API keys, one KEY or NAME KEY a line")
    api_keys: SecretStr | None = Field(None, description="the keys themselves, comma-separated; environment only")
    log_format: Literal["text", "json"] = Field("text", description="of what jobs tell on standard error")

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Read the environment, below it the file that it names.

        Raises
        ------
        InputError
            With the variable or the field of the file, what it got and what it takes.
        """
        file = environment.get(FILE_VARIABLE)
        values = _read_file(file) if file else {}
        where = {name: f"{name} in {file}" for name in values}
        for name, variable in VARIABLES.items():
            if environment.get(variable):
                values[name], where[name] = environment[variable], variable
        try:
            settings = cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            takes = f"one of {', '.join(cls.file_fields())}" if first["type"] == "extra_forbidden" else first["msg"]
            # What stands in the wrong place may be a key.
            got = "a value" if name in (NOT_IN_FILE, *(values.keys() - VARIABLES.keys())) else repr(first["input"])
            field = where.get(name, name)
            raise InputError(field, got, str(takes).removeprefix("Input should be ")) from None
        if settings.storage is not None and not ("://" in settings.storage or os.path.isabs(settings.storage)):
            takes = "an absolute path or a URI: jobs and workers have working directories of their own"
            raise InputError(where["storage"], settings.storage, takes)
        return settings

    @classmethod
    def file_fields(cls) -> list[str]:
        """Give the names that the file may hold."""
        return [name for name in cls.model_fields if name != NOT_IN_FILE]

    def variables(self) -> dict[str, str]:
        """Give the settings as environment variables, without secrets."""
        values = self.model_dump(exclude={NOT_IN_FILE}, exclude_defaults=True)
        return {VARIABLES[name]: str(value) for name, value in values.items()}

    def below_storage(self, path: str) -> str:
        """Give a relative path below the storage; others, and without a storage all, as they are."""
        if self.storage is None or "://" in path or os.path.isabs(os.path.expanduser(path)):
            return path
        return f"{self.storage.rstrip('/')}/{os.path.normpath(path)}"


def export_file(environment: MutableMapping[str, str] = os.environ) -> None:
    """Put what the settings file says into the environment, where it does not say otherwise itself.

    Raises
    ------
    InputError
        As :meth:`Settings.read`.
    """
    if environment.get(FILE_VARIABLE):
        for variable, value in Settings.read(environment).variables().items():
            if not environment.get(variable):
                environment[variable] = value


def _read_file(file: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(file).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(FILE_VARIABLE, file, f"a readable YAML file ({' '.join(str(error).split())})") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(FILE_VARIABLE, file, f"a YAML mapping of {', '.join(Settings.file_fields())}")
    if NOT_IN_FILE in content:
        takes = "nothing in this file, which lies on every node: api_keys_file, or the environment"
        raise InputError(f"{NOT_IN_FILE} in {file}", "a value", takes)
    return {str(name): value for name, value in content.items() if value is not None}
