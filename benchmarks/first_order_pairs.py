"""One state pair, screened by the exact engine and by first order, in turn, and what that says of first order."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from benchmarks.first_order_models import SOURCES, Cells, cut
from geneformer_ray.compute.embedding import cell_embeddings
from geneformer_ray.compute.encoder import Encoder
from geneformer_ray.compute.first_order import FirstOrder, FirstOrderShifts, first_order_cells
from geneformer_ray.compute.perturbation import PerturbationPlan
from geneformer_ray.compute.reading import Reading
from geneformer_ray.compute.shifts import CellShifts, shift_cell
from geneformer_ray.compute.verification import agreement, gene_agreement, genes_to_verify

__all__ = ["VERIFIED", "Pair", "Setting"]

TOPS = (20, 50, 100)
# Cells of each state, of those that train, whose mean embedding is the state's.
CELLS_OF_A_STATE = 40
FORWARDS = 5
ANCHORS = (2, 3, 5, 9, 17, 33)
GOAL_ALONE = "goal alone"
WAYS = {
    "shift": {
        **{f"{m} anchors": FirstOrder(anchors=m, tolerance=math.inf) for m in ANCHORS},
        "adaptive": FirstOrder(),
        f"5 anchors, {GOAL_ALONE}": FirstOrder(tolerance=math.inf),
    },
    "hold": {
        "8 held out": FirstOrder(),
        "2 held out": FirstOrder(held_out=2),
        f"2 held out, {GOAL_ALONE}": FirstOrder(held_out=2),
    },
}
# The way that chooses the genes, and how many of them.
VERIFIED = (("5 anchors", 50), ("5 anchors", 75), ("adaptive", 50), ("adaptive", 75))
CONTROLS = 50

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """A source, its cells cut to so many genes (None: as they are), and how many cells of each pair."""

    source: str
    genes: int | None
    cells: int


@dataclass(frozen=True)
class Timed:
    """Seconds of this process's CPU, and of the wall."""

    cpu: float
    wall: float

    @classmethod
    def of(cls, run: Callable[[], T]) -> tuple[T, Timed]:
        """Run something."""
        wall, cpu = time.perf_counter(), time.process_time()
        result = run()
        return result, cls(time.process_time() - cpu, time.perf_counter() - wall)


