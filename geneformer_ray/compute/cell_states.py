"""The mean embedding of each cell state, and the file that carries it from one job to another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd

from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

__all__ = ["check_states", "state_embeddings", "states_file", "states_in_file", "sum_by_state"]

# How many cells, and the sum of their embeddings.
StateSum: TypeAlias = "tuple[int, NDArray[np.float64]]"
STATES = "states"


def sum_by_state(embeddings: NDArray[np.floating], states: NDArray[Any]) -> dict[str, StateSum]:
    """Sum the embeddings of each state's cells; sums add up over shards of a data set.

    Parameters
    ----------
    embeddings
        Shape (cells, width).
    states
        Each cell's state, compared whole (upstream matches substrings), shape (cells,). A cell without one belongs to
        none.

    Returns
    -------
    dict
        State -> how many cells, and their sum, float64 of shape (width,).
    """
    known = ~pd.isna(states)
    names, values = states[known].astype(str), embeddings[known].astype(np.float64)
    return {str(state): (int((names == state).sum()), values[names == state].sum(axis=0)) for state in np.unique(names)}


def state_embeddings(parts: Iterable[Mapping[str, StateSum]]) -> dict[str, NDArray[np.float32]]:
    """Average the embeddings of each state's cells: float32 of shape (width,), states in order.

    Parameters
    ----------
    parts
        Sums by state. Their order matters in the last digits, for sums of floats depend on it.
    """
    totals: dict[str, StateSum] = {}
    for part in parts:
        for state, (count, total) in part.items():
            before = totals.get(state, (0, np.zeros(len(total))))
            totals[state] = (before[0] + count, before[1] + total)
    return {state: (total / count).astype(np.float32) for state, (count, total) in sorted(totals.items())}


def check_states(states: Mapping[str, object], width: int, wanted: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """Check state embeddings that came from a file: every wanted state there, each a list of `width` numbers."""
    checked = {}
    for state in wanted:
        if state not in states:
            there = ", ".join(states) or "none"
            raise InputError("--state-embeddings", f"no state {state!r}", f"a file that holds it (it has {there})")
        try:
            vector = np.asarray(states[state], dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise InputError("--state-embeddings", f"{state} as no list of numbers", "lists of floats") from error
        if vector.shape != (width,) or not np.isfinite(vector).all():
            raise InputError(
                "--state-embeddings", f"{state} of shape {vector.shape}", f"{width} finite numbers, the model's width"
            )
        checked[state] = vector
    return checked


def states_file(states: Mapping[str, NDArray[np.float32]], made_with: Mapping[str, Any]) -> dict[str, Any]:
    """Give the content of a file of state embeddings.

    Parameters
    ----------
    states
        State -> float32 of shape (width,).
    made_with
        What decides them and is compared where they are used: ``model`` (its digest), ``embedding``, ``layer``.
    """
    return {**made_with, STATES: {state: vector.tolist() for state, vector in states.items()}}


def states_in_file(content: Any, made_with: Mapping[str, Any], field: str = "--state-embeddings") -> dict[str, Any]:
    """Take the states out of a file's content: one of ours, or a plain JSON object of state -> list of floats.

    Raises
    ------
    InputError
        If it is neither, or says that it was made with another model, embedding or layer: the numbers would have the
        right width, and mean nothing.
    """
    if not isinstance(content, dict):
        raise InputError(field, type(content).__name__, "a JSON object of state -> list of floats")
    if not isinstance(content.get(STATES), dict):
        return content
    for name, wanted in made_with.items():
        if content.get(name, wanted) != wanted:
            raise InputError(
                field, f"states of {name} {content[name]}", f"states of {name} {wanted}, as it is used here"
            )
    states: dict[str, Any] = content[STATES]
    return states
