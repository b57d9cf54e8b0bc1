"""A board on which training runs write how far they are; an actor of its own, so it imports little."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from geneformer_ray.errors import InputError

__all__ = ["Board", "Line"]


class Board:
    """Where the runs write how far they are and what bad input they met, for the driver to read."""

    def __init__(self) -> None:
        self._done: dict[str, int] = {}
        self._note = ""
        self._bad_input: InputError | None = None
        self._controllers: dict[str, Any] = {}
        self._safe: set[str] = set()
        self._stopping = self._saving = False

    def join(self, run: str, controller: Any) -> bool:
        """Name the controller of a run that begins; False where all are to stop."""
        self._controllers[run] = controller
        self._safe.discard(run)
        return not self._stopping

    def tell(self, run: str, done: int, note: str) -> bool:
        """Say how much of a run is done; True where it is to write a checkpoint and go no further."""
        self._done[run], self._note = done, note
        return self._saving

    def safe(self, run: str) -> None:
        """Say that all that a run has trained lies in a checkpoint."""
        self._safe.add(run)

    def refuse(self, error: InputError) -> None:
        """Hand over bad input that a run met."""
        self._bad_input = error

    def read(self) -> tuple[int, str, InputError | None]:
        """Give what is done of all runs, the last note, and the bad input that one of them met."""
        return sum(self._done.values()), self._note, self._bad_input

    def save(self) -> list[str]:
        """Let no further run begin and those that train write a checkpoint; give the names of those yet to do so.

        A run that has not told anything has trained nothing.
        """
        self._stopping = self._saving = True
        return sorted(self._done.keys() - self._safe)

    def stop(self) -> list[Any]:
        """Let no further run begin; give the controllers of those that have."""
        self._stopping = True
        return list(self._controllers.values())


class Line:
    """One run's line to the board: what it tells, and what it hears.

    Parameters
    ----------
    board
        The actor.
    run
        The run's name.
    """

    def __init__(self, board: Any, run: str) -> None:
        self._board, self._run = board, run
        self._answer: Any = None  # to what was told last
        self._heard = False

    def tell(self, done: int, note: str) -> None:
        """Say how much is done, without waiting for the board."""
        self._listen()  # to what came meanwhile: a new answer takes its place
        self._answer = self._board.tell.remote(self._run, done, note)

    def asked_to_stop(self) -> bool:
        """Whether the board has said so by now; once it has, it stays said."""
        self._listen()
        return self._heard

    def safe(self) -> None:
        """Say that a checkpoint holds all that was trained."""
        ray.get(self._board.safe.remote(self._run))

    def _listen(self) -> None:
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._heard |= bool(ray.get(self._answer))
            self._answer = None
