"""What a service is started with: from the environment, or from ``args`` in Serve's configuration file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from geneformer_ray.data import storage
from geneformer_ray.errors import InputError

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
    batch_tokens: int = Field(16_384, ge=1, description="padded tokens computed at once, over all requests")
    batch_wait_s: float = Field(0.005, ge=0, le=10, description="how long a batch waits for more requests, seconds")
    num_cpus: float = Field(1, gt=0, description="CPUs of a replica; torch gets as many threads")
    num_gpus: float = Field(0, ge=0, description="GPUs of a replica; a fraction shares one")

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
        try:
            settings = cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            takes = f"one of {', '.join(names)}" if first["type"] == "extra_forbidden" else str(first["msg"])
            raise InputError(field, repr(first["input"]), takes.removeprefix("Input should be ")) from error
        here = Path.cwd() / "mlflow" / "mlflow.db"
        return settings.model_copy(
            update={
                "model": _absolute(settings.model),
                "vocabulary": settings.vocabulary and storage.absolute(settings.vocabulary),
                "tracking_uri": settings.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{here}",
            }
        )


def _absolute(model: str) -> str:
    """Make a directory absolute; a hub id looks like a relative path, so only what is there counts as one."""
    is_directory = not model.startswith("models:/") and storage.exists(storage.absolute(model))
    return storage.absolute(model) if is_directory else model
