"""Whether values are counts, and what they add up to: few passes, as every stored value of a file goes through them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from scipy import sparse

__all__ = ["FRACTIONS", "WrongValue", "first_wrong", "impossible_totals", "row_sums", "truths_in_text"]

VALUES_PER_PASS = 1 << 16  # a piece stays in the processor's cache between the passes of a check
FRACTIONS = "fractions"
# Whole counts add up exactly, and a total is rounded once, to a float32 at worst. Corrected counts may have been added
# up one by one in float32, which loses more with every gene.
ROUNDING, ROUNDING_OF_FRACTIONS = 1e-6, 1e-4


class WrongValue(NamedTuple):
    """What about values is not counts, and where the first such value lies."""

    what: str
    at: int


def first_wrong(values: NDArray[Any], *, fractions_allowed: bool = False) -> WrongValue | None:
    """Find what about these values is not counts; None if nothing is."""
    if values.dtype.kind == "u":
        return None
    for start in range(0, len(values), VALUES_PER_PASS):
        some = values[start : start + VALUES_PER_PASS]
        # NaN spreads into both, and an infinity is one of them.
        low, high = some.min(), some.max()
        if not (np.isfinite(low) and np.isfinite(high)):
            return WrongValue("values that are not finite", start + int(np.argmin(np.isfinite(some))))
        if low < 0:
            return WrongValue("negative values", start + int(np.argmax(some < 0)))
        if not fractions_allowed and some.dtype.kind == "f":
            whole = np.floor(some) == some
            if not whole.all():
                return WrongValue(FRACTIONS, start + int(np.argmin(whole)))
    return None


def impossible_totals(
    totals: NDArray[np.float64], sums: NDArray[np.float64], *, fractions_allowed: bool = False
) -> NDArray[np.bool_]:
    """Mark totals over all genes that are not finite, or below the sums over some of the genes.

    A total of 0 for a cell that has counts is below its sum; for a cell without any it is right.
    """
    rounding = ROUNDING_OF_FRACTIONS if fractions_allowed else ROUNDING
    return np.asarray(~np.isfinite(totals) | (totals < sums * (1 - rounding)))


def truths_in_text(values: pa.Array) -> tuple[NDArray[np.bool_], list[str]]:
    """Read true, false, 1 and 0 in any case, missing as false; give the other texts as well, which mean nothing."""
    plain = pc.utf8_lower(values)
    true, known = (
        pc.is_in(plain, pa.array(texts, pa.string())) for texts in (["true", "1"], ["true", "1", "false", "0"])
    )
    others = values.filter(pc.and_(pc.invert(known), pc.is_valid(values))).unique().to_pylist()
    return np.asarray(true.to_numpy(zero_copy_only=False), dtype=bool), others


def row_sums(matrix: sparse.csr_array) -> NDArray[np.float64]:
    """Add up each row in float64: float32 loses counts above 16 million."""
    totals = np.zeros(matrix.shape[0])
    # reduceat gives an empty row the entry that follows it, so only the others are asked for.
    filled = np.diff(matrix.indptr) > 0
    if filled.any():
        totals[filled] = np.add.reduceat(matrix.data, matrix.indptr[:-1][filled], dtype=np.float64)
    return totals
