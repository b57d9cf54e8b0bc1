"""First-order screens: every deletion or overexpression of a cell for a few dozen passes, not one pass a gene.

The exact engine (``shifts``) stays the judge: some random genes of each cell are measured exactly, and say how far off
the others are. Where that is too far, more of the path is computed exactly, where it bends most.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from geneformer_ray.compute.cell_events import cell_events
from geneformer_ray.compute.embedding import check_embedding
from geneformer_ray.compute.first_order_cell import FirstOrder, FirstOrderCell, FirstOrderShifts
from geneformer_ray.compute.held_ranks import HeldRanks
from geneformer_ray.compute.linear_trunk import Linearised, Point, linearise, vectors_a_token
from geneformer_ray.compute.overexpression_path import InsertedGenes, MovedGenes
from geneformer_ray.compute.path_cell import PathCell
from geneformer_ray.compute.shifts import CellShifts, shift_cells
from geneformer_ray.compute.token_budget import VECTORS_A_TOKEN, TokenBudget, out_of_memory
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from geneformer_ray.compute.encoder import Encoder
    from geneformer_ray.compute.perturbation import PerturbationPlan
    from geneformer_ray.compute.reading import Reading
    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = ["FirstOrder", "FirstOrderShifts", "check_first_order", "first_order_cells"]


def check_first_order(plan: PerturbationPlan, reading: Reading) -> None:
    """Refuse what is not of first order, or of which nobody has shown that it is."""
    method = "--method first_order"
    if plan.perturbation not in ("delete", "overexpress"):
        raise InputError(
            "--perturbation", f"{plan.perturbation} with {method}", "delete or overexpress; or --method exact"
        )
    if plan.perturbation == "overexpress" and reading.embedding != "mean":
        # What stands right behind a <cls> can turn all of it, which a held-out gene or two do not show.
        got = f"{reading.embedding} with --perturbation overexpress and {method}"
        raise InputError("--embedding", got, "mean; or --method exact")
    if plan.anchor is not None or plan.together or plan.combine != 1 or plan.sets is not None:
        raise InputError("--genes", f"several genes in one event with {method}", "one gene at a time")
    if not reading.states:
        raise InputError("--state-column", f"no states with {method}", "shifts to states")
    if reading.gene_shifts:
        raise InputError("--gene-shifts", f"gene shifts with {method}", "cell shifts alone")


def first_order_cells(
    encoder: Encoder,
    sequences: Sequence[NDArray[np.integer]],
    plan: PerturbationPlan,
    reading: Reading,
    vocabulary: GeneVocabulary,
    settings: FirstOrder | None = None,
    *,
    budget: TokenBudget | None = None,
) -> list[FirstOrderShifts]:
    """Estimate every event of each cell.

    Parameters
    ----------
    encoder, sequences, plan, reading, vocabulary, budget
        As for :func:`geneformer_ray.compute.shifts.shift_cells`. With ranks held there is no path: the original cell,
        made linear once, gives the effects of all its genes.
    settings
        How much is computed, and how well it must do.

    Returns
    -------
    list of FirstOrderShifts
        Events of a cell of which the estimate would cost no less than the exact engine are measured by that one.
    """
    check_first_order(plan, reading)
    check_embedding(reading.embedding, vocabulary)
    settings = settings or FirstOrder()
    budget = budget or TokenBudget.of_free_memory(encoder.execution, encoder.config)
    cells = [
        [
            (mine, kind(cell_events(ids, mine, vocabulary, encoder.max_length), reading, settings, encoder.trunk))
            for mine, kind in _kinds(plan, ids)
        ]
        for ids in sequences
    ]
    while waiting := [part for parts in cells for _, part in parts if part.pays and not part.done]:
        # As many functions for all that goes side by side.
        functions = min(part.functions for part in waiting)
        _next_round(encoder, [part for part in waiting if part.functions == functions], reading, budget)
    alone: dict[PerturbationPlan, list[int]] = {}
    for number, parts in enumerate(cells):
        for mine, part in parts:
            if not part.pays:
                alone.setdefault(mine, []).append(number)
    exact: dict[tuple[PerturbationPlan, int], FirstOrderShifts] = {}
    for mine, numbers in alone.items():
        some = [sequences[number] for number in numbers]
        shifts = shift_cells(encoder, some, mine, reading, vocabulary, budget=budget)
        exact |= {
            (mine, number): FirstOrderShifts.all_exact(found) for number, found in zip(numbers, shifts, strict=True)
        }
    return [
        _together([part.result() if part.pays else exact[mine, number] for mine, part in parts], plan)
        for number, parts in enumerate(cells)
    ]


def _kinds(plan: PerturbationPlan, ids: NDArray[np.integer]) -> list[tuple[PerturbationPlan, type[FirstOrderCell]]]:
    """Cut a cell's events into those that are estimated alike."""
    if plan.perturbation == "delete":
        return [(plan, HeldRanks if plan.ranks == "hold" else PathCell)]
    if plan.genes is None:
        return [(plan, MovedGenes)]
    held = set(ids.tolist())
    moved = tuple(gene for gene in plan.genes if gene in held)
    inserted = tuple(gene for gene in plan.genes if gene not in held)
    kinds: list[tuple[PerturbationPlan, type[FirstOrderCell]]] = [(replace(plan, genes=moved), MovedGenes)]
    return [*kinds, (replace(plan, genes=inserted), InsertedGenes)]


