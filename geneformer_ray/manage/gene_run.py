"""What a finished training of gene classes leaves in its output for MLflow and for people; ``record.json`` comes last.

Nothing here needs the store, and nothing that is read later needs the cells or the cluster, as with classes of cells.

::

    OUTPUT/record.json                            plan, trials, name to register under
    OUTPUT/split-foldN.json                       which genes do what; how many cells hold them
    OUTPUT/baseline-foldN.json                    the baseline's scores
    OUTPUT/genes.csv                              every gene once, as predicted in the fold that reports it
    OUTPUT/roc.png, OUTPUT/report.html
    OUTPUT/trials/NAME/scores.json, genes-{choose,report}.csv
    OUTPUT/trials/NAME/recorded.json              the run and the versions, once MLflow has them
"""

from __future__ import annotations

import io
import uuid
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from geneformer_ray.compute.gene_baseline import FEATURES, gene_baseline
from geneformer_ray.compute.gene_scores import TokenScores, score_genes, spread_over_folds
from geneformer_ray.data import storage
from geneformer_ray.errors import InputError
from geneformer_ray.manage.code_revision import code_revision
from geneformer_ray.manage.gene_report import write_gene_report
from geneformer_ray.manage.trained_run import RECORD, SCORED_ROLES, made_up_cell
from geneformer_ray.manage.trials import Trial

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from geneformer_ray.compute.gene_baseline import GeneOccurrence
    from geneformer_ray.data.gene_folds import GeneSplit
    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = ["GENES_TABLE", "KIND", "REPORTED", "GeneRecord", "GeneRun"]

KIND = "genes"
GENES_TABLE = "genes.csv"
# Of a trial.
REPORTED = "genes-report.csv"


@dataclass(frozen=True)
class GeneRecord:
    """What is to be recorded.

    Parameters
    ----------
    vocabulary
        The model's.
    splits
        One a fold.
    occurrence
        How often each gene is found, and where: what the baseline knows.
    trials
        What was trained.
    output
        Where the trials lie.
    registered_model
        The name to register them under; None leaves them on disk.
    plan
        The run's plan: options, digests, and the report on the classes.
    """

    vocabulary: GeneVocabulary
    splits: list[GeneSplit]
    occurrence: GeneOccurrence
    trials: list[Trial]
    output: str
    registered_model: str | None
    plan: dict[str, Any]


@dataclass(frozen=True)
class GeneRun:
    """A finished training of gene classes, as it lies in its output.

    Parameters
    ----------
    output
        Where.
    id
        Random: what tells this training from every other, wherever its output is moved.
    registered_model, plan, trials
        As in :class:`GeneRecord`.
    labels
        The class names.
    code_revision
        The commit that trained.
    example
        Token ids of a made-up cell: no model of genes carries a real one.
    """

    output: str
    id: str
    registered_model: str | None
    plan: dict[str, Any]
    trials: list[Trial]
    labels: list[str]
    code_revision: str
    example: list[list[int]]

    @classmethod
    def load(cls, output: str, flag: str = "--output") -> GeneRun:
        """Read what :meth:`of` wrote."""
        content = storage.read_json(storage.join(output, RECORD), flag)
        try:
            if content.pop("kind") != KIND:
                raise KeyError(f"no record of {KIND}")
            return cls(output=output, trials=[Trial(**trial) for trial in content.pop("trials")], **content)
        except (AttributeError, KeyError, TypeError) as error:
            raise InputError(flag, f"{output} with a broken {RECORD}", f"one that finetune wrote ({error})") from error

    @classmethod
    def of(cls, record: GeneRecord) -> GeneRun:
        """Score the baseline, put the folds' genes together and write it all; what an earlier attempt wrote stands."""
        output = record.output
        if storage.exists(storage.join(output, RECORD)):
            return cls.load(output)
        run = cls(
            output=output,
            id=uuid.uuid4().hex,
            registered_model=record.registered_model,
            plan=record.plan,
            trials=record.trials,
            labels=record.splits[0].labels,
            code_revision=code_revision(),
            example=made_up_cell(record.vocabulary),
        )
        tables = []
        for split in record.splits:
            scores, guessed = _baseline(record.occurrence, split)
            storage.write_json(run.place("baseline", split.fold), scores)
            tables.append(_reported(record, split, guessed))
        table = pd.concat(tables).sort_values(["true_class", "gene"], ignore_index=True)
        storage.write_bytes(storage.join(output, GENES_TABLE), table.to_csv(index=False).encode())
        write_gene_report(run)
        content = {key: value for key, value in asdict(run).items() if key != "output"}
        storage.write_json(storage.join(output, RECORD), {"kind": KIND, **content})  # last: it vouches for the rest
        return run

    def place(self, what: str, fold: int) -> str:
        """Say where a fold's split or baseline lies."""
        return storage.join(self.output, f"{what}-fold{fold}.json")

    def split(self, fold: int) -> dict[str, Any]:
        """Read a fold's split, as :meth:`geneformer_ray.data.gene_folds.GeneSplit.manifest` gave it."""
        found: dict[str, Any] = storage.read_json(self.place("split", fold))
        return found

    def baseline(self, fold: int) -> dict[str, dict[str, Any]]:
        """Read a fold's scores of the baseline."""
        found: dict[str, dict[str, Any]] = storage.read_json(self.place("baseline", fold))
        return found

    def scores(self, trial: Trial) -> dict[str, dict[str, Any]]:
        """Read a trial's scores: per gene and, as ``tokens``, per occurrence."""
        found: dict[str, dict[str, Any]] = storage.read_json(storage.join(trial.directory(self.output), "scores.json"))
        return found

    @property
    def folds(self) -> int:
        """How many there are."""
        return int(self.plan["folds"])

    def genes(self) -> pd.DataFrame:
        """Read the table of all genes."""
        return _read_table(storage.join(self.output, GENES_TABLE))

    def reporting(self) -> dict[str, list[dict[str, Any]]]:
        """Give the reporting scores of all trials and of the baseline's folds, each per gene and per occurrence."""
        model = [self.scores(trial)["reporting"] for trial in self.trials]
        baseline = [self.baseline(fold)["reporting"] for fold in range(self.folds)]
        return {
            "model": model,
            "model_tokens": [one["tokens"] for one in model],
            "baseline": baseline,
            "baseline_tokens": [one["tokens"] for one in baseline],
        }

    def spread(self) -> dict[str, dict[str, Any]]:
        """Give mean and standard deviation over folds (and seeds) of these."""
        return {name: spread_over_folds(scores) for name, scores in self.reporting().items()}


