"""Hyper-parameter search: Ray Tune's ASHA says which trials go on, and each trial is a group of Ray Train's workers.

A trial is a Tune function that waits for a training of Ray Train, as Ray advises. At the end of an epoch the workers
report their score and wait for ASHA's word; a trial that is to stop ends by itself, as one that patience stops. Tune's
own way, to end the function, leaves the CPUs of its workers taken: seen with Ray 2.60, more than a minute later still.
(Ray has a cleaner for what a dead training held, which needs the dashboard.)

What an earlier attempt was told lies in the journal. ASHA hears it again before anything else, and trials that have
ended are not begun again; Tune's own state, which is pickled, is kept in a temporary folder and never read.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from geneformer_ray.data import storage
from geneformer_ray.distribute.supervision import Course, new_board, on_this_node, supervise
from geneformer_ray.distribute.train_workers import (
    TrainingRun,
    Workers,
    discard_checkpoints,
    runs_at_once,
    trainer,
)
from geneformer_ray.distribute.trial_on_worker import TrialOnWorker
from geneformer_ray.distribute.verdicts import Verdicts
from geneformer_ray.distribute.worker import Worker
from geneformer_ray.manage.search_journal import Journal, Report
from geneformer_ray.progress import say

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from geneformer_ray.distribute.streamed_training import History

__all__ = ["Halving", "search_trials"]

SECONDS_BETWEEN_QUESTIONS = 0.1
# What Tune would write into folders that nobody reads, and print beside our own progress.
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")


@dataclass(frozen=True)
class Halving:
    """Asynchronous successive halving (ASHA, Li et al. 2018).

    Parameters
    ----------
    epochs
        The most that a trial trains.
    grace_epochs
        The fewest, before it may be stopped.
    reduction
        About one in so many trials goes on from each rung: `grace_epochs`, times `reduction`, times its square...
    """

    epochs: int
    grace_epochs: int
    reduction: float


def _name(number: int) -> str:
    """Give a trial's name among the runs of Ray Train."""
    return f"search-{number:03d}"


def search_trials(
    configs: Sequence[dict[str, Any]],
    journal: Journal,
    halving: Halving,
    *,
    workers: Workers,
    output: str,
    precision: str,
) -> None:
    """Train every trial until it or ASHA ends it, as many at once as the cluster has room for.

    Parameters
    ----------
    configs
        As for :func:`geneformer_ray.distribute.finetune.finetune_trials`, of each trial by its number, with ``trial``,
        ``learned`` and an ``output`` of its own, which gets its history.
    journal
        What earlier attempts decided; gets what is decided now.
    halving
        When a trial is stopped.
    workers, precision
        Of each trial's group.
    output
        Checkpoints lie here while they are needed.

    Raises
    ------
    InputError
        If a worker met bad input. No error of a trial leaves another one running.
    """
    left = [number for number, config in enumerate(configs) if not (journal.over(number) and _is_written(config))]
    if not left:
        return
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what fails is told once, by who raises it
    board = new_board()
    verdicts = ray.remote(num_cpus=0)(Verdicts).options(scheduling_strategy=on_this_node()).remote()
    runs = {
        number: TrainingRun(
            _name(number), {**configs[number], "verdicts": verdicts},
            len(configs[number]["learned"].rows["train"]) * halving.epochs,
        )
        for number in left
    }  # fmt: skip
    trainers = {number: trainer(search_worker, run, board, workers, output, precision) for number, run in runs.items()}
    scheduler = _Asha(halving, journal, verdicts, [number for number in range(len(configs)) if number not in left])

    def work(course: Course) -> None:
        with tempfile.TemporaryDirectory() as folder:
            # On this node, where that folder is. Of no CPU: the workers have them all.
            here = {"CPU": 0, f"node:{ray.util.get_node_ip_address()}": 0.001}
            train = tune.with_parameters(_train, trainers=trainers, verdicts=verdicts, output=output)
            tune.Tuner(
                tune.with_resources(train, here),
                tune_config=tune.TuneConfig(
                    search_alg=_Left(left, course), num_samples=len(left), scheduler=scheduler,
                    max_concurrent_trials=runs_at_once(workers), reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    name="search", storage_path=folder, verbose=0, callbacks=[_Errors(course)]
                ),
            ).fit()  # fmt: skip

    supervise(board, [work], total=sum(run.cells for run in runs.values()), what="search")


def _is_written(config: Mapping[str, Any]) -> bool:
    return storage.exists(storage.join(config["trial"].directory(config["output"]), "history.json"))


# ---------------------------------------------------------------- on the workers


def search_worker(config: dict[str, Any]) -> None:
    """Train the trial of a configuration, as far as it is let; runs on each worker."""
    _SearchedTrial(Worker(config), config).train(keep=False)


