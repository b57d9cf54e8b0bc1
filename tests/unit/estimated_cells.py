"""A model for cells long enough to be estimated, a table of such cells, and a worker that screens them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from geneformer_ray.compute.encoder import Encoder
from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.compute.first_order import FirstOrder
from geneformer_ray.compute.model_directory import save_model
from geneformer_ray.compute.perturbation import PerturbationPlan
from geneformer_ray.compute.pretraining import new_model
from geneformer_ray.compute.reading import Reading
from geneformer_ray.compute.screen_method import ScreenMethod
from geneformer_ray.data.shards import write_shard
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.distribute.screen_worker import ScreenWorker
from tests.conftest import random_cells, randomise

GENES, LONGEST = 150, 130
STATES = {name: np.random.default_rng(number).normal(size=16).astype(np.float32) for number, name in enumerate("ab")}
READING = Reading(states=STATES)
FULL, HOLD = PerturbationPlan(), PerturbationPlan(ranks="hold")
SETTINGS = FirstOrder(tolerance=0.3, held_out=4, anchors=4)
ESTIMATES = ScreenMethod(first_order=SETTINGS)


class EstimatedCells:
    """Cells of some lengths, in a folder."""

    def __init__(self, folder: Path, lengths: list[int], genes: int = GENES, longest: int = LONGEST) -> None:
        names = ["<pad>", "<mask>", *(f"GENE{number:03d}" for number in range(genes))]
        self.folder, self.lengths = folder, lengths
        self.vocabulary = GeneVocabulary({name: number for number, name in enumerate(names)}, max_length=longest)
        torch.manual_seed(1)
        model = new_model(self.vocabulary, layers=3, width=16, heads=2, feed_forward=24)
        randomise(model, 0.25)
        save_model(model, self.vocabulary, folder / "model")
        self.cells = random_cells(self.vocabulary, np.random.default_rng(3), lengths)
        self.ids = [f"cell{number}" for number in range(len(lengths))]
        columns = {
            "cell_id": self.ids,
            "input_ids": [cell.tolist() for cell in self.cells],
            "state": ["a"] * len(lengths),
        }
        write_shard(str(folder / "cells"), "", 0, pa.table(columns), vocabulary=self.vocabulary.digest)

    @property
    def encoder(self) -> Encoder:
        return Encoder.load(self.folder / "model", execution=choose_execution(cpus=1, gpu=False))

    @property
    def names(self) -> np.ndarray:
        return np.array(self.vocabulary.names, dtype=object)

    def worker(self, output: Path, method: ScreenMethod, plan: PerturbationPlan = FULL, **runner: Any) -> ScreenWorker:
        return ScreenWorker(
            cells=str(self.folder / "cells"),
            runner={"model": str(self.folder / "model"), "cpus": 1, "gpu": False, **runner},
            plan=asdict(plan),
            reading=asdict(READING),
            output=str(output),
            tables=["cell_shifts"],
            method=method,
        )
