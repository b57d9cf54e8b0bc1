"""Encode count matrices into Parquet, stretch by stretch over the cluster."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from geneformer_ray.data import storage
from geneformer_ray.data.cells import cells_encoding, cells_schema
from geneformer_ray.data.digests import digest_of
from geneformer_ray.data.rank_value import RankValueEncoder
from geneformer_ray.data.shards import mark_finished, write_shard
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.distribute.count_inputs import CountReading, Stretch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from geneformer_ray.data.counts import CountBlock, CountFile
    from geneformer_ray.data.rank_value import EncodedCells

__all__ = ["NOT_PASSED", "NO_COUNTS", "NO_KNOWN_GENE", "REJECTS", "TokenizeWorker", "save_as_dataset"]

REJECTS = "_rejects"
NOT_PASSED = "filter_pass is not 1"
NO_COUNTS = "no counts"
NO_KNOWN_GENE = "no expressed gene that the vocabulary knows"


class TokenizeWorker:
    """Encodes stretches of cells.

    Parameters
    ----------
    vocabulary
        The path of ours.
    reading
        How count files are read.
    column_types
        Obs columns to carry along, and their types over all files.
    output
        The output directory.
    """

    def __init__(
        self, vocabulary: str, reading: CountReading, column_types: Mapping[str, pa.DataType], output: str
    ) -> None:
        self.vocabulary = GeneVocabulary.load(vocabulary)
        self.reading, self.output = reading, output
        self.schema = cells_schema(self.vocabulary.digest, column_types)
        self.columns = list(column_types)
        self._file: tuple[str, CountFile] | None = None
        self._encoder: tuple[str, RankValueEncoder] | None = None

    def _open(self, stretch: Stretch) -> tuple[CountFile, RankValueEncoder]:
        """Open a file, unless it is the last one's; files of one experiment mostly share their genes, too."""
        if self._file is None or self._file[0] != stretch.path:
            if self._file is not None:
                self._file[1].close()
            self._file = stretch.path, self.reading.open(stretch.path, stretch.sorted_in)
        file = self._file[1]
        genes = digest_of(file.genes)
        if self._encoder is None or self._encoder[0] != genes:
            self._encoder = genes, RankValueEncoder(self.vocabulary, file.genes)
        return file, self._encoder[1]

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Encode one stretch and write its shard; cells that are left out go to the table of rejects."""
        stretch = Stretch(**item)
        file, encoder = self._open(stretch)
        block = file.block(stretch.start, stretch.stop, self.columns)
        encoded = encoder.encode(block.counts, block.totals)
        reasons = _reasons(block, encoded)
        kept = reasons == ""
        ids = pa.array([stretch.prefix + cell_id for cell_id in block.cell_ids], pa.string())
        table = self._table(ids, block, encoded)
        if not kept.all():
            table = table.filter(pa.array(kept))
        write_shard(self.output, "", stretch.item, table, **cells_encoding(self.schema))
        if not kept.all():
            rejects = pa.table({"cell_id": ids.filter(pa.array(~kept)), "reason": pa.array(reasons[~kept])})
            write_shard(self.output, REJECTS, stretch.item, rejects)
        because, numbers = np.unique(reasons[~kept], return_counts=True)
        counts = {
            "cells_in": len(block.cell_ids),
            "cells": int(kept.sum()),
            "rejected": dict(zip(because.tolist(), numbers.tolist(), strict=True)),
            "truncated": int((encoded.genes_before_cut[kept] > encoder.room).sum()),
            "tokens": int(encoded.lengths[kept].sum()),
        }
        return mark_finished(self.output, stretch.item, counts)

    def _table(self, ids: pa.Array, block: CountBlock, encoded: EncodedCells) -> pa.Table:
        lists = pa.ListArray.from_arrays(pa.array(encoded.offsets.astype(np.int32)), pa.array(encoded.ids))
        lengths = pa.array(encoded.lengths.astype(np.int32))
        columns = [block.obs[name].cast(self.schema.field(name).type) for name in self.columns]
        return pa.table([ids, lists, lengths, *columns], schema=self.schema)


def _reasons(block: CountBlock, encoded: EncodedCells) -> NDArray[np.object_]:
    """Say why each cell is left out; nothing where it is not."""
    reasons = np.full(len(block.cell_ids), "", dtype=object)
    reasons[encoded.genes_before_cut == 0] = NO_KNOWN_GENE
    reasons[(encoded.genes_before_cut == 0) & (block.totals == 0)] = NO_COUNTS
    reasons[~block.passed] = NOT_PASSED
    return reasons


def save_as_dataset(output: str) -> str:
    """Write the cells of a finished run as a Hugging Face dataset as well, in ``OUTPUT/_dataset``."""
    import datasets

    target = storage.join(output, "_dataset")
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as scratch:
        files = storage.list_files(output, ".parquet")
        if storage.is_uri(output):
            files = [_download(file, Path(scratch, "shards")) for file in files]
        dataset = datasets.Dataset.from_parquet(files, cache_dir=str(Path(scratch, "cache")))
        if storage.is_uri(output):
            dataset.save_to_disk(Path(scratch, "dataset"))
            storage.upload(Path(scratch, "dataset"), target)
        else:
            dataset.save_to_disk(target)
    return target


def _download(file: str, directory: Path) -> str:
    directory.mkdir(exist_ok=True)
    copy = directory / file.rsplit("/", 1)[-1]
    copy.write_bytes(storage.read_bytes(file))
    return str(copy)
