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
    from geneformer_ray.compute.cell_values import aggregate_tables
    from geneformer_ray.compute.classifier import CellClassifier
    from geneformer_ray.compute.combination import combination_table
    from geneformer_ray.compute.concordance import concordance_table
    from geneformer_ray.compute.embedding import cell_embeddings
    from geneformer_ray.compute.encoder import Encoder
    from geneformer_ray.compute.gene_pairs import gene_shift_table
    from geneformer_ray.compute.impact_mixture import mixture_table
    from geneformer_ray.compute.model_runner import ModelRunner
    from geneformer_ray.compute.null_comparison import vs_null_table
    from geneformer_ray.compute.perturbation import PerturbationPlan
    from geneformer_ray.compute.reading import Reading
    from geneformer_ray.compute.shift_anndata import shift_anndata
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
    "aggregate_tables",
    "cell_embeddings",
    "combination_table",
    "concordance_table",
    "gene_shift_table",
    "goal_shift_table",
    "mixture_table",
    "shift_anndata",
    "shift_cell",
    "shift_cells",
    "vs_null_table",
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
    "vs_null_table": "compute.null_comparison",
    "shift_anndata": "compute.shift_anndata",
    "mixture_table": "compute.impact_mixture",
    "gene_shift_table": "compute.gene_pairs",
    "concordance_table": "compute.concordance",
    "combination_table": "compute.combination",
    "aggregate_tables": "compute.cell_values",
    "shift_cell": "compute.shifts",
    "shift_cells": "compute.shifts",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: a job that reads flags should not wait for torch."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
