"""Encode raw counts as rank value encodings, into Parquet."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, Literal

from pydantic import Field

from geneformer_ray.data import storage
from geneformer_ray.data.encoding_report import EncodingReport, GeneReport, length_histogram
from geneformer_ray.data.rank_value import RankValueEncoder
from geneformer_ray.data.shards import finished_items
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.distribute.cluster import connected
from geneformer_ray.distribute.count_inputs import CountInputs, find_inputs
from geneformer_ray.distribute.fan_out import Pool, fan_out
from geneformer_ray.distribute.tokenize import REJECTS, TokenizeWorker, save_as_dataset
from geneformer_ray.progress import Progress, say
from ray_jobs.command_line import main, place
from ray_jobs.reading_flags import INPUT, ReadingConfig


class TokenizeConfig(ReadingConfig):
    """Flags of ``python -m ray_jobs.tokenize``."""

    input: tuple[str, ...] = Field(description=INPUT, json_schema_extra={"several": True, "metavar": "FILE_OR_DIR"})
    vocabulary: str = Field(description="vocabulary directory, file or hub id, with medians")
    output: str = Field(description="directory for the tables")
    obs_columns: tuple[str, ...] = Field((), description="obs columns to carry along, comma-separated")
    max_length: int | None = Field(None, gt=2, description="tokens a cell at most (default: the vocabulary's)")
    cell_id_prefix: tuple[str, ...] = Field((), description="one prefix a file for its cell ids, comma-separated")
    format: Literal["parquet", "datasets"] = Field(
        "parquet", description="datasets: also a Hugging Face dataset in OUTPUT/_dataset, for upstream's own tools"
    )


def run(config: TokenizeConfig) -> dict[str, Any]:
    """Encode every cell of every file."""
    output = place(config.output, "--output")
    vocabulary = GeneVocabulary.load(config.vocabulary)
    if config.max_length is not None:
        vocabulary = replace(vocabulary, max_length=config.max_length)
    paths = find_inputs([place(path, "--input") for path in config.input])
    inputs = CountInputs(paths, config.reading, prefixes=config.cell_id_prefix, obs_columns=config.obs_columns)
    genes = [
        GeneReport(files, names, RankValueEncoder(vocabulary, names)) for names, files in inputs.gene_lists.values()
    ]
    for line in (line for report in genes for line in report.lines()):
        say(line)
    plan = {
        "job": "tokenize",
        "files": paths,
        "contents": inputs.stamps(),
        "vocabulary": vocabulary.digest,
        "encoding": vocabulary.encoding_digest,
        "obs_columns": list(config.obs_columns),
        "format": config.format,
        "prefixes": list(config.cell_id_prefix),
        **asdict(config.reading),
    }
    storage.claim_output(output, plan, overwrite=config.overwrite, resume=True, inputs=[*paths, config.vocabulary])
    vocabulary.save(storage.join(output, "_vocabulary"))
    report = EncodingReport(genes, vocabulary.max_length)
    with connected():
        inputs.sort(output)
        _encode(inputs, output, report)
    inputs.discard_sorted(output)
    shards = storage.list_files(output, ".parquet")
    summary = report.as_dict(length_histogram(shards, vocabulary.max_length))
    report.write_genes(storage.join(output, "_genes.csv"))
    storage.write_json(storage.join(output, "_report.json"), summary)
    if config.format == "datasets":
        save_as_dataset(output)
    summary |= {
        "genes": {name: sum(one[name] for one in summary["genes"]) for name in ("genes", "matched", "unmatched")},
        "vocabulary": vocabulary.digest,
        "output": output,
        "tables": {"cells": output, "rejects": storage.join(output, REJECTS)},
        "report": storage.join(output, "_report.json"),
    }
    storage.finish_output(output, plan, summary)
    return summary


def _encode(inputs: CountInputs, output: str, report: EncodingReport) -> None:
    done = finished_items(output)
    todo = [asdict(stretch) for stretch in inputs.stretches(output) if stretch.item not in done]
    options = {
        "vocabulary": storage.join(output, "_vocabulary"),
        "reading": inputs.reading,
        "column_types": inputs.column_types,
        "output": output,
    }
    with Progress("tokenize", len(inputs), "cells") as progress:
        for counts in done.values():
            report.count(counts)
        progress.advance(report.totals["cells_in"])
        for counts in fan_out(TokenizeWorker, options, todo, Pool.of_cluster(model=False)):
            report.count(counts)
            progress.advance(counts["cells_in"])


if __name__ == "__main__":
    main(TokenizeConfig, run, __doc__ or "")
