"""Read and encode one uploaded h5ad file, in a process of its own: ``python -m serve.h5ad_reader TASK``.

It runs with limits on memory, time and system calls, and with the code that encodes files offline. Nothing here loads
torch, Ray or a web server: it starts in half a second.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import ipc

from geneformer_ray.data.counts import CountBlock, CountFile
from geneformer_ray.data.left_out import reasons_left_out
from geneformer_ray.data.rank_value import EncodedCells, RankValueEncoder
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError
from serve.cell_encoding import unknown_shares
from serve.confinement import confine

__all__ = ["CELLS_SCHEMA", "ENCODED", "REFUSED", "REFUSED_CODE", "UPLOADED", "ReadingTask", "check_links"]

# Names in the directory that the process works in.
UPLOADED, ENCODED, REFUSED, SORTED = "cells.h5ad", "encoded.arrow", "refused.json", "sorted"
REFUSED_CODE = 2
CELLS_SCHEMA = pa.schema(
    [
        pa.field("cell_id", pa.string()),
        pa.field("input_ids", pa.list_(pa.int32())),
        pa.field("unknown_share", pa.float64()),
        pa.field("reason", pa.string()),
    ]
)
CELLS_AT_ONCE = 500
# What the library names by its flags goes by other names in a request.
FIELDS = {"--input": "body", "--counts": "counts", "--gene-column": "gene_column"}
WORDS = {"--counts ": "counts=", "--gene-column ": "gene_column=", "--allow-non-integer": "allow_non_integer=true"}


@dataclass(frozen=True)
class ReadingTask:
    """What to read, and within which limits.

    Parameters
    ----------
    directory
        Holds the file, and takes what is written.
    vocabulary
        The directory of the model's vocabulary.
    counts, gene_column, allow_non_integer
        As :class:`CountFile` takes them.
    max_cells, max_genes, cell_id_length
        Most cells and genes of the file, most letters of a cell's id.
    memory_bytes, cpu_seconds
        As :func:`confine` takes them.
    """

    directory: str
    vocabulary: str
    counts: str
    gene_column: str | None
    allow_non_integer: bool
    max_cells: int
    max_genes: int
    cell_id_length: int
    memory_bytes: int
    cpu_seconds: int

    def as_json(self) -> str:
        """Write it as the process takes it."""
        return json.dumps(asdict(self))


class _TooMuch(InputError):
    """The file is beyond a limit, rather than wrong."""


def check_links(path: str) -> None:
    """Refuse a file that reaches beyond itself: what lies on this machine is nobody's upload.

    HDF5 follows links to other files, reads a dataset's values from any file that the dataset names, and makes virtual
    datasets of others, all without a word. AnnData writes none of these.

    Raises
    ------
    InputError
        With the link or dataset.
    """
    if not h5py.is_hdf5(path):
        raise InputError("body", "a file that is no HDF5, or was cut off at its beginning", "an h5ad file")
    takes = "an h5ad file that holds all of its data itself, without soft or external links"
    try:
        with h5py.File(path, "r", locking=False) as file:
            # Links are looked at, not followed.
            linked = file.id.links.visit(_foreign_link, info=True)
            if linked is None:
                linked = file.visititems(_foreign_dataset)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        why = " ".join(str(error).split())[:200]
        raise InputError("body", "a damaged HDF5 file", f"a readable h5ad file ({why})") from error
    if linked is not None:
        raise InputError("body", linked, takes)


def _foreign_link(name: bytes, link: Any) -> str | None:
    kinds = {h5py.h5l.TYPE_HARD: None, h5py.h5l.TYPE_SOFT: "soft", h5py.h5l.TYPE_EXTERNAL: "external"}
    kind = kinds.get(link.type, "user-defined")
    return None if kind is None else f"{kind} link {name.decode(errors='replace')}"


def _foreign_dataset(name: str, element: Any) -> str | None:
    if not isinstance(element, h5py.Dataset):
        return None
    made = element.id.get_create_plist()
    outside = made.get_external_count() > 0 or made.get_layout() == h5py.h5d.VIRTUAL
    return f"dataset {name}, whose values lie elsewhere" if outside else None


def _encoded(task: ReadingTask) -> Iterator[pa.RecordBatch]:
    """Read and encode the file, some cells at a time."""
    vocabulary = GeneVocabulary.load(task.vocabulary)
    check_links(UPLOADED)
    with _open(task) as file:
        if len(file) > task.max_cells:
            raise _TooMuch("body", f"{len(file):,} cells", f"up to {task.max_cells:,}")
        if len(file.genes) > task.max_genes:
            raise _TooMuch("body", f"{len(file.genes):,} genes", f"up to {task.max_genes:,}")
        file.check_sample()
        encoder = _encoder(file, vocabulary)
        for part in file.parts():
            file.write_sorted(part, SORTED)
    with _open(task, SORTED) as file:
        for start in range(0, len(file), CELLS_AT_ONCE):
            block = file.block(start, min(start + CELLS_AT_ONCE, len(file)))
            longest = max(map(len, block.cell_ids))
            if longest > task.cell_id_length:
                raise InputError("body", f"a cell id of {longest:,} letters", f"up to {task.cell_id_length}")
            encoded = encoder.encode(block.counts, block.totals)
            yield _batch(block, encoded, unknown_shares(encoder, block.counts))


def _open(task: ReadingTask, sorted_in: str | None = None) -> CountFile:
    return CountFile(
        UPLOADED,
        counts=task.counts,
        gene_column=task.gene_column,
        allow_non_integer=task.allow_non_integer,
        sorted_in=sorted_in,
    )


def _encoder(file: CountFile, vocabulary: GeneVocabulary) -> RankValueEncoder:
    """Look the file's genes up; where none is known, name the column whose genes are."""
    try:
        return RankValueEncoder(vocabulary, file.genes)
    except InputError as error:
        columns = file.gene_columns()
        known = {column: vocabulary.match(names).matched for column, names in columns.items()}
        best = max(known, key=known.__getitem__, default="")
        takes = error.takes
        if known.get(best):
            takes = f"{best}, where {known[best]} of the first {len(columns[best])} names are known: gene_column={best}"
        raise InputError("gene_column", error.got, takes) from error


