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

import subprocess
import uuid
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from geneformer_ray.compute.baseline import baseline_scores
from geneformer_ray.compute.scores import probabilities, score
from geneformer_ray.data import storage
from geneformer_ray.data.digests import digest_of
from geneformer_ray.errors import InputError
from geneformer_ray.manage.trials import Trial, read_predictions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from geneformer_ray.data.cells import CellTable
    from geneformer_ray.data.splits import GroupSplit
    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = ["MISCLASSIFIED", "Fold", "Record", "TrainedRun", "digest_of_test", "misclassified_cells"]

RECORD = "record.json"
MISCLASSIFIED = "misclassified.csv"
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
    splits: list[GroupSplit]
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
    """

    labels: list[str]
    dropped: dict[str, int]
    digest: str
    cells: dict[str, int]


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
        if not cls.present_in(output):
            raise InputError(flag, f"{output} without {RECORD}", "the output of a finetune job that finished training")
        content = storage.read_json(storage.join(output, RECORD), flag)
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
            folds=[
                Fold(split.labels, split.dropped, split.digest, {role: len(rows) for role, rows in split.rows.items()})
                for split in record.splits
            ],
            code_revision=_code_revision(),
            example=_example(record),
        )
        for number, (split, manifest) in enumerate(zip(record.splits, record.manifests, strict=True)):
            storage.write_json(run.place("split", number), manifest)
            storage.write_json(run.place("baseline", number), _baseline(record, split))
        for trial in record.trials:
            split, directory = record.splits[trial.fold or 0], trial.directory(output)
            scores = {}
            for role, name in SCORED_ROLES.items():
                _, targets, logits = read_predictions(directory, role)
                scores[name] = score(targets, logits, split.labels)
            storage.write_json(storage.join(directory, "scores.json"), scores)
            groups = record.table.column(str(record.plan["group"]), "--group")[split.rows["report"]]
            mistakes = misclassified_cells(*read_predictions(directory, "report"), split.labels, groups)
            storage.write_bytes(storage.join(directory, MISCLASSIFIED), mistakes.to_csv(index=False).encode())
        content = {key: value for key, value in asdict(run).items() if key != "output"}
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


def misclassified_cells(
    cell_ids: Sequence[str],
    targets: NDArray[np.int64],
    logits: NDArray[np.floating],
    labels: Sequence[str],
    groups: Sequence[Any] | NDArray[Any] | None = None,
) -> pd.DataFrame:
    """List the cells whose predicted type is not their label, the most confident mistakes first.

    Parameters
    ----------
    cell_ids, targets, logits
        As predictions have them.
    labels
        Class names.
    groups
        Donor or library of each cell, where it is known.

    Returns
    -------
    Columns ``cell_id``, ``group`` (where known), ``true_label``, ``predicted_label``, ``probability_true``,
    ``probability_predicted``.
    """
    odds, predicted = probabilities(logits), logits.argmax(axis=1)
    everyone = np.arange(len(targets))
    names = np.array(labels, dtype=object)
    columns = {"cell_id": list(cell_ids)} | ({} if groups is None else {"group": list(groups)})
    table = pd.DataFrame(
        {
            **columns,
            "true_label": names[targets],
            "predicted_label": names[predicted],
            "probability_true": odds[everyone, targets],
            "probability_predicted": odds[everyone, predicted],
        }
    )
    wrong: pd.DataFrame = table[predicted != targets]
    return wrong.sort_values(["probability_predicted", "cell_id"], ascending=[False, True], ignore_index=True)


def digest_of_test(cell_ids: Sequence[str], targets: NDArray[np.int64], labels: Sequence[str]) -> str:
    """Hash which cells a figure was measured on, and what they truly are; in any order."""
    return digest_of(sorted([cell_id, labels[target]] for cell_id, target in zip(cell_ids, targets, strict=True)))


def _example(record: Record) -> list[list[int]]:
    if record.plan.get("examples", True):
        rows = record.splits[0].rows["report"][:EXAMPLE_CELLS]
        return [ids.tolist() for ids in record.table.read(rows).input_ids]
    # Cells are data, which --no-examples keeps out of every model: a made-up one shows their form as well.
    vocabulary = record.vocabulary
    genes = [vocabulary.tokens[gene] for gene in vocabulary.genes[:EXAMPLE_GENES]]
    return [[token for token in (vocabulary.cls_id, *genes, vocabulary.eos_id) if token is not None]]


def _baseline(record: Record, split: GroupSplit) -> dict[str, dict[str, Any]]:
    sequences = {role: record.table.read(rows).input_ids for role, rows in split.rows.items()}
    others = [sequences[role] for role in SCORED_ROLES]
    results = baseline_scores(sequences["train"], split.targets["train"], others, record.vocabulary, len(split.labels))
    return {
        name: score(split.targets[role], logits, split.labels)
        for (role, name), logits in zip(SCORED_ROLES.items(), results, strict=True)
    }


def _code_revision() -> str:
    """Give the commit that this code is, marked where files differ from it; the version outside a checkout."""
    from importlib.metadata import PackageNotFoundError, version

    here = Path(__file__).resolve()
    try:
        # This file may lie in an environment inside some other project's checkout.
        subprocess.run(
            ["git", "ls-files", "--error-unmatch", here.name], cwd=here.parent, capture_output=True, check=True
        )
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(describe, cwd=here.parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        try:
            return version("geneformer-ray")
        except PackageNotFoundError:
            return "unknown"
