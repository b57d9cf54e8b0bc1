"""The output directory of a finished screen: its tables, its vocabulary, and what another screen must share with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow.dataset as ds

from geneformer_ray.data import storage
from geneformer_ray.data.shards import VOCABULARY_KEY
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError, VocabularyMismatch

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ScreenOutput"]

LOWERING, RAISING = ("delete", "inhibit"), ("overexpress", "activate")
# What two screens must share for their numbers to be of one kind, by the names in their plans.
NUMBERS = {
    "cells": "table of cells",
    "model": "model",
    "embedding": "--embedding",
    "layer": "--layer",
    "comparison": "--comparison",
    "state_column": "--state-column",
    "states": "states' cells or embeddings",
}
CELLS = {"rows": "choice of cells (--filter, --start, --max-cells, --seed)"}
PERTURBATION = {"perturbation": "--perturbation", "rank_shift": "--rank-shift", "ranks": "--ranks"}


@dataclass(frozen=True)
class ScreenOutput:
    """A finished screen.

    Parameters
    ----------
    path
        The screen's output directory.
    flag
        The flag that named it.
    plan
        What the screen recorded of itself: its flags, and digests of cells, model and vocabulary.
    vocabulary
        Its own copy of the model's vocabulary.
    """

    path: str
    flag: str
    plan: Mapping[str, Any]
    vocabulary: GeneVocabulary

    @classmethod
    def open(cls, path: str, flag: str) -> ScreenOutput:
        """Open the output of a screen that has finished.

        Raises
        ------
        InputError
            There is no such output, or its screen has not finished.
        """
        manifest_file = storage.join(path, storage.MANIFEST)
        takes = "the output directory of ray_jobs.screen"
        if not storage.exists(manifest_file):
            raise InputError(flag, path, takes)
        manifest = storage.read_json(manifest_file, flag)
        plan = manifest["plan"]
        if plan.get("job") != "screen":
            raise InputError(flag, f"{path}, the output of ray_jobs.{plan.get('job')}", takes)
        if not manifest["finished"]:
            raise InputError(
                flag, f"{path}, an unfinished screen", "a finished one: run its command again to resume it"
            )
        return cls(path, flag, plan, GeneVocabulary.load(storage.join(path, "_vocabulary"), flag))

    @property
    def states(self) -> list[str]:
        """The states that its shifts are measured towards, the goal first; none in a screen of similarities."""
        named = (self.plan.get("goal"), self.plan.get("start"), *(self.plan.get("alternatives") or ()))
        return [state for state in named if state]

    def choose_state(self, state: str | None) -> str | None:
        """Give the state that is asked for, the goal where none is; None for a screen without states."""
        if state is None:
            return self.states[0] if self.states else None
        if state not in self.states:
            there = f"one of {', '.join(self.states)}" if self.states else f"none: {self.path} is without states"
            raise InputError("--state", repr(state), there)
        return state

    def table(self, *names: str) -> ds.Dataset:
        """Open the first of some tables that the screen has written.

        Raises
        ------
        InputError
            It has none of them, or its rows carry another vocabulary's digest.
        """
        found = [name for name in names if storage.exists(storage.join(self.path, name))]
        if not found:
            flags = " or ".join("--" + name.replace("_", "-") for name in names)
            raise InputError(self.flag, f"{self.path} without {' and '.join(names)}", f"a screen with {flags}")
        filesystem, inside = storage.locate(storage.join(self.path, found[0]))
        dataset = ds.dataset(inside, filesystem=filesystem, format="parquet")
        carried = (dataset.schema.metadata or {}).get(VOCABULARY_KEY, self.vocabulary.digest.encode()).decode()
        if carried != self.vocabulary.digest:
            takes = f"shifts of its own _vocabulary, {self.vocabulary.digest}"
            raise VocabularyMismatch(self.flag, f"{self.path} with shifts of vocabulary {carried}", takes)
        return dataset

    def check_like(self, other: ScreenOutput, *, same_cells: bool = True, same_perturbation: bool = False) -> None:
        """Refuse another screen whose numbers cannot be set beside this one's.

        Parameters
        ----------
        other
            The other screen.
        same_cells
            Whether the same cells of the table must have been chosen.
        same_perturbation
            Whether the same must have been done to the genes.

        Raises
        ------
        InputError
            Naming the first difference, and the other screen's flag.
        """
        mine, theirs = self.vocabulary.digest, other.vocabulary.digest
        if mine != theirs:
            got = f"{other.path}, a screen with the vocabulary {theirs}"
            raise VocabularyMismatch(other.flag, got, f"one with that of {self.flag}, {mine}")
        kinds = NUMBERS | (CELLS if same_cells else {}) | (PERTURBATION if same_perturbation else {})
        for key, what in kinds.items():
            if self.plan.get(key) != other.plan.get(key):
                got = f"{other.path}, a screen with another {what} ({other.plan.get(key)})"
                raise InputError(other.flag, got, f"one with that of {self.flag} ({self.plan.get(key)})")

    def check_opposite(self, other: ScreenOutput) -> None:
        """Refuse another screen unless one of the two lowers its genes and the other raises them."""
        mine, theirs = self.plan["perturbation"], other.plan["perturbation"]
        opposite = RAISING if mine in LOWERING else LOWERING
        if theirs not in opposite:
            takes = f"{' or '.join(opposite)}, beside a screen of {mine} in {self.flag}"
            raise InputError(other.flag, f"{other.path}, a screen of {theirs}", takes)
