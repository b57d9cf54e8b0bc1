"""Encoding: cells a second and peak memory against input size, beside upstream's way and a bare loop.

``python -m benchmarks.tokenize --output runs/benchmarks`` simulates its input (about 2,000 of 20,000 genes a cell),
runs everything on it one after the other, prints a table and writes ``tokenize.json``. It needs an otherwise idle
machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import anndata
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks import measure, simulate
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.distribute.count_inputs import CountInputs, CountReading
from geneformer_ray.distribute.tokenize import TokenizeWorker

GENES = 20_000


def ours_in_process(source: str, vocabulary: str, output: str) -> dict[str, float]:
    """Encode with the worker that Ray would run, in this process alone: file to shards."""
    started = time.perf_counter()
    inputs = CountInputs([source], CountReading(), obs_columns=["cell_type"])
    worker = TokenizeWorker(vocabulary, inputs.reading, inputs.column_types, output)
    cells = sum(worker(vars(stretch))["cells"] for stretch in inputs.stretches(output))
    return {"cells": cells, "seconds": time.perf_counter() - started}


def upstreams_way(source: str, vocabulary: str, output: str) -> dict[str, float]:
    """Encode as upstream goes about it: all cells in memory, a list of tokens a cell, from_dict, map, save.

    Written anew from its description: chunks of 512 cells, the known genes' columns taken by number, each row sliced
    twice, numpy's unstable sort, special tokens inserted one after the other in a map. What upstream does about gene
    ids is left out.
    """
    from datasets import Dataset

    genes = GeneVocabulary.load(vocabulary)
    started = time.perf_counter()
    cells = anndata.read_h5ad(source)
    tokens = np.array([genes.tokens[name] for name in cells.var_names])
    medians = np.array([genes.medians[name] for name in cells.var_names])
    known = np.flatnonzero([name in genes.tokens for name in cells.var_names])
    totals = np.asarray(cells.X.sum(axis=1)).ravel()
    encoded: list[NDArray[np.integer]] = []
    for start in range(0, cells.n_obs, 512):
        chunk = slice(start, start + 512)
        values = cells[chunk, known].X.multiply(1 / totals[chunk, None]).multiply(10_000).multiply(1 / medians).tocsr()
        for number in range(values.shape[0]):
            encoded.append(tokens[values[number].indices][np.argsort(-values[number].data)])
    dataset = Dataset.from_dict({"input_ids": encoded, "cell_type": cells.obs["cell_type"].tolist()})

    def cut(cell: dict) -> dict:
        ids = np.insert(cell["input_ids"][: genes.max_length - 2], 0, genes.cls_id)
        ids = np.insert(ids, len(ids), genes.eos_id)
        return {"input_ids": ids, "length": len(ids)}

    dataset.map(cut).save_to_disk(output)
    return {"cells": len(dataset), "seconds": time.perf_counter() - started}


def bare_loop(source: str, vocabulary: str, output: str) -> dict[str, float]:
    """Sort scipy rows in a plain loop, stably, with the matrix in memory already and nothing written."""
    genes = GeneVocabulary.load(vocabulary)
    cells = anndata.read_h5ad(source)
    tokens = np.array([genes.tokens[name] for name in cells.var_names])
    medians = np.array([genes.medians[name] for name in cells.var_names])
    matrix, totals = cells.X, np.asarray(cells.X.sum(axis=1)).ravel()
    started = time.perf_counter()
    encoded = []
    for number in range(matrix.shape[0]):
        start, stop = matrix.indptr[number], matrix.indptr[number + 1]
        columns = matrix.indices[start:stop]
        values = matrix.data[start:stop] / totals[number] * 10_000 / medians[columns]
        encoded.append(tokens[columns[np.argsort(-values, kind="stable")]])
    return {"cells": len(encoded), "seconds": time.perf_counter() - started}


WAYS = {"ours_in_process": ours_in_process, "upstreams_way": upstreams_way, "bare_loop": bare_loop}


def measured(what: str, command: list[str], cells: int, cpus: list[int]) -> dict[str, object]:
    """Run one command and give its row of the table."""
    result = measure.run(command, cpus, OMP_NUM_THREADS="1")
    summary = json.loads(result.last_line)
    encoding = cells / summary["seconds"] if "seconds" in summary else _rate_of_shards(summary["output"])
    return {
        "what": what,
        "cpus": len(cpus),
        "cells": cells,
        "seconds": round(result.seconds, 1),
        "cells/s, whole command": round(cells / result.seconds),
        "cells/s, without start-up": round(encoding),
        "peak MiB": round(result.peak_mib),
    }


def _rate_of_shards(output: str) -> float:
    """Give cells a second from the first shard to the last, as the files' times tell."""
    shards = sorted(Path(output).glob("part-*.parquet"), key=lambda shard: shard.stat().st_mtime)
    cells = sum(pq.read_metadata(shard).num_rows for shard in shards[1:])
    return cells / (shards[-1].stat().st_mtime - shards[0].stat().st_mtime)


def main() -> None:
    """Simulate, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/benchmarks", help="directory for inputs and figures")
    parser.add_argument("--cells", default="10000,100000", help="sizes, comma-separated")
    parser.add_argument("--slow-cells", type=int, default=10_000, help="cells for upstream's way and the bare loop")
    parser.add_argument("--way", choices=sorted(WAYS), help="run one way in this process (what the benchmark calls)")
    parser.add_argument("arguments", nargs="*", help="of that way: input, vocabulary, output")
    given = parser.parse_args()
    if given.way:
        print(json.dumps(WAYS[given.way](*given.arguments)))
        return
    output = Path(given.output).absolute()
    output.mkdir(parents=True, exist_ok=True)
    vocabulary, scratch = output / "vocabulary", output / "scratch"
    simulate.write_vocabulary(vocabulary, GENES)
    rows: list[dict[str, object]] = []
    sizes = [int(size) for size in given.cells.split(",")]
    for cells in sorted({*sizes, given.slow_cells}):
        source = output / f"cells_{cells}.h5ad"
        if not source.exists():
            simulate.write_h5ad(source, cells, GENES)
        job = [sys.executable, "-m", "ray_jobs.tokenize", "--input", str(source), "--vocabulary", str(vocabulary)]
        job += ["--obs-columns", "cell_type", "--output", str(scratch)]
        way = [sys.executable, "-m", "benchmarks.tokenize", "--way"]
        arguments = [str(source), str(vocabulary), str(scratch)]
        runs = [("ours, one process", [*way, "ours_in_process", *arguments], [0])] if cells in sizes else []
        runs += [("ours, the job on Ray", job, list(range(n))) for n in (1, 2)] if cells in sizes else []
        if cells == given.slow_cells:
            runs.append(("bare loop in memory, nothing written", [*way, "bare_loop", *arguments], [0]))
            runs.append(("upstream's way", [*way, "upstreams_way", *arguments], [0]))
        for what, command, cpus in runs:
            shutil.rmtree(scratch, ignore_errors=True)
            rows.append(measured(what, command, cells, cpus))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    shutil.rmtree(scratch, ignore_errors=True)
    print(measure.table(rows))
    about = simulate.describe(output / f"cells_{max(sizes)}.h5ad")
    measure.write(str(output / "tokenize.json"), {"machine": measure.machine(), "input": about, "rows": rows})


if __name__ == "__main__":
    main()
