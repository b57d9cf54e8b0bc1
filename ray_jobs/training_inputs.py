"""What every fine-tuning opens and checks before it writes anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from geneformer_ray.compute.freezing import check_frozen_layers
from geneformer_ray.compute.lora import LoraOptions
from geneformer_ray.data.cells import CellTable
from geneformer_ray.distribute.cluster import check_workers
from geneformer_ray.manage.registry import check_name
from ray_jobs.command_line import place, store_directory
from ray_jobs.model_argument import OpenedModel, open_model

if TYPE_CHECKING:
    from ray_jobs.finetune_flags import FinetuneConfig

__all__ = ["TrainingInputs"]


@dataclass(frozen=True)
class TrainingInputs:
    """Places, cells and model of a fine-tuning.

    Parameters
    ----------
    output, cells
        Where they lie, absolute.
    store
        Where MLflow's store goes if no setting names one.
    table, model
        The cells and the model, which fit each other.
    """

    output: str
    cells: str
    store: str
    table: CellTable
    model: OpenedModel

    @classmethod
    def open(cls, config: FinetuneConfig) -> TrainingInputs:
        """Find everything, and check that it goes together."""
        check_workers(config.num_workers, config.cpus_per_worker)
        if config.registered_model is not None:
            check_name(config.registered_model)
        output, cells = place(config.output, "--output"), place(config.cells, "--cells")
        store = store_directory()
        table = CellTable(cells)
        model = open_model(config.model, config.vocabulary)
        table.check(model.vocabulary)
        model.check_lengths(int(table.lengths.max()))
        check_frozen_layers(config.freeze_layers, model.config)
        if (lora := config.lora()) is not None:
            LoraOptions(**lora).check(model.config)
        return cls(output, cells, store, table, model)

    def plan(self, config: FinetuneConfig) -> dict[str, Any]:
        """Give the part of a run's plan that does not depend on what is learned."""
        return {
            "job": "finetune",
            "cells": self.table.digest,
            "model": self.model.digest,
            "vocabulary": self.model.vocabulary.digest,
            "options": _options(config),
            **config.how(),
            "workers": config.num_workers,
            "precision": config.precision,
        }

    def worker_config(self, config: FinetuneConfig) -> dict[str, Any]:
        """Give what a trial's workers need, beside what they learn."""
        return {
            "cells": self.cells,
            **self.model.reference(),
            **config.how(),
            "options": _options(config),
            "output": self.output,
        }


def _options(config: FinetuneConfig) -> dict[str, Any]:
    return {**config.options(), "gene_dropout": config.gene_dropout}
