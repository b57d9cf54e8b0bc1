"""Embed cells, genes or cell states with a model's trunk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from geneformer_ray.compute.cell_states import states_file
from geneformer_ray.compute.embedding import check_embedding
from geneformer_ray.data import storage
from geneformer_ray.data.cells import CellTable
from geneformer_ray.data.digests import digest_of
from geneformer_ray.data.embedded_h5ad import H5adCells
from geneformer_ray.data.shards import finished_items
from geneformer_ray.distribute.cluster import connected
from geneformer_ray.distribute.embed import (
    EmbedWorker,
    cells_per_item,
    discard_gene_sums,
    embed_code,
    embed_states,
    embedded_blocks,
    merge_gene_sums,
    row_items,
    states_of_output,
)
from geneformer_ray.distribute.fan_out import fan_out
from geneformer_ray.distribute.job_metrics import count_resumed
from geneformer_ray.errors import InputError
from geneformer_ray.progress import Progress
from ray_jobs.command_line import main, place
from ray_jobs.embed_flags import EmbedConfig
from ray_jobs.model_argument import open_model

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


__all__ = ["EmbedConfig", "run"]


def run(config: EmbedConfig) -> dict[str, Any]:
    """Embed every chosen cell."""
    config.check_workers()
    output, cells = place(config.output, "--output"), place(config.cells, "--cells")
    table = CellTable(cells)
    model = open_model(config.model, config.vocabulary)
    table.check(model.vocabulary)
    rows = table.select(config.filter)
    model.check_layer(config.layer)
    model.check_lengths(int(table.lengths[rows].max()))
    if config.embedding != "gene":
        check_embedding(config.embedding, model.vocabulary)
    states_N = None if config.state_column is None else table.column(config.state_column, "--state-column")[rows]
    h5ad = _find_in_h5ad(config, table, rows)
    per_item = cells_per_item(len(rows), config.embedding)
    about = {
        "model": model.digest,
        "vocabulary": model.vocabulary.digest,
        "embedding": config.embedding,
        "layer": config.layer,
        "precision": config.precision,
    }
    plan = {
        "job": "embed",
        "cells": table.digest,
        **about,
        "filter": {name: list(values) for name, values in config.filter.items()},
        "state_column": config.state_column,
        "states": None if states_N is None else digest_of(states_N.astype(str).tolist()),
        "h5ad": h5ad and [h5ad.path, storage.stamp(h5ad.path), config.cell_id_prefix],
        "cells_per_shard": per_item,
        "rows": digest_of(rows),
        "code": embed_code(),
    }
    inputs = [cells, model.source, None if h5ad is None else h5ad.path]
    storage.claim_output(output, plan, overwrite=config.overwrite, resume=True, inputs=inputs)
    done = finished_items(output)
    todo = [item for item in row_items(rows, per_item) if item["item"] not in done]
    summary: dict[str, Any] = {"cells": len(rows), "embedding": config.embedding, "layer": config.layer}
    with connected():
        count_resumed(done)
        pool = config.pool()
        runner = model.runner(layer=config.layer, precision=config.precision, digest=model.digest, **pool.execution())
        options = {"cells": cells, "runner": runner, "embedding": config.embedding, "output": output}
        with Progress("embed", len(rows), "cells") as progress:
            progress.advance(len(rows) - sum(len(item["rows"]) for item in todo))
            for counts in fan_out(EmbedWorker, options, todo, pool):
                progress.advance(counts["cells"])
        if states_N is not None:
            if config.embedding == "gene":
                state_column = str(config.state_column)
                states = embed_states(cells, rows, runner, embedding="mean", state_column=state_column, pool=pool)
            else:
                states = states_of_output(output, states_N)
            storage.write_json(
                storage.join(output, "states.json"),
                states_file(
                    states, model.made_with("mean" if config.embedding == "gene" else config.embedding, config.layer)
                ),
            )
            summary["states"] = sorted(states)
    if config.embedding == "gene":
        summary["genes"] = merge_gene_sums(output, model.vocabulary)
    summary |= {"output": output, "tables": {"embeddings": storage.join(output, "embeddings")}}
    if h5ad is not None:
        copy = storage.join(output, h5ad.path.rsplit("/", 1)[-1].removesuffix(".h5ad") + ".h5ad")
        h5ad.write_copy(copy, embedded_blocks(output), about)
        summary["h5ad"] = {"path": copy, **h5ad.counts}
    storage.finish_output(output, plan, summary)
    discard_gene_sums(output)
    return summary


def _find_in_h5ad(config: EmbedConfig, table: CellTable, rows: NDArray[np.int64]) -> H5adCells | None:
    if config.h5ad is None:
        if config.cell_id_prefix:
            raise InputError("--cell-id-prefix", f"{config.cell_id_prefix} without --h5ad", "both, or neither")
        return None
    if config.embedding == "gene":
        raise InputError("--h5ad", "a file beside --embedding gene", "mean or cls: it gets an embedding a cell")
    return H5adCells.find(place(config.h5ad, "--h5ad"), table.cell_ids[rows], prefix=config.cell_id_prefix)


if __name__ == "__main__":
    main(EmbedConfig, run, __doc__ or "")
