"""Why a cell of a file has no encoding, in the words that people read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from geneformer_ray.data.counts import CountBlock
    from geneformer_ray.data.rank_value import EncodedCells

__all__ = ["reasons_left_out"]

NOT_PASSED = "filter_pass is not 1"
NO_COUNTS = "no counts"
NO_KNOWN_GENE = "no expressed gene that the vocabulary knows"


def reasons_left_out(block: CountBlock, encoded: EncodedCells) -> NDArray[np.object_]:
    """Say why each cell of a block is left out, shape (cells,); an empty text where it is not."""
    reasons = np.full(len(block.cell_ids), "", dtype=object)
    without = np.flatnonzero(encoded.genes_before_cut == 0)
    reasons[without] = NO_KNOWN_GENE
    counted = np.asarray(block.counts[without].sum(axis=1)).ravel()
    reasons[without[counted == 0]] = NO_COUNTS
    reasons[~block.passed] = NOT_PASSED
    return reasons
