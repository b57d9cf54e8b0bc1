"""A gene vocabulary from count matrices: each item of cells leaves a sketch of its values, and all are merged."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from geneformer_ray.data import storage
from geneformer_ray.data.counts import CELLS_PER_BLOCK
from geneformer_ray.data.digests import digest_of
from geneformer_ray.data.expression import expressed_values
from geneformer_ray.data.gene_names import ensembl_id
from geneformer_ray.data.median_sketch import MedianSketch
from geneformer_ray.data.shards import finished_items, mark_finished, write_shard
from geneformer_ray.data.vocabulary import CLS, EOS, MASK, PAD, GeneVocabulary
from geneformer_ray.distribute.fan_out import Pool, fan_out
from geneformer_ray.errors import InputError
from geneformer_ray.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from geneformer_ray.data.counts import CountFile
    from geneformer_ray.distribute.count_inputs import CountInputs, CountReading

__all__ = ["Corpus", "SketchWorker", "new_vocabulary", "write_medians"]

SKETCHES = "_sketches"
# Every item leaves a sketch of some MiB, so they are few; but what is lost with a worker is an item.
ITEMS_ABOUT = 256
BLOCKS_AT_MOST = 50


class Corpus:
    """Count files, and the genes whose medians are wanted.

    Parameters
    ----------
    inputs
        The files; where they differ in their genes, the union counts.
    vocabulary
        What names the genes; None where the files themselves do.
    chosen
        A text file, one gene a line: only these, of a corpus that names its genes itself.

    Attributes
    ----------
    genes
        The vocabulary's in its order, else the files' in sorted order.
    unknown
        Lines of `chosen` that no file knows.

    Raises
    ------
    InputError
        If the list of genes cannot be read, or none of them is there.
    """

    def __init__(
        self, inputs: CountInputs, vocabulary: GeneVocabulary | None = None, chosen: str | None = None
    ) -> None:
        self.inputs, self.vocabulary = inputs, vocabulary
        self.unknown: list[str] = []
        if vocabulary is not None:
            self.genes = list(vocabulary.genes)
            for names, files in inputs.gene_lists.values():
                if not vocabulary.match(names).matched:
                    got = f"no gene of the vocabulary (found {', '.join(names[:3])}, ...) in {files[0]}"
                    raise InputError("--gene-column", got, "names that the vocabulary knows")
            return
        keys = {key for names, _ in inputs.gene_lists.values() for key in _keys(names, None)}
        self.genes = sorted(key for key in keys if key is not None)
        if chosen is not None:
            self._choose(chosen)

    def _choose(self, path: str) -> None:
        try:
            lines = list(filter(None, (line.strip() for line in storage.read_bytes(path).decode().splitlines())))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError("--genes", path, f"a readable text file, one gene a line ({error})") from error
        listed = _keys(lines, None)
        known = set(self.genes).intersection(listed)
        if not known:
            got = f"{path} with {len(lines):,} lines ({', '.join(lines[:3]) or 'none'}), none of them a gene of --input"
            raise InputError("--genes", got, "one gene a line, named as in the files")
        self.genes = sorted(known)
        self.unknown = [line for line, key in zip(lines, listed, strict=True) if key not in known]

    def lines(self) -> Iterator[str]:
        """Say to a person what the files' genes were taken for."""
        named_by_id = []
        for names, files in self.inputs.gene_lists.values():
            known = sum(key is not None for key in _keys(names, self.vocabulary))
            others = len(files) - 1
            more = f" and {others:,} more file{'s' if others > 1 else ''}" if others else ""
            ids = sum(ensembl_id(name) is not None for name in names)
            named_by_id.append(2 * ids > len(names))
            yield f"{files[0]}{more}: {known:,} of {len(names):,} genes taken, {ids:,} of them Ensembl ids"
        if self.vocabulary is None and len(set(named_by_id)) > 1:
            yield "some files name genes by Ensembl id and others by symbol: a gene named both ways counts as two"

    def items(self, output: str) -> list[dict[str, Any]]:
        """Cut the files into items of cells; the cut depends on the files alone, so any cluster can resume a run."""
        blocks = min(-(-len(self.inputs) // (ITEMS_ABOUT * CELLS_PER_BLOCK)), BLOCKS_AT_MOST)
        return [asdict(stretch) for stretch in self.inputs.stretches(output, blocks * CELLS_PER_BLOCK)]

    def plan(self) -> dict[str, Any]:
        """Say what decides the medians, for the output's manifest."""
        cut = [[item["path"], item["start"]] for item in self.items("")]
        return {
            "files": self.inputs.paths,
            "contents": self.inputs.stamps(),
            **asdict(self.inputs.reading),
            "genes": digest_of(self.genes),
            "items": digest_of(cut),
        }

    def sketch(self, output: str) -> tuple[MedianSketch, int]:
        """Sketch all items over the cluster, going on where an earlier run stopped, and merge them.

        Returns
        -------
        tuple
            The sketch of all values, and how many cells they came from: without those that a filter left out.
        """
        self.inputs.sort(output)
        options = {"genes": self.genes, "vocabulary": None, "reading": self.inputs.reading, "output": output}
        if self.vocabulary is not None:
            # Workers share nothing but the output, and only match names.
            options["vocabulary"] = storage.join(output, SKETCHES)
            replace(self.vocabulary, medians={}).save(storage.join(output, SKETCHES))
        items, done = self.items(output), finished_items(output)
        with Progress("vocabulary", len(self.inputs), "cells") as progress:
            progress.advance(sum(counts["cells_in"] for counts in done.values()))
            todo = [item for item in items if item["item"] not in done]
            for counts in fan_out(SketchWorker, options, todo, Pool.of_cluster(model=False)):
                done[counts["item"]] = counts
                progress.advance(counts["cells_in"])
        merged = MedianSketch(len(self.genes))
        for item in items:  # one at a time: two sketches are in memory, however many there are
            merged.merge(MedianSketch.load(_sketch_path(output, item["item"])))
        return merged, sum(counts["cells"] for counts in done.values())

    def discard_sketches(self, output: str) -> None:
        """Delete what only a run that was broken off would need."""
        self.inputs.discard_sorted(output)
        storage.remove(storage.join(output, SKETCHES))


class SketchWorker:
    """Reads items of cells and writes a sketch of the values in each.

    Parameters
    ----------
    genes
        The genes to keep, in the order in which sketches number them.
    vocabulary
        The path of the vocabulary that names them, None where the files do.
    reading
        How files are read.
    output
        The output directory.
    """

    def __init__(self, genes: Sequence[str], vocabulary: str | None, reading: CountReading, output: str) -> None:
        self.number = {gene: number for number, gene in enumerate(genes)}
        self.vocabulary = GeneVocabulary.load(vocabulary) if vocabulary else None
        self.reading, self.output = reading, output
        self._last: tuple[CountFile, NDArray[np.int64]] | None = None

    def _open(self, path: str, sorted_in: str | None) -> tuple[CountFile, NDArray[np.int64]]:
        """Open a file, unless it is the last one, and find the gene of each column."""
        if self._last is None or self._last[0].path != path:
            if self._last is not None:
                self._last[0].close()
            file = self.reading.open(path, sorted_in)
            keys = _keys(file.genes, self.vocabulary)
            self._last = file, np.array([-1 if key is None else self.number.get(key, -1) for key in keys])
        return self._last

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Sketch one item; cells that did not pass the filter are left out."""
        file, gene_of_column = self._open(item["path"], item["sorted_in"])
        sketch, cells = MedianSketch(len(self.number)), 0
        for start in range(item["start"], item["stop"], CELLS_PER_BLOCK):
            block = file.block(start, min(start + CELLS_PER_BLOCK, item["stop"]))
            counts, totals = block.counts[block.passed], block.totals[block.passed]
            sketch.add(*expressed_values(counts, totals, gene_of_column, len(self.number)))
            cells += len(totals)
        sketch.save(_sketch_path(self.output, item["item"]))
        return mark_finished(self.output, item["item"], {"cells_in": item["stop"] - item["start"], "cells": cells})


def write_medians(output: str, genes: Sequence[str], sketch: MedianSketch, *, min_cells: int) -> dict[str, float]:
    """Write the table of medians, and give those of the genes that enough cells express.

    The table is ``OUTPUT/_medians``: gene, cells that express it, median (null where none does), whether it is exact.
    """
    cells, medians = sketch.medians()
    table = pa.table(
        {
            "gene": pa.array(genes, pa.string()),
            "cells": cells,
            "median": pa.array(medians, from_pandas=True),
            "exact": np.full(len(genes), sketch.exact),
        }
    )
    write_shard(output, "_medians", 0, table)
    enough = cells >= max(1, min_cells)
    return {gene: float(median) for gene, median, keep in zip(genes, medians, enough, strict=True) if keep}


def new_vocabulary(
    medians: Mapping[str, float], special_tokens: Collection[str], max_length: int | None
) -> GeneVocabulary:
    """Make a vocabulary in V2's order: ``<pad>``, ``<mask>``, the special tokens asked for, the genes sorted."""
    special = [token for name, token in (("cls", CLS), ("eos", EOS)) if name in special_tokens]
    tokens = {name: number for number, name in enumerate([PAD, MASK, *special, *sorted(medians)])}
    return GeneVocabulary(tokens, medians=dict(medians), max_length=max_length or 0)


def _keys(names: Sequence[str], vocabulary: GeneVocabulary | None) -> list[str | None]:
    """Give each name's gene: the vocabulary's key, or without one the name, Ensembl ids upper-cased and unversioned."""
    if vocabulary is not None:
        return vocabulary.match(names).keys
    keys = [ensembl_id(name) or name for name in names]
    return [None if key in ("", PAD, MASK, CLS, EOS) else key for key in keys]


def _sketch_path(output: str, item: int) -> str:
    return storage.join(output, SKETCHES, f"{item:06d}.parquet")
