"""Encode count matrices into Parquet, stretch by stretch over the cluster."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from geneformer_ray.data import storage
from geneformer_ray.data.cell_schema import cells_encoding, cells_schema
from geneformer_ray.data.digests import digest_of
from geneformer_ray.data.encoding_report import GeneReport
from geneformer_ray.data.left_out import reasons_left_out
from geneformer_ray.data.rank_value import RankValueEncoder
from geneformer_ray.data.shards import finished_items, mark_finished, write_shard
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.distribute.cluster import connected
from geneformer_ray.distribute.count_inputs import CountReading, Stretch
from geneformer_ray.distribute.fan_out import Pool, fan_out
from geneformer_ray.distribute.job_metrics import count_resumed
from geneformer_ray.errors import InputError
from geneformer_ray.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Mapping

    from geneformer_ray.data.counts import CountBlock, CountFile
    from geneformer_ray.data.encoding_report import EncodingReport
    from geneformer_ray.data.rank_value import EncodedCells
    from geneformer_ray.distribute.count_inputs import CountInputs

__all__ = ["REJECTS", "TokenizeWorker", "encode", "gene_reports", "save_as_dataset"]

REJECTS = "_rejects"


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
        reasons = reasons_left_out(block, encoded)
        kept = reasons == ""
        ids = pa.array([stretch.prefix + cell_id for cell_id in block.cell_ids], pa.string())
        table = self._table(ids, block, encoded, stretch.path)
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

    def _table(self, ids: pa.Array, block: CountBlock, encoded: EncodedCells, path: str) -> pa.Table:
        lists = pa.ListArray.from_arrays(pa.array(encoded.offsets.astype(np.int32)), pa.array(encoded.ids))
        lengths = pa.array(encoded.lengths.astype(np.int32))
        columns = []
        for name in self.columns:
            kind = self.schema.field(name).type
            try:
                columns.append(block.obs[name].cast(kind))
            except pa.ArrowInvalid as error:
                got = f"{name} of {path}, {block.obs[name].type} values that are no {kind} of the other files ({error})"
                raise InputError("--obs-columns", got, "a column of one kind in all files") from error
        return pa.table([ids, lists, lengths, *columns], schema=self.schema)


def gene_reports(inputs: CountInputs, vocabulary: GeneVocabulary) -> list[GeneReport]:
    """Match every distinct list of genes with a vocabulary.

    Raises
    ------
    InputError
        If the vocabulary knows no gene of a file; with the column whose names it does know, where there is one.
    """
    reports = []
    for names, files in inputs.gene_lists.values():
        try:
            others = inputs.features_left_out.get(files[0], [])
            reports.append(GeneReport(files, names, RankValueEncoder(vocabulary, names), others))
        except InputError as error:
            with inputs.reading.open(files[0]) as file:
                columns = file.gene_columns()
            known = {column: vocabulary.match(some).matched for column, some in columns.items()}
            best = max(known, key=known.__getitem__, default="")
            takes = error.takes
            if known.get(best):
                takes = f"{best}, where {known[best]} of {len(columns[best])} names are known: --gene-column {best}"
            raise InputError(error.field, f"{error.got} in {files[0]}", takes) from error
    return reports


def encode(inputs: CountInputs, output: str, report: EncodingReport) -> None:
    """Encode all that no earlier run did, and count what became of all cells in `report`."""
    done = finished_items(output)
    todo = [asdict(stretch) for stretch in inputs.stretches(output) if stretch.item not in done]
    options = {
        "vocabulary": storage.join(output, "_vocabulary"),
        "reading": inputs.reading,
        "column_types": inputs.column_types,
        "output": output,
    }
    for counts in done.values():
        report.count(counts)
    if not todo:
        return
    with connected():
        count_resumed(done)
        inputs.sort(output)
        with Progress("tokenize", len(inputs), "cells") as progress:
            progress.advance(report.totals["cells_in"])
            for counts in fan_out(TokenizeWorker, options, todo, Pool.of_cluster(model=False)):
                report.count(counts)
                progress.advance(counts["cells_in"])


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
