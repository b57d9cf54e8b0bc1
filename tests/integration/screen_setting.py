"""Cells and a model whose screen has many items, the command that runs it, and what it takes to be the same table."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from geneformer_ray.compute.model_directory import save_model
from geneformer_ray.compute.pretraining import new_model
from geneformer_ray.data.shards import write_shard
from geneformer_ray.data.vocabulary import GeneVocabulary
from tests.conftest import random_cells
from tests.integration.processes import Job, Run

GENES, LONGEST = 1_200, 1_050
# A cell of all these is split; hundreds of small ones are joined.
LENGTHS = [1_040, *np.random.default_rng(1).integers(80, 240, size=900).tolist(), 1_050]
ITEMS_BEFORE = 5
STATES = ("--state-column", "state", "--start", "alpha", "--goal", "beta")


@dataclass(frozen=True)
class ScreenSetting:
    """Cells, a model, and the command that screens them."""

    folder: Path
    vocabulary: GeneVocabulary

    @classmethod
    def of(cls, folder: Path) -> ScreenSetting:
        """Write cells and model into a folder."""
        names = {f"GENE{number:04d}": 1.0 for number in range(GENES)}
        setting = cls(folder, GeneVocabulary.from_medians(names, max_length=LONGEST))
        torch.manual_seed(0)
        model = new_model(setting.vocabulary, layers=2, width=16, heads=2, feed_forward=24)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.4)
        save_model(model, setting.vocabulary, folder / "model")
        cells = setting.cells
        setting.write_cells("cells", cells, [f"cell{number}" for number in range(len(cells))])
        return setting

    @property
    def cells(self) -> list[np.ndarray]:
        return random_cells(self.vocabulary, np.random.default_rng(2), LENGTHS)

    def write_cells(self, name: str, cells: list[np.ndarray], ids: list[str]) -> None:
        states = [["alpha", "beta"][number % 2] for number in range(len(cells))]
        table = pa.table({"cell_id": ids, "input_ids": [cell.tolist() for cell in cells], "state": states})
        write_shard(str(self.folder / name), "", 0, table, vocabulary=self.vocabulary.digest, row_group_size=64)

    def flags(self, output: Path, *more: str, cells: str = "cells", model: str = "model") -> list[str]:
        places = {"--cells": self.folder / cells, "--model": self.folder / model, "--output": output}
        return [*(str(part) for pair in places.items() for part in pair), *more]

    def start(self, output: Path, *flags: str, cells: str = "cells", model: str = "model", **environment: str) -> Job:
        return Job("screen", *self.flags(output, *flags, cells=cells, model=model), **environment)

    def run(self, output: Path, *flags: str, **options: str) -> Run:
        with self.start(output, *flags, **options) as job:
            return job.finished()


def whole_run(setting: ScreenSetting, output: Path, *flags: str, **environment: str) -> Run:
    """Screen all cells, undisturbed and without states, and check that the run is what the tests take it for."""
    run = setting.run(output, *flags, **environment)
    assert run.code == 0, run.errors
    assert run.summary["events"] == run.summary["rows"] == sum(LENGTHS)
    assert items_done(output) > 5 * ITEMS_BEFORE
    shards_of_last = sum("cell901" in pq.read_table(file)["cell_id"].to_pylist() for file in shards(output))
    assert shards_of_last > 1
    return run


def items_done(output: Path) -> int:
    return len(list(output.glob("_progress/*.json")))


def begun(output: Path) -> bool:
    """Whether a run is in its middle: it has done some items, and has many more to do."""
    return items_done(output) >= ITEMS_BEFORE


def shards(output: Path) -> list[Path]:
    return sorted(output.glob("cell_shifts/*.parquet"))


def sorted_rows(output: Path) -> pa.Table:
    """The table in one order, each (cell, genes, state) once."""
    table = pq.read_table(output / "cell_shifts")
    keys = pa.table(
        {
            "cell": table["cell_id"],
            "genes": pc.binary_join(table["genes"].combine_chunks(), "+"),
            "state": table["state"],
            "value": table["value"],
        }
    )
    assert len(keys.group_by(["cell", "genes", "state"]).aggregate([])) == len(keys)
    return keys.sort_by([("cell", "ascending"), ("genes", "ascending"), ("state", "ascending")])


def digest_of_rows(table: pa.Table) -> str:
    sha = hashlib.sha256()
    for name in ("cell", "genes", "state"):
        sha.update("\n".join(table[name].to_pylist()).encode())
    sha.update(table["value"].to_numpy().tobytes())
    return sha.hexdigest()


def assert_same(output: Path, whole: Path) -> None:
    """The same rows, the same shards byte for byte, nothing beside them, and the same counts."""
    assert digest_of_rows(sorted_rows(output)) == digest_of_rows(sorted_rows(whole))
    assert [shard.name for shard in shards(output)] == [shard.name for shard in shards(whole)]
    assert [shard.read_bytes() for shard in shards(output)] == [shard.read_bytes() for shard in shards(whole)]
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in whole.iterdir())
    mine, theirs = (json.loads((folder / "_manifest.json").read_text()) for folder in (output, whole))
    assert mine["finished"]
    counts = ("cells", "events", "rows", "events_skipped", "rejected")
    assert [mine["summary"][name] for name in counts] == [theirs["summary"][name] for name in counts]
