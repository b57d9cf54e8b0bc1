"""A model as a worker on any node opens it."""

from __future__ import annotations

import platform
from typing import Any

from geneformer_ray.compute.model_directory import find_model, weights_digest
from geneformer_ray.compute.model_runner import ModelRunner
from geneformer_ray.errors import InputError
from geneformer_ray.manage.registry import local_source

__all__ = ["open_runner"]


def open_runner(options: dict[str, Any]) -> ModelRunner:
    """Open a model from options of :class:`ModelRunner` and, for a registered one, its ``tracking_uri``.

    Where the options hold a ``digest``, the model must have it.

    Raises
    ------
    InputError
        If the model on this node is another one.
    """
    source, digest = local_source(options["model"], options.get("tracking_uri")), options.get("digest")
    rest = {name: value for name, value in options.items() if name not in ("model", "tracking_uri", "digest")}
    if digest is not None:
        source = str(find_model(source))
        found = weights_digest(find_model(source))
        if found != digest:
            got = f"{options['model']} with digest {found} on {platform.node()}"
            raise InputError("--model", got, f"{digest}, the digest of the model that the run was started with")
    return ModelRunner(source, **rest)
