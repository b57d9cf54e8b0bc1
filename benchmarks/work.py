"""What work of the models multiplies, what this project was measured to multiply a second, and what an item costs.

Work is counted by the library's own accounting (:meth:`ScreenItems.flops`); rates are read from ``BENCHMARKS.md``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.screen import SHAPES as MEASURED_SHAPES
from geneformer_ray.distribute.screen_items import CellCounts, ScreenItems

__all__ = ["LAYERS_NOT_READ", "SHAPES", "Driver", "Rates", "Shape", "figures"]

BENCHMARKS = Path(__file__).parents[1] / "BENCHMARKS.md"
# Forward, and twice as much backward: for what enters a product, and for its weights.
PASSES_OF_TRAINING = 3
# A screen reads the layer before the last, so that the last one is not computed (`--layer -1`).
LAYERS_NOT_READ = 1
# ScreenItems takes no token for cheaper than a floor, which schedules tiny models; this many layers are above it.
MANY_LAYERS = 1_000
CORES = 2  # of the machine of BENCHMARKS.md: screens use both in one process, and two workers train
# What the driver keeps of a cell: its row, its events and its length (CellCounts), eight bytes each.
BYTES_OF_A_CELL = 24


@dataclass(frozen=True)
class Shape:
    """The trunk of a model: layers, width, width of the feed-forward product, and the longest input."""

    layers: int
    width: int
    feed_forward: int
    positions: int

    def items(self, layers: int, length: int, cells: int = 1) -> ScreenItems:
        """Cut deletions of every gene of so many cells into the items of a screen."""
        lengths = np.full(cells, length, dtype=np.int64)
        counts = CellCounts(events=lengths, lengths=lengths, unfit=0)
        return ScreenItems(np.arange(cells), counts, layers, self.width, self.feed_forward)

    def flops(self, length: int, layers: int) -> float:
        """Count the multiplications and additions of one pass over a sequence, through so many layers."""
        many = self.items(MANY_LAYERS, length).flops(np.array([length]))
        return float(many[0]) / MANY_LAYERS * layers

    def event(self, length: int) -> float:
        """Count one perturbed cell of a screen; an embedding of a cell costs the same."""
        return self.flops(length, self.layers - LAYERS_NOT_READ)

    def screen(self, length: int) -> float:
        """Count a cell with every gene deleted, one at a time, and its original."""
        return (length + 1) * self.event(length)

    def epoch(self, length: int) -> float:
        """Count one cell in an epoch of fine-tuning, head aside."""
        return PASSES_OF_TRAINING * self.flops(length, self.layers)


# Upstream's published configurations (config.json of Geneformer-V1-10M, -V2-104M and -V2-316M).
SHAPES = {
    **{
        name: Shape(layers, width, feed_forward, positions)
        for name, (layers, width, _, feed_forward, _, positions, _) in MEASURED_SHAPES.items()
    },
    "V2-316M": Shape(18, 1_152, 4_608, 4_096),
}


def figures(section: str, **row: str) -> dict[str, float]:
    """Read the numbers of the first row in a section of BENCHMARKS.md whose columns have these values."""
    head: list[str] = []
    text = BENCHMARKS.read_text(encoding="utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")] if line.startswith("| ") else []
        if not cells:
            head = []
        elif not head:
            head = cells
        elif len(cells) == len(head):
            found = dict(zip(head, cells, strict=True))
            if all(found.get(name.replace("_", " ")) == value for name, value in row.items()):
                return {name: float(value.rstrip("%")) for name, value in found.items() if _is_number(value)}
    raise SystemExit(f"BENCHMARKS.md, {section}: no row with {row}")


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[0-9.]+%?", text) is not None


@dataclass(frozen=True)
class Rates:
    """GFLOP/s: measured of one core of the CPU of BENCHMARKS.md, assumed of one GPU."""

    core_screen: dict[str, float]
    core_training: float
    gpu: float

    @classmethod
    def measured(cls, gpu: float) -> Rates:
        """Turn measured rates into GFLOP/s, with the counting of this module; `gpu` is taken as it is."""
        screens = {}
        for name in MEASURED_SHAPES:
            row = figures("Screens", shape=name, tokens="2048", what="ours, float32")
            screens[name] = row["perturbed cells/s"] * SHAPES[name].event(2_048) / 1e9 / CORES
        # Not measured: the largest measured model stands for it.
        screens["V2-316M"] = screens["V2-104M"]
        # V1-10M's shape cut to two layers, cells of 512 tokens.
        row = figures("Training", lengths="uniform", workers="2", what="ours")
        training = row["tokens/s"] / 512 * PASSES_OF_TRAINING * SHAPES["V1-10M"].flops(512, 2) / 1e9 / CORES
        return cls(screens, training, gpu)


@dataclass(frozen=True)
class Driver:
    """What items cost the driver of a screen, as it was measured: milliseconds each; MiB for all, and more for each."""

    ms: float
    mib: float
    mib_an_item: float

    @classmethod
    def measured(cls) -> Driver:
        """Read the fan-out of items that do nothing; the memory's slope where pipelines are full."""
        some, many = (figures("Fan-out", items=items) for items in ("10000", "100000"))
        slope = (many["driver's peak MiB"] - some["driver's peak MiB"]) / (many["items"] - some["items"])
        return cls(some["ms an item"], some["driver's peak MiB"], slope)

    def gib(self, cells: int, items: float) -> float:
        """Give what a screen of so many cells and items takes."""
        return (self.mib + items * self.mib_an_item + cells * BYTES_OF_A_CELL / 2**20) / 1_024
