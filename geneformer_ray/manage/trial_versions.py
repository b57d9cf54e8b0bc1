"""A trained trial in MLflow, whatever it has learned: a run, a version that says where it comes from, and a receipt."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from geneformer_ray.compute.model_directory import find_model, weights_digest
from geneformer_ray.data import storage
from geneformer_ray.data.digests import digest_of
from geneformer_ray.manage.promotion import CHOOSING_METRIC, LABELS_TAG, REPORTING_METRIC, VOCABULARY_TAG
from geneformer_ray.manage.registry import WEIGHTS_TAG, reaching_store
from geneformer_ray.manage.runs import DIGEST_TAG, log_run, register
from geneformer_ray.manage.trials import ADAPTERS
from geneformer_ray.run_log import current_run

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from geneformer_ray.manage.runs import RunRecord

__all__ = ["TrialVersion", "logged", "origin_tags", "parameters_of", "trial_tags", "what_finishes"]


@dataclass(frozen=True)
class TrialVersion:
    """A trial as a version of a registered model.

    Parameters
    ----------
    directory
        The trial's.
    digest
        What tells it from every other.
    tags
        What promotion compares, and where it comes from.
    example
        Token id lists: the model's input example.
    flavour
        As for :func:`geneformer_ray.manage.runs.register`.
    """

    directory: str
    digest: str
    tags: Mapping[str, str]
    example: Sequence[Sequence[int]]
    flavour: str = "pyfunc_model"

    def log(
        self, record_of: Callable[[dict[str, str]], RunRecord], registered_model: str | None, then: str
    ) -> dict[str, Any]:
        """Log the trial's run and register its model, each once however often called.

        Parameters
        ----------
        record_of
            Gives the run's record for the tags of the version.
        registered_model
            The name to register under; None leaves the model on disk.
        then
            What finishes the job if the store cannot be reached.

        Returns
        -------
        ``run_id`` and ``version``, which is None without a name.
        """
        model = find_model(storage.join(self.directory, "model"), "--output")
        tags = {**self.tags, WEIGHTS_TAG: weights_digest(model)}
        record = record_of(tags)
        with reaching_store(then):
            run_id = log_run(record)
        receipt: dict[str, Any] = {DIGEST_TAG: self.digest, "run_id": run_id}
        self._keep(receipt)
        version = None
        if registered_model is not None:
            with reaching_store(then):
                version = register(
                    run_id, self.digest, model, registered_model, tags, self.example, flavour=self.flavour
                ).version
            self._keep({**receipt, "versions": {registered_model: version}})
        return {"run_id": run_id, "version": version}

    def _keep(self, receipt: dict[str, Any]) -> None:
        """Write down beside a trial what it is in MLflow: for people; MLflow itself is asked by the digest."""
        storage.write_json(storage.join(self.directory, "recorded.json"), receipt)


def what_finishes(output: str, registered_model: str | None) -> str:
    """Say what finishes a training whose store cannot be reached."""
    name = f" --registered-model {shlex.quote(registered_model)}" if registered_model else ""
    command = f"python -m ray_jobs.register --output {shlex.quote(output)}{name}"
    return f"the trained models are safe in {output}: once it answers, `{command}` finishes the job"


def logged(plan: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Give entries of a plan as they read as parameters."""
    found = {name: plan[name] for name in names if name in plan}
    for name, value in found.items():
        if isinstance(value, dict):
            value = [f"{key}={one:g}" for key, one in value.items()]
        found[name] = ", ".join(value) if isinstance(value, list) else value
    return found


def parameters_of(plan: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Give how a plan trains: entries of it, its adapters and its options."""
    lora = {f"lora_{name}": value for name, value in plan.get("lora", {}).items()}
    return {**logged(plan, names), **lora, **plan.get("options", {})}


def origin_tags(plan: Mapping[str, Any], labels: Sequence[str], code_revision: str) -> dict[str, str]:
    """Give what each run of a training is tagged with: cells, vocabulary, classes and code."""
    return {
        "cells_digest": str(plan["cells"]),
        VOCABULARY_TAG: str(plan["vocabulary"]),
        LABELS_TAG: digest_of(labels),
        "code_revision": code_revision,
        **({"job_run": current_run().id} if current_run().id else {}),  # as in the log and in Ray's metrics
    }


def trial_tags(plan: Mapping[str, Any], directory: str, scores: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Give what a trial's run and version are tagged with beside: what promotion compares, and where the model lies."""
    choosing, reporting = scores["choosing"], scores["reporting"]
    return {
        CHOOSING_METRIC: f"{choosing['macro_f1']:.6f}",
        REPORTING_METRIC: f"{reporting['macro_f1']:.6f}",
        "reporting_accuracy": f"{reporting['accuracy']:.6f}",
        "model_directory": storage.join(directory, "model"),
        **({ADAPTERS: storage.join(directory, ADAPTERS)} if "lora" in plan else {}),
    }
