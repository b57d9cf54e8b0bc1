"""What a verified screen measures exactly: chosen once from the estimates, and written down for runs that go on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from geneformer_ray.compute.verification import genes_to_verify
from geneformer_ray.compute.verified_shifts import GeneSums, rows_of
from geneformer_ray.data import storage
from geneformer_ray.data.shards import read_shard
from geneformer_ray.distribute.screen_tables import CELL_SHIFTS
from geneformer_ray.progress import Progress

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from geneformer_ray.compute.verification import Verification
    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = ["CHOSEN", "Chosen"]

CHOSEN = "_chosen.json"


@dataclass(frozen=True)
class Chosen:
    """Genes and cells.

    Parameters
    ----------
    top, controls
        Token ids of the genes with the largest mean estimates and of random others.
    rows
        Row numbers of the cells of which every gene is measured, in order.
    """

    top: tuple[int, ...]
    controls: tuple[int, ...]
    rows: NDArray[np.int64]

    @classmethod
    def once(
        cls,
        output: str,
        estimates: str,
        estimated: NDArray[np.int64],
        goal: str,
        verification: Verification,
        vocabulary: GeneVocabulary,
    ) -> Chosen:
        """Read what an earlier run chose; else choose, and write it down.

        Parameters
        ----------
        output
            The screen's output.
        estimates
            Where the estimates lie, all of them.
        estimated
            Row numbers of the cells that have any, in order.
        goal
            The state whose shifts decide.
        verification
            How many of each.
        vocabulary
            Names the genes.
        """
        file = storage.join(output, CHOSEN)
        if storage.exists(file):
            named = storage.read_json(file)
            top, controls = (tuple(vocabulary.tokens[name] for name in named[kind]) for kind in ("top", "controls"))
            return cls(top, controls, np.array(named["control_cells"], dtype=np.int64))
        sums = _sums(estimates, goal, vocabulary)
        genes = genes_to_verify(
            *sums.means(), top=verification.top, controls=verification.controls, seed=verification.seed
        )
        drawn = np.random.default_rng(verification.seed).permutation(len(estimated))[: verification.control_cells]
        chosen = cls(tuple(genes[0].tolist()), tuple(genes[1].tolist()), np.sort(estimated[drawn]))
        names = {kind: [vocabulary.names[token] for token in getattr(chosen, kind)] for kind in ("top", "controls")}
        storage.write_json(file, {**names, "control_cells": chosen.rows.tolist()})
        return chosen


def _sums(estimates: str, goal: str, vocabulary: GeneVocabulary) -> GeneSums:
    """Sum the estimated shifts to the goal, shard by shard in their order."""
    sums = GeneSums(vocabulary.names)
    shards = len(storage.list_files(storage.join(estimates, CELL_SHIFTS), ".parquet"))
    with Progress("choosing genes", shards, "shards") as progress:
        for number in range(shards):
            table = read_shard(estimates, CELL_SHIFTS, number)
            sums.add(table.filter(rows_of(table, "shift", goal)))
            progress.advance(1)
    return sums
