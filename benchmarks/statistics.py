"""Ranking genes by their shift to the goal: seconds and peak memory, beside upstream's loop over genes.

``python -m benchmarks.statistics --output runs/benchmarks`` simulates screens (the goal's shifts of every gene in every
cell), runs both ways on each in a process of its own, prints a table and writes ``statistics.json``. It needs an
otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from scipy import stats
from statsmodels.stats.multitest import multipletests

from benchmarks import measure, simulate
from geneformer_ray.compute.shift_tables import CELL_SHIFTS
from geneformer_ray.compute.statistics import goal_shift_table

GOAL = "goal"
# Upstream draws so many values from a larger pool.
POOL = 100_000
CELLS_AT_ONCE = 100


def write_screen(directory: Path, genes: int, cells: int) -> None:
    """Write the goal's shifts of every gene in every cell, a twentieth of the genes with an effect."""
    directory.mkdir(parents=True)
    names = pa.array([[name] for name in simulate.gene_names(genes)], pa.list_(pa.string()))
    rng = np.random.default_rng(0)
    effect = 5e-4 * (np.arange(genes) % 20 == 0)
    for start in range(0, cells, CELLS_AT_ONCE):
        count = min(CELLS_AT_ONCE, cells - start)
        rows = count * genes
        columns = [
            pa.array(np.repeat([f"cell{number:09d}" for number in range(start, start + count)], genes), pa.string()),
            names.take(pa.array(np.tile(np.arange(genes), count))),
            pa.array(np.full(rows, "shift")),
            pa.array(np.full(rows, GOAL)),
            pa.array((np.tile(effect, count) + rng.normal(0, 1e-3, rows)).astype(np.float32)),
        ]
        pq.write_table(pa.table(columns, schema=CELL_SHIFTS), directory / f"part-{start:09d}.parquet")


def ours(source: str, bootstrap: int) -> dict[str, object]:
    """Read the Parquet files and rank the genes, with `bootstrap` replicates behind the intervals."""
    started = time.perf_counter()
    table = goal_shift_table(ds.dataset(source), goal=GOAL, start=None, bootstrap=bootstrap)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "p": dict(zip(table["gene"], table[f"p_{GOAL}"], strict=True))}


def upstreams_way(source: str) -> dict[str, object]:
    """Rank as upstream goes about it, from values that are in memory already, in a list for each gene.

    Written anew from its description: all values in one list, 100,000 of them drawn with seed 42 where there are more,
    a rank-sum test of each gene against them, and a data frame that grows by one row a gene. Reading upstream's own
    files, two or more a cell, is left out.
    """
    frame = ds.dataset(source).to_table(columns=["genes", "value"]).to_pandas()
    frame["gene"] = frame["genes"].str[0]
    values = {gene: group.tolist() for gene, group in frame.groupby("gene")["value"]}
    started = time.perf_counter()
    pool = [value for gene in sorted(values) for value in values[gene]]
    if len(pool) > POOL:
        random.seed(42)
        pool = random.sample(pool, POOL)
    table = pd.DataFrame()
    for gene in sorted(values):
        p = stats.ranksums(pool, values[gene]).pvalue
        row = {"Gene": [gene], "Shift_to_goal_end": [np.mean(values[gene])], "Goal_end_vs_random_pval": [p]}
        table = pd.concat([table, pd.DataFrame(row)], ignore_index=True)
    table["Goal_end_FDR"] = multipletests(table["Goal_end_vs_random_pval"], method="fdr_bh")[1]
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "p": dict(zip(table["Gene"], table["Goal_end_vs_random_pval"], strict=True))}


def one_way(way: str, source: str, result: str) -> None:
    """Run one way in this process: its seconds to standard output, its p-values to a file."""
    found = upstreams_way(source) if way == "upstream" else ours(source, int(way.removeprefix("ours_")))
    Path(result).write_text(json.dumps(found.pop("p")))
    print(json.dumps(found))


def measured(what: str, way: str, source: Path, result: Path) -> dict[str, object]:
    """Run one way in a process of its own and give its row of the table."""
    command = [sys.executable, "-m", "benchmarks.statistics", "--way", way, str(source), str(result)]
    found = measure.run(command, OMP_NUM_THREADS="1")
    seconds = json.loads(found.last_line)["seconds"]
    rows = ds.dataset(source).count_rows()
    return {
        "what": what,
        "genes": len(json.loads(result.read_text())),
        "rows": rows,
        "seconds, ranking": round(seconds, 2),
        "seconds, whole process": round(found.seconds, 1),
        "peak MiB": round(found.peak_mib),
    }


def largest_difference(one: Path, other: Path) -> float:
    """Give the largest relative difference between two runs' p-values."""
    mine, theirs = (json.loads(file.read_text()) for file in (one, other))
    return max(abs(mine[gene] - theirs[gene]) / theirs[gene] for gene in theirs)


def main() -> None:
    """Simulate, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/benchmarks", help="directory for screens and figures")
    parser.add_argument("--sizes", default="200x500,2000x500", help="GENESxCELLS, comma-separated")
    parser.add_argument("--bootstrap", type=int, default=1000, help="replicates of the third run")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each way")
    parser.add_argument("--way", help="run one way in this process (what the benchmark calls)")
    parser.add_argument("arguments", nargs="*", help="of that way: screen, file for its p-values")
    given = parser.parse_args()
    if given.way:
        one_way(given.way, *given.arguments)
        return
    output = Path(given.output).absolute()
    rows: list[dict[str, object]] = []
    agreement: dict[str, float] = {}
    for size in given.sizes.split(","):
        genes, cells = map(int, size.split("x"))
        source = output / f"screen_{size}"
        if not source.exists():
            write_screen(source, genes, cells)
        ways = {"ours_0": "ours", f"ours_{given.bootstrap}": "ours, with intervals", "upstream": "upstream's loop"}
        results = {way: output / f"p_{size}_{way}.json" for way in ways}
        for way, what in ways.items():
            for _ in range(given.repeats):
                rows.append(measured(what, way, source, results[way]))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        if genes * cells <= POOL:  # a larger pool is cut by upstream, and the p-values are then not the same
            agreement[size] = largest_difference(results["ours_0"], results["upstream"])
        for result in results.values():
            result.unlink()
    print(measure.table(rows))
    for size, difference in agreement.items():
        print(f"\n{size}: p-values differ by {difference:.1e} at most, relatively")
    content = {"machine": measure.machine(), "p_value_differences": agreement, "rows": rows}
    measure.write(str(output / "statistics.json"), content)


if __name__ == "__main__":
    main()