def _together(parts: Sequence[FirstOrderShifts], plan: PerturbationPlan) -> FirstOrderShifts:
    """Put what was found of one cell's events in the order of the plan."""
    if len(parts) == 1:
        return parts[0]
    genes = [event for part in parts for event in part.shifts.genes]
    place = {gene: number for number, gene in enumerate(plan.genes or ())}
    order = sorted(range(len(genes)), key=lambda number: place[genes[number][0]])
    shifts = CellShifts(
        [genes[number] for number in order],
        np.concatenate([part.shifts.values_ES for part in parts])[order],
        skipped=sum(part.shifts.skipped for part in parts),
        empty=sum(part.shifts.empty for part in parts),
    )
    return FirstOrderShifts(
        shifts,
        np.concatenate([part.exact_E for part in parts])[order],
        max(part.error for part in parts),
        sum(part.passes for part in parts if len(part.shifts)),
        sum(part.anchors for part in parts),
    )


def _next_round(encoder: Encoder, cells: Sequence[FirstOrderCell], reading: Reading, budget: TokenBudget) -> None:
    """Compute what the cells ask for, side by side; each takes its own once it is there, and all of it is let go."""
    asked = deque((cell, cell.points()) for cell in cells)
    points = [point for _, some in asked for point in some]
    functions = max(cell.functions for cell in cells)
    found: list[Linearised] = []
    while asked:
        cell, some = asked[0]
        if len(some) <= len(found):
            cell.take(found[: len(some)])
            del found[: len(some)], asked[0]
            continue
        batch = _batch(points, encoder, functions, budget)
        try:
            found += linearise(encoder.trunk, batch, first_only=reading.first_only)
            del points[: len(batch)]
            continue
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if len(batch) == 1:
                got = f"a cell of {len(batch[0].ids_L)} tokens"
                raise InputError("--cells", got, "memory for its gradient, which is not there") from error
        # Outside the handler, whose traceback holds what was computed.
        budget.halve(min(budget.tokens, sum(map(len, batch))))


def _batch(points: Sequence[Point], encoder: Encoder, functions: int, budget: TokenBudget) -> list[Point]:
    """Take as many points as the budget holds, one at least; a token takes more here than on the way forward alone."""
    room = budget.tokens * VECTORS_A_TOKEN / vectors_a_token(encoder.trunk, functions)
    taken = [points[0]]
    tokens = len(points[0])
    for point in points[1:]:
        tokens += len(point)
        if tokens > room:
            break
        taken.append(point)
    return taken
