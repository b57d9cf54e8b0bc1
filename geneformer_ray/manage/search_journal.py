"""What a search has decided so far, in its output: enough for the same command to go on after any end."""

from __future__ import annotations

import uuid
from dataclasses import astuple, dataclass, fields

from geneformer_ray.data import storage
from geneformer_ray.errors import InputError

__all__ = ["Journal", "Report"]

JOURNAL = "journal.json"


@dataclass(frozen=True)
class Report:
    """What a trial scored after an epoch, and what became of it.

    Parameters
    ----------
    trial, epoch
        The trial's number from 0, the epoch from 1.
    score
        On the choosing cells; higher is better.
    over
        Whether the trial ended there.
    """

    trial: int
    epoch: int
    score: float
    over: bool


COLUMNS = [field.name for field in fields(Report)]


class Journal:
    """The reports of a search's trials, in the order in which they were decided upon.

    Written before anybody acts on a decision, so that a search that goes on repeats none of them.

    Parameters
    ----------
    directory
        Where it lies, and where it is read from if an earlier attempt left one.

    Attributes
    ----------
    id
        Random: what tells this search from every other, wherever its output is moved.
    """

    def __init__(self, directory: str) -> None:
        self._file = storage.join(directory, JOURNAL)
        self.id, self.reports = uuid.uuid4().hex, list[Report]()
        if not storage.exists(self._file):
            self._write()
            return
        content = storage.read_json(self._file, "--output")
        try:
            if content["columns"] != COLUMNS:
                raise ValueError(f"columns {content['columns']}")
            self.id, self.reports = str(content["id"]), [Report(*row) for row in content["reports"]]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError("--output", self._file, f"a journal that search wrote ({error})") from error

    def add(self, report: Report) -> None:
        """Write a report down."""
        self.reports.append(report)
        self._write()

    def _write(self) -> None:
        content = {"id": self.id, "columns": COLUMNS, "reports": [astuple(report) for report in self.reports]}
        storage.write_json(self._file, content)

    def of(self, trial: int) -> list[Report]:
        """Give a trial's reports, by epoch."""
        return sorted((one for one in self.reports if one.trial == trial), key=lambda one: one.epoch)

    def find(self, trial: int, epoch: int) -> Report | None:
        """Give the report of a trial's epoch, None where there is none yet."""
        return next((one for one in self.reports if (one.trial, one.epoch) == (trial, epoch)), None)

    def over(self, trial: int) -> bool:
        """Whether a trial has ended."""
        return any(one.over for one in self.of(trial))

    def best(self, trial: int | None = None) -> Report:
        """Give the report with the highest score, of one trial or of all; of equal ones, that of the first trial."""
        reports = self.reports if trial is None else self.of(trial)
        return min(reports, key=lambda one: (-one.score, one.trial, one.epoch))
