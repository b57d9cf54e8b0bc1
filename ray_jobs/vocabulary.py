"""Make a gene vocabulary: non-zero medians from a corpus of raw counts, tokens from it or from another vocabulary.

--input alone makes a new vocabulary of the corpus's genes. --vocabulary alone writes any vocabulary in this package's
form, with --special-tokens behind all other tokens. Both together keep the vocabulary's tokens, names and mapping, and
take the medians from the corpus; its genes that no cell expresses then have none.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from geneformer_ray.data import storage
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.distribute.cluster import connected
from geneformer_ray.distribute.count_inputs import CountInputs, find_inputs
from geneformer_ray.distribute.vocabulary import Corpus, new_vocabulary, write_medians
from geneformer_ray.errors import InputError
from geneformer_ray.progress import say
from ray_jobs.command_line import main, place
from ray_jobs.reading_flags import INPUT, ReadingConfig


class VocabularyConfig(ReadingConfig):
    """Flags of ``python -m ray_jobs.vocabulary``."""

    input: tuple[str, ...] = Field((), description=INPUT, json_schema_extra={"several": True, "metavar": "FILE_OR_DIR"})
    vocabulary: str | None = Field(None, description="vocabulary directory, file or hub id, whose tokens are kept")
    output: str = Field(description="directory for the vocabulary")
    genes: str | None = Field(None, description="file, one gene a line: only these enter a new vocabulary")
    min_cells: int = Field(1, ge=1, description="genes expressed in fewer cells are left out, or have no median")
    special_tokens: tuple[Literal["cls", "eos"], ...] = Field((), description="which to add: cls, eos, or cls,eos")
    max_length: int | None = Field(
        None, gt=2, description="tokens a cell at most (default: --vocabulary's; else 4096 with <cls>, 2048 without)"
    )


def run(config: VocabularyConfig) -> dict[str, Any]:
    """Make the vocabulary."""
    output = place(config.output, "--output")
    if not config.input and config.vocabulary is None:
        raise InputError("--input, --vocabulary", "neither", "a corpus, a vocabulary, or both")
    if config.genes is not None and config.vocabulary is not None:
        raise InputError("--genes", f"{config.genes} beside --vocabulary", "--input alone: a vocabulary's genes stay")
    chosen = place(config.genes, "--genes") if config.genes else None
    old = GeneVocabulary.load(config.vocabulary) if config.vocabulary else None
    corpus = None
    plan: dict[str, Any] = {
        "job": "vocabulary",
        "vocabulary": old.encoding_digest if old else None,
    }
    if config.input:
        files = find_inputs([place(path, "--input") for path in config.input])
        corpus = Corpus(CountInputs(files, config.reading, unique_ids=False), old, chosen)
        plan |= corpus.plan()
        for line in corpus.lines():
            say(line)
    reads = [
        *(corpus.inputs.paths if corpus else []),
        chosen,
        config.vocabulary and storage.absolute(config.vocabulary),
    ]
    storage.claim_output(output, plan, overwrite=config.overwrite, resume=True, inputs=reads)
    medians, summary = _medians(config, corpus, output) if corpus else ({}, {})
    if old is None:
        vocabulary = new_vocabulary(medians, config.special_tokens, config.max_length)
    else:
        special = {name: name in config.special_tokens for name in ("cls", "eos")}
        vocabulary = replace(old, medians=medians if corpus else old.medians).with_special_tokens(**special)
        vocabulary = replace(vocabulary, max_length=config.max_length or old.max_length)
    vocabulary.save(output)
    without = [gene for gene in vocabulary.genes if gene not in vocabulary.medians]
    if without:
        say(f"{len(without):,} genes of the vocabulary have no median, such as {', '.join(without[:3])}")
    summary = {"genes": len(vocabulary.genes), "genes_without_median": len(without), **summary}
    # These shape the vocabulary and not the sketches: a run that was broken off may go on with others.
    summary |= {"min_cells": config.min_cells, "special_tokens": sorted(set(config.special_tokens))}
    summary |= {"max_length": vocabulary.max_length, "digest": vocabulary.digest, "output": output}
    storage.finish_output(output, plan, summary)
    if corpus:
        corpus.discard_sketches(output)
    return summary


def _medians(config: VocabularyConfig, corpus: Corpus, output: str) -> tuple[dict[str, float], dict[str, Any]]:
    """Take the medians of the corpus, and say what became of its cells and genes."""
    if corpus.unknown:
        say(f"--genes: {len(corpus.unknown):,} lines that no file knows, such as {', '.join(corpus.unknown[:3])}")
    with connected():
        sketch, cells = corpus.sketch(output)
    medians = write_medians(output, corpus.genes, sketch, min_cells=config.min_cells)
    if not medians:
        got = f"{len(corpus.genes):,} genes, none of them expressed in {config.min_cells:,} of {cells:,} cells"
        raise InputError("--input, --min-cells", got, "cells that express genes, and no higher number than there are")
    how = "exact" if sketch.exact else f"within {sketch.error_bound:.2%}"
    say(f"{len(medians):,} of {len(corpus.genes):,} genes have a median, {how}, from {cells:,} cells")
    return medians, {
        "genes_left_out": len(corpus.genes) - len(medians),
        "genes_unknown": len(corpus.unknown),
        "genes_unknown_examples": corpus.unknown[:5],
        "cells": cells,
        "cells_left_out": len(corpus.inputs) - cells,
        "exact": sketch.exact,
        "error_bound": sketch.error_bound,
        "tables": {"medians": storage.join(output, "_medians")},
    }


if __name__ == "__main__":
    main(VocabularyConfig, run, __doc__ or "")
