"""What a finished pretraining leaves in its output for MLflow, and the one run that it becomes there.

Nothing here needs the cells or the cluster, and only :meth:`FinishedPretraining.log` needs the store: one that is out
of reach costs no model, and the same command then records what lies there.

::

    OUTPUT/history.json           loss and accuracy of every epoch, by the masks of training
    OUTPUT/measured.json          hidden genes of the held-out cells: named by the model, by the one that it began
                                  with, by frequency alone
    OUTPUT/training_curves.png    both as a figure
    OUTPUT/pretraining.json       plan, what was held out, a random id; written last
"""

from __future__ import annotations

import io
import uuid
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from geneformer_ray.compute.model_directory import find_model, weights_digest
from geneformer_ray.data import storage
from geneformer_ray.data.digests import digest_of
from geneformer_ray.errors import InputError
from geneformer_ray.manage.code_revision import code_revision
from geneformer_ray.manage.pretraining_plot import pretraining_figure
from geneformer_ray.manage.promotion import SPLIT_TAG, VOCABULARY_TAG
from geneformer_ray.manage.registry import WEIGHTS_TAG, reaching_store
from geneformer_ray.manage.runs import RunRecord, log_run
from geneformer_ray.run_log import current_run

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.figure import Figure

__all__ = ["FinishedPretraining"]

RECORD = "pretraining.json"
FIGURE = "training_curves.png"
# Of the plan, beside its options; all of it is in config.json.
LOGGED = ("workers", "precision", "group")


@dataclass(frozen=True)
class FinishedPretraining:
    """A finished pretraining, as it lies in its output.

    Parameters
    ----------
    output
        Where.
    id
        Random: what tells this pretraining from every other, wherever its output is moved.
    plan
        What was trained: options and digests.
    held_out
        Which cells it was measured on.
    code_revision
        The commit that trained.
    """

    output: str
    id: str
    plan: dict[str, Any]
    held_out: dict[str, Any]
    code_revision: str

    @classmethod
    def present_in(cls, output: str) -> bool:
        """Whether the pretraining in an output is finished, so that only recording may be left."""
        return storage.exists(storage.join(output, RECORD))

    @classmethod
    def of(cls, output: str, plan: dict[str, Any], held_out: Mapping[str, Any]) -> FinishedPretraining:
        """Draw the figure and write it all down; what an earlier attempt wrote stands."""
        if cls.present_in(output):
            return cls.load(output)
        run = cls(output, uuid.uuid4().hex, plan, dict(held_out), code_revision())
        image = io.BytesIO()
        run.figure().savefig(image, format="png")
        storage.write_bytes(storage.join(output, FIGURE), image.getvalue())
        content = {key: value for key, value in asdict(run).items() if key != "output"}
        storage.write_json(storage.join(output, RECORD), content)  # last: it vouches for the rest
        return run

    @classmethod
    def load(cls, output: str) -> FinishedPretraining:
        """Read what :meth:`of` wrote."""
        try:
            return cls(output, **storage.read_json(storage.join(output, RECORD), "--output"))
        except TypeError as error:
            got = f"{output} with a broken {RECORD}"
            raise InputError("--output", got, f"one that pretrain wrote ({error})") from error

    @property
    def history(self) -> list[dict[str, float]]:
        """An entry an epoch."""
        entries: list[dict[str, float]] = storage.read_json(storage.join(self.output, "history.json"), "--output")
        return entries

    @property
    def measured(self) -> dict[str, Any]:
        """Scores, and what they were computed on."""
        found: dict[str, Any] = storage.read_json(storage.join(self.output, "measured.json"), "--output")
        return found

    def figure(self) -> Figure:
        """Draw loss and scores."""
        return pretraining_figure(self.history, self.measured["scores"])

    def summary(self) -> dict[str, Any]:
        """Say what was learned, by the last epoch and by what was measured at the end, and where it lies."""
        return {
            **{key: value for key, value in self.history[-1].items() if key != "step"},
            **self.measured["scores"],
            "held_out": self.held_out,
            "model": storage.join(self.output, "model"),
            **({"adapters": storage.join(self.output, "adapters")} if "lora" in self.plan else {}),
        }

    def log(self) -> str:
        """Log the run, once however often called, and give its id.

        Raises
        ------
        RegistryUnavailable
            MLflow is down, locked or refuses; the message says what finishes the job.
        """
        record = self._record()
        with reaching_store(f"the model is safe in {self.output}: once it answers, the same command finishes the job"):
            return log_run(record)

    def _record(self) -> RunRecord:
        plan, history, measured = self.plan, self.history, self.measured
        model = storage.join(self.output, "model")
        began = {"base": plan["model"]} if plan["model"] else plan["shape"]
        lora = {f"lora_{name}": value for name, value in (plan.get("lora") or {}).items()}
        return RunRecord(
            "pretrain",
            digest_of(self.id, "pretrain"),
            parameters={
                **began,
                **{name: plan[name] for name in LOGGED if name in plan},
                **lora,
                **{f"held_out_{name}": value for name, value in self.held_out.items() if name != "group"},
                # Device, dtype and threads, with the reason for each.
                "execution": measured["execution"],
                **plan["options"],
            },
            metrics=measured["scores"],
            curves=history,
            figures={FIGURE: self.figure()},
            documents={
                "config.json": plan, "history.json": history, "measured.json": measured, "held_out.json": self.held_out,
            },
            files={
                place.rsplit("/", 1)[1]: storage.read_bytes(place)
                for place in storage.list_files(storage.join(self.output, "adapters"))
            },
            tags={
                "cells_digest": str(plan["cells"]),
                VOCABULARY_TAG: str(plan["vocabulary"]),
                SPLIT_TAG: str(plan["rows"]),
                WEIGHTS_TAG: weights_digest(find_model(model, "--output")),
                **({"base_digest": str(plan["model"])} if plan["model"] else {}),
                "code_revision": self.code_revision,
                "model_directory": model,
                **({"job_run": current_run().id} if current_run().id else {}),  # as in the log and in Ray's metrics
            },
        )  # fmt: skip
