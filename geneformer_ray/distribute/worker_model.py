"""A model as a worker on any node opens it."""

from __future__ import annotations

from typing import Any

from geneformer_ray.compute.model_runner import ModelRunner
from geneformer_ray.manage.registry import local_source

__all__ = ["open_runner"]


def open_runner(options: dict[str, Any]) -> ModelRunner:
    """Open a model from options of :class:`ModelRunner` and, for a registered one, its ``tracking_uri``."""
    rest = {name: value for name, value in options.items() if name not in ("model", "tracking_uri")}
    return ModelRunner(local_source(options["model"], options.get("tracking_uri")), **rest)
