"""Geneformer on Ray: the library.

What a notebook needs, without a cluster or a tracking store::

    from geneformer_ray import CellTable, ModelRunner, PerturbationPlan, Reading, shift_cell

    runner = ModelRunner("runs/quickstart/pretrained/model")
    cell = CellTable("runs/quickstart/cells").read([0]).input_ids[0]
    shifts = shift_cell(runner.encoder, cell, PerturbationPlan(), Reading(), runner.vocabulary)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geneformer_ray.compute.classifier import CellClassifier
    from geneformer_ray.compute.embedding import cell_embeddings
    from geneformer_ray.compute.encoder import Encoder
    from geneformer_ray.compute.model_runner import ModelRunner
    from geneformer_ray.compute.perturbation import PerturbationPlan
    from geneformer_ray.compute.reading import Reading
    from geneformer_ray.compute.shifts import CellShifts, shift_cell, shift_cells
    from geneformer_ray.compute.statistics import goal_shift_table
    from geneformer_ray.data.cells import CellTable
    from geneformer_ray.data.rank_value import RankValueEncoder
    from geneformer_ray.data.vocabulary import GeneVocabulary
    from geneformer_ray.errors import GeneformerRayError, InputError

__all__ = [
    "CellClassifier",
    "CellShifts",
    "CellTable",
    "Encoder",
    "GeneVocabulary",
    "GeneformerRayError",
    "InputError",
    "ModelRunner",
    "PerturbationPlan",
    "RankValueEncoder",
    "Reading",
    "cell_embeddings",
    "goal_shift_table",
    "shift_cell",
    "shift_cells",
]

_WHERE = {
    "CellClassifier": "compute.classifier",
    "CellShifts": "compute.shifts",
    "CellTable": "data.cells",
    "Encoder": "compute.encoder",
    "GeneVocabulary": "data.vocabulary",
    "GeneformerRayError": "errors",
    "InputError": "errors",
    "ModelRunner": "compute.model_runner",
    "PerturbationPlan": "compute.perturbation",
    "RankValueEncoder": "data.rank_value",
    "Reading": "compute.reading",
    "cell_embeddings": "compute.embedding",
    "goal_shift_table": "compute.statistics",
    "shift_cell": "compute.shifts",
    "shift_cells": "compute.shifts",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: a job that reads flags should not wait for torch."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
