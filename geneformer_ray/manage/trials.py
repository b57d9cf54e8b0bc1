"""A trial of fine-tuning: a pooling, a seed and a fold, with its model, history and predictions on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
        Of its classifier.
    fold
        Number of its split, where groups are cross-validated; None where there is but one split.
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
    """Write a role's predictions: cell ids, class numbers, logits of shape (cells, classes)."""
    lists = pa.FixedSizeListArray.from_arrays(pa.array(logits.ravel()), logits.shape[1])
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({"cell_id": list(cell_ids), "target": targets, "logits": lists}), buffer)
    storage.write_bytes(storage.join(directory, f"predictions-{role}.parquet"), buffer.getvalue().to_pybytes())


def read_predictions(directory: str, role: str) -> tuple[list[str], NDArray[Any], NDArray[Any]]:
    """Read a role's predictions: cell ids, class numbers, logits of shape (cells, classes)."""
    filesystem, inside = storage.locate(storage.join(directory, f"predictions-{role}.parquet"))
    table = pq.read_table(inside, filesystem=filesystem)
    targets = table["target"].to_numpy()
    logits = table["logits"].combine_chunks().flatten().to_numpy().reshape(len(targets), -1)
    return table["cell_id"].to_pylist(), targets, logits
