"""Encode raw counts as rank value encodings, into Parquet."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, Literal

from pydantic import Field

from geneformer_ray.data import storage
from geneformer_ray.data.counts import CELLS_PER_BLOCK
from geneformer_ray.data.encoding_report import EncodingReport, length_histogram
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.distribute.count_inputs import CountInputs, find_inputs
from geneformer_ray.distribute.tokenize import REJECTS, encode, gene_reports, save_as_dataset
from geneformer_ray.errors import InputError
from geneformer_ray.progress import say
from ray_jobs.command_line import main, place
from ray_jobs.reading_flags import INPUT, ReadingConfig


class TokenizeConfig(ReadingConfig):
    """Flags of ``python -m ray_jobs.tokenize``."""

    input: tuple[str, ...] = Field(description=INPUT, json_schema_extra={"several": True, "metavar": "FILE_OR_DIR"})
    vocabulary: str = Field(description="vocabulary directory, file or hub id, with medians")
    output: str = Field(description="directory for the tables")
    obs_columns: tuple[str, ...] = Field((), description="obs columns to carry along, comma-separated")
    max_length: int | None = Field(None, gt=2, description="tokens a cell at most (default: the vocabulary's)")
    cell_id_prefix: tuple[str, ...] = Field(
        (), description="one prefix a file for its cell ids, comma-separated", json_schema_extra={"keeps_empty": True}
    )
    format: Literal["parquet", "datasets"] = Field(
        "parquet", description="datasets: also a Hugging Face dataset in OUTPUT/_dataset, for upstream's own tools"
    )


def run(config: TokenizeConfig) -> dict[str, Any]:
    """Encode every cell of every file."""
    output = place(config.output, "--output")
    vocabulary = _vocabulary(config)
    paths = find_inputs([place(path, "--input") for path in config.input])
    inputs = CountInputs(paths, config.reading, prefixes=config.cell_id_prefix, obs_columns=config.obs_columns)
    report = EncodingReport(gene_reports(inputs, vocabulary), vocabulary.max_length)
    for line in report.lines():
        say(line)
    plan = {
        "job": "tokenize",
        "files": paths,
        "contents": inputs.stamps(),
        "vocabulary": vocabulary.digest,
        "encoding": vocabulary.encoding_digest,
        "max_length": vocabulary.max_length,
        "cells_per_shard": CELLS_PER_BLOCK,
        "obs_columns": list(config.obs_columns),
        "format": config.format,
        "prefixes": list(config.cell_id_prefix),
        **asdict(config.reading),
    }
    storage.claim_output(output, plan, overwrite=config.overwrite, resume=True, inputs=[*paths, config.vocabulary])
    vocabulary.save(storage.join(output, "_vocabulary"))
    try:
        encode(inputs, output, report)
    except InputError as error:
        takes = f"{error.takes} (then with --overwrite: {output} has been begun)"
        raise InputError(error.field, error.got, takes) from error
    for line in report.left_out():
        say(line)
    shards = storage.list_files(output, ".parquet")
    summary = report.as_dict(length_histogram(shards, vocabulary.max_length))
    report.write_genes(storage.join(output, "_genes.csv"))
    storage.write_json(storage.join(output, "_report.json"), summary)
    tables = {"cells": output}
    if summary["rejected"]:
        tables["rejects"] = storage.join(output, REJECTS)
    if config.format == "datasets":
        tables["dataset"] = save_as_dataset(output)
    summary |= {
        "genes": report.distinct_genes(),
        "warnings": sorted({warning for one in summary["genes"] for warning in one["warnings"]}),
        "vocabulary": vocabulary.digest,
        "output": output,
        "tables": tables,
        "report": storage.join(output, "_report.json"),
    }
    storage.finish_output(output, plan, summary)
    inputs.discard_sorted(output)
    return summary


def _vocabulary(config: TokenizeConfig) -> GeneVocabulary:
    vocabulary = GeneVocabulary.load(config.vocabulary)
    if not vocabulary.medians:
        raise InputError("--vocabulary", f"{config.vocabulary} without medians", "one with medians, to encode by")
    if config.max_length is None:
        return vocabulary
    if config.max_length > vocabulary.max_length:
        beyond = f"beyond the vocabulary's {vocabulary.max_length:,}"
        say(f"--max-length {config.max_length:,} is {beyond}: a model may not take such cells")
    return replace(vocabulary, max_length=config.max_length)


if __name__ == "__main__":
    main(TokenizeConfig, run, __doc__ or "")
