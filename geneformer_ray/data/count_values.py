"""Whether values are counts, and what they add up to: few passes, as every stored value of a file goes through them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from scipy import sparse

__all__ = ["row_sums", "what_is_wrong"]

VALUES_PER_PASS = 1 << 16  # a piece stays in the processor's cache between the passes of a check


def what_is_wrong(values: NDArray[Any], *, fractions_allowed: bool = False) -> str:
    """Say what about these values is not counts; empty if nothing is."""
    if values.dtype.kind == "u":
        return ""
    for start in range(0, len(values), VALUES_PER_PASS):
        some = values[start : start + VALUES_PER_PASS]
        # NaN spreads into both, and an infinity is one of them.
        low, high = some.min(), some.max()
        if not (np.isfinite(low) and np.isfinite(high)):
            return "values that are not finite"
        if low < 0:
            return "negative values"
        if not fractions_allowed and some.dtype.kind == "f" and not (np.floor(some) == some).all():
            return "fractions"
    return ""


def row_sums(matrix: sparse.csr_array) -> NDArray[np.float64]:
    """Add up each row in float64: float32 loses counts above 16 million."""
    totals = np.zeros(matrix.shape[0])
    # reduceat gives an empty row the entry that follows it, so only the others are asked for.
    filled = np.diff(matrix.indptr) > 0
    if filled.any():
        totals[filled] = np.add.reduceat(matrix.data, matrix.indptr[:-1][filled], dtype=np.float64)
    return totals
