"""What a check of a set-up found: how it stands, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["Finding", "examine", "fault", "note", "ok", "warning"]

# A note is a fact that someone may want to know. A warning costs time or may become a fault; jobs run all the same.
Status = Literal["ok", "note", "warning", "fault"]


@dataclass(frozen=True)
class Finding:
    """One line of a doctor's report.

    Parameters
    ----------
    name
        The group and what was looked at: ``storage.shared``.
    status
        How it stands.
    found
        What was found. It never holds a secret.
    do
        What helps: a command where there is one. Empty where nothing has to be done.
    """

    name: str
    status: Status
    found: str
    do: str = ""

    @property
    def group(self) -> str:
        """The part of the name before the dot."""
        return self.name.partition(".")[0]


def ok(name: str, found: str) -> Finding:
    """Say that something is as it should be."""
    return Finding(name, "ok", found)


def note(name: str, found: str, do: str = "") -> Finding:
    """State a fact that is no fault."""
    return Finding(name, "note", found, do)


def warning(name: str, found: str, do: str) -> Finding:
    """Say what costs time, or may become a fault."""
    return Finding(name, "warning", found, do)


def fault(name: str, found: str, do: str) -> Finding:
    """Say what is broken, and what mends it."""
    return Finding(name, "fault", found, do)


def examine(name: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Give what a check finds, and its own failure as a fault: one broken thing must not hide the others."""
    try:
        yield from check()
    except Exception as error:  # noqa: BLE001  (whatever is broken about a set-up, it is told and the next one asked)
        said = " ".join(str(error).split())
        do = "mend what it names; if nothing is wrong with that, it is a defect of this check"
        yield fault(name, f"the check itself failed: {type(error).__name__}: {said}", do)