class _SearchedTrial(TrialOnWorker):
    """A trial that asks at each epoch's end whether it goes on."""

    def _end_epoch(self, history: History) -> bool:
        over = super()._end_epoch(history)
        entry = history[-1]
        score, epoch = entry[self.learned.chosen_by], int(entry["step"])
        if not (math.isfinite(score) and math.isfinite(entry["train_loss"])):
            score, over = 0.0, True  # it has diverged: the lowest score there is, and nothing to wait for
        over |= epoch == self.options.epochs
        answer = self._ask(epoch, score, over) if self.worker.leads else None
        return bool(self.worker.gather(answer)[0])

    def _ask(self, epoch: int, score: float, over: bool) -> bool:
        """Report an epoch, and wait for the word on it."""
        verdicts, name = self.config["verdicts"], self.config["run"]
        ray.get(verdicts.report.remote(name, epoch, score, over))
        while (answer := ray.get(verdicts.verdict.remote(name, epoch))) is None:
            time.sleep(SECONDS_BETWEEN_QUESTIONS)
        return bool(answer)


# -------------------------------------------------------- in the processes of Tune


def _train(config: dict[str, Any], *, trainers: dict[int, Any], verdicts: Any, output: str) -> None:
    """Train a trial and pass on what its workers report: the Tune function."""
    number, ended, errors = config["number"], threading.Event(), list[BaseException]()

    def fit() -> None:
        try:
            trainers[number].fit()
        except BaseException as error:  # noqa: BLE001  (raised below)
            errors.append(error)
        finally:
            ended.set()

    threading.Thread(target=fit, daemon=True).start()
    name, told = _name(number), 0
    while True:
        last = ended.wait(SECONDS_BETWEEN_QUESTIONS)
        for epoch, score, over in ray.get(verdicts.reports.remote(name, told)):
            tune.report({"epoch": epoch, "score": score, "over": over})
            told = epoch
        if last:
            break
    if errors:
        raise errors[0]
    discard_checkpoints(output, name)


# --------------------------------------------------------------- on the driver


class _Asha(ASHAScheduler):
    """ASHA with a memory: it hears what earlier attempts reported, and its word goes to the trial's workers."""

    def __init__(self, halving: Halving, journal: Journal, verdicts: Any, ended: Sequence[int]) -> None:
        super().__init__(
            time_attr="epoch", metric="score", mode="max",
            max_t=halving.epochs, grace_period=halving.grace_epochs, reduction_factor=halving.reduction,
        )  # fmt: skip
        self._journal, self._verdicts = journal, verdicts
        for number in ended:
            self._remember(None, number, TuneTrial("search", stub=True))

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        self._remember(tune_controller, trial.config["number"], trial)

    def _remember(self, tune_controller: Any, number: int, trial: TuneTrial) -> None:
        super().on_trial_add(tune_controller, trial)
        for report in self._journal.of(number):
            super().on_trial_result(tune_controller, trial, {"epoch": report.epoch, "score": report.score})

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        number, epoch = trial.config["number"], result["epoch"]
        report = self._journal.find(number, epoch)
        if report is None:
            stops = super().on_trial_result(tune_controller, trial, result) == TrialScheduler.STOP
            report = Report(number, epoch, result["score"], result["over"] or stops)
            self._journal.add(report)
            if report.over:
                say(f"trial {number}: {report.score:.4f} after {epoch} of {self._max_t} epochs")
        ray.get(self._verdicts.decide.remote(_name(number), epoch, report.over))
        return str(TrialScheduler.CONTINUE)  # it ends by itself


class _OfDriver:
    """Something of the driver's that Tune pickles, to restore it one day, which nobody does: nothing is kept."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Left(_OfDriver, Searcher):
    """Hands out the trials that are left, until no further one may begin."""

    def __init__(self, numbers: Sequence[int], course: Course) -> None:
        super().__init__()
        self._numbers, self._course = list(numbers), course

    def suggest(self, trial_id: str) -> Any:
        if self._course.over.is_set() or not self._numbers:
            return Searcher.FINISHED
        return {"number": self._numbers.pop(0)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing depends on it."""

    def save(self, checkpoint_path: str) -> None:
        """Keep nothing for Tune: the journal has it all."""

    def restore(self, checkpoint_path: str) -> None:
        """Take nothing from Tune."""


class _Errors(_OfDriver, tune.Callback):
    """Tells the driver of a trial that failed; it then ends the others."""

    def __init__(self, course: Course) -> None:
        self._course = course

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        self._course.errors.append(trial.get_pickled_error() or RuntimeError(f"{trial} failed"))
