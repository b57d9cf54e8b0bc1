"""The flags of a job that is to be submitted: checked here by the job's own parser, before anything is uploaded."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_type_hints

from geneformer_ray.data import storage
from geneformer_ray.errors import InputError
from geneformer_ray.settings import Settings
from ray_jobs.command_line import parse, place

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["SubmittedFlags", "check", "jobs"]

# A job has to be able to tell them from hub ids and names of genes, so that no type says which flags are paths.
PATHS = (
    "output", "input", "cells", "shifts", "null", "against", "h5ad", "state_embeddings", "gene_sets",
    "gene_classes", "space",
)  # fmt: skip
TAKES = "an absolute path, a URI, or GENEFORMER_STORAGE: a submitted job works in a copy that Ray throws away"


@dataclass(frozen=True)
class SubmittedFlags:
    """Flags as the job is to get them.

    Parameters
    ----------
    job
        The job's name.
    flags
        As they were given, but for a local ``--config``.
    config
        That file, which has to be uploaded.
    """

    job: str
    flags: tuple[str, ...]
    config: Path | None

    @property
    def command(self) -> list[str]:
        """The driver's command; ``python`` is that of the cluster."""
        return ["python", "-m", f"ray_jobs.{self.job}", *self.flags]


def jobs() -> list[str]:
    """Give the names of the jobs that can be submitted: what this package can run, but for what submits."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    runnable = [file for file in files if '\nif __name__ == "__main__":' in file.read_text(encoding="utf-8")]
    return [file.stem for file in runnable if file.stem != "submit"]


def check(job: str, flags: Sequence[str], config_name: str) -> SubmittedFlags:
    """Check a job's flags as far as can be told here.

    Parameters
    ----------
    job, flags
        As they were given.
    config_name
        The name that a local ``--config`` file has where the job runs.

    Raises
    ------
    InputError
        With the flag, what it got and what it takes.
    SystemExit
        As the job's parser does: unknown flags, ``--help``.
    """
    if job not in jobs():
        raise InputError("job", job, f"one of {', '.join(jobs())}")
    module = importlib.import_module(f"ray_jobs.{job}")
    kind = get_type_hints(module.run)["config"]
    config = parse(kind, flags, description=(module.__doc__ or "").strip(), prog=f"python -m ray_jobs.{job}")
    # Flags that do not go together; not every job has such.
    getattr(module, "check_flags", lambda _: None)(config)
    for name in PATHS:
        value = getattr(config, name, None)
        for path in [value] if isinstance(value, str) else value or ():
            _check_path("--" + name.replace("_", "-"), path)
    return _with_config(job, flags, config_name)


def _check_path(flag: str, path: str) -> None:
    if Settings.read().storage is None and not storage.is_uri(path) and not os.path.isabs(os.path.expanduser(path)):
        raise InputError(flag, f"the relative path {path}", TAKES)
    place(path, flag)


def _with_config(job: str, flags: Sequence[str], config_name: str) -> SubmittedFlags:
    """Let ``--config`` name the file where the job will find it; one that every node can read stays as it is."""
    result, config = list(flags), None
    for at, flag in enumerate(flags):
        name, equals, value = flag.partition("=")
        if name != "--config":
            continue
        file = value if equals else flags[at + 1]
        if storage.is_uri(file):
            continue
        config = Path(file).expanduser()
        if equals:
            result[at] = f"{name}={config_name}"
        else:
            result[at + 1] = config_name
    return SubmittedFlags(job, tuple(result), config)