def _baseline(occurrence: GeneOccurrence, split: GeneSplit) -> tuple[dict[str, dict[str, Any]], NDArray[np.float64]]:
    """Score the baseline on a fold; give also its probabilities of the reporting genes."""
    features = {role: occurrence.features(its) for role, its in split.tokens.items()}
    scores, odds = {}, {}
    for role, name in SCORED_ROLES.items():
        targets = split.targets[role]
        odds[role] = gene_baseline(features["train"], split.targets["train"], features[role], len(split.labels))
        # It says the same of a gene wherever that stands.
        tokens = TokenScores(split.labels)
        logits = np.log(np.maximum(odds[role], np.finfo(float).tiny))
        tokens.add(targets, logits, occurrence.held_V[split.tokens[role]])
        scores[name] = {**score_genes(targets, odds[role], split.labels), "tokens": tokens.scores()}
    return scores, odds["report"]


def _reported(record: GeneRecord, split: GeneSplit, guessed: NDArray[np.float64]) -> pd.DataFrame:
    """Give a fold's reporting genes: probabilities meaned over seeds, and what the baseline knows and says of them."""
    tables = [
        _read_table(storage.join(trial.directory(record.output), REPORTED))
        for trial in record.trials
        if trial.fold == split.fold
    ]
    table, columns = tables[0], [f"probability_{label}" for label in split.labels]
    odds_GC = np.mean([one[columns].to_numpy() for one in tables], axis=0)
    names = np.array(split.labels, dtype=object)
    frequency, rank = record.occurrence.features(split.tokens["report"]).T
    return pd.DataFrame(
        {
            **{name: table[name] for name in ("gene", "symbol")},
            "fold": split.fold,
            "cells": table["cells"],
            **dict(zip(FEATURES, (frequency, rank), strict=True)),
            "true_class": table["true_class"],
            "predicted_class": names[odds_GC.argmax(axis=1)],
            **dict(zip(columns, odds_GC.T, strict=True)),
            "baseline_class": names[guessed.argmax(axis=1)],
        }
    )


def _read_table(path: str) -> pd.DataFrame:
    # As it was written: a gene or a class may be called NA, and every digit of a probability counts.
    text = dict.fromkeys(("gene", "symbol", "true_class", "predicted_class", "baseline_class"), str)
    content = io.BytesIO(storage.read_bytes(path))
    table: pd.DataFrame = pd.read_csv(content, dtype=text, keep_default_na=False, float_precision="round_trip")
    return table
