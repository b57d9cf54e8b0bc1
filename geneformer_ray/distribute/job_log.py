"""The log of a submitted job: told line by line as it grows, without the summary, which is the last line of JSON."""

from __future__ import annotations

import json
import sys
from typing import TextIO

__all__ = ["JobLog"]


class JobLog:
    """Tells what it is given, once.

    Ray writes a driver's standard output and standard error into one file. Of lines of JSON the latest is held back
    until another one comes: it may be the summary.

    Parameters
    ----------
    stream
        Where to; standard error by default.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._heard = 0  # characters, over all connections
        self._at = 0  # characters of this connection
        self._rest = ""
        self._held: str | None = None
        self._last_is_held = False

    @property
    def connected(self) -> bool:
        """Whether this connection has told anything; a job's log is never empty."""
        return self._at > 0

    def from_the_start(self) -> None:
        """Expect the log from its first character again: what was heard before is passed over."""
        self._at = 0

    def add(self, text: str) -> None:
        """Tell what is new in the next piece of the log."""
        known = self._heard - self._at
        self._at += len(text)
        new = text[known:] if known > 0 else text
        self._heard = max(self._heard, self._at)
        *lines, self._rest = (self._rest + new).split("\n")
        for line in lines:
            self._line(line)

    def end(self, code: int) -> str | None:
        """Tell what is left of the log of a job that ended with an exit code; give its summary, if there is one.

        A job that succeeded has one. One that ended with 1 has one if nothing follows it: a failure has the last word.
        """
        if self._rest:
            self._line(self._rest)
            self._rest = ""
        held, self._held = self._held, None
        if held is None or code == 0 or (code == 1 and self._last_is_held):
            return held
        self._tell(held)
        return None

    def _line(self, line: str) -> None:
        self._last_is_held = _is_object(line)
        if not self._last_is_held:
            self._tell(line)
            return
        if self._held is not None:
            self._tell(self._held)
        self._held = line

    def _tell(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


def _is_object(line: str) -> bool:
    if not line.startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False
