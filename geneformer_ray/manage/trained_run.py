"""What a finished training leaves in its output for MLflow: scores, mistakes, and ``record.json``, written last.

Nothing here needs the store, and nothing that is read later needs the cells or the cluster: a registry that is down
costs no trained model, and recording can be finished from the output alone.

::

    OUTPUT/record.json                      plan, trials, folds, name to register under, input example
    OUTPUT/split[-foldN].json               which cells do what
    OUTPUT/baseline[-foldN].json            the baseline's scores
    OUTPUT/trials/NAME/scores.json
    OUTPUT/trials/NAME/misclassified.csv    reporting cells, the most confident mistakes first
    OUTPUT/trials/NAME/recorded.json        the run and the versions, once MLflow has them
"""

from __future__ import annotations

import uuid
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from geneformer_ray.compute.baseline import baseline_scores
from geneformer_ray.compute.scores import score
from geneformer_ray.data import storage
from geneformer_ray.data.task_splits import UNLABELLED, TaskSplit, tasks_of
from geneformer_ray.errors import InputError
from geneformer_ray.manage.code_revision import code_revision
from geneformer_ray.manage.misclassified_cells import MISCLASSIFIED
from geneformer_ray.manage.task_predictions import TaskPredictions, mistakes_in, predictions_of, scores_of, together
from geneformer_ray.manage.trials import Trial

if TYPE_CHECKING:
    from collections.abc import Sequence

    from geneformer_ray.data.cells import CellTable
    from geneformer_ray.data.task_splits import LabelSplit, Task
    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = [
    "CELLS",
    "RECORD",
    "SCORED_ROLES",
    "Fold",
    "Record",
    "TrainedRun",
    "kind_of",
    "made_up_cell",
]

RECORD = "record.json"
# What a record is of that does not say so.
CELLS = "cells"
SCORED_ROLES = {"choose": "choosing", "report": "reporting"}
EXAMPLE_CELLS = 2
EXAMPLE_GENES = 3


@dataclass(frozen=True)
class Record:
    """What is to be recorded.

    Parameters
    ----------
    table, vocabulary
        The cells and their vocabulary.
    splits, manifests
        How the cells were split, and the splits as logged: one a fold.
    trials
        What was trained.
    output
        Where the trials lie.
    registered_model
        The name to register them under; None leaves them on disk.
    plan
        The run's plan: options and digests.
    """

    table: CellTable
    vocabulary: GeneVocabulary
    splits: Sequence[LabelSplit]
    manifests: list[dict[str, Any]]
    trials: list[Trial]
    output: str
    registered_model: str | None
    plan: dict[str, Any]


@dataclass(frozen=True)
class Fold:
    """A split, without its rows.

    Parameters
    ----------
    labels, dropped, digest
        As the split has them.
    cells
        Role -> how many.
    tasks
        Task -> its class names; None where there is but one label column.
    """

    labels: list[str]
    dropped: dict[str, int]
    digest: str
    cells: dict[str, int]
    tasks: dict[str, list[str]] | None = None

    @classmethod
    def of(cls, split: LabelSplit) -> Fold:
        """Give what is kept of a split."""
        cells = {role: len(rows) for role, rows in split.rows.items()}
        tasks = split.tasks if isinstance(split, TaskSplit) else None
        return cls(split.labels, split.dropped, split.digest, cells, tasks)

    def predictions(self, directory: str, role: str) -> list[TaskPredictions]:
        """Read what a trial on this split predicted."""
        return predictions_of(directory, role, self.labels, self.tasks)


