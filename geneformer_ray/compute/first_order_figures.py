"""What first-order screens cost and how well they say they did, summed up over cells."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from geneformer_ray.compute.screen_method import ScreenedCell

__all__ = ["first_order_figures", "merge_figures"]


def first_order_figures(cells: Sequence[ScreenedCell], tolerance: float) -> dict[str, Any]:
    """Sum up some cells, in plain JSON values.

    Parameters
    ----------
    cells
        Of a first-order screen.
    tolerance
        The stated error above which a cell is counted.
    """
    estimated = [cell.estimates for cell in cells if cell.estimated]
    return {
        "cells": len(cells),
        "passes": math.fsum(cell.passes for cell in cells),
        "exact_passes": sum(cell.exact_passes for cell in cells),
        "estimated": len(estimated),
        "anchors": sum(one[0].anchors for one in estimated),
        # Where deletions are taken apart one part may be all exact, and the other estimated.
        "errors": [
            _errors([one.error for one in some if not one.exact_E.all()], tolerance)
            for some in zip(*estimated, strict=True)
        ],
    }


def _errors(stated: Sequence[float], tolerance: float) -> dict[str, float]:
    known = [error for error in stated if math.isfinite(error)]
    return {
        "known": len(known),
        "sum": math.fsum(known),
        "largest": max(known, default=0.0),
        "over_tolerance": sum(not error <= tolerance for error in stated),
    }


def merge_figures(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Put the figures of several items together, in whatever order they come.

    Returns
    -------
    dict
        ``passes_per_cell``, and ``exact_passes_per_cell`` that they replace; ``cells_estimated``, the others being
        cells of which the exact engine costs no more; over those that were estimated ``anchors_per_cell``; over those
        whose shifts were, ``error_mean`` and ``error_max``, as the held-out genes state it, and ``over_tolerance``, how
        many stayed above ``--tolerance`` or have no held-out gene that says; where deletions are taken apart, these
        three again for ``shift_gene``. None where there is no cell to speak of.
    """
    found = list(parts)
    errors = [_merged(some) for some in zip(*(part["errors"] for part in found if part["errors"]), strict=True)]
    of_shift, *of_gene = errors or [_merged(())]
    return {
        "passes_per_cell": _mean(found, "passes", "cells"),
        "exact_passes_per_cell": _mean(found, "exact_passes", "cells"),
        "cells_estimated": sum(part["estimated"] for part in found),
        "anchors_per_cell": _mean(found, "anchors", "estimated"),
        **of_shift,
        **({"shift_gene": of_gene[0]} if of_gene else {}),
    }


def _merged(errors: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    largest = [part["largest"] for part in errors if part["known"]]
    return {
        "error_mean": _mean(errors, "sum", "known"),
        "error_max": _short(max(largest)) if largest else None,
        "over_tolerance": sum(part["over_tolerance"] for part in errors),
    }


def _mean(parts: Iterable[Mapping[str, Any]], what: str, of: str) -> float | None:
    sums = [(part[what], part[of]) for part in parts]
    number = sum(many for _, many in sums)
    return _short(math.fsum(one for one, _ in sums) / number) if number else None


def _short(number: float) -> float:
    """Give six digits: sums that differ in their last bits are one number to a reader."""
    return float(f"{number:.6g}")
