"""Encode count matrices into Parquet, block by block over the cluster."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from geneformer_ray.data import cells as cells_module
from geneformer_ray.data import storage
from geneformer_ray.data.counts import CountFile
from geneformer_ray.data.rank_value import RankValueEncoder
from geneformer_ray.data.shards import mark_finished, write_shard
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

__all__ = ["TokenizeWorker", "input_files", "plan_blocks", "save_as_dataset"]

CELLS_PER_BLOCK = 2_000


def input_files(inputs: Sequence[str]) -> list[str]:
    """List the h5ad files: files as given, directories by the files in them, in name order."""
    files: list[str] = []
    for path in inputs:
        found = storage.list_files(path, ".h5ad") if storage.is_directory(path) else [path]
        if not found:
            raise InputError("--input", f"{path} without .h5ad files", "a directory that holds some")
        files += found
    return files


def plan_blocks(
    files: Sequence[str], reading: dict[str, Any], obs_columns: Sequence[str], prefixes: Sequence[str]
) -> list[dict[str, Any]]:
    """Cut files into blocks of cells, after checking them all.

    Raises
    ------
    InputError
        If a file cannot be read, lacks a column, or two files hold the same cell id.
    """
    items: list[dict[str, Any]] = []
    seen: dict[str, str] = {}
    for path, prefix in zip(files, prefixes, strict=True):
        file = CountFile(path, **reading)
        file.check_columns(obs_columns)
        for cell_id in file.cell_ids:
            other = seen.setdefault(prefix + cell_id, path)
            if other != path:
                got = f"the cell id {cell_id} in {other} and in {path}"
                raise InputError("--cell-id-prefix", got, "one prefix a file, to tell them apart")
        for start in range(0, len(file), CELLS_PER_BLOCK):
            stop = min(start + CELLS_PER_BLOCK, len(file))
            items.append({"item": len(items), "path": path, "start": start, "stop": stop, "prefix": prefix})
    return items


class TokenizeWorker:
    """Encodes blocks of cells.

    Parameters
    ----------
    vocabulary
        Its path.
    reading
        Options of :class:`CountFile`.
    obs_columns
        Columns to carry along.
    output
        The output directory.
    """

    def __init__(self, vocabulary: str, reading: dict[str, Any], obs_columns: Sequence[str], output: str) -> None:
        self.vocabulary = GeneVocabulary.load(vocabulary)
        self.reading, self.obs_columns, self.output = reading, list(obs_columns), output
        self._files: dict[str, tuple[CountFile, RankValueEncoder]] = {}

    def _open(self, path: str) -> tuple[CountFile, RankValueEncoder]:
        if path not in self._files:
            file = CountFile(path, **self.reading)
            self._files = {path: (file, RankValueEncoder(self.vocabulary, file.genes))}
        return self._files[path]

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Encode one block and write its shard; cells without a known gene go to the rejects table."""
        file, encoder = self._open(item["path"])
        block = file.block(item["start"], item["stop"], self.obs_columns)
        encoded = encoder.encode(block.counts, block.totals)
        kept = encoded.genes_before_cut > 0
        ids = [item["prefix"] + cell_id for cell_id in block.cell_ids]
        # Typed by the whole file: a block that happens to lack values must not differ from the others.
        columns = {name: _array(block.obs[name]).cast(_array(file.obs[name]).type) for name in self.obs_columns}
        schema = cells_module.cells_schema(
            self.vocabulary.digest, {name: values.type for name, values in columns.items()}
        )
        lists = pa.ListArray.from_arrays(pa.array(encoded.offsets.astype(np.int32)), pa.array(encoded.ids))
        lengths = pa.array(encoded.lengths.astype(np.int32))
        table = pa.table([pa.array(ids), lists, lengths, *columns.values()], schema=schema).filter(pa.array(kept))
        write_shard(self.output, "", item["item"], table)
        rejected = [cell_id for cell_id, keep in zip(ids, kept, strict=True) if not keep]
        if rejected:
            reasons = ["no expressed gene that the vocabulary knows"] * len(rejected)
            write_shard(self.output, "_rejects", item["item"], pa.table({"cell_id": rejected, "reason": reasons}))
        room = self.vocabulary.max_length - (self.vocabulary.cls_id is not None) - (self.vocabulary.eos_id is not None)
        counts = {
            "cells_in": len(ids),
            "cells": int(kept.sum()),
            "rejected": len(rejected),
            "truncated": int((encoded.genes_before_cut > room).sum()),
            "tokens": int(encoded.lengths[kept].sum()),
            "genes_matched": encoder.matched,
            "genes_unmatched": len(encoder.unmatched),
            "genes_duplicated": len(encoder.duplicates),
        }
        return mark_finished(self.output, item["item"], counts)


def save_as_dataset(output: str) -> None:
    """Write the cells of a finished run as a Hugging Face dataset as well, in ``OUTPUT/_dataset``."""
    import datasets

    with tempfile.TemporaryDirectory() as cache:
        files = storage.list_files(output, ".parquet")
        datasets.disable_progress_bars()
        dataset = datasets.Dataset.from_parquet(files, cache_dir=cache)
        dataset.save_to_disk(storage.join(output, "_dataset"))


def _array(column: pd.Series[Any]) -> Any:
    """Give an obs column as an Arrow array; categories as what they name."""
    return pa.array(column.astype(object).where(column.notna(), None), from_pandas=True)
