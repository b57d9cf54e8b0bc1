"""Output tables in shards: deterministic names, each vouched for by a small file that is written after it."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from geneformer_ray.data import storage
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = [
    "VOCABULARY_KEY",
    "begin_attempt",
    "each_finished",
    "end_attempts",
    "finished_items",
    "forget_attempts",
    "mark_finished",
    "read_shard",
    "shard_file",
    "write_shard",
]

# Where a table's schema says which vocabulary its genes and tokens belong to.
VOCABULARY_KEY = b"vocabulary_digest"
PROGRESS, ATTEMPTS = "_progress", "_attempts"


def write_shard(
    output: str, table_name: str, number: int, table: pa.Table, *, vocabulary: str | None = None, **encoding: Any
) -> None:
    """Write one item's rows as ``OUTPUT/TABLE/part-NUMBER.parquet``; doing an item again replaces them.

    An empty table name stands for the output itself.

    The file is made in memory and appears whole or not at all (see :func:`storage.write_bytes`); until the item is
    vouched for it is replaced when the run is resumed. `vocabulary` is the digest that the table carries;
    `encoding` goes to :func:`pyarrow.parquet.write_table`.
    """
    if vocabulary is not None:
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), VOCABULARY_KEY: vocabulary.encode()})
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd", **encoding)
    storage.write_bytes(shard_file(output, table_name, number), buffer.getvalue().to_pybytes())


def shard_file(output: str, table_name: str, number: int) -> str:
    """Say where an item's rows of a table lie."""
    return storage.join(output, table_name, f"part-{number:06d}.parquet")


def read_shard(output: str, table_name: str, number: int) -> pa.Table:
    """Read one item's rows of a table, without what their schema says of vocabularies."""
    buffer = pa.BufferReader(storage.read_bytes(shard_file(output, table_name, number)))
    return pq.read_table(buffer).replace_schema_metadata(None)


def mark_finished(output: str, number: int, counts: Mapping[str, Any]) -> dict[str, Any]:
    """Vouch for an item: all its shards are whole. Written last."""
    content = {"item": number, **counts}
    storage.write_json(storage.join(output, PROGRESS, f"{number:06d}.json"), content)
    return content


def finished_items(output: str) -> dict[int, dict[str, Any]]:
    """Give what earlier runs finished: item number -> its counts."""
    return {int(content["item"]): content for content in each_finished(output)}


def each_finished(output: str) -> Iterator[dict[str, Any]]:
    """Give the counts of each item that earlier runs finished, one at a time."""
    for file in storage.list_files(storage.join(output, PROGRESS), ".json"):
        try:
            content = storage.read_json(file)
        except InputError:
            continue  # half written when the worker was killed: the item is done again
        yield content


def begin_attempt(output: str, what: str) -> int:
    """Note that a piece of work begins; give how many attempts at it have begun before and came to no end.

    A process that is killed cannot say why. What it was doing is on disk, for the next one to find.
    """
    for lost in itertools.count():
        mark = _attempt(output, what, lost)
        if not storage.exists(mark):
            storage.write_bytes(mark, b"begun\n")
            return lost
    raise AssertionError("unreachable")


def end_attempts(output: str, what: str, lost: int) -> None:
    """Forget the attempts at a piece of work that came to its end after so many lost ones."""
    for number in range(lost + 1):
        storage.remove(_attempt(output, what, number))


def forget_attempts(output: str) -> None:
    """Forget all attempts: a new run tries every item that is not finished afresh."""
    storage.remove(storage.join(output, ATTEMPTS))


def _attempt(output: str, what: str, number: int) -> str:
    return storage.join(output, ATTEMPTS, f"{what}.{number}")
