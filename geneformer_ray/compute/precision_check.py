"""How far shifts in lower precision lie from float32's, on some events of the same cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from geneformer_ray.compute.first_order import first_order_cells
from geneformer_ray.compute.shifts import shift_cells

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from geneformer_ray.compute.encoder import Encoder
    from geneformer_ray.compute.first_order import FirstOrder
    from geneformer_ray.compute.perturbation import PerturbationPlan
    from geneformer_ray.compute.reading import Reading
    from geneformer_ray.compute.shifts import CellShifts
    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = ["compare_precision", "merge_precision"]

EVENTS_A_CELL = 32


def compare_precision(
    encoder: Encoder,
    exact: Encoder,
    sequences: Sequence[NDArray[np.integer]],
    plan: PerturbationPlan,
    reading: Reading,
    vocabulary: GeneVocabulary,
    settings: FirstOrder | None = None,
) -> dict[str, float]:
    """Measure some events of each cell with both encoders.

    Parameters
    ----------
    encoder, exact
        The trunk as the screen runs it, and the same in float32.
    sequences
        Each cell's token ids.
    plan, reading
        The screen's.
    settings
        Those of a first-order screen: all events of the cells are estimated with both. None compares exact values.

    Returns
    -------
    dict
        ``events`` compared; ``largest_error`` of any value; ``largest_value`` in float32, to set it against: of
        shifts, or of 1 - similarity without states; ``squared_error``, summed, and ``values``, how many.
    """

    def measured(one: Encoder) -> list[CellShifts]:
        if settings is None:
            return shift_cells(one, sequences, plan, reading, vocabulary, most_events=EVENTS_A_CELL)
        return [cell.shifts for cell in first_order_cells(one, sequences, plan, reading, vocabulary, settings)]

    ours, theirs = measured(encoder), measured(exact)
    values = np.concatenate([cell.values_ES.ravel() for cell in theirs]).astype(np.float64)
    error = np.concatenate([cell.values_ES.ravel() for cell in ours]) - values
    effect = values if reading.states else 1 - values
    return {
        "events": sum(map(len, theirs)),
        "values": len(values),
        "largest_error": float(np.abs(error).max(initial=0)),
        "largest_value": float(np.abs(effect).max(initial=0)),
        "squared_error": float((error**2).sum()),
    }


def merge_precision(parts: Iterable[Mapping[str, float]]) -> dict[str, Any] | None:
    """Put the comparisons of several cells together; None where there is none.

    Returns
    -------
    dict
        ``events``, ``largest_error``, ``root_mean_square_error``, ``largest_value``.
    """
    found = list(parts)
    if not found:
        return None
    values = sum(part["values"] for part in found)
    return {
        "events": int(sum(part["events"] for part in found)),
        "largest_error": max(part["largest_error"] for part in found),
        "root_mean_square_error": (sum(part["squared_error"] for part in found) / max(1, values)) ** 0.5,
        "largest_value": max(part["largest_value"] for part in found),
    }
