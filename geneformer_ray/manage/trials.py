"""A trial of fine-tuning: a pooling, a seed and a fold, with its model, history and predictions on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from geneformer_ray.data import storage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["ADAPTERS", "FINISHED", "Trial", "read_predictions", "write_predictions"]

# Written last: it vouches for a trial's model, history and predictions, and says how it was computed.
FINISHED = "finished.json"
# Beside the model, not in it: transformers would put them on its weights, in which they are already.
ADAPTERS = "adapters"


@dataclass(frozen=True)
class Trial:
    """What tells a trial from the others of its run.

    Parameters
    ----------
    pooling, seed
        Of its classifier. In place of a pooling, a classifier of genes has ``genes``: each enters the head as it is.
    fold
        Number of its split, where groups or genes are cross-validated; None where there is but one split.
    """

    pooling: str
    seed: int
    fold: int | None = None

    @property
    def name(self) -> str:
        """Its name, in directories and in MLflow."""
        return f"{self.pooling}-seed{self.seed}" + ("" if self.fold is None else f"-fold{self.fold}")

    def directory(self, output: str) -> str:
        """Say where its model, history and predictions lie."""
        return storage.join(output, "trials", self.name)


def write_predictions(
    directory: str,
    role: str,
    cell_ids: Sequence[str],
    targets: NDArray[Any],
    logits: NDArray[Any],
) -> None:
    """Write a role's predictions.

    Parameters
    ----------
    directory, role
        The trial's directory; ``choose`` or ``report``.
    cell_ids
        Of the role's cells.
    targets
        Class numbers, shape (cells,); of several tasks shape (cells, tasks), -1 where a cell has no label.
    logits
        Shape (cells, classes), those of several tasks side by side.
    """
    columns = {"cell_id": list(cell_ids), "target": _rows(targets), "logits": _rows(logits)}
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), buffer)
    storage.write_bytes(storage.join(directory, f"predictions-{role}.parquet"), buffer.getvalue().to_pybytes())


def read_predictions(directory: str, role: str) -> tuple[list[str], NDArray[Any], NDArray[Any]]:
    """Read a role's predictions: cell ids, class numbers and logits, as :func:`write_predictions` has them."""
    filesystem, inside = storage.locate(storage.join(directory, f"predictions-{role}.parquet"))
    table = pq.read_table(inside, filesystem=filesystem)
    return table["cell_id"].to_pylist(), _array(table["target"]), _array(table["logits"])


def _rows(values: NDArray[Any]) -> Any:
    """Give an array as a column: of numbers, or of lists of one length."""
    if values.ndim == 1:
        return values
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def _array(column: pa.ChunkedArray) -> NDArray[Any]:
    if not pa.types.is_fixed_size_list(column.type):
        return np.asarray(column.to_numpy())
    values = column.combine_chunks().flatten().to_numpy()
    return np.asarray(values.reshape(len(column), column.type.list_size))