class Pair:
    """The screen of some cells from one state to another, every way."""

    def __init__(self, encoder: Encoder, cells: Cells, setting: Setting, pair: tuple[str, str], embedding: str) -> None:
        self.encoder, self.vocabulary, self.pair = encoder, cells.vocabulary, pair
        genes = setting.genes or SOURCES[setting.source].genes
        rng = np.random.default_rng(0)

        def some(state: str, number: int, *, trains: bool) -> list[NDArray[np.int32]]:
            long = cells.genes >= (setting.genes or 0)
            rows = np.flatnonzero((cells.types == state) & (cells.trains == trains) & long)
            if len(rows) < min(number, 2):
                raise SystemExit(f"{setting.source}: only {len(rows)} cells of {state} with {setting.genes} genes")
            return [cut(cells.sequences[row], genes) for row in rng.permutation(rows)[:number]]

        states = {
            state: cell_embeddings(
                encoder, some(state, CELLS_OF_A_STATE, trains=True), self.vocabulary, embedding=embedding
            ).mean(axis=0)
            for state in pair
        }
        self.reading = Reading(embedding, "context", states)
        self.goal_alone = Reading(embedding, "context", {pair[1]: states[pair[1]]})
        self.cells = some(pair[0], setting.cells, trains=False)
        self.exact: dict[str, list[CellShifts]] = {"shift": [], "hold": []}
        self.found: dict[tuple[str, str], list[NDArray[np.float32]]] = {}
        self.rows: list[dict[str, Any]] = []

    def measure(self) -> None:
        """Screen every cell in every way."""
        # Before the clock starts: libraries load, and pages of memory are touched.
        self._first_order(self.cells[0], PerturbationPlan(), self.reading, FirstOrder())
        for number, ids in enumerate(self.cells):
            forward = [Timed.of(partial(self.encoder.hidden, [ids[None]]))[1].cpu for _ in range(FORWARDS)]
            for ranks, ways in WAYS.items():
                plan = PerturbationPlan(ranks=ranks)
                exact, timed = Timed.of(partial(self._exact, ids, plan))
                self.exact[ranks].append(exact)
                common = {"cell": number, "genes": len(exact), "ranks": ranks, "forward": float(np.median(forward))}
                self._note("exact", common, timed, len(exact) + 1.0, exact.values_ES)
                for way, settings in ways.items():
                    reading = self.goal_alone if way.endswith(GOAL_ALONE) else self.reading
                    (found,), timed = Timed.of(partial(self._first_order, ids, plan, reading, settings))
                    if found.shifts.genes != exact.genes:
                        raise RuntimeError("the two engines screened other genes")
                    more = {"anchors": found.anchors, "error": found.error, "all_exact": bool(found.exact_E.all())}
                    self._note(way, common | more, timed, found.passes, found.shifts.values_ES)
            print(f"{' -> '.join(self.pair)}: cell {number + 1} of {len(self.cells)}", file=sys.stderr, flush=True)

    def _exact(self, ids: NDArray[np.int32], plan: PerturbationPlan) -> CellShifts:
        return shift_cell(self.encoder, ids, plan, self.reading, self.vocabulary)

    def _first_order(
        self, ids: NDArray[np.int32], plan: PerturbationPlan, reading: Reading, settings: FirstOrder
    ) -> list[FirstOrderShifts]:
        return first_order_cells(self.encoder, [ids], plan, reading, self.vocabulary, settings)

    def _note(
        self, way: str, common: Mapping[str, Any], timed: Timed, passes: float, values_ES: NDArray[np.float32]
    ) -> None:
        self.found.setdefault((common["ranks"], way), []).append(values_ES)
        row = {**common, "way": way, "cpu": timed.cpu, "wall": timed.wall, "passes": passes}
        # From the last one on, for that is the goal: it may be alone.
        for column, state in zip(range(-1, -1 - values_ES.shape[1], -1), ("goal", "start"), strict=False):
            exact_E, found_E = self.exact[common["ranks"]][-1].values_ES[:, column], values_ES[:, column]
            agreed = {top: agreement(exact_E, found_E, top=top) for top in TOPS}
            off_E = found_E.astype(np.float64) - exact_E
            row[state] = {
                "spearman": agreed[TOPS[0]].spearman,
                "pearson": agreed[TOPS[0]].pearson,
                "recall": {top: found.recall for top, found in agreed.items()},
                "off": float(np.sqrt((off_E**2).mean()) / exact_E.std(dtype=np.float64)),
            }
        self.rows.append(row)

    def aggregated(self) -> list[dict[str, Any]]:
        """Compare genes' means over cells, way by way."""
        gene_N, kept_N = self._genes()
        rows = []
        for (ranks, way), values in self.found.items():
            exact_N, found_N = (np.concatenate(some)[kept_N, -1] for some in (self.found[ranks, "exact"], values))
            agreed = {top: gene_agreement(gene_N[kept_N], exact_N, found_N, top=top) for top in TOPS}
            rows.append(
                {
                    "ranks": ranks,
                    "way": way,
                    "genes": agreed[TOPS[0]].events,
                    "spearman": agreed[TOPS[0]].spearman,
                    "recall": {top: found.recall for top, found in agreed.items()},
                }
            )
        return rows

    def _genes(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Give the gene of every value, and which genes enough cells hold."""
        gene_N = np.array([event[0] for shifts in self.exact["shift"] for event in shifts.genes])
        _, code_N, cells_G = np.unique(gene_N, return_inverse=True, return_counts=True)
        return gene_N, cells_G[code_N] >= math.ceil(len(self.cells) / 2)

    def verified(self, first: str, top: int) -> dict[str, Any]:
        """Measure the strongest genes by a way, and some controls, exactly in all cells: ``--method verified``."""
        gene_N, kept_N = self._genes()
        exact_N, mixed_N = (
            np.concatenate(self.found["shift", way])[:, 1].astype(np.float64) for way in ("exact", first)
        )
        genes = genes_to_verify(gene_N[kept_N], mixed_N[kept_N], top=top, controls=CONTROLS)
        plan = PerturbationPlan(genes=tuple(np.concatenate(genes).tolist()))
        passes, seconds, start = 0.0, 0.0, 0
        for ids, shifts in zip(self.cells, self.exact["shift"], strict=True):
            found, timed = Timed.of(partial(self._exact, ids, plan))
            passes, seconds = passes + len(found) + 1, seconds + timed.cpu
            place = {event: start + number for number, event in enumerate(shifts.genes)}
            mixed_N[[place[event] for event in found.genes]] = found.values_ES[:, 1]
            start += len(shifts)
        spent = {
            way: [row for row in self.rows if (row["ranks"], row["way"]) == ("shift", way)] for way in ("exact", first)
        }
        share = {
            what: (extra + sum(row[what] for row in spent[first])) / sum(row[what] for row in spent["exact"])
            for what, extra in (("passes", passes), ("cpu", seconds))
        }
        agreed = {k: gene_agreement(gene_N[kept_N], exact_N[kept_N], mixed_N[kept_N], top=k) for k in TOPS}
        return {
            "first": first,
            "top": top,
            "genes": agreed[TOPS[0]].events,
            "share": share,
            "recall": {k: found.recall for k, found in agreed.items()},
        }

    def decomposed(self) -> list[dict[str, float]]:
        """Say for each cell how large the rank shift is beside the gene effect, towards the goal."""
        rows = []
        for full, gene in zip(self.exact["shift"], self.exact["hold"], strict=True):
            full_E, gene_E = full.values_ES[:, 1].astype(np.float64), gene.values_ES[:, 1].astype(np.float64)
            rank_E = full_E - gene_E
            agreed = agreement(gene_E.astype(np.float32), full_E.astype(np.float32), top=50)
            rows.append(
                {
                    "ratio": float(rank_E.std() / gene_E.std()),
                    "ratio_absolute": float(np.median(np.abs(rank_E)) / np.median(np.abs(gene_E))),
                    "share": float((np.abs(rank_E) / (np.abs(rank_E) + np.abs(gene_E))).mean()),
                    "spearman": agreed.spearman,
                    "recall": agreed.recall,
                }
            )
        return rows
