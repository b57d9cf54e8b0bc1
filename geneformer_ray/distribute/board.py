"""A board on which training runs write how far they are; an actor of its own, so it imports little."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geneformer_ray.errors import InputError

__all__ = ["Board"]


class Board:
    """Where the runs write how far they are and what bad input they met, for the driver to read."""

    def __init__(self) -> None:
        self._done: dict[str, int] = {}
        self._note = ""
        self._bad_input: InputError | None = None
        self._controllers: list[Any] = []
        self._stopped = False

    def join(self, controller: Any) -> bool:
        """Name the controller of a run that begins; False where all are to stop."""
        self._controllers.append(controller)
        return not self._stopped

    def tell(self, run: str, done: int, note: str) -> None:
        """Say how much of a run is done."""
        self._done[run], self._note = done, note

    def refuse(self, error: InputError) -> None:
        """Hand over bad input that a run met."""
        self._bad_input = error

    def read(self) -> tuple[int, str, InputError | None]:
        """Give what is done of all runs, the last note, and the bad input that one of them met."""
        return sum(self._done.values()), self._note, self._bad_input

    def stop(self) -> list[Any]:
        """Let no further run begin; give the controllers of those that have."""
        self._stopped = True
        return self._controllers
