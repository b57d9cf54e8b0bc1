"""Perturb genes of cells and measure the shift of each cell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from geneformer_ray.compute.embedding import check_embedding, check_states
from geneformer_ray.compute.perturbation import PerturbationPlan
from geneformer_ray.compute.shifts import Reading
from geneformer_ray.data import storage
from geneformer_ray.data.cells import CellTable
from geneformer_ray.data.shards import finished_items
from geneformer_ray.distribute.cluster import connected, cpus_of_cluster
from geneformer_ray.distribute.embed import embed_states
from geneformer_ray.distribute.fan_out import Pool, fan_out
from geneformer_ray.distribute.screen import ScreenWorker, expected_events, genes_in_enough_cells, screen_items
from geneformer_ray.errors import InputError, NotThereYetError
from geneformer_ray.progress import Progress
from ray_jobs.command_line import JobConfig, main, place
from ray_jobs.model_argument import OpenedModel, open_model

if TYPE_CHECKING:
    from numpy.typing import NDArray


class ScreenConfig(JobConfig):
    """Flags of ``python -m ray_jobs.screen``."""

    cells: str = Field(description="table of tokenised cells")
    model: str = Field(description="model directory, hub id, or models:/NAME@ALIAS")
    output: str = Field(description="directory for the tables")
    vocabulary: str | None = Field(None, description="the model's vocabulary, where it does not carry one")
    filter: dict[str, tuple[str, ...]] = Field({}, description="only cells with one of these values", json_schema_extra={"metavar": "COLUMN=A,B"})
    perturbation: Literal["delete", "overexpress", "inhibit", "activate"] = Field("delete", description="what is done to a gene")
    genes: str = Field("all", description="all, or genes: G1,G2")
    gene_sets: str | None = Field(None, description="GMT file: each set together (not there yet)")
    together: bool = Field(False, description="perturb all of --genes in one event")
    combine: int = Field(1, ge=1, description="genes of one event, every combination (only 1 so far)")
    anchor: str | None = Field(None, description="a gene perturbed in every event as well")
    rank_shift: int | None = Field(None, description="quartiles to inhibit or activate by (not there yet)")
    min_cells: int = Field(1, ge=1, description="with --genes all: only genes that this many of the cells hold")
    embedding: Literal["mean", "cls"] = Field("mean", description="mean of the unperturbed genes, or the <cls>")
    layer: Literal[-1, 0] = Field(-1, description="-1: the layer before the last; 0: the last")
    comparison: Literal["context", "upstream"] = Field("context", description="leave the perturbed genes out, or as upstream does")
    gene_shifts: bool = Field(False, description="also the similarity of every unperturbed gene")
    gene_shifts_summary: bool = Field(False, description="count, mean and deviation a pair of genes (not there yet)")
    state_column: str | None = Field(None, description="column of cell states")
    start: str | None = Field(None, description="the state whose cells are perturbed")
    goal: str | None = Field(None, description="the state that shifts are measured towards")
    alternatives: tuple[str, ...] = Field((), description="other states to measure towards, comma-separated")
    state_embeddings: str | None = Field(None, description="JSON file of state -> floats, as embed writes (default: computed)")
    precision: Literal["fp32", "bf16", "auto"] = Field("fp32", description="what matrix products are computed in")
    max_cells: int | None = Field(None, ge=1, description="a random sample of this many cells")
    seed: int = Field(0, ge=0, description="of the sample")


def _check_there(config: ScreenConfig) -> None:
    """Refuse what is not written yet."""
    if config.gene_sets is not None:
        raise NotThereYetError.flag("--gene-sets", config.gene_sets, "genes in --genes so far")
    if config.combine != 1:
        raise NotThereYetError.flag("--combine", config.combine, "1 so far")
    if config.rank_shift is not None:
        raise NotThereYetError.flag("--rank-shift", config.rank_shift, "nothing so far")
    if config.gene_shifts_summary:
        raise NotThereYetError.flag("--gene-shifts-summary", "true", "--gene-shifts so far")
    states = (config.state_column, config.start, config.goal)
    if any(states) and not all(states):
        raise InputError("--state-column, --start, --goal", "some of them", "all three, or none")
    if not config.start and (config.alternatives or config.state_embeddings):
        raise InputError("--alternatives, --state-embeddings", "no states", "--state-column, --start and --goal as well")


def _plan(config: ScreenConfig, model: OpenedModel, sequences: list[NDArray[np.int32]]) -> PerturbationPlan:
    resolve, tokens = model.vocabulary.resolve, model.vocabulary.tokens
    if config.genes == "all":
        few = config.min_cells > 1
        genes = genes_in_enough_cells(sequences, model.vocabulary, config.min_cells) if few else None
    elif storage.exists(storage.absolute(config.genes)):
        raise NotThereYetError.flag("--genes", f"the file {config.genes}", "all, or genes G1,G2 so far")
    else:
        keys = dict.fromkeys(resolve(name.strip()) for name in config.genes.split(",") if name.strip())
        genes = tuple(tokens[key] for key in keys)
        if not genes:
            raise InputError("--genes", repr(config.genes), "all, or genes G1,G2")
    anchor = None if config.anchor is None else tokens[resolve(config.anchor, "--anchor")]
    return PerturbationPlan(config.perturbation, genes, config.together, anchor)


def _chosen_rows(config: ScreenConfig, table: CellTable) -> NDArray[np.int64]:
    filters = dict(config.filter)
    rows = table.select(filters)
    if config.state_column and config.start:
        states = table.column(config.state_column, "--state-column").astype(str)
        for flag, state in (("--start", config.start), ("--goal", config.goal), *(("--alternatives", s) for s in config.alternatives)):
            if not config.state_embeddings and state not in states or flag == "--start" and state not in states[rows]:
                raise InputError(flag, f"{state!r}, which no cell has in {config.state_column}", f"one of {', '.join(np.unique(states))}")
        rows = rows[states[rows] == config.start]
    if config.max_cells is not None and config.max_cells < len(rows):
        rows = np.sort(np.random.default_rng(config.seed).choice(rows, config.max_cells, replace=False))
    return rows


def run(config: ScreenConfig) -> dict[str, Any]:
    """Screen every chosen cell."""
    _check_there(config)
    output, cells = place(config.output, "--output"), place(config.cells, "--cells")
    table = CellTable(cells)
    model = open_model(config.model, config.vocabulary)
    table.check(model.vocabulary)
    check_embedding(config.embedding, model.vocabulary)
    rows = _chosen_rows(config, table)
    sequences = [model.vocabulary.adapt(ids, table.vocabulary_digest) for ids in table.read(rows).input_ids]
    plan = _plan(config, model, sequences)
    events = expected_events(sequences, plan, model.vocabulary)
    wanted = [] if config.goal is None or config.start is None else [config.start, config.goal, *config.alternatives]
    given = storage.read_json(place(config.state_embeddings, "--state-embeddings"), "--state-embeddings") if config.state_embeddings else None
    record = {"job": "screen", "cells": table.digest, "model": model.digest, "vocabulary": model.vocabulary.digest,
              **config.model_dump(mode="json", exclude={"overwrite", "output", "cells", "model", "vocabulary"})}  # fmt: skip
    if given is not None:
        record["state_embeddings"] = {state: given[state] for state in wanted if state in given}
    storage.claim_output(output, record, overwrite=config.overwrite, resume=True)
    model.vocabulary.save(output)
    runner = model.runner(layer=config.layer, precision=config.precision)
    done = finished_items(output)
    with connected():
        pool = Pool(1, cpus_of_cluster())
        states: dict[str, NDArray[np.float32]] = {}
        if wanted and config.state_column:
            if given is None:
                everything = table.select({config.state_column: list(dict.fromkeys(wanted))})
                computed = embed_states(cells, everything, runner, embedding=config.embedding, state_column=config.state_column, pool=pool)
                given = {state: vector.tolist() for state, vector in computed.items()}
            states = check_states(given, model.width, list(dict.fromkeys(wanted)))
            storage.write_json(storage.join(output, "states.json"), {s: v.tolist() for s, v in states.items()})
        reading = Reading(config.embedding, config.comparison, states, config.gene_shifts)
        options = {
            "cells": cells,
            "runner": runner,
            "plan": {"perturbation": plan.perturbation, "genes": plan.genes, "together": plan.together, "anchor": plan.anchor},
            "reading": {
                "embedding": reading.embedding,
                "comparison": reading.comparison,
                "states": {state: vector.tolist() for state, vector in states.items()},
                "gene_shifts": reading.gene_shifts,
            },
            "output": output,
        }  # fmt: skip
        todo = [i for i in screen_items(rows, events, np.array([len(ids) for ids in sequences])) if i["item"] not in done]
        with Progress("screen", int(events.sum()), "events") as progress:
            progress.advance(sum(counts["events"] for counts in done.values()))
            for counts in fan_out(ScreenWorker, options, todo, pool):
                done[counts["item"]] = counts
                progress.advance(counts["events"])
    measured = sum(counts["events"] for counts in done.values())
    possible = len(rows) * (1 if plan.together or plan.genes is None else len(plan.genes))
    summary = {
        "cells": len(rows),
        "events": measured,
        "rows": sum(counts["rows"] for counts in done.values()),
        # Listed genes that a cell does not hold cannot be deleted from it.
        "events_skipped": 0 if plan.genes is None else possible - measured,
        "cells_without_events": int((events == 0).sum()),
        "output": output,
        "tables": {"cell_shifts": storage.join(output, "cell_shifts")},
    }
    if config.gene_shifts:
        summary["gene_rows"] = sum(counts["gene_rows"] for counts in done.values())
    storage.finish_output(output, record, summary)
    return summary


if __name__ == "__main__":
    main(ScreenConfig, run, __doc__ or "")