@dataclass(frozen=True)
class TrainedRun:
    """A finished training, as it lies in its output.

    Parameters
    ----------
    output
        Where.
    id
        Random: what tells this training from every other, wherever its output is moved.
    registered_model, plan, trials
        As in :class:`Record`.
    folds
        The splits.
    code_revision
        The commit that trained.
    example
        Token id lists of some reporting cells, or of a made-up one where no cell may lie with the models.
    """

    output: str
    id: str
    registered_model: str | None
    plan: dict[str, Any]
    trials: list[Trial]
    folds: list[Fold]
    code_revision: str
    example: list[list[int]]

    @classmethod
    def present_in(cls, output: str) -> bool:
        """Whether the training in an output is finished, so that only recording may be left."""
        return storage.exists(storage.join(output, RECORD))

    @classmethod
    def load(cls, output: str, flag: str = "--output") -> TrainedRun:
        """Read what :meth:`of` wrote."""
        content = _read(output, flag)
        try:
            trials = [Trial(**trial) for trial in content.pop("trials")]
            folds = [Fold(**fold) for fold in content.pop("folds")]
            return cls(output=output, trials=trials, folds=folds, **content)
        except (AttributeError, KeyError, TypeError) as error:
            raise InputError(flag, f"{output} with a broken {RECORD}", f"one that finetune wrote ({error})") from error

    @classmethod
    def of(cls, record: Record) -> TrainedRun:
        """Score what was trained and write it all to the output; what an earlier attempt wrote stands."""
        output = record.output
        if cls.present_in(output):
            return cls.load(output)
        run = cls(
            output=output,
            id=uuid.uuid4().hex,
            registered_model=record.registered_model,
            plan=record.plan,
            trials=record.trials,
            folds=[Fold.of(split) for split in record.splits],
            code_revision=code_revision(),
            example=_example(record),
        )
        for number, (split, manifest) in enumerate(zip(record.splits, record.manifests, strict=True)):
            storage.write_json(run.place("split", number), manifest)
            storage.write_json(run.place("baseline", number), _baseline(record, split))
        for trial in record.trials:
            fold, directory = run.fold_of(trial), trial.directory(output)
            predicted = {role: fold.predictions(directory, role) for role in SCORED_ROLES}
            scores = {name: scores_of(predicted[role]) for role, name in SCORED_ROLES.items()}
            storage.write_json(storage.join(directory, "scores.json"), scores)
            reporting = record.splits[trial.fold or 0].rows["report"]
            groups = record.table.column(str(record.plan["group"]), "--group")[reporting]
            mistakes = mistakes_in(predicted["report"], groups)
            storage.write_bytes(storage.join(directory, MISCLASSIFIED), mistakes.to_csv(index=False).encode())
        content = {key: value for key, value in asdict(run).items() if key != "output"}
        for fold in content["folds"]:
            if fold["tasks"] is None:
                del fold["tasks"]
        storage.write_json(storage.join(output, RECORD), content)  # last: it vouches for the rest
        return run

    def place(self, what: str, fold: int) -> str:
        """Say where a fold's split or baseline lies."""
        suffix = f"-fold{fold}" if len(self.folds) > 1 else ""
        return storage.join(self.output, f"{what}{suffix}.json")

    def fold_of(self, trial: Trial) -> Fold:
        """Give a trial's split."""
        return self.folds[trial.fold or 0]

    @cached_property
    def labels(self) -> list[str]:
        """The classes of all folds."""
        return sorted({label for fold in self.folds for label in fold.labels})


def kind_of(output: str, flag: str = "--output") -> str:
    """Say what the finished training in an output is of: classes of cells, or what its record names."""
    return str(_read(output, flag).get("kind", CELLS))


def _read(output: str, flag: str) -> dict[str, Any]:
    if not TrainedRun.present_in(output):
        raise InputError(flag, f"{output} without {RECORD}", "the output of a finetune job that finished training")
    content = storage.read_json(storage.join(output, RECORD), flag)
    if not isinstance(content, dict):
        raise InputError(flag, f"{output} with a broken {RECORD}", "one that finetune wrote")
    return content


def _example(record: Record) -> list[list[int]]:
    if record.plan.get("examples", True):
        rows = record.splits[0].rows["report"][:EXAMPLE_CELLS]
        return [ids.tolist() for ids in record.table.read(rows).input_ids]
    # Cells are data, which --no-examples keeps out of every model.
    return made_up_cell(record.vocabulary)


def made_up_cell(vocabulary: GeneVocabulary) -> list[list[int]]:
    """Give the token ids of a made-up cell, in a list: it shows the form of cells as well as a real one."""
    genes = [vocabulary.tokens[gene] for gene in vocabulary.genes[:EXAMPLE_GENES]]
    return [[token for token in (vocabulary.cls_id, *genes, vocabulary.eos_id) if token is not None]]


def _baseline(record: Record, split: LabelSplit) -> dict[str, dict[str, Any]]:
    """Score the baseline: fitted once a task, on the cells that have a label for it."""
    found = {task.name: _baseline_of(record, split, task) for task in tasks_of(split)}
    return {name: together({task: its[name] for task, its in found.items()}) for name in SCORED_ROLES.values()}


def _baseline_of(record: Record, split: LabelSplit, task: Task) -> dict[str, dict[str, Any]]:
    labelled = {role: targets != UNLABELLED for role, targets in task.targets.items()}
    sequences = {role: record.table.read(split.rows[role][its]).input_ids for role, its in labelled.items()}
    targets = {role: task.targets[role][its] for role, its in labelled.items()}
    others = [sequences[role] for role in SCORED_ROLES]
    results = baseline_scores(sequences["train"], targets["train"], others, record.vocabulary, len(task.labels))
    return {
        name: score(targets[role], logits, task.labels)
        for (role, name), logits in zip(SCORED_ROLES.items(), results, strict=True)
    }
