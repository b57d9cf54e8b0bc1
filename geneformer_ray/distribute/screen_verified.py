"""A screen that estimates every deletion, then measures the strongest genes, a control and some whole cells exactly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from geneformer_ray.compute.decomposition import MEASURES
from geneformer_ray.data import storage
from geneformer_ray.data.cells import CellTable
from geneformer_ray.data.shards import each_finished
from geneformer_ray.distribute.fan_out import Pool, fan_out
from geneformer_ray.distribute.screen import Screen, check_rejected
from geneformer_ray.distribute.screen_agreement import control_cells, cost_statement, verification_statement
from geneformer_ray.distribute.screen_chosen import Chosen
from geneformer_ray.distribute.screen_items import count_cells
from geneformer_ray.distribute.screen_merge import MergeWorker, merge_items
from geneformer_ray.distribute.screen_totals import ScreenTotals
from geneformer_ray.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from geneformer_ray.compute.perturbation import PerturbationPlan
    from geneformer_ray.compute.verification import Verification
    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = ["VerifiedScreen"]

# Of the stages before the last; deleted once the output is finished.
ESTIMATES, EXACT_GENES, EXACT_CELLS = "_estimates", "_exact_genes", "_exact_cells"


@dataclass(frozen=True)
class VerifiedScreen:
    """Four stages, each of which goes on where it was stopped: estimates, two exact screens, and the table of all.

    Parameters
    ----------
    screen
        The first-order screen of all cells; its output is that of the whole.
    verification
        How much is measured exactly.
    goal
        The state whose shifts decide which genes are.
    max_length
        The model's input size.
    """

    screen: Screen
    verification: Verification
    goal: str
    max_length: int

    @property
    def tables(self) -> list[str]:
        """The names of the tables that it writes."""
        return self.screen.tables

    @property
    def measures(self) -> tuple[str, ...]:
        """What is measured of each event."""
        return MEASURES if self.screen.method.decompose else MEASURES[:1]

    def run(self, pool: Pool, vocabulary: GeneVocabulary) -> dict[str, Any]:
        """Do every stage as far as no earlier run did it, and say what came of all."""
        whole, plan = self.screen, self.screen.plan
        estimates = replace(whole, output=self._at(ESTIMATES), title="estimates")
        first = estimates.measure(pool)
        estimated = first.estimated_rows
        chosen = Chosen.once(whole.output, estimates.output, estimated, self.goal, self.verification, vocabulary)
        others = np.setdiff1d(estimated, chosen.rows)
        cells = self._exact(EXACT_CELLS, "exact: control cells", chosen.rows, plan, vocabulary)
        rest = self._exact(EXACT_GENES, "exact: chosen genes", others, self.plan_of(chosen), vocabulary)
        exact, rejected = [], dict(first.rejected)
        for screen in (cells, rest):
            exact.append(screen.measure(pool))
            rejected |= exact[-1].rejected
            check_rejected(rejected, len(whole.items.rows), whole.max_rejected, whole.output)
        merged = self._merge([cells, rest], rejected, chosen, vocabulary)
        totals = self._totals(merged, first, exact)
        control = control_cells(estimates, cells, self.goal, self.measures)
        return {
            **totals.summary(whole.items),
            "verification": {
                "top": len(chosen.top),
                "controls": len(chosen.controls),
                "control_cells": len(chosen.rows),
                **verification_statement(control, (item["control_genes"] for item in merged), self.verification.top),
                **cost_statement(first, exact, whole.method.times),
            },
        }

    def plan_of(self, chosen: Chosen) -> PerturbationPlan:
        """Say what is done to the chosen genes: where every gene of a cell is perturbed, nothing to those it lacks."""
        plan = self.screen.plan
        return replace(plan, genes=(*chosen.top, *chosen.controls), insert=plan.insert and plan.genes is not None)

    def discard(self) -> None:
        """Delete what the stages left; until the output is finished a rerun needs it."""
        for name in (ESTIMATES, EXACT_CELLS, EXACT_GENES):
            storage.remove(self._at(name))

    def _at(self, name: str) -> str:
        return storage.join(self.screen.output, name)

    def _exact(
        self, name: str, title: str, rows: NDArray[np.int64], plan: PerturbationPlan, vocabulary: GeneVocabulary
    ) -> Screen:
        """Make the exact screen of some cells; how many may fail is judged over all stages."""
        counts = count_cells(CellTable(self.screen.cells), rows, plan, vocabulary, self.max_length)
        how: dict[str, Any] = {"plan": plan, "method": replace(self.screen.method, first_order=None)}
        items = replace(self.screen.items, rows=rows, counts=counts, **how)
        return replace(self.screen, items=items, output=self._at(name), title=title, max_rejected=1.0, **how)

    def _merge(
        self, exact: Sequence[Screen], rejected: Mapping[str, str], chosen: Chosen, vocabulary: GeneVocabulary
    ) -> list[dict[str, Any]]:
        """Write the table; give what its items came to, in their order."""
        output = self.screen.output
        options = {
            "cells": self.screen.cells,
            "estimates": self._at(ESTIMATES),
            "output": output,
            "vocabulary": vocabulary.digest,
            "goal": self.goal,
            "controls": [vocabulary.names[token] for token in chosen.controls],
            "rows_an_event": len(self.measures) * len(self.screen.reading.states),
        }
        done = {counts["item"] for counts in each_finished(output)}
        items = list(merge_items(self.screen.items, {one.output: one.items for one in exact}, rejected))
        todo = (item for item in items if item["item"] not in done)
        with Progress("tables", len(items), "items", done=len(done)) as progress:
            for _ in fan_out(MergeWorker, options, todo, Pool.of_cluster(model=False)):
                progress.advance(1)
        return list(each_finished(output))

    @staticmethod
    def _totals(merged: Sequence[dict[str, Any]], first: ScreenTotals, exact: Sequence[ScreenTotals]) -> ScreenTotals:
        """Put together what the table holds, and how its numbers came about."""
        totals = ScreenTotals(figures=first.figures, first_order_precision=first.precision)
        for item in merged:
            totals.add(item)
        for name in ("events_skipped", "events_without_a_gene_to_compare"):
            totals.counts[name] = first.counts[name]
        totals.precision = [part for one in (first, *exact) for part in one.precision]
        return totals
