"""The space of a hyper-parameter search, and what its trials draw from it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Choices", "Range", "SearchSpace"]

FORMS = "{low: A, high: B}, with log: true where the exponent is drawn evenly, or {choices: [A, B]}"
# A drawn number is one that a person can type again.
DIGITS = 4
# A setting that one of n draws would give is missed by so many times n of them with a chance of exp(-20).
DRAWS_IN_VAIN = 20


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included.

    Parameters
    ----------
    low, high
        The bounds.
    log
        Whether orders of magnitude are drawn evenly, rather than the numbers.
    whole
        Whether only whole numbers are meant.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False

    @property
    def given(self) -> dict[str, Any]:
        """The values that were written down: name -> value."""
        return {"low": self.low, "high": self.high}

    def draw(self, rng: np.random.Generator) -> float:
        """Draw one value."""
        # Each whole number is the lower end of an interval of its own.
        end = self.high + 1 if self.whole else self.high
        if self.log:
            value = math.exp(rng.uniform(math.log(self.low), math.log(end)))
        else:
            value = float(rng.uniform(self.low, end))
        if self.whole:
            return min(math.floor(value), int(self.high))
        return min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high)


@dataclass(frozen=True)
class Choices:
    """Some values, all as likely.

    Parameters
    ----------
    values
        Each of them once.
    """

    values: tuple[Any, ...]

    @property
    def given(self) -> dict[str, Any]:
        """The values that were written down: name -> value."""
        return {f"choices: {json.dumps(value)}": value for value in self.values}

    def draw(self, rng: np.random.Generator) -> Any:
        """Draw one value."""
        return self.values[int(rng.integers(len(self.values)))]


@dataclass(frozen=True)
class SearchSpace:
    """What each searched value may be.

    Parameters
    ----------
    entries
        Name of the value -> where it is drawn from.
    """

    entries: Mapping[str, Range | Choices]

    @classmethod
    def of(cls, content: object, kinds: Mapping[str, type | None]) -> SearchSpace:
        """Check a declared space.

        Parameters
        ----------
        content
            Name -> ``{low, high}``, optionally with ``log``, or ``{choices}``.
        kinds
            Every name that may be searched -> `int` or `float` where a range makes sense, None where only choices do.

        Raises
        ------
        InputError
            With the entry that is wrong.
        """
        if not isinstance(content, Mapping) or not content:
            raise InputError("--space", json.dumps(content, default=str), f"a mapping of names to {FORMS}")
        entries = {}
        for key, entry in content.items():
            name = str(key).lstrip("-").replace("-", "_")
            if name not in kinds:
                raise InputError("--space", str(key), f"flags that a search may draw: {', '.join(kinds)}")
            if name in entries:
                raise InputError("--space", f"{key} twice", "each flag once")
            entries[name] = _entry(name, entry, kinds[name])
        return cls(entries)

    def draws(
        self,
        count: int,
        seed: int,
        defaults: Mapping[str, Any],
        meant: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> list[dict[str, Any]]:
        """Draw the values of trials: of the first one the defaults, of no two the same.

        A trial's values are a function of its number and the seed: neither how many are drawn, nor what ran before, nor
        the order of the entries changes them.

        Parameters
        ----------
        count
            How many trials.
        seed
            Of the draws.
        defaults
            Name -> value of the first trial.
        meant
            Leaves out of a trial's values those that mean nothing beside the others.

        Raises
        ------
        InputError
            If the space holds fewer combinations.
        """
        found: list[dict[str, Any]] = []
        again = 0
        for drawn in self._all_draws(seed, {name: defaults[name] for name in self.entries}):
            if len(found) == count:
                break
            values = meant(drawn)
            again = again + 1 if values in found else 0
            if again > DRAWS_IN_VAIN * count:
                raise InputError("--trials", count, f"at most {len(found)}: --space holds no more that differ")
            if not again:
                found.append(values)
        return found

    def _all_draws(self, seed: int, defaults: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Give the defaults, then draws without end; each entry has numbers of its own, by its name."""
        yield defaults
        streams = {name: np.random.default_rng([seed, _number_of(name)]) for name in self.entries}
        while True:
            yield {name: entry.draw(streams[name]) for name, entry in self.entries.items()}


def _entry(name: str, entry: object, kind: type | None) -> Range | Choices:
    """Check one entry."""

    def refuse(takes: str) -> InputError:
        return InputError("--space", f"{name}: {json.dumps(entry, default=str)}", takes)

    if not isinstance(entry, Mapping):
        raise refuse(FORMS)
    if set(entry) == {"choices"}:
        values = entry["choices"]
        if not isinstance(values, list) or not values:
            raise refuse("choices: a list of one value or more")
        plain = tuple(tuple(value) if isinstance(value, list) else value for value in values)
        if any(value in plain[:i] for i, value in enumerate(plain)):
            raise refuse("choices that are all different")
        return Choices(plain)
    if not {"low", "high"} <= set(entry) <= {"low", "high", "log"}:
        raise refuse(FORMS)
    if kind is None:
        raise refuse("choices: this flag takes no number")
    try:
        # YAML takes 1e-5 for a text: it wants 1.0e-5.
        low, high = (kind(float(entry[end])) if kind is float else int(str(entry[end])) for end in ("low", "high"))
    except (TypeError, ValueError) as error:
        raise refuse(f"low and high that are {'whole ' if kind is int else ''}numbers") from error
    log = entry.get("log", False)
    if not isinstance(log, bool):
        raise refuse("log: true or false")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise refuse("a low below its high")
    if log and low <= 0:
        raise refuse("a low above 0 with log: true")
    return Range(low, high, log, kind is int)


def _number_of(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
