"""A trial of fine-tuning on disk: a pooling and a seed, with its model, history and predictions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from geneformer_ray.data import storage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["read_predictions", "trial_directory", "trial_name", "write_predictions"]


def trial_name(pooling: str, seed: int) -> str:
    """Name a trial."""
    return f"{pooling}-seed{seed}"


def trial_directory(output: str, pooling: str, seed: int) -> str:
    """Say where a trial's model, history and predictions lie."""
    return storage.join(output, "trials", trial_name(pooling, seed))


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
