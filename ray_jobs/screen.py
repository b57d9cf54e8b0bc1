"""Perturb genes of cells and measure the shift of each cell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from geneformer_ray.compute.embedding import check_embedding, check_states
from geneformer_ray.compute.reading import Reading
from geneformer_ray.data import storage
from geneformer_ray.data.cells import CellTable
from geneformer_ray.data.digests import digest_of
from geneformer_ray.distribute.cluster import connected
from geneformer_ray.distribute.embed import embed_states
from geneformer_ray.distribute.fan_out import Pool
from geneformer_ray.distribute.screen import Screen
from ray_jobs.command_line import main, place
from ray_jobs.model_argument import OpenedModel, open_model
from ray_jobs.screen_flags import ScreenConfig, check_flags, perturbation_plan

if TYPE_CHECKING:
    from numpy.typing import NDArray


def _chosen_rows(config: ScreenConfig, table: CellTable) -> NDArray[np.int64]:
    """Give the row numbers of the cells to perturb."""
    rows = table.select(config.filter)
    if config.state_column and config.start and config.goal:
        towards = {"--goal": [config.goal], "--alternatives": config.alternatives}
        needed = {} if config.state_embeddings else towards
        rows = table.in_state(rows, config.state_column, config.start, needed)
    if config.max_cells is not None and config.max_cells < len(rows):
        rows = np.sort(np.random.default_rng(config.seed).choice(rows, config.max_cells, replace=False))
    return rows


def _states(config: ScreenConfig, table: CellTable, model: OpenedModel, pool: Pool) -> dict[str, NDArray[np.float32]]:
    """Read the states' embeddings, or compute them over all cells of each state."""
    if config.state_column is None or config.start is None or config.goal is None:
        return {}
    wanted = list(dict.fromkeys([config.start, config.goal, *config.alternatives]))
    if config.state_embeddings is not None:
        given = storage.read_json(place(config.state_embeddings, "--state-embeddings"), "--state-embeddings")
        return check_states(given, model.width, wanted)
    rows = table.select({config.state_column: wanted})
    runner = model.runner(layer=config.layer, precision=config.precision, **pool.execution())
    return embed_states(
        table.path, rows, runner, embedding=config.embedding, state_column=config.state_column, pool=pool
    )


def _what_states_are_made_of(config: ScreenConfig, table: CellTable) -> Any:
    """Give what decides the states' embeddings: the file's content, or each cell's state."""
    if config.state_embeddings is not None:
        return storage.read_json(place(config.state_embeddings, "--state-embeddings"), "--state-embeddings")
    return (
        None
        if config.state_column is None
        else table.column(config.state_column, "--state-column").astype(str).tolist()
    )


def run(config: ScreenConfig) -> dict[str, Any]:
    """Screen every chosen cell."""
    check_flags(config)
    output, cells = place(config.output, "--output"), place(config.cells, "--cells")
    table = CellTable(cells)
    model = open_model(config.model, config.vocabulary)
    table.check(model.vocabulary)
    model.check_layer(config.layer)
    check_embedding(config.embedding, model.vocabulary)
    rows = _chosen_rows(config, table)
    sequences = [model.vocabulary.adapt(ids, table.vocabulary_digest) for ids in table.read(rows).input_ids]
    model.check_lengths(max(map(len, sequences)))
    plan = perturbation_plan(config, model.vocabulary, sequences)
    named = config.model_dump(mode="json", exclude={"overwrite", "output", "cells", "model", "vocabulary"})
    record = {
        "job": "screen",
        "cells": table.digest,
        "model": model.digest,
        "vocabulary": model.vocabulary.digest,
        **named,
        "rows": digest_of(rows),
        "states": digest_of(_what_states_are_made_of(config, table)),
    }
    inputs = [cells, model.source, config.state_embeddings and place(config.state_embeddings, "--state-embeddings")]
    storage.claim_output(output, record, overwrite=config.overwrite, resume=True, inputs=inputs)
    model.vocabulary.save(storage.join(output, "_vocabulary"))
    with connected():
        pool = Pool.of_cluster(model=True)
        states = _states(config, table, model, pool)
        if states:
            content = {state: vector.tolist() for state, vector in states.items()}
            storage.write_json(storage.join(output, "states.json"), content)
        runner = model.runner(layer=config.layer, precision=config.precision, **pool.execution())
        gene_shifts = config.gene_shifts or config.gene_shifts_summary
        reading = Reading(config.embedding, config.comparison, states, gene_shifts)
        summary: dict[str, Any] = {}
        screen = Screen(
            cells, rows, sequences, runner, plan, reading, output, config.gene_shifts, config.gene_shifts_summary
        )
        summary |= screen.run(pool, model.vocabulary)
    summary |= {"output": output, "tables": {name: storage.join(output, name) for name in screen.tables}}
    storage.finish_output(output, record, summary)
    screen.discard_sums()
    return summary


if __name__ == "__main__":
    main(ScreenConfig, run, __doc__ or "")
