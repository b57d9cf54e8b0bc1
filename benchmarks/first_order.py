"""First-order deletion screens beside the exact engine: what they cost, and how well they agree.

``python -m benchmarks.first_order --output runs/benchmarks --figure docs/first_order_tradeoff.png`` trains two small
models on real cells (:mod:`benchmarks.first_order_models`: it needs the extra ``demo`` and the data file of scanpy,
``pip install --no-deps scanpy``), deletes every gene of some cells that they were not trained on, prints tables and
writes ``first_order.json``. One thread, no Ray; an otherwise idle machine, for 25 minutes. ``--models`` keeps the
models for the next time; ``--read FILE`` lays out figures that were measured before.

Every cell is screened in turn by the exact engine and in each of the other ways, one after the other, so that what else
the machine does falls on all. Shifts are towards the pair's two states (two, as ``screen`` measures them), read as the
mean of the layer before the last. Agreement is that with the exact engine's values of the same events; genes are
aggregated by their mean over the cells that hold them, those genes that half of a pair's cells hold (``screen
--min-cells``). Passes are forward passes of the cell, as the library counts what it multiplies; ``forwards`` is CPU
time over that of one plain forward pass of the same cell.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scipy.spatial.distance import cosine

from benchmarks import measure
from benchmarks.first_order_models import SOURCES, Cells, read_cells, trained
from benchmarks.first_order_pairs import VERIFIED, Pair, Setting
from benchmarks.first_order_tables import draw, tables
from geneformer_ray.compute.encoder import Encoder
from geneformer_ray.compute.execution import choose_execution

SETTINGS = {
    "PBMC": Setting("PBMC", None, 12),
    "pancreas-500": Setting("pancreas", 500, 8),
    "pancreas-1500": Setting("pancreas", 1_500, 5),
}


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Train or load the models, and measure."""
    machine = measure.machine()
    execution = choose_execution(cpus=1, gpu=False)
    content: dict[str, Any] = {"models": {}, "settings": {}}
    opened: dict[str, tuple[Cells, Encoder]] = {}
    for name in given.settings.split(","):
        setting = SETTINGS[name] if given.cells is None else replace(SETTINGS[name], cells=given.cells)
        if setting.source not in opened:
            cells = read_cells(setting.source)
            options = {"pooling": given.embedding, "seed": given.seed, "execution": execution}
            directory, scores = trained(setting.source, cells, Path(given.models), **options)
            content["models"][setting.source] = scores
            print(f"{setting.source}: {scores}", file=sys.stderr, flush=True)
            opened[setting.source] = cells, Encoder.load(directory, layer=given.layer, execution=execution)
        cells, encoder = opened[setting.source]
        content["settings"][name] = []
        for states in SOURCES[setting.source].pairs:
            pair = Pair(encoder, cells, setting, states, given.embedding)
            pair.measure()
            content["settings"][name].append(
                {
                    "pair": states,
                    "cosine": float(1 - cosine(*pair.reading.states.values())),
                    "rows": pair.rows,
                    "aggregated": pair.aggregated(),
                    "verified": [pair.verified(first, top) for first, top in VERIFIED],
                    "decomposed": pair.decomposed(),
                }
            )
    libraries = {name: version(name) for name in ("torch", "transformers")}
    return {"machine": {**machine, **libraries}, "flags": vars(given), **content}


def main() -> None:
    """Run, print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/benchmarks", help="directory for figures")
    parser.add_argument("--models", default="runs/benchmarks/models", help="directory that keeps the models")
    parser.add_argument("--settings", default=",".join(SETTINGS), help=f"comma-separated: {', '.join(SETTINGS)}")
    parser.add_argument("--cells", type=int, help="of each pair (default: 12, 8, 5)")
    parser.add_argument(
        "--embedding", default="mean", choices=("mean", "cls"), help="what types are learned from, and read"
    )
    parser.add_argument("--layer", type=int, default=-1, choices=(-1, 0), help="that is read")
    parser.add_argument("--seed", type=int, default=0, help="of the models")
    parser.add_argument("--figure", help="a picture of the trade-off is drawn here")
    parser.add_argument("--read", help="figures of an earlier run: nothing is measured")
    given = parser.parse_args()
    if given.read:
        content = json.loads(Path(given.read).read_text())
    else:
        content = json.loads(json.dumps(run(given)))
        measure.write(str(Path(given.output) / "first_order.json"), content)
    print(tables(content))
    if given.figure:
        draw(content).savefig(given.figure, dpi=110)


if __name__ == "__main__":
    main()
