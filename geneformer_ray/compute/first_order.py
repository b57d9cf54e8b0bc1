"""First-order screens: every deletion of a cell for a few dozen passes, not one pass a gene.

The exact engine (``shifts``) stays the judge: some random genes of each cell are measured exactly, and say how far off
the others are. Where that is too far, more of the path is computed exactly, where it bends most.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from geneformer_ray.compute.cell_events import cell_events
from geneformer_ray.compute.embedding import check_embedding
from geneformer_ray.compute.first_order_cell import FirstOrder, FirstOrderCell, FirstOrderShifts
from geneformer_ray.compute.linear_trunk import Linearised, Point, linearise, vectors_a_token
from geneformer_ray.compute.shifts import shift_cell, shift_cells
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
    if plan.perturbation != "delete":
        raise InputError("--perturbation", f"{plan.perturbation} with {method}", "delete; --method exact for others")
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
    """Estimate every deletion of each cell.

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
        A cell of which the estimate would cost no less than the exact engine is measured by that one.
    """
    check_first_order(plan, reading)
    check_embedding(reading.embedding, vocabulary)
    settings = settings or FirstOrder()
    budget = budget or TokenBudget.of_free_memory(encoder.execution, encoder.config)
    events = [cell_events(ids, plan, vocabulary, encoder.max_length) for ids in sequences]
    cells = [FirstOrderCell(mine, reading, settings, encoder.trunk) for mine in events]
    alone = [number for number, cell in enumerate(cells) if not cell.pays]
    exact = shift_cells(encoder, [sequences[number] for number in alone], plan, reading, vocabulary, budget=budget)
    found = {number: FirstOrderShifts.all_exact(shifts) for number, shifts in zip(alone, exact, strict=True)}
    working = {number: cell for number, cell in enumerate(cells) if cell.pays}
    for cell in working.values():
        held_out = replace(plan, genes=tuple(cell.held_out))
        cell.judge(shift_cell(encoder, cell.events.input_ids, held_out, reading, vocabulary, budget=budget))
    while waiting := [cell for cell in working.values() if not cell.done]:
        _next_round(encoder, waiting, reading, budget)
    found |= {number: cell.result() for number, cell in working.items()}
    return [found[number] for number in range(len(cells))]


def _next_round(encoder: Encoder, cells: Sequence[FirstOrderCell], reading: Reading, budget: TokenBudget) -> None:
    """Compute what the cells ask for, side by side."""
    asked = [cell.points() for cell in cells]
    points = [point for some in asked for point in some]
    states_SD = torch.from_numpy(np.stack(list(reading.states.values()))).to(encoder.execution.device)
    found: list[Linearised] = []
    while len(found) < len(points):
        batch = _batch(points[len(found) :], encoder, len(states_SD), budget)
        try:
            found += linearise(encoder.trunk, batch, states_SD, first_only=reading.first_only)
            continue
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if len(batch) == 1:
                got = f"a cell of {len(batch[0].ids_L)} tokens"
                raise InputError("--cells", got, "memory for its gradient, which is not there") from error
        # Outside the handler, whose traceback holds what was computed.
        budget.halve(min(budget.tokens, sum(map(len, batch))))
    results = iter(found)
    for cell, some in zip(cells, asked, strict=True):
        cell.take([next(results) for _ in some])


def _batch(points: Sequence[Point], encoder: Encoder, states: int, budget: TokenBudget) -> list[Point]:
    """Take as many points as the budget holds, one at least; a token takes more here than on the way forward alone."""
    room = budget.tokens * VECTORS_A_TOKEN / vectors_a_token(encoder.trunk, states)
    taken = [points[0]]
    tokens = len(points[0])
    for point in points[1:]:
        tokens += len(point)
        if tokens > room:
            break
        taken.append(point)
    return taken
