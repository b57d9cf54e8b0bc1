"""What a service is started with: from the environment, or from ``args`` in Serve's configuration file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from geneformer_ray.data import storage
from geneformer_ray.errors import InputError
from geneformer_ray.settings import Settings

__all__ = ["ENVIRONMENT_PREFIX", "ServeSettings"]

ENVIRONMENT_PREFIX = "GENEFORMER_SERVE_"


class ServeSettings(BaseModel):
    """Settings of one service; each also stands in the environment as ``GENEFORMER_SERVE_`` and its name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        "models:/geneformer@champion",
        min_length=1,
        description="models:/NAME@ALIAS, models:/NAME/VERSION, a model directory, or a hub id",
    )
    vocabulary: str | None = Field(None, description="the model's vocabulary, where its directory carries none")
    tracking_uri: str | None = Field(
        None,
        description="the MLflow store of models:/ URIs; by default MLFLOW_TRACKING_URI, else mlflow/mlflow.db here",
    )
    max_cells: int = Field(64, ge=1, description="cells of one request")
    max_genes: int = Field(65_536, ge=1, description="genes or token ids of one cell")
    max_body_bytes: int = Field(8 * 1024**2, ge=1, description="bytes of one request's body")
    max_candidate_genes: int = Field(64, ge=1, description="genes of one perturb request")
    max_upload_bytes: int = Field(256 * 1024**2, ge=1, description="bytes of an uploaded h5ad file")
    max_upload_cells: int = Field(10_000, ge=1, description="cells of an uploaded h5ad file")
    upload_memory_bytes: int = Field(2 * 1024**3, ge=2**29, description="address space of the process that reads it")
    upload_seconds: int = Field(30, ge=1, description="seconds, by the clock and of computing, that it may take")
    upload_readers: int = Field(2, ge=1, description="uploads that are read at once; others wait")
    body_seconds: float = Field(30.0, gt=0, description="seconds within which a request's body must have arrived (408)")
    api_keys: SecretStr | None = Field(
        None, description="API keys, separated by commas, each KEY or NAME KEY; better in the environment or in a file"
    )
    api_keys_file: str | None = Field(
        None, description="a file of API keys, one KEY or NAME KEY a line, read again when it changes"
    )
    require_api_key: bool | None = Field(
        None, description="whether requests need a key (default: beyond loopback, and where there are keys)"
    )
    batch_tokens: int | None = Field(
        None, ge=1, description="padded tokens computed at once, over all requests (default: 4,096, on a GPU 65,536)"
    )
    batch_wait_s: float = Field(
        0.0, ge=0, le=10, description="seconds that a batch waits for more than what has queued up for the model"
    )
    deadline_s: float = Field(60.0, gt=0, description="seconds until a request is given up (504)")
    watch_s: float = Field(
        10.0, ge=0, description="seconds between two looks at the alias of a registered model; 0: never"
    )
    cache_dir: str | None = Field(
        None, description="where copies of registered models are kept (default: below the user's cache directory)"
    )
    screen_results: str | None = Field(
        None, description="output of python -m ray_jobs.statistics, whose ranking GET /v1/screen and the page show"
    )
    min_replicas: int = Field(1, ge=0, description="replicas at least")
    max_replicas: int = Field(1, ge=1, description="replicas at most: more are started as requests queue up")
    num_cpus: float = Field(1, gt=0, description="CPUs of a replica; torch gets as many threads")
    num_gpus: float = Field(0, ge=0, description="GPUs of a replica; a fraction shares one")

    @property
    def tokens_of_a_batch(self) -> int:
        """Tokens computed at once. A CPU gains nothing from more than a few thousand, and others wait that long."""
        return self.batch_tokens or (65_536 if self.num_gpus else 4_096)

    @property
    def cache_directory(self) -> Path:
        """Where copies of registered models are kept."""
        if self.cache_dir:
            return Path(self.cache_dir)
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "geneformer-ray" / "models"

    @classmethod
    def read(cls, args: Mapping[str, Any] | None = None) -> ServeSettings:
        """Read the environment, then `args`, which win; make local paths absolute.

        This runs where the service is started from: replicas have working directories and environments of their own.

        Raises
        ------
        InputError
            With the setting, what it got and what it takes.
        """
        names = {name: ENVIRONMENT_PREFIX + name.upper() for name in cls.model_fields}
        values: dict[str, Any] = {name: os.environ[key] for name, key in names.items() if os.environ.get(key)}
        values |= dict(args or {})
        shared = Settings.read()
        if "model" not in values and shared.registered_model:
            values["model"] = f"models:/{shared.registered_model}@champion"
        try:
            settings = cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            takes = f"one of {', '.join(names)}" if first["type"] == "extra_forbidden" else str(first["msg"])
            # An API key is shown nowhere, and what stands under an unknown name may be one.
            got = repr(first["input"]) if field in names and field != "api_keys" else "a value"
            raise InputError(field, got, takes.removeprefix("Input should be ")) from None
        store = settings.tracking_uri or shared.tracking_uri or "sqlite:///mlflow/mlflow.db"
        return settings.model_copy(
            update={
                "model": _absolute(settings.model),
                "cache_dir": str(settings.cache_directory.absolute()),
                "api_keys_file": settings.api_keys_file and str(Path(settings.api_keys_file).absolute()),
                "vocabulary": settings.vocabulary and storage.absolute(settings.vocabulary),
                "screen_results": settings.screen_results and storage.absolute(settings.screen_results),
                "tracking_uri": _absolute_store(store),
            }
        )


def _absolute(model: str) -> str:
    """Make a directory absolute; a hub id looks like a relative path, so only what is there counts as one."""
    is_directory = not model.startswith("models:/") and storage.exists(storage.absolute(model))
    return storage.absolute(model) if is_directory else model


def _absolute_store(uri: str) -> str:
    file = uri.removeprefix("sqlite:///")
    return uri if file == uri else f"sqlite:///{Path(file).absolute()}"
