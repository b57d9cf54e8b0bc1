"""Which genes train, choose and report: cross-validation over genes, not over cells.

A model that saw a gene's class in training would know it again in any other cell, so that cells held out would prove
nothing. Every gene with a class reports in exactly one fold, chooses in the one before it and trains in all others; a
cell takes part wherever it holds a gene of the part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from geneformer_ray.data.digests import digest_of
from geneformer_ray.data.splits import ROLES
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from geneformer_ray.data.cells import CellTable
    from geneformer_ray.data.gene_classes import GeneClasses
    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = ["FEWEST_FOLDS", "GeneFolds", "GeneSplit", "cell_blocks"]

# One part of the genes each to train, choose and report.
FEWEST_FOLDS = 3
# Cells of which tokens are held at once.
CELLS_AT_ONCE = 4_096


def cell_blocks(
    table: CellTable, rows: NDArray[np.int64], vocabulary: GeneVocabulary, *, at_once: int = CELLS_AT_ONCE
) -> Iterator[list[NDArray[np.int32]]]:
    """Read cells as a model takes them, some at a time: token ids of each, in the order of `rows`."""
    cells_digest = table.vocabulary_digest or vocabulary.digest  # as in training: what does not say is taken as its own
    for start in range(0, len(rows), at_once):
        cells = table.read(rows[start : start + at_once]).input_ids
        yield [vocabulary.adapt(ids, cells_digest) for ids in cells]


@dataclass(frozen=True)
class GeneSplit:
    """A split of genes, with the cells that hold them.

    Parameters
    ----------
    fold
        Its number.
    labels
        The class names.
    genes
        Role -> the vocabulary's keys of its genes, in the order of their tokens.
    tokens, targets
        Role -> token id and class number of each of those genes.
    rows
        Role -> row numbers of the cells that hold at least one of its genes, in order. A cell may have several roles.
    held
        Role -> how many of its genes each of those cells holds.
    without
        How many of the chosen cells hold no gene of any class; they have no role.
    """

    fold: int
    labels: list[str]
    genes: dict[str, list[str]]
    tokens: dict[str, NDArray[np.int64]]
    targets: dict[str, NDArray[np.int64]]
    rows: dict[str, NDArray[np.int64]]
    held: dict[str, NDArray[np.int32]]
    without: int

    @property
    def digest(self) -> str:
        """A hash of which genes do what in which cells, and of their classes."""
        return digest_of(self.labels, self.genes, *self._of(*ROLES))

    @property
    def reporting_digest(self) -> str:
        """A hash of what is reported on: genes, their classes, and the cells that hold them."""
        return digest_of(self.labels, self.genes["report"], *self._of("report"))

    def _of(self, *roles: str) -> list[NDArray[np.int64]]:
        return [of[role] for role in roles for of in (self.tokens, self.targets, self.rows)]

    def manifest(self) -> dict[str, Any]:
        """Give what a reader needs to make the same split: genes of each role and class, and how many cells hold them.

        The cells themselves are not listed: nearly all of them have every role.
        """
        return {
            "fold": self.fold,
            "labels": self.labels,
            "genes": {
                role: {
                    label: [
                        gene for gene, its in zip(self.genes[role], self.targets[role], strict=True) if its == number
                    ]
                    for number, label in enumerate(self.labels)
                }
                for role in ROLES
            },
            "cells": {role: len(self.rows[role]) for role in ROLES},
            "tokens": {role: int(self.held[role].sum()) for role in ROLES},
            "cells_without_target_gene": self.without,
            "digest": self.digest,
            "reporting_digest": self.reporting_digest,
        }


@dataclass(frozen=True)
class GeneFolds:
    """Genes dealt into folds.

    Parameters
    ----------
    classes
        The genes.
    fold_of
        The fold in which each of them reports, shape (genes,).
    folds
        How many there are.
    """

    classes: GeneClasses
    fold_of: NDArray[np.int64]
    folds: int

    @classmethod
    def deal(cls, classes: GeneClasses, folds: int, seed: int) -> GeneFolds:
        """Deal genes into folds, each class evenly: the folds' genes of a class differ by one at most, as do all.

        A class's genes are ordered by a hash of seed and name, and dealt in turn, going on from class to class where
        the last one ended. No generator of random numbers takes part, so that every version deals alike, in whatever
        order a file has its genes.

        Raises
        ------
        InputError
            If there are fewer than three folds, or a class has fewer genes than there are folds.
        """
        if folds < FEWEST_FOLDS:
            takes = f"{FEWEST_FOLDS} or more: every fold needs other genes to train than to choose and to report"
            raise InputError("--folds", folds, takes)
        # One gene of every class in every fold, and so in every role.
        classes.check(folds)
        fold_of = np.empty(len(classes.genes), dtype=np.int64)
        dealt = 0
        for number in range(len(classes.labels)):
            its = np.flatnonzero(classes.targets == number).tolist()
            its.sort(key=lambda position: (digest_of(seed, classes.genes[position]), classes.genes[position]))
            fold_of[its] = (dealt + np.arange(len(its))) % folds
            dealt += len(its)
        return cls(classes, fold_of, folds)

    def role_folds(self, fold: int) -> dict[str, list[int]]:
        """Say which folds' genes train, choose and report in a fold."""
        report, choose = fold, (fold + 1) % self.folds
        train = [other for other in range(self.folds) if other not in (report, choose)]
        return {"train": train, "choose": [choose], "report": [report]}

    def count_held(self, blocks: Iterable[Sequence[NDArray[np.integer]]], vocabulary_size: int) -> NDArray[np.int32]:
        """Count the genes of each fold that each cell holds, reading the cells once: shape (cells, folds).

        Parameters
        ----------
        blocks
            Lists of cells, as :func:`cell_blocks` gives them.
        vocabulary_size
            Tokens of the vocabulary.
        """
        fold_V = np.full(vocabulary_size, -1, dtype=np.int64)
        fold_V[self.classes.tokens] = self.fold_of
        parts = [np.zeros((0, self.folds), dtype=np.int32)]
        for sequences in blocks:
            cell = np.repeat(np.arange(len(sequences)), [len(ids) for ids in sequences])
            fold = fold_V[np.concatenate([np.zeros(0, dtype=np.int64), *sequences])]
            where = (cell * self.folds + fold)[fold >= 0]
            counts = np.bincount(where, minlength=len(sequences) * self.folds)
            parts.append(counts.reshape(-1, self.folds).astype(np.int32))
        return np.concatenate(parts)

    def splits(self, rows: NDArray[np.int64], held_CF: NDArray[np.int32]) -> list[GeneSplit]:
        """Give one split a fold.

        Parameters
        ----------
        rows
            Row numbers of the chosen cells.
        held_CF
            As :meth:`count_held` counts it over these cells, shape (cells, folds).

        Raises
        ------
        InputError
            If no cell holds a gene of some role.
        """
        classes = self.classes
        without = int((held_CF.sum(axis=1) == 0).sum())
        splits = []
        for fold in range(self.folds):
            genes, tokens, targets, role_rows, held = {}, {}, {}, {}, {}
            for role, folds in self.role_folds(fold).items():
                its = np.flatnonzero(np.isin(self.fold_of, folds))
                genes[role] = [classes.genes[position] for position in its]
                tokens[role], targets[role] = classes.tokens[its], classes.targets[its]
                count_C = held_CF[:, folds].sum(axis=1)
                holding = np.flatnonzero(count_C)
                if not len(holding):
                    got = f"no cell with a gene to {role} in fold {fold}"
                    raise InputError("--gene-classes", got, "genes that the cells hold")
                role_rows[role], held[role] = rows[holding].astype(np.int64), count_C[holding].astype(np.int32)
            splits.append(GeneSplit(fold, classes.labels, genes, tokens, targets, role_rows, held, without))
        return splits
