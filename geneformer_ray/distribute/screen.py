"""A perturbation screen over a pool of actors: its items, what came of them, and when too many cells were set aside."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from geneformer_ray.compute.gene_shift_summary import BUCKETS
from geneformer_ray.compute.screen_method import ScreenMethod
from geneformer_ray.data import storage
from geneformer_ray.data.shards import each_finished, forget_attempts
from geneformer_ray.distribute.fan_out import Pool, fan_out
from geneformer_ray.distribute.job_metrics import count_resumed
from geneformer_ray.distribute.screen_tables import CELL_SHIFTS, GENE_SHIFTS, GENE_SUMMARY, PAIR_SUMS, REJECTS
from geneformer_ray.distribute.screen_totals import ScreenTotals
from geneformer_ray.distribute.screen_worker import ScreenWorker, SummaryWorker
from geneformer_ray.errors import InputError
from geneformer_ray.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from geneformer_ray.compute.perturbation import PerturbationPlan
    from geneformer_ray.compute.reading import Reading
    from geneformer_ray.data.vocabulary import GeneVocabulary
    from geneformer_ray.distribute.screen_items import ScreenItems

__all__ = ["Screen", "check_rejected", "check_share"]


@dataclass(frozen=True)
class Screen:
    """A screen that is ready to run.

    Parameters
    ----------
    cells
        The table's path.
    items
        What there is to do.
    runner
        Options of :func:`open_runner`.
    plan, reading, method
        What is done, what is compared, and how it is measured.
    output
        The output directory.
    gene_rows, gene_summary
        What is kept of gene shifts: every one, and count, mean and deviation a pair.
    max_rejected
        The share of cells above which the run fails.
    title
        What progress is called.
    """

    cells: str
    items: ScreenItems
    runner: dict[str, Any]
    plan: PerturbationPlan
    reading: Reading
    output: str
    gene_rows: bool = False
    gene_summary: bool = False
    max_rejected: float = 1.0
    method: ScreenMethod = field(default_factory=ScreenMethod)
    title: str = "screen"

    @property
    def tables(self) -> list[str]:
        """The names of the tables that it writes."""
        gene_tables = {GENE_SHIFTS: self.gene_rows, GENE_SUMMARY: self.gene_summary}
        return [CELL_SHIFTS, *(name for name, wanted in gene_tables.items() if wanted)]

    def run(self, pool: Pool, vocabulary: GeneVocabulary) -> dict[str, Any]:
        """Do every item that no earlier run finished, and say what came of all."""
        totals = self.measure(pool)
        if self.gene_summary:
            self._summarise(vocabulary)
        return totals.summary(self.items)

    def measure(self, pool: Pool) -> ScreenTotals:
        """Do every item that no earlier run finished; give the sums of all."""
        reading = {
            **asdict(self.reading),
            "states": {state: vector.tolist() for state, vector in self.reading.states.items()},
        }
        options = {
            "cells": self.cells,
            "runner": self.runner,
            "plan": asdict(self.plan),
            "reading": reading,
            "output": self.output,
            "tables": self.tables,
            "method": self.method,
        }
        forget_attempts(self.output)
        totals, done, events_done = ScreenTotals(), set(), 0
        for counts in each_finished(self.output):
            done.add(counts["item"])
            events_done += totals.add(counts)
        check_rejected(totals.rejected, len(self.items.rows), self.max_rejected, self.output)
        count_resumed(done)
        todo = (item for item in self.items if item["item"] not in done)
        with Progress(self.title, int(self.items.counts.events.sum()), "events", done=events_done) as progress:
            for counts in fan_out(ScreenWorker, options, todo, pool):
                progress.advance(totals.add(counts))
                check_rejected(totals.rejected, len(self.items.rows), self.max_rejected, self.output)
        torn = list(self._torn(totals))
        if torn:
            for _ in fan_out(ScreenWorker, options, torn, pool):
                pass  # counted below, with all others
            totals = ScreenTotals()
            for counts in each_finished(self.output):
                totals.add(counts)
        forget_attempts(self.output)
        return totals

    def _torn(self, totals: ScreenTotals) -> Iterator[dict[str, Any]]:
        """Give the parts that went well of cells of which another part did not: a cell is whole, or set aside."""
        for item in self.items if totals.rejected else ():
            reason = totals.rejected.get(str(item["rows"][0])) if "part" in item else None
            if reason is not None and item["item"] not in totals.rejecting:
                yield {**item, "reason": reason}

    def _summarise(self, vocabulary: GeneVocabulary) -> None:
        """Merge the items' sums, bucket by bucket over the cluster."""
        options = {"names": vocabulary.names, "vocabulary": vocabulary.digest, "output": self.output}
        items = [{"bucket": bucket} for bucket in range(BUCKETS)]
        with Progress("gene shifts summary", BUCKETS, "parts") as progress:
            for _ in fan_out(SummaryWorker, options, items, Pool.of_cluster(model=False)):
                progress.advance(1)

    def discard(self) -> None:
        """Delete what the summary was made of; until the output is finished a rerun needs it."""
        storage.remove(storage.join(self.output, PAIR_SUMS))


def check_rejected(rejected: Mapping[str, str], cells: int, most: float, output: str) -> None:
    """Fail a run that has set too many of its cells aside.

    Parameters
    ----------
    rejected
        Row number, as text -> the reason.
    cells, most
        How many cells there are, and the share of them that may be set aside.
    output
        Where what is done stays.
    """
    if rejected:
        row, reason = next(iter(rejected.items()))
        then = f"{output} keeps what is done, {REJECTS} the reasons; the same command with more goes on"
        check_share(len(rejected), cells, most, f"row {row}: {reason}", then)


def check_share(rejected: int, cells: int, most: float, why: str, then: str) -> None:
    """Fail a run that sets too many of its cells aside.

    Raises
    ------
    InputError
        With the first reason, and what can be done `then`.
    """
    if rejected > most * cells:
        got = f"{most:g}, and {rejected:,} of {cells:,} cells set aside ({why})"
        needed = math.ceil(1e6 * rejected / cells) / 1e6
        raise InputError("--max-rejected", got, f"a share of at least {needed:g} for these cells; {then}")
