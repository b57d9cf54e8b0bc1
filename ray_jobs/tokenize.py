"""Encode h5ad files of raw counts as rank value encodings, into Parquet."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from geneformer_ray.data import storage
from geneformer_ray.data.counts import CountFile
from geneformer_ray.data.rank_value import RankValueEncoder
from geneformer_ray.data.shards import finished_items
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.distribute.cluster import connected
from geneformer_ray.distribute.fan_out import Pool, fan_out
from geneformer_ray.distribute.tokenize import TokenizeWorker, input_files, plan_blocks, save_as_dataset
from geneformer_ray.errors import InputError, NotThereYetError
from geneformer_ray.progress import Progress, say
from ray_jobs.command_line import JobConfig, main, place


class TokenizeConfig(JobConfig):
    """Flags of ``python -m ray_jobs.tokenize``."""

    input: tuple[str, ...] = Field(
        description="h5ad files, or directories of them", json_schema_extra={"several": True, "metavar": "FILE_OR_DIR"}
    )
    vocabulary: str = Field(description="vocabulary directory or file, with medians")
    output: str = Field(description="directory for the tables")
    obs_columns: tuple[str, ...] = Field((), description="obs columns to carry along, comma-separated")
    max_length: int | None = Field(None, gt=2, description="tokens a cell at most (default: the vocabulary's)")
    counts: str = Field("X", description="where the raw counts lie: X, raw.X or layers/NAME")
    gene_column: str | None = Field(
        None, description="var column of gene names (default: ensembl_id, gene_ids, the index)"
    )
    cell_id_prefix: tuple[str, ...] = Field((), description="one prefix a file for its cell ids, comma-separated")
    format: Literal["parquet", "datasets"] = Field(
        "parquet", description="datasets: also a Hugging Face dataset in OUTPUT/_dataset, for upstream's own tools"
    )
    allow_non_integer: bool = Field(False, description="accept counts that are not whole numbers")


def run(config: TokenizeConfig) -> dict[str, Any]:
    """Encode every cell of every file."""
    output = place(config.output, "--output")
    files = input_files([place(path, "--input") for path in config.input])
    vocabulary_path = place(config.vocabulary, "--vocabulary")
    vocabulary = GeneVocabulary.load(vocabulary_path)
    if config.max_length is not None and config.max_length != vocabulary.max_length:
        takes = f"{vocabulary.max_length}, the vocabulary's, so far"
        raise InputError("--max-length", config.max_length, takes)
    if config.format == "datasets" and storage.is_uri(output):
        raise NotThereYetError.flag("--format", "datasets into a URI", "datasets into a local directory")
    if config.cell_id_prefix and len(config.cell_id_prefix) != len(files):
        raise InputError("--cell-id-prefix", f"{len(config.cell_id_prefix)} prefixes", f"{len(files)}, one a file")
    reading: dict[str, Any] = {
        "counts": config.counts,
        "gene_column": config.gene_column,
        "allow_non_integer": config.allow_non_integer,
    }
    items = plan_blocks(files, reading, config.obs_columns, config.cell_id_prefix or [""] * len(files))
    unmatched: list[str] = []
    for path in files:  # names nothing known before any work is done
        encoder = RankValueEncoder(vocabulary, CountFile(path, **reading).genes)
        unmatched = unmatched or encoder.unmatched
        not_matched, summed = len(encoder.unmatched), len(encoder.duplicates)
        say(f"{path}: {encoder.matched:,} genes matched, {not_matched:,} not, {summed:,} summed")
    plan = {
        "job": "tokenize",
        "files": files,
        "contents": [storage.stamp(path) for path in files],
        "vocabulary": vocabulary.digest,
        "encoding": vocabulary.encoding_digest,
        "obs_columns": list(config.obs_columns),
        "format": config.format,
        "prefixes": list(config.cell_id_prefix),
        **reading,
    }
    storage.claim_output(output, plan, overwrite=config.overwrite, resume=True, inputs=[*files, vocabulary_path])
    done = finished_items(output)
    options = {
        "vocabulary": vocabulary_path,
        "reading": reading,
        "obs_columns": list(config.obs_columns),
        "output": output,
    }
    with connected(), Progress("tokenize", sum(i["stop"] - i["start"] for i in items), "cells") as progress:
        progress.advance(sum(counts["cells_in"] for counts in done.values()))
        todo = [item for item in items if item["item"] not in done]
        for counts in fan_out(TokenizeWorker, options, todo, Pool.of_cluster(model=False)):
            done[counts["item"]] = counts
            progress.advance(counts["cells_in"])
    vocabulary.save(storage.join(output, "_vocabulary"))
    if config.format == "datasets":
        save_as_dataset(output)
    summary = {
        name: sum(counts[name] for counts in done.values()) for name in ("cells_in", "cells", "rejected", "truncated")
    }
    tokens = sum(counts["tokens"] for counts in done.values())
    summary |= {
        "tokens_per_cell": round(tokens / max(1, summary["cells"]), 1),
        "genes_unmatched_examples": unmatched[:5],
        "vocabulary": vocabulary.digest,
        "output": output,
        "tables": {"cells": output, "rejects": storage.join(output, "_rejects")},
    }
    storage.finish_output(output, plan, summary)
    return summary


if __name__ == "__main__":
    main(TokenizeConfig, run, __doc__ or "")
