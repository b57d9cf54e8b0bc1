"""What a deletion's shift is made of: the gene that is gone, and the ranks of all behind it.

A deletion does two things at once. The gene is gone, and every gene behind it moves up by one rank, so gets another
position embedding; that second effect has nothing to do with which gene it was. ``shift_gene`` is the shift with all
ranks held, ``shift_rank`` what the full ``shift`` has beyond that: the two add up to it by definition.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from geneformer_ray.compute.shift_tables import cell_shift_rows
from geneformer_ray.compute.shifts import shift_cells
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from geneformer_ray.compute.encoder import Encoder
    from geneformer_ray.compute.perturbation import PerturbationPlan
    from geneformer_ray.compute.reading import Reading
    from geneformer_ray.compute.shifts import CellShifts
    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = ["MEASURES", "check_decomposition", "decompose", "decomposed_rows", "shift_decomposed"]

MEASURES = ("shift", "shift_gene", "shift_rank")


def check_decomposition(plan: PerturbationPlan, reading: Reading) -> None:
    """Refuse what cannot be taken apart: similarities do not add up, and only a deletion moves others' ranks."""
    if plan.perturbation != "delete":
        raise InputError("--decompose", f"--perturbation {plan.perturbation}", "deletions")
    if plan.ranks != "shift":
        raise InputError("--decompose", f"--ranks {plan.ranks}", "--ranks shift: it measures the other way as well")
    if not reading.states:
        raise InputError("--decompose", "a screen without states", "shifts to states")


def shift_decomposed(
    encoder: Encoder,
    sequences: Sequence[NDArray[np.integer]],
    plan: PerturbationPlan,
    reading: Reading,
    vocabulary: GeneVocabulary,
    **options: Any,
) -> tuple[list[CellShifts], list[CellShifts]]:
    """Measure deletions as they are and with all ranks held: twice the cost of one.

    Parameters
    ----------
    encoder, sequences, plan, reading, vocabulary, options
        As for :func:`geneformer_ray.compute.shifts.shift_cells`.

    Returns
    -------
    full, gene
        The shifts, and their parts that the genes themselves make; the same events in the same order.
    """
    check_decomposition(plan, reading)
    full = shift_cells(encoder, sequences, plan, reading, vocabulary, **options)
    held = replace(plan, ranks="hold")
    gene = shift_cells(encoder, sequences, held, replace(reading, gene_shifts=False), vocabulary, **options)
    return full, gene


def decompose(full: CellShifts, gene: CellShifts) -> CellShifts:
    """Give the part of a cell's shifts that the ranks make."""
    if full.genes != gene.genes:
        raise ValueError(f"shifts of other events: {len(full)} and {len(gene)}")
    return replace(gene, values_ES=full.values_ES - gene.values_ES)


def decomposed_rows(
    cell_ids: Sequence[str],
    full: Sequence[CellShifts],
    gene: Sequence[CellShifts],
    states: Sequence[str],
    names: NDArray[np.object_],
    *,
    exact: tuple[Sequence[NDArray[np.bool_]], Sequence[NDArray[np.bool_]]] | None = None,
) -> pa.Table:
    """Give three rows an event and state: ``shift``, ``shift_gene`` and ``shift_rank``, measure by measure.

    Parameters
    ----------
    cell_ids, full, gene
        Of the same cells.
    states
        The reading's states, in the order of the values' columns.
    names
        Token names by id, shape (vocabulary,).
    exact
        Where some values are estimates: which events of `full` and of `gene` are not, a pair of lists of shape
        (events,). What the ranks make is exact where both are.
    """
    if not states:
        raise InputError("--decompose", "a screen without states", "shifts to states")
    rank = [decompose(whole, part) for whole, part in zip(full, gene, strict=True)]
    known: list[Sequence[NDArray[np.bool_]] | None] = [None] * len(MEASURES)
    if exact is not None:
        known = [*exact, [whole_E & part_E for whole_E, part_E in zip(*exact, strict=True)]]
    parts = zip(MEASURES, (full, gene, rank), known, strict=True)
    return pa.concat_tables(
        cell_shift_rows(cell_ids, shifts, states, names, measure=measure, exact=exact_E)
        for measure, shifts, exact_E in parts
    )
