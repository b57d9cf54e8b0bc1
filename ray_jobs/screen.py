"""Perturb genes of cells and measure the shift of each cell."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from geneformer_ray.compute.embedding import check_embedding
from geneformer_ray.compute.reading import Reading
from geneformer_ray.data import storage
from geneformer_ray.data.cells import CellTable
from geneformer_ray.data.digests import digest_of
from geneformer_ray.distribute.cluster import connected
from geneformer_ray.distribute.screen import Screen, check_share
from geneformer_ray.distribute.screen_items import BATCH_PLAN, ScreenItems, count_cells, read_sequences, screen_code
from geneformer_ray.distribute.screen_tables import REJECTS
from geneformer_ray.distribute.screen_verified import VerifiedScreen
from geneformer_ray.progress import say
from ray_jobs.command_line import main, place
from ray_jobs.model_argument import open_model
from ray_jobs.screen_flags import ScreenConfig, check_flags, perturbation_plan, recorded_flags
from ray_jobs.screen_notices import notices
from ray_jobs.screen_states import screen_states, states_of, states_path, what_states_are_made_of

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
    sequences = itertools.chain.from_iterable(read_sequences(table, rows, model.vocabulary))
    plan = perturbation_plan(config, model.vocabulary, sequences)
    gene_shifts = config.gene_shifts or config.gene_shifts_summary
    method, named = config.screen_method(config.seed), {state: np.empty(0, np.float32) for state in states_of(config)}
    reading = Reading(config.embedding, config.comparison, named, gene_shifts)
    config.check_measurable(plan, reading, gene_summary=not config.gene_shifts)
    longest = int(model.config.max_position_embeddings)
    counts = count_cells(table, rows, plan, model.vocabulary, longest)
    why = "too long for the model, or with foreign tokens"
    check_share(counts.unfit, len(rows), config.max_rejected, why, "nothing was done")
    record = {
        "job": "screen",
        "cells": table.digest,
        "model": model.digest,
        "vocabulary": model.vocabulary.digest,
        **recorded_flags(config),
        "rows": digest_of(rows),
        "states": what_states_are_made_of(config, table),
        "events": digest_of(counts.events, counts.lengths),
        "batch_plan": BATCH_PLAN,
        "code": screen_code(method),
    }
    inputs = [cells, model.source, states_path(config)]
    storage.claim_output(output, record, overwrite=config.overwrite, resume=True, inputs=inputs)
    model.vocabulary.save(storage.join(output, "_vocabulary"))
    with connected():
        pool = config.pool()
        runner = model.runner(layer=config.layer, precision=config.precision, digest=model.digest, **pool.execution())
        states = screen_states(config, table, model, runner, pool, storage.join(output, "states.json"))
        how: dict[str, Any] = {"method": method, "plan": plan}
        of_all = Screen(
            cells=cells,
            items=ScreenItems.of_model(rows, counts, model.config, config.layer, states=len(states), **how),
            runner=runner,
            **how,
            reading=replace(reading, states=states),
            output=output,
            gene_rows=config.gene_shifts,
            gene_summary=config.gene_shifts_summary,
            max_rejected=config.max_rejected,
        )
        screen: Screen | VerifiedScreen = of_all
        if config.method == "verified":
            screen = VerifiedScreen(of_all, config.verification(config.seed), states_of(config)[1], longest)
        summary = screen.run(pool, model.vocabulary)
    tables = [*screen.tables, *([REJECTS] if summary["rejected"] else [])]
    summary |= {"output": output, "tables": {name.lstrip("_"): storage.join(output, name) for name in tables}}
    for line in notices(summary, config):
        say(line)
    storage.finish_output(output, record, summary)
    screen.discard()
    return summary


if __name__ == "__main__":
    main(ScreenConfig, run, __doc__ or "")
