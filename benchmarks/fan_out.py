"""Fan-out of a screen: what it costs beside the bare engine, what a second worker brings, and what an item costs.

``python -m benchmarks.fan_out --output runs/benchmarks`` simulates cells, runs everything one after the other, prints
two tables and writes ``fan_out.json``. It needs an otherwise idle machine of two CPUs.

- ``engine``: :func:`geneformer_ray.compute.shifts.shift_cells` over the items of the screen, in one process and one
  thread; nothing is written, nothing is scheduled. Also two such processes at once, each with all the items: what this
  machine gives two workers at most.
- ``job``: ``python -m ray_jobs.screen`` on the same cells, with one and with two workers of one thread each.
- items that do nothing, on two workers: what the driver and all processes hold, and what an item costs.

Events a second leave out imports and the start of Ray and of the model: they are counted from the first item that is
finished to the last. The model is small, so that an item takes seconds; a larger one makes the overhead smaller.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measure

LAYERS, WIDTH, HEADS, FEED_FORWARD = 3, 64, 2, 128
GENES, LENGTH = 2_000, 512
# Looking at some forty processes takes milliseconds, which a machine of two CPUs that are both at work does not have.
SECONDS_BETWEEN_SAMPLES = 2.0


def write_inputs(folder: Path, cells: int) -> None:
    """Simulate cells of one length and a model with random weights."""
    import pyarrow as pa
    import torch

    from geneformer_ray.compute.model_directory import save_model
    from geneformer_ray.compute.pretraining import new_model
    from geneformer_ray.data.shards import write_shard
    from geneformer_ray.data.vocabulary import GeneVocabulary

    names = {f"GENE{number:04d}": 1.0 for number in range(GENES)}
    vocabulary = GeneVocabulary.from_medians(names, max_length=LENGTH)
    torch.manual_seed(0)
    model = new_model(vocabulary, layers=LAYERS, width=WIDTH, heads=HEADS, feed_forward=FEED_FORWARD)
    save_model(model, vocabulary, folder / "model")
    rng = np.random.default_rng(0)
    lists = [(rng.permutation(GENES)[:LENGTH] + 2).tolist() for _ in range(cells)]
    table = pa.table({"cell_id": [str(number) for number in range(cells)], "input_ids": lists})
    write_shard(str(folder / "cells"), "", 0, table, vocabulary=vocabulary.digest, row_group_size=16)


def engine(given: argparse.Namespace) -> dict[str, float]:
    """Compute the items of the screen in this process."""
    from geneformer_ray.compute.model_runner import ModelRunner
    from geneformer_ray.compute.perturbation import PerturbationPlan
    from geneformer_ray.compute.reading import Reading
    from geneformer_ray.compute.shifts import shift_cells
    from geneformer_ray.data.cells import CellTable
    from geneformer_ray.distribute.screen_items import ScreenItems, count_cells

    table, runner = CellTable(f"{given.folder}/cells"), ModelRunner(f"{given.folder}/model", cpus=1, gpu=False)
    plan, vocabulary = PerturbationPlan(), runner.vocabulary
    counts = count_cells(table, np.arange(len(table)), plan, vocabulary, runner.encoder.max_length)
    items = list(ScreenItems.of_model(np.arange(len(table)), counts, runner.encoder.config, -1))
    events, started = 0, 0.0
    for number, item in enumerate(items):
        sequences = table.read(np.array(item["rows"])).input_ids
        shifts = shift_cells(runner.encoder, sequences, plan, Reading(), vocabulary)
        # The first item warms up, as it does in the job.
        events += sum(map(len, shifts)) if number else 0
        started = started or time.perf_counter()
    return {"events/s": events / (time.perf_counter() - started), "items": len(items)}


class Nothing:
    """Does nothing."""

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Give the item's number back, in an answer as long as a screen's."""
        return {"item": item["item"], "counts": [0] * len(item["rows"])}


def nothing(given: argparse.Namespace) -> dict[str, float]:
    """Do so many items that do nothing."""
    from geneformer_ray.distribute.cluster import connected
    from geneformer_ray.distribute.fan_out import Pool, fan_out

    with connected(cpus=2):
        items = ({"item": number, "rows": [number] * 4} for number in range(given.items))
        first, done = 0.0, 0
        for _ in fan_out(Nothing, {}, items, Pool(2, 2)):
            first = first or time.perf_counter()
            done += 1
        seconds = time.perf_counter() - first
    if done != given.items:
        raise SystemExit(f"{done:,} of {given.items:,} items were done")
    held = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {"ms an item": 1000 * seconds / (done - 1), "driver MiB": int(held.split()[1]) / 1024}