def _batch(block: CountBlock, encoded: EncodedCells, shares: NDArray[np.float64]) -> pa.RecordBatch:
    reasons = reasons_left_out(block, encoded)
    left_out = reasons != ""
    lengths = np.where(left_out, 0, encoded.lengths)
    kept = np.repeat(~left_out, encoded.lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    columns = [
        pa.array(block.cell_ids, pa.string()),
        pa.ListArray.from_arrays(pa.array(offsets), pa.array(encoded.ids[kept])),
        pa.array(shares),
        pa.array(reasons, pa.string(), mask=~left_out),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=CELLS_SCHEMA)


def _refusal(error: InputError) -> dict[str, Any]:
    """Put an error of the library into the words of a request."""
    got, takes = str(error.got), error.takes
    for flag, word in WORDS.items():
        got, takes = got.replace(flag, word), takes.replace(flag, word)
    field = FIELDS.get(error.field, error.field)
    return {"field": field, "got": got, "takes": takes, "too_large": isinstance(error, _TooMuch)}


def main(arguments: Sequence[str]) -> int:
    """Read the file of a task, given as JSON, and write its cells, or why there are none."""
    task = ReadingTask(**json.loads(arguments[0]))
    confine(task.memory_bytes, task.cpu_seconds, task.memory_bytes)
    try:
        with pa.OSFile(ENCODED, "wb") as sink, ipc.new_file(sink, CELLS_SCHEMA) as writer:
            for batch in _encoded(task):
                writer.write_batch(batch)
    except (InputError, MemoryError) as error:
        if isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError):
            takes = f"one that can be read within {task.memory_bytes >> 20:,} MiB of memory"
            error = _TooMuch("body", "a file that unfolds to more", takes)
        Path(REFUSED).write_text(json.dumps(_refusal(error)), encoding="utf-8")
        return REFUSED_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
