"""How a table of tokenised cells is written: its schema, and its encoding in Parquet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from geneformer_ray.data.shards import VOCABULARY_KEY

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["cells_encoding", "cells_schema"]


def cells_schema(vocabulary_digest: str, columns: Mapping[str, pa.DataType] | None = None) -> pa.Schema:
    """Give the schema of a table of tokenised cells: id, tokens, length, then the chosen obs columns."""
    fields = [
        pa.field("cell_id", pa.string()),
        pa.field("input_ids", pa.list_(pa.int32())),
        pa.field("length", pa.int32()),
        *(pa.field(name, kind) for name, kind in (columns or {}).items()),
    ]
    return pa.schema(fields, metadata={VOCABULARY_KEY: vocabulary_digest.encode()})


def cells_encoding(schema: pa.Schema) -> dict[str, Any]:
    """Say how tokenised cells lie in Parquet, as :func:`pyarrow.parquet.write_table` takes it.

    Ranked tokens hardly repeat, so a dictionary of them costs time and saves nothing; split into bytes they are written
    twice as fast and compress best.
    """
    return {
        "use_dictionary": [name for name in schema.names if name != "input_ids"],
        "column_encoding": {"input_ids.list.element": "BYTE_STREAM_SPLIT"},
    }
