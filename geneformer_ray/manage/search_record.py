"""A finished search as a table, a figure, and MLflow runs: one of the search, and below it one of each trial."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pandas as pd

from geneformer_ray.data import storage
from geneformer_ray.data.digests import digest_of
from geneformer_ray.manage.code_revision import code_revision
from geneformer_ray.manage.registry import reaching_store
from geneformer_ray.manage.runs import PARENT_TAG, RunRecord, log_run
from geneformer_ray.manage.search_plot import search_plot
from geneformer_ray.manage.trial_versions import logged
from geneformer_ray.run_log import current_run

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from geneformer_ray.manage.search_journal import Journal, Report

__all__ = ["SearchRecord"]

TABLE, FIGURE = "trials.csv", "search.png"
# By this, people find what a search made.
SEARCH_TAG = "search"
LOGGED = ("label", "task_weights", "group", "grace_epochs", "reduction", "draw_seed")


@dataclass(frozen=True)
class SearchRecord:
    """What is to be recorded of a search.

    Parameters
    ----------
    output
        Where table and figure go.
    plan
        The search's plan: options and digests.
    journal
        What its trials scored.
    metric
        What the score is: an entry of the trials' histories.
    epochs
        The most that a trial trained.
    values
        The searched values of each trial, by its number.
    histories
        Each trial's history file.
    log
        The values that were drawn by their exponents.
    """

    output: str
    plan: Mapping[str, Any]
    journal: Journal
    metric: str
    epochs: int
    values: Sequence[Mapping[str, Any]]
    histories: Sequence[str]
    log: Collection[str] = ()

    @cached_property
    def best(self) -> Report:
        """The best epoch of the best trial."""
        return self.journal.best()

    @cached_property
    def names(self) -> list[str]:
        """The searched values."""
        return list(dict.fromkeys(name for values in self.values for name in values))

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row a trial: its number, its values, ``score``, ``best_epoch``, ``epochs``, ``stopped_early``."""
        rows = []
        for trial, values in enumerate(self.values):
            best, epochs = self.journal.best(trial), len(self.journal.of(trial))
            rows.append(
                {
                    "trial": trial,
                    **{name: values.get(name) for name in self.names},
                    "score": best.score,
                    "best_epoch": best.epoch,
                    "epochs": epochs,
                    "stopped_early": epochs < self.epochs,
                }
            )
        return pd.DataFrame(rows)

    def write(self) -> dict[str, str]:
        """Write the table and the figure, and say where they lie."""
        files = {"table": storage.join(self.output, TABLE), "figure": storage.join(self.output, FIGURE)}
        storage.write_bytes(files["table"], self._table())
        buffer = io.BytesIO()
        search_plot(self.table, self.names, self.metric, log=self.log).savefig(buffer, format="png", dpi=150)
        storage.write_bytes(files["figure"], buffer.getvalue())
        return files

    def summary(self) -> dict[str, Any]:
        """Give what a person wants to know of the search."""
        return {
            "trials": len(self.values),
            "stopped_early": int(self.table["stopped_early"].sum()),
            "epochs_trained": int(self.table["epochs"].sum()),
            "epochs_without_stopping": len(self.values) * self.epochs,
            "best": {
                "trial": self.best.trial,
                "values": dict(self.values[self.best.trial]),
                "epoch": self.best.epoch,
                self.metric: self.best.score,
            },
            "as_given": {self.metric: self.journal.best(0).score},
        }

    def log_runs(self, final: Mapping[str, Any], registered_model: str | None, then: str) -> str:
        """Log the search and its trials in MLflow, each once however often called; give the id of the search's run.

        Parameters
        ----------
        final
            The summary of the best setting's training: its runs and versions are put below the search as well.
        registered_model
            The name that its versions have.
        then
            What finishes the job if the store cannot be reached.

        Raises
        ------
        RegistryUnavailable
            The store cannot be reached.
        """
        with reaching_store(then):
            parent = log_run(self._search_run())
            for trial in range(len(self.values)):
                log_run(self._trial_run(trial, parent))
            self._tag(final, registered_model, parent)
        return parent

    def _table(self) -> bytes:
        return self.table.to_csv(index=False).encode()

    def _tags(self) -> dict[str, str]:
        job = current_run().id
        return {SEARCH_TAG: self.journal.id, "code_revision": code_revision(), **({"job_run": job} if job else {})}

    def _search_run(self) -> RunRecord:
        found = self.summary()
        return RunRecord(
            "search",
            digest_of(self.journal.id, "search"),
            parameters={
                **logged(self.plan, LOGGED),
                "epochs": self.epochs,
                "best_trial": self.best.trial,
                **{f"best_{name}": value for name, value in found["best"]["values"].items()},
            },
            metrics={
                **{name: found[name] for name in ("trials", "stopped_early", "epochs_trained")},
                f"best_{self.metric}": self.best.score,
                f"as_given_{self.metric}": found["as_given"][self.metric],
            },
            figures={FIGURE: search_plot(self.table, self.names, self.metric, log=self.log)},
            documents={"config.json": dict(self.plan)},
            files={TABLE: self._table()},
            tags=self._tags(),
        )

    def _trial_run(self, trial: int, parent: str) -> RunRecord:
        best, reports = self.journal.best(trial), self.journal.of(trial)
        stopped = {"stopped_at_epoch": len(reports)} if len(reports) < self.epochs else {}
        history = storage.read_json(self.histories[trial], "--output")
        return RunRecord(
            f"search-{trial:03d}",
            digest_of(self.journal.id, trial),
            parameters={"trial": trial, **self.values[trial]},
            metrics={
                f"best_{self.metric}": best.score,
                "best_epoch": best.epoch,
                "epochs_trained": len(reports),
                **stopped,
            },
            curves=history,
            documents={"history.json": history},
            tags={**self._tags(), PARENT_TAG: parent},
        )

    def _tag(self, final: Mapping[str, Any], registered_model: str | None, parent: str) -> None:
        """Put the best setting's runs below the search, and say on its versions where they come from."""
        import mlflow

        client = mlflow.MlflowClient()
        for run in (final["baseline_run"], *(trial["run_id"] for trial in final["trials"])):
            client.set_tag(run, PARENT_TAG, parent)
            client.set_tag(run, SEARCH_TAG, self.journal.id)
        for trial in final["trials"]:
            if registered_model is not None:
                tags = {SEARCH_TAG: self.journal.id, "search_trials": str(len(self.values))}
                for name, value in tags.items():
                    client.set_model_version_tag(registered_model, str(trial["version"]), name, value)
