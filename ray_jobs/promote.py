"""Make a registered version the champion if it beats the present one, or go back to the one before.

The candidate is chosen by macro F1 on the choosing cells, and compared with the champion by macro F1 on the reporting
cells, which must be the same ones. A candidate that is not better ends with exit code 0 and "promoted": false in the
summary, whose other figures are the champion's.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from geneformer_ray.errors import InputError
from geneformer_ray.manage.promotion import REPORTING_METRIC, promote, rollback
from geneformer_ray.manage.registry import open_store, reaching_store, without_credentials
from geneformer_ray.progress import say
from ray_jobs.command_line import JobConfig, main, store_directory


class PromoteConfig(JobConfig):
    """Flags of ``python -m ray_jobs.promote``."""

    registered_model: str = Field(description="name in the registry")
    version: int | None = Field(
        None, ge=1, description="the candidate (default: the best macro F1 on the choosing cells)"
    )
    margin: float = Field(
        0.0, ge=-1, le=1,
        description="macro F1 on the reporting cells must exceed the champion's by more than this; below 0: how much "
        "worse it may be",
    )  # fmt: skip
    allow_change: bool = Field(
        False, description="admit another label set or vocabulary, or other reporting cells (then without comparison)"
    )
    rollback: bool = Field(False, description="make the previous champion the champion again")


def run(config: PromoteConfig) -> dict[str, Any]:
    """Move the alias ``champion``; the former champion becomes ``previous``."""
    if config.rollback and config.version is not None:
        raise InputError("--version", config.version, "nothing with --rollback, which knows the version")
    tracking = without_credentials(open_store(store_directory()))
    with reaching_store("repeat the command once it answers"):
        if config.rollback:
            found = rollback(config.registered_model)
        else:
            found = promote(
                config.registered_model, config.version, margin=config.margin, allow_change=config.allow_change
            )
    champion = found.champion
    say(f"{'promoted' if found.promoted else 'not promoted'} version {found.candidate.version}: {found.reason}")
    return {
        "name": champion.name,
        "version": champion.version,
        "previous": found.previous,
        "promoted": found.promoted,
        "reason": found.reason,
        "candidate": found.candidate.version,
        "margin": config.margin,
        "pooling": champion.tags.get("pooling"),
        "macro_f1": _number(champion.tags.get(REPORTING_METRIC)),
        "accuracy": _number(champion.tags.get("reporting_accuracy")),
        "mlflow": tracking,
    }


def _number(text: str | None) -> float | None:
    return None if text is None else float(text)


if __name__ == "__main__":
    main(PromoteConfig, run, __doc__ or "")
