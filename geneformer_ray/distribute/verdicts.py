"""Where the trials of a search report their epochs and hear whether they go on: an actor of its own."""

from __future__ import annotations

__all__ = ["Verdicts"]


class Verdicts:
    """What trials report, and what is decided about each report; asked again, it answers the same.

    A worker that dies while it waits trains its epoch again and reports it again.
    """

    def __init__(self) -> None:
        self._reports: dict[str, dict[int, tuple[float, bool]]] = {}
        self._over: dict[tuple[str, int], bool] = {}

    def report(self, trial: str, epoch: int, score: float, over: bool) -> None:
        """Say what a trial scored after an epoch (from 1), and whether it ends there of itself."""
        self._reports.setdefault(trial, {})[epoch] = (score, over)

    def reports(self, trial: str, after: int) -> list[tuple[int, float, bool]]:
        """Give a trial's reports of later epochs: epoch, score, whether it ends there of itself."""
        its = self._reports.get(trial, {})
        return [(epoch, *its[epoch]) for epoch in sorted(its) if epoch > after]

    def decide(self, trial: str, epoch: int, over: bool) -> None:
        """Say whether a trial ends after an epoch."""
        self._over[trial, epoch] = over

    def verdict(self, trial: str, epoch: int) -> bool | None:
        """Whether a trial ends after an epoch; None as long as nobody has decided."""
        return self._over.get((trial, epoch))
