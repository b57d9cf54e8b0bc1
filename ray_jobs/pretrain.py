"""Pretrain a Geneformer-shaped BERT by masked-gene modelling."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from geneformer_ray.data import storage
from geneformer_ray.data.cells import CellTable
from geneformer_ray.data.digests import digest_of
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.distribute.cluster import check_workers, connected
from geneformer_ray.distribute.pretrain import pretrain_worker
from geneformer_ray.distribute.train_workers import discard_checkpoints, fit
from geneformer_ray.errors import InputError
from ray_jobs.command_line import main, place
from ray_jobs.model_argument import open_model, place_vocabulary
from ray_jobs.training_flags import TrainingConfig

# Flags of a new model, which one to start from has settled.
SHAPE = ("layers", "width", "heads", "feed_forward", "initializer_range")


class PretrainConfig(TrainingConfig):
    """Flags of ``python -m ray_jobs.pretrain``."""

    cells: str = Field(description="table of tokenised cells")
    vocabulary: str | None = Field(None, description="their vocabulary; optional with --model")
    output: str = Field(description="directory for the model")
    model: str | None = Field(None, description="a model to start from (default: random weights)")
    layers: int = Field(6, ge=1, description="of a new model")
    width: int = Field(256, ge=8, description="of a new model's hidden states")
    heads: int = Field(4, ge=1, description="attention heads of a new model")
    feed_forward: int = Field(512, ge=8, description="width of a new model's feed-forward layers")
    initializer_range: float = Field(0.02, gt=0, description="deviation of a new model's weights")
    epochs: int = Field(3, ge=1, description="passes over the cells")
    learning_rate: float = Field(1e-3, gt=0, description="the highest")
    validation_share: float = Field(0.1, gt=0, lt=1, description="share of the cells held out to measure the loss")
    seed: int = Field(0, ge=0, description="of weights, order, masks")


def run(config: PretrainConfig) -> dict[str, Any]:
    """Train, and write a self-contained model directory."""
    shaped = [name for name in SHAPE if name in config.model_fields_set]
    if config.model and shaped:
        flag, value = "--" + shaped[0].replace("_", "-"), getattr(config, shaped[0])
        raise InputError(flag, f"{value} beside --model", "nothing: the model that training starts from has its shape")
    check_workers(config.num_workers, config.cpus_per_worker)
    output, cells = place(config.output, "--output"), place(config.cells, "--cells")
    table = CellTable(cells)
    opened = open_model(config.model, config.vocabulary) if config.model else None
    if opened is None and config.vocabulary is None:
        raise InputError("--vocabulary", "nothing", "the vocabulary of the cells")
    vocabulary = opened.vocabulary if opened else GeneVocabulary.load(place_vocabulary(str(config.vocabulary)))
    table.check(vocabulary)
    if config.width % config.heads:
        raise InputError("--heads", config.heads, f"a divisor of the width {config.width}")
    rows = np.random.default_rng(config.seed).permutation(table.select(config.filter))
    held_out = max(1, round(config.validation_share * len(rows)))
    if len(rows) - held_out < config.num_workers:
        raise InputError("--cells", f"{len(rows)} cells", "more cells than workers, and some to hold out")
    longest = int(table.lengths[rows].max())
    limit = opened.config.max_position_embeddings if opened else vocabulary.max_length
    if longest > limit:
        raise InputError("--cells", f"a cell of {longest} tokens", f"cells of up to {limit}, the model's input size")
    options = {**config.options(), "seed": config.seed}
    shape = {name: getattr(config, name) for name in SHAPE}
    plan = {
        "job": "pretrain",
        "cells": table.digest,
        "vocabulary": vocabulary.digest,
        "model": opened.digest if opened else None,
        "shape": shape,
        "options": options,
        "filter": {name: list(values) for name, values in config.filter.items()},
        "workers": config.num_workers,
        "precision": config.precision,
        "rows": digest_of(rows, held_out),
    }
    storage.claim_output(
        output, plan, overwrite=config.overwrite, resume=True, inputs=[cells, opened.source if opened else None]
    )
    vocabulary_source = storage.join(output, "vocabulary")
    vocabulary.save(vocabulary_source)
    worker_config = {
        "cells": cells,
        "vocabulary": vocabulary_source,
        "model": opened.source if opened else None,
        "tracking_uri": opened.tracking_uri if opened else None,
        "shape": shape,
        "rows": {"train": rows[held_out:], "validate": rows[:held_out]},
        "options": options,
        "output": output,
    }
    with connected():
        total = (len(rows) - held_out) * config.epochs
        fit(
            pretrain_worker, worker_config, workers=config.workers(), output=output, precision=config.precision,
            total=total, what="pretrain",
        )  # fmt: skip
    history = storage.read_json(storage.join(output, "history.json"))
    summary = {
        "cells": len(rows),
        **{key: value for key, value in history[-1].items() if key != "step"},
        "model": storage.join(output, "model"),
        "output": output,
    }
    storage.finish_output(output, plan, summary)
    discard_checkpoints(output)
    return summary


if __name__ == "__main__":
    main(PretrainConfig, run, __doc__ or "")
