"""Pretrain a Geneformer-shaped BERT by masked-gene modelling, from scratch or from a model.

Beside the model lie what it has learned, measured on held-out cells against a baseline of gene frequencies, and one
MLflow run. Where MLflow could not be reached at the end, the same command records what lies there, and trains nothing.
"""

from __future__ import annotations

from typing import Any

from geneformer_ray.compute.lora import LoraOptions
from geneformer_ray.data import storage
from geneformer_ray.data.cells import CellTable
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.distribute.cluster import check_workers, connected
from geneformer_ray.distribute.pretrain import pretrain_worker
from geneformer_ray.distribute.train_workers import discard_checkpoints, fit
from geneformer_ray.errors import InputError
from geneformer_ray.manage.pretraining_record import FinishedPretraining
from geneformer_ray.manage.registry import open_store, without_credentials
from geneformer_ray.progress import say
from ray_jobs.command_line import main, place, store_directory
from ray_jobs.model_argument import open_model, place_vocabulary
from ray_jobs.pretrain_flags import SHAPE, PretrainConfig, check_flags

__all__ = ["PretrainConfig", "check_flags", "run"]


def run(config: PretrainConfig) -> dict[str, Any]:
    """Train, measure and record; write a self-contained model directory."""
    check_flags(config)
    check_workers(config.num_workers, config.cpus_per_worker)
    output, cells = place(config.output, "--output"), place(config.cells, "--cells")
    store = store_directory()
    table = CellTable(cells)
    opened = open_model(config.model, config.vocabulary) if config.model else None
    if opened is None and config.vocabulary is None:
        raise InputError("--vocabulary", "nothing", "the vocabulary of the cells")
    vocabulary = opened.vocabulary if opened else GeneVocabulary.load(place_vocabulary(str(config.vocabulary)))
    table.check(vocabulary)
    lora = config.lora()
    if opened and lora:
        LoraOptions(**lora).check(opened.config)
    held = config.held_out(table)
    rows = {"train": held.train, "validate": held.validate}
    longest = max(int(table.lengths[some].max()) for some in rows.values())
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
        "rows": held.digest,
        # Only where given: without them the plan is that of earlier outputs, which go on.
        **({"group": config.group} if config.group else {}),
        **({"lora": lora} if lora else {}),
    }
    storage.claim_output(
        output, plan, overwrite=config.overwrite, resume=True, inputs=[cells, opened.source if opened else None]
    )
    vocabulary_source = storage.join(output, "vocabulary")
    vocabulary.save(vocabulary_source)
    tracking = without_credentials(open_store(store))
    say(f"MLflow: {tracking}")
    which = f"all of {held.group} {', '.join(held.groups)}" if held.group else "drawn from all"
    say(f"held out: {len(held.validate)} cells, {which}")
    worker_config = {
        "cells": cells,
        "vocabulary": vocabulary_source,
        "model": opened.source if opened else None,
        "tracking_uri": opened.tracking_uri if opened else None,
        "base": plan["model"],
        "shape": shape,
        "lora": lora,
        "rows": rows,
        "options": options,
        "output": output,
    }
    if not FinishedPretraining.present_in(output):  # else the store was out of reach when all was trained
        with connected():
            fit(
                pretrain_worker, worker_config, workers=config.workers(), output=output, precision=config.precision,
                total=len(held.train) * config.epochs, what="pretrain",
            )  # fmt: skip
    finished = FinishedPretraining.of(output, plan, held.described())
    summary = {
        "cells": len(held.train) + len(held.validate),
        **finished.summary(),
        "run_id": finished.log(),
        "mlflow": tracking,
        "output": output,
    }
    storage.finish_output(output, plan, summary)
    discard_checkpoints(output)
    return summary


if __name__ == "__main__":
    main(PretrainConfig, run, __doc__ or "")
