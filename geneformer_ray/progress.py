"""Progress of long work: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from geneformer_ray.run_log import in_json, json_line

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Progress", "say"]

SECONDS_BETWEEN_LINES = 5.0


def say(text: str) -> None:
    """Print a line for the person who waits, on standard error: standard output is the summary's."""
    tqdm.write(json_line(text) if in_json() else text, file=sys.stderr)
    sys.stderr.flush()


class Progress:
    """Counts units of work done, with rate and time left.

    Parameters
    ----------
    what
        What is being done: "screen".
    total
        How many units there are.
    unit
        What a unit is: "events".
    stream
        Where to; standard error by default.
    brief
        Say nothing at all of work that is over before the first line is due.
    done
        Units that an earlier run did: they count as done, and say nothing about the rate of this one.
    """

    def __init__(
        self, what: str, total: int, unit: str, stream: TextIO | None = None, *, brief: bool = False, done: int = 0
    ) -> None:
        self.what, self.total, self.unit = what, total, unit
        self._stream = stream or sys.stderr
        self._before, self._done, self._said_done = done, done, -1
        self._started = self._said = time.monotonic()
        self._brief = brief
        self._bar = (
            tqdm(total=total, desc=what, unit=f" {unit}", file=self._stream, leave=not brief, initial=done)
            if self._stream.isatty() and not in_json()
            else None
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        # An error ends in its own line alone.
        elif kind is None and self._done != self._said_done and not (self._brief and self._said_done < 0):
            self._line()

    def advance(self, units: int, note: str = "") -> None:
        """Count units as done; `note` is shown beside them."""
        self._done += units
        if self._bar is not None:
            self._bar.update(units)
            if note:
                self._bar.set_postfix_str(note)
        elif time.monotonic() - self._said >= SECONDS_BETWEEN_LINES:
            self._line(note)

    def _line(self, note: str = "") -> None:
        now = time.monotonic()
        self._said, self._said_done = now, self._done
        rate = (self._done - self._before) / max(1e-9, now - self._started)
        left = f", {(self.total - self._done) / rate:.0f} s left" if rate and self._done < self.total else ""
        if in_json():
            values: dict[str, Any] = {
                "done": self._done,
                "total": self.total,
                "unit": self.unit,
                "per_second": round(rate, 3),
            }
            print(json_line(self.what, **values, note=note), file=self._stream, flush=True)
            return
        extra = f", {note}" if note else ""
        text = f"{self.what}: {self._done:,} of {self.total:,} {self.unit}, {rate:,.0f}/s{left}{extra}"
        print(text, file=self._stream, flush=True)
