"""Finish what finetune could not record: log its trials in MLflow and register their models, from its output alone.

When MLflow is down or locked, finetune ends with exit code 1 and one line that names this command; its models lie in
its output. This job logs and registers what the store does not have yet, so it can be run again, after another failure
too. It also registers the models of a finetune that was given no --registered-model.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from pydantic import Field

from geneformer_ray.data import storage
from geneformer_ray.distribute.train_workers import discard_checkpoints
from geneformer_ray.errors import InputError
from geneformer_ray.manage.gene_records import log_gene_run
from geneformer_ray.manage.gene_run import KIND as GENES
from geneformer_ray.manage.gene_run import GeneRun
from geneformer_ray.manage.registry import check_name, open_store, without_credentials
from geneformer_ray.manage.trained_run import CELLS, TrainedRun, kind_of
from geneformer_ray.manage.trial_records import log_trained_run
from geneformer_ray.progress import say
from ray_jobs.command_line import JobConfig, main, place, store_directory

if TYPE_CHECKING:
    from collections.abc import Callable

# What a finished training is of, as its record says -> how it is read, and how it is logged.
KINDS: dict[str, tuple[Callable[[str], Any], Callable[[Any, str | None], dict[str, Any]]]] = {
    CELLS: (TrainedRun.load, log_trained_run),
    GENES: (GeneRun.load, log_gene_run),
}


class RegisterConfig(JobConfig):
    """Flags of ``python -m ray_jobs.register``."""

    output: str = Field(description="finetune's output, with its finished training")
    registered_model: str | None = Field(
        None, description="name in the registry (default: the one that finetune was given)"
    )


def run(config: RegisterConfig) -> dict[str, Any]:
    """Log and register what is missing; the summary is finetune's."""
    output = place(config.output, "--output")
    kind = kind_of(output)
    if kind not in KINDS:
        raise InputError("--output", f"{output} with a training of {kind}", f"one of {', '.join(KINDS)}")
    load, log = KINDS[kind]
    trained = load(output)
    name = config.registered_model if config.registered_model is not None else trained.registered_model
    if name is not None:
        check_name(name)
    tracking = without_credentials(open_store(store_directory()))
    say(f"MLflow: {tracking}")
    summary = log(trained, name) | {"output": output, "mlflow": tracking}
    storage.finish_output(output, trained.plan, summary)
    with contextlib.suppress(FileNotFoundError):
        discard_checkpoints(output)
    return summary


if __name__ == "__main__":
    main(RegisterConfig, run, __doc__ or "")
