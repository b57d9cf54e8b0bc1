"""Which pooling? Finished trials of every pooling, seed and fold, compared cell by cell with each other and a baseline.

What is estimated, and what is resampled:

- A score is the mean over trials (seeds, and folds where groups are cross-validated); ``sd`` is the spread over them.
- A difference is paired: the mean over seeds (and folds) of one pooling's score less the other's, with the same seed
  and the same cells; ``sd`` is the spread of these pairs.
- An interval is the 95 % percentile interval of a bootstrap over the cells that were scored: cells are drawn with
  replacement, every pooling, every seed and the baseline are scored on the very same draw, and seeds (and folds) are
  averaged. Where these cells come from several groups, groups are drawn first, then cells within each drawn group.
  Seeds are not resampled: the interval speaks of other cells, ``sd`` of other seeds.
- Two poolings are told apart where the interval leaves out 0 *and* every seed has the sign of the mean. Nothing is
  corrected for the number of comparisons.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from geneformer_ray.compute.baseline import baseline_scores
from geneformer_ray.compute.paired_bootstrap import bootstrap_scores, percentile_interval, weighted_scores
from geneformer_ray.manage.trials import read_predictions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from geneformer_ray.data.cells import CellTable
    from geneformer_ray.data.vocabulary import GeneVocabulary
    from geneformer_ray.manage.trials import Trial

    FloatArray = NDArray[np.float64]

__all__ = ["BASELINE", "Findings", "Predictions", "Study", "analyse", "baseline_predictions", "read_trial"]

BASELINE = "baseline"
# Role -> what its cells are called in tables.
ROLES = {"choose": "choosing", "report": "reporting"}
REPLICATES = 2000


@dataclass(frozen=True)
class Predictions:
    """One classifier's predictions of one role's cells: ids, true and predicted class numbers, of shape (cells,)."""

    cell_ids: list[str]
    targets: NDArray[np.int64]
    predicted: NDArray[np.int64]


@dataclass(frozen=True)
class Study:
    """What is compared.

    Parameters
    ----------
    labels
        Class names.
    trials
        Trial -> role -> its predictions. Every pooling has the same seeds and folds.
    baseline
        Fold (None without folds) -> role -> the baseline's predictions.
    group_of
        Cell id -> group.
    """

    labels: list[str]
    trials: Mapping[Trial, Mapping[str, Predictions]]
    baseline: Mapping[int | None, Mapping[str, Predictions]]
    group_of: Mapping[str, str]

    @property
    def poolings(self) -> list[str]:
        """The poolings, in the order of the trials."""
        return list(dict.fromkeys(trial.pooling for trial in self.trials))


@dataclass(frozen=True)
class Findings:
    """What came out.

    Parameters
    ----------
    scores
        ``pooling, role, metric, label, mean, sd, n, ci_low, ci_high, baseline``: one row a pooling, role and metric.
        ``label`` names the class of an ``f1``, and is empty for ``macro_f1`` and ``accuracy``.
    differences
        ``pooling, other, role, metric, label, mean, sd, n, ci_low, ci_high, told_apart``: `pooling` less `other`, on
        the reporting cells; `other` may be the baseline.
    trials
        ``pooling, seed, fold, role, macro_f1, accuracy`` of every trial.
    """

    scores: pd.DataFrame
    differences: pd.DataFrame
    trials: pd.DataFrame


def read_trial(trial: Trial, output: str) -> dict[str, Predictions]:
    """Read what a finished trial predicted, by role."""
    found = {}
    for role in ROLES:
        cell_ids, targets, logits = read_predictions(trial.directory(output), role)
        found[role] = Predictions(cell_ids, targets.astype(np.int64), logits.argmax(axis=1))
    return found


def baseline_predictions(
    table: CellTable, vocabulary: GeneVocabulary, manifest: Mapping[str, Any], label: str
) -> dict[str, Predictions]:
    """Fit PCA + logistic regression on the split's training cells, and predict the others.

    Parameters
    ----------
    table, vocabulary
        The cells of the study.
    manifest
        The split as ``finetune`` wrote it.
    label
        The column of classes.
    """
    row_of = {str(cell_id): row for row, cell_id in enumerate(table.cell_ids)}
    number = {name: code for code, name in enumerate(manifest["labels"])}
    cell_ids = manifest["cells"]
    rows = {role: np.array([row_of[cell_id] for cell_id in ids]) for role, ids in cell_ids.items()}
    column = table.column(label, "--label")
    targets = {role: np.array([number[str(name)] for name in column[its]]) for role, its in rows.items()}
    others = [table.read(rows[role]).input_ids for role in ROLES]
    train = table.read(rows["train"]).input_ids
    logits = baseline_scores(train, targets["train"], others, vocabulary, len(number))
    return {
        role: Predictions(list(cell_ids[role]), targets[role], its.argmax(axis=1))
        for role, its in zip(ROLES, logits, strict=True)
    }


def analyse(study: Study, *, replicates: int = REPLICATES, seed: int = 0) -> Findings:
    """Compare the poolings.

    Parameters
    ----------
    study
        Finished trials and the baseline.
    replicates, seed
        Of the bootstrap.
    """
    scores, differences, trials = [], [], []
    for role in ROLES:
        scored = _Scored.of(study, role, replicates, seed)
        for pooling in study.poolings:
            scores += scored.rows({"pooling": pooling, "role": ROLES[role]}, scored.where(pooling))
        trials += [
            {**vars(trial), "role": ROLES[role], "macro_f1": observed[0], "accuracy": observed[1]}
            for trial, observed in zip(study.trials, scored.observed_TM, strict=False)
        ]
        if role == "report":
            for pooling, other in [
                *itertools.combinations(study.poolings, 2),
                *((pooling, BASELINE) for pooling in study.poolings),
            ]:
                differences += scored.paired_rows({"pooling": pooling, "other": other, "role": ROLES[role]})
    return Findings(pd.DataFrame(scores), pd.DataFrame(differences), pd.DataFrame(trials))


@dataclass(frozen=True)
class _Scored:
    """Every trial's scores of one role, observed and on each draw: T trials, then the baseline's folds; M metrics."""

    names: list[tuple[str, int | None, int | None]]
    metrics: list[tuple[str, str]]
    observed_TM: FloatArray
    drawn_TMR: FloatArray

    @classmethod
    def of(cls, study: Study, role: str, replicates: int, seed: int) -> _Scored:
        """Score every trial and the baseline on all cells of the role, and on the same draws of them."""
        names: list[tuple[str, int | None, int | None]]
        names = [(trial.pooling, trial.seed, trial.fold) for trial in study.trials]
        found = [its[role] for its in study.trials.values()]
        names += [(BASELINE, None, fold) for fold in study.baseline]
        found += [its[role] for its in study.baseline.values()]
        # Sorted, so that the draws do not depend on the order of the cells in a file.
        ids = sorted(set().union(*(its.cell_ids for its in found)))
        code = {cell_id: number for number, cell_id in enumerate(ids)}
        _, group_N = np.unique([study.group_of[cell_id] for cell_id in ids], return_inverse=True)
        classes = len(study.labels)
        drawn_TMR = bootstrap_scores(
            [np.array([code[cell_id] for cell_id in its.cell_ids]) for its in found],
            [its.targets for its in found],
            [its.predicted for its in found],
            group_N,
            classes,
            replicates=replicates,
            seed=seed,
        )
        observed_TM = np.stack(
            [weighted_scores(p.targets, p.predicted, classes, np.ones((len(p.targets), 1)))[:, 0] for p in found]
        )
        metrics = [("macro_f1", ""), ("accuracy", ""), *(("f1", label) for label in study.labels)]
        return cls(names, metrics, observed_TM, drawn_TMR)

    def where(self, pooling: str) -> list[int]:
        """Give the numbers of a pooling's trials."""
        return [number for number, (name, _, _) in enumerate(self.names) if name == pooling]

    def rows(self, first: dict[str, Any], numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Give a row a metric: a pooling's scores beside the baseline's."""
        rows = self._summarise(first, self.observed_TM[numbers], _mean(self.drawn_TMR[numbers]))
        baseline_M = _mean(self.observed_TM[self.where(BASELINE)])
        return [{**row, "baseline": float(value)} for row, value in zip(rows, baseline_M, strict=True)]

    def paired_rows(self, first: dict[str, Any]) -> list[dict[str, Any]]:
        """Give a row a metric: a pooling less another, paired by seed and fold."""
        partner = {self.names[number][1:]: number for number in self.where(first["other"])}
        pairs = []
        for number in self.where(first["pooling"]):
            _, seed, fold = self.names[number]
            # The baseline has no seed: it is the same beside each.
            pairs.append((number, partner[None if first["other"] == BASELINE else seed, fold]))
        ones, others = (list(side) for side in zip(*pairs, strict=True))
        differences_PM = self.observed_TM[ones] - self.observed_TM[others]
        rows = self._summarise(first, differences_PM, _mean(self.drawn_TMR[ones] - self.drawn_TMR[others]))
        seeds = np.array([self.names[number][1] for number in ones])
        per_seed_SM = np.stack([_mean(differences_PM[seeds == seed]) for seed in np.unique(seeds)])
        for row, per_seed_S in zip(rows, per_seed_SM.T, strict=True):
            agree = (per_seed_S > 0).all() or (per_seed_S < 0).all()
            row["told_apart"] = bool(agree and (row["ci_low"] > 0 or row["ci_high"] < 0))
        return rows

    def _summarise(self, first: dict[str, Any], values_PM: FloatArray, drawn_MR: FloatArray) -> list[dict[str, Any]]:
        rows = []
        for (metric, label), value_P, drawn_R in zip(self.metrics, values_PM.T, drawn_MR, strict=True):
            known = value_P[~np.isnan(value_P)]
            low, high = percentile_interval(drawn_R)
            rows.append(
                {
                    **first,
                    "metric": metric,
                    "label": label,
                    "mean": float(known.mean()) if len(known) else float("nan"),
                    "sd": float(known.std(ddof=1)) if len(known) > 1 else float("nan"),
                    "n": len(known),
                    "ci_low": low,
                    "ci_high": high,
                }
            )
        return rows


def _mean(values: FloatArray) -> FloatArray:
    """Average over the first axis what is a number; NaN where nothing is, without numpy's warning."""
    known = ~np.isnan(values)
    count = known.sum(axis=0)
    total = np.where(known, values, 0.0).sum(axis=0)
    mean: FloatArray = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return mean
