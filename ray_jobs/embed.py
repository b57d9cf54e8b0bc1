"""Embed cells, genes or cell states with a model's trunk."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from geneformer_ray.compute.embedding import check_embedding
from geneformer_ray.data import storage
from geneformer_ray.data.cells import CellTable
from geneformer_ray.data.digests import digest_of
from geneformer_ray.data.shards import finished_items
from geneformer_ray.distribute.cluster import connected
from geneformer_ray.distribute.embed import EmbedWorker, embed_states, merge_gene_sums, row_items, states_of_output
from geneformer_ray.distribute.fan_out import Pool, fan_out
from geneformer_ray.progress import Progress
from ray_jobs.command_line import JobConfig, main, place
from ray_jobs.model_argument import open_model


class EmbedConfig(JobConfig):
    """Flags of ``python -m ray_jobs.embed``."""

    cells: str = Field(description="table of tokenised cells")
    model: str = Field(description="model directory, hub id, or models:/NAME@ALIAS")
    output: str = Field(description="directory for the tables")
    vocabulary: str | None = Field(None, description="the model's vocabulary, where it does not carry one")
    filter: dict[str, tuple[str, ...]] = Field(
        {}, description="only cells with one of these values", json_schema_extra={"metavar": "COLUMN=A,B"}
    )
    embedding: Literal["mean", "cls", "gene"] = Field(
        "mean", description="mean of a cell's genes, its <cls>, or one embedding a gene"
    )
    layer: Literal[-1, 0] = Field(-1, description="-1: the layer before the last; 0: the last")
    state_column: str | None = Field(None, description="column of cell states: their mean embeddings go to states.json")
    precision: Literal["fp32", "bf16", "auto"] = Field("fp32", description="what matrix products are computed in")


def run(config: EmbedConfig) -> dict[str, Any]:
    """Embed every chosen cell."""
    output, cells = place(config.output, "--output"), place(config.cells, "--cells")
    table = CellTable(cells)
    model = open_model(config.model, config.vocabulary)
    table.check(model.vocabulary)
    rows = table.select(config.filter)
    model.check_layer(config.layer)
    model.check_lengths(int(table.lengths[rows].max()))
    if config.embedding != "gene":
        check_embedding(config.embedding, model.vocabulary)
    if config.state_column is not None:
        table.column(config.state_column, "--state-column")
    plan = {
        "job": "embed",
        "cells": table.digest,
        "model": model.digest,
        "vocabulary": model.vocabulary.digest,
        "filter": {name: list(values) for name, values in config.filter.items()},
        "embedding": config.embedding,
        "layer": config.layer,
        "state_column": config.state_column,
        "precision": config.precision,
        "rows": digest_of(rows),
    }
    storage.claim_output(output, plan, overwrite=config.overwrite, resume=True, inputs=[cells, model.source])
    done = finished_items(output)
    todo = [item for item in row_items(rows) if item["item"] not in done]
    with connected():
        pool = Pool.of_cluster(model=True)
        runner = model.runner(layer=config.layer, precision=config.precision, **pool.execution())
        options = {"cells": cells, "runner": runner, "embedding": config.embedding, "output": output}
        with Progress("embed", len(rows), "cells") as progress:
            progress.advance(len(rows) - sum(len(item["rows"]) for item in todo))
            for counts in fan_out(EmbedWorker, options, todo, pool):
                progress.advance(counts["cells"])
        states = {}
        if config.state_column is not None:
            column = table.column(config.state_column, "--state-column")
            if config.embedding == "gene":
                states = embed_states(
                    cells, rows, runner, embedding="mean", state_column=config.state_column, pool=pool
                )
            else:
                states = states_of_output(output, table.cell_ids, column)
            content = {state: vector.tolist() for state, vector in states.items()}
            storage.write_json(storage.join(output, "states.json"), content)
    summary: dict[str, Any] = {
        "cells": len(rows),
        "embedding": config.embedding,
        "layer": config.layer,
        "output": output,
    }
    if config.embedding == "gene":
        summary["genes"] = merge_gene_sums(output, model.vocabulary.names, model.vocabulary.digest)
    summary["tables"] = {"embeddings": storage.join(output, "embeddings")}
    if states:
        summary["states"] = sorted(states)
    storage.finish_output(output, plan, summary)
    return summary


if __name__ == "__main__":
    main(EmbedConfig, run, __doc__ or "")