WAYS = {"engine": engine, "nothing": nothing}


def rate_of_job(output: Path) -> float:
    """Give events a second from the first item finished to the last, as the files' times tell."""
    files = sorted(output.glob("_progress/*.json"), key=lambda file: file.stat().st_mtime)
    events = sum(json.loads(file.read_text())["events"] for file in files[1:])
    return events / (files[-1].stat().st_mtime - files[0].stat().st_mtime)


def screens(folder: Path, cells: int) -> list[dict[str, object]]:
    """Time the engine and the job with one and two workers."""
    write_inputs(folder, cells)
    way = [sys.executable, "-m", "benchmarks.fan_out", "--way", "engine", "--folder", str(folder)]
    run = measure.run(way, [0], SECONDS_BETWEEN_SAMPLES, OMP_NUM_THREADS="1")
    bare = json.loads(run.last_line)
    rows = [_row("engine", 1, run, bare["events/s"], bare["events/s"], bare["items"])]
    with ThreadPoolExecutor(2) as both:
        runs = [both.submit(measure.run, way, [cpu], SECONDS_BETWEEN_SAMPLES, OMP_NUM_THREADS="1") for cpu in (0, 1)]
    rate = sum(json.loads(run.result().last_line)["events/s"] for run in runs)
    rows.append(_row("two engines", 2, runs[0].result(), rate, bare["events/s"], bare["items"]))
    job = [sys.executable, "-m", "ray_jobs.screen", "--cells", str(folder / "cells"), "--model", str(folder / "model")]
    for workers in (1, 2):
        output = folder / f"workers_{workers}"
        run = measure.run(
            [*job, "--output", str(output), "--max-workers", str(workers)], [0, 1], SECONDS_BETWEEN_SAMPLES
        )
        rows.append(_row("job", workers, run, rate_of_job(output), bare["events/s"], bare["items"]))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def _row(what: str, workers: int, run: measure.Measured, rate: float, bare: float, items: float) -> dict[str, object]:
    return {
        "what": what,
        "workers": workers,
        "items": int(items),
        "seconds": round(run.seconds, 1),
        "events/s": f"{rate:.0f}",
        "times engine": f"{rate / bare:.2f}",
        "peak MiB": round(run.peak_mib),
    }


def idle_items(sizes: list[int]) -> list[dict[str, object]]:
    """Time items that do nothing."""
    rows: list[dict[str, object]] = []
    for items in sizes:
        way = [sys.executable, "-m", "benchmarks.fan_out", "--way", "nothing", "--items", str(items)]
        run = measure.run(way)
        found = json.loads(run.last_line)
        rows.append(
            {
                "items": items,
                "seconds": round(run.seconds, 1),
                "ms an item": f"{found['ms an item']:.2f}",
                "driver's peak MiB": round(found["driver MiB"]),
                "peak MiB of all": round(run.peak_mib),
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Simulate, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/benchmarks", help="directory for inputs and figures")
    parser.add_argument("--cells", type=int, default=120, help=f"cells of {LENGTH} genes, all of them deleted; 0: none")
    parser.add_argument("--idle", default="1000,10000,100000", help="numbers of items that do nothing, comma-separated")
    parser.add_argument("--way", choices=sorted(WAYS), help="run one way in this process (what the benchmark calls)")
    parser.add_argument("--folder", help="inputs of that way")
    parser.add_argument("--items", type=int, help="of that way")
    given = parser.parse_args()
    if given.way:
        print(json.dumps(WAYS[given.way](given)))
        return
    folder = Path(given.output).absolute() / "fan_out"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows = screens(folder, given.cells) if given.cells else []
    idle = idle_items([int(size) for size in given.idle.split(",")])
    shutil.rmtree(folder)
    print("\n\n".join(measure.table(found) for found in (rows, idle) if found))
    content = {"machine": measure.machine(), "flags": vars(given), "screens": rows, "idle": idle}
    measure.write(str(Path(given.output) / "fan_out.json"), content)


if __name__ == "__main__":
    main()
