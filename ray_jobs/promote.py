"""Make a registered version the champion, or go back to the one before."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from geneformer_ray.errors import InputError
from geneformer_ray.manage.registry import open_store, promote, rollback
from ray_jobs.command_line import JobConfig, main, store_directory


class PromoteConfig(JobConfig):
    """Flags of ``python -m ray_jobs.promote``."""

    registered_model: str = Field(description="name in the registry")
    version: int | None = Field(
        None, ge=1, description="the version (default: the best macro F1 on the choosing cells)"
    )
    rollback: bool = Field(False, description="make the previous champion the champion again")


def run(config: PromoteConfig) -> dict[str, Any]:
    """Move the alias ``champion``; the former champion becomes ``previous``."""
    if config.rollback and config.version is not None:
        raise InputError("--version", config.version, "nothing with --rollback, which knows the version")
    tracking = open_store(store_directory())
    if config.rollback:
        champion, former = rollback(config.registered_model)
    else:
        champion, former = promote(config.registered_model, config.version)
    return {
        "name": champion.name,
        "version": champion.version,
        "previous": former,
        "pooling": champion.tags.get("pooling"),
        "macro_f1": _number(champion.tags.get("reporting_macro_f1")),
        "accuracy": _number(champion.tags.get("reporting_accuracy")),
        "mlflow": tracking,
    }


def _number(text: str | None) -> float | None:
    return None if text is None else float(text)


if __name__ == "__main__":
    main(PromoteConfig, run, __doc__ or "")
