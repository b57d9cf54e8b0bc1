"""Errors for the person who caused them: what was wrong, where, and what would be right.

::

    GeneformerRayError
    ├── InputError            a value from outside is wrong: a flag, a file, a request (exit code 2, HTTP 422)
    │   ├── UnknownGeneError      a gene that the vocabulary does not hold, with the nearest matches
    │   └── VocabularyMismatch    cells, model or table were made with another vocabulary
    ├── OutputExistsError     the output already holds something that must not be mixed (exit code 2)
    ├── RegistryUnavailable   MLflow is down, locked or refuses; what was trained lies on disk (exit code 1)
    └── ServiceError          a service that was asked (geneformer_ray.client) refused, or did not answer
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "GeneformerRayError",
    "InputError",
    "OutputExistsError",
    "RegistryUnavailable",
    "UnknownGeneError",
    "VocabularyMismatch",
]


class GeneformerRayError(Exception):
    """Base of every error that this package raises on purpose."""


class InputError(GeneformerRayError, ValueError):
    """A value from outside is wrong.

    Parameters
    ----------
    field
        The flag, column or request field that holds the value.
    got
        What it held.
    takes
        What it takes, as a phrase: "one of mean, cls".
    """

    def __init__(self, field: str, got: object, takes: str) -> None:
        super().__init__(f"{field}: got {got}; takes {takes}")
        self.field = field
        self.got = got
        self.takes = takes

    def __reduce__(self) -> tuple[type[InputError], tuple[str, object, str]]:
        # Exceptions pickle by their message; these travel between Ray processes with all three parts.
        return type(self), (self.field, self.got, self.takes)


class UnknownGeneError(InputError):
    """A gene is not in the vocabulary."""

    @classmethod
    def with_matches(cls, field: str, gene: str, known: Iterable[str]) -> UnknownGeneError:
        """Name the gene and the nearest genes that the vocabulary does hold."""
        by_upper = {name.upper(): name for name in known}
        near = [by_upper[name] for name in difflib.get_close_matches(gene.upper(), by_upper, n=3, cutoff=0.6)]
        nearest = f"nearest: {', '.join(near)}" if near else "nothing in it is spelt alike"
        return cls(field, repr(gene), f"a gene of the vocabulary ({nearest})")


class VocabularyMismatch(InputError):
    """Two things that must share a vocabulary do not."""


class OutputExistsError(InputError):
    """The output is not empty, and new rows must not be mixed with old ones."""

    @classmethod
    def at(cls, path: str, what: str) -> OutputExistsError:
        """Say what lies at `path` and how to replace it."""
        return cls("--output", f"{path}, which already holds {what}", "a new directory, or --overwrite to replace it")


class RegistryUnavailable(GeneformerRayError):
    """MLflow's store cannot be reached or written: the input was right, and the same command may work later.

    Parameters
    ----------
    store
        Its tracking URI, without credentials.
    why
        What MLflow said.
    then
        What is safe, and which command finishes the job.
    """

    def __init__(self, store: str, why: str, then: str) -> None:
        super().__init__(f"MLflow at {store} failed ({why}); {then}")
        self.store = store
        self.why = why
        self.then = then

    def __reduce__(self) -> tuple[type[RegistryUnavailable], tuple[str, str, str]]:
        return type(self), (self.store, self.why, self.then)
