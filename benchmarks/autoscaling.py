"""From no worker at all: a screen and a fine-tune on two workers each bring nodes, finish, and the nodes go again.

    python -m benchmarks.autoscaling [--output runs/autoscaling] [--figure docs/autoscaling.png]

Ray's own autoscaler, whose nodes are processes of this machine. Prints a table, writes what was seen every half second
as JSON, and draws it. How fast a cloud brings a machine is the cloud's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.fake_cluster import FakeCluster, fake_cluster
from benchmarks.measure import machine
from geneformer_ray.compute.model_directory import save_model
from geneformer_ray.compute.pretraining import new_model
from geneformer_ray.data.shards import write_shard
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.manage.figure_style import BLUE, GREEN, GREY, VERMILLION, dress, new_figure

GENES, LENGTH, CELLS = 1_200, 600, 48
NODES, IDLE_MINUTES = 2, 0.2
SECONDS_BETWEEN_SAMPLES = 0.5
SECONDS_UNTIL_GONE = 120
SECONDS_OF_A_RATE = 3
WORKERS = ("_Actor", "MapWorker", "RayTrainWorker")  # in the names of the actors that do the work


@dataclass
class Seen:
    """What was seen of a cluster and the jobs on it; seconds are since its start.

    Parameters
    ----------
    samples
        ``second``, ``nodes`` (beside the head), ``actors`` (that work).
    jobs
        A job's name, when it began and ended, its exit code, and its progress: ``second`` and units ``done``.
    metrics
        Our own among Ray's metrics: the highest value of each series, by node, name and labels.
    """

    samples: list[dict[str, float]] = field(default_factory=list)
    jobs: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)

    def nodes(self, first: float = 0, last: float = np.inf) -> list[float]:
        """Give the nodes beside the head between two times."""
        return [sample["nodes"] for sample in self.samples if first <= sample["second"] <= last]

    def gone_after(self, job: int) -> float:
        """Give the seconds from a job's end until no node was left."""
        end = self.jobs[job]["end"]
        return min(sample["second"] for sample in self.samples if sample["second"] > end and not sample["nodes"]) - end


def watch(cluster: FakeCluster, seen: Seen, started: float, over: threading.Event) -> None:
    """Ask the dashboard's API, as anybody with the token can, until all is over."""
    with httpx.Client(
        base_url=cluster.dashboard, headers={"Authorization": f"Bearer {cluster.token}"}, timeout=10
    ) as client:
        while not over.wait(SECONDS_BETWEEN_SAMPLES):
            nodes = [node for node in _listed(client, "nodes") if node["state"] == "ALIVE" and not node["is_head_node"]]
            actors = [
                actor
                for actor in _listed(client, "actors")
                if actor["state"] == "ALIVE" and any(name in actor["class_name"] for name in WORKERS)
            ]
            for target in client.get("/api/prometheus/sd").raise_for_status().json()[0]["targets"]:
                note_metrics(target, seen.metrics)
            second = round(time.monotonic() - started, 1)
            seen.samples.append({"second": second, "nodes": len(nodes), "actors": len(actors)})


def note_metrics(target: str, into: dict[str, float]) -> None:
    """Ask a node, as Prometheus would; one that just went does not answer."""
    try:
        exported = httpx.get(f"http://{target}/metrics", timeout=5).text
    except httpx.TransportError:
        return
    for line in exported.splitlines():
        if line.startswith("ray_geneformer_job_"):
            series, value = line.rsplit(" ", 1)
            into[f"{target} {series}"] = max(float(value), into.get(f"{target} {series}", 0))


def _listed(client: httpx.Client, what: str) -> list[dict[str, Any]]:
    answer = client.get(f"/api/v0/{what}").raise_for_status().json()
    found: list[dict[str, Any]] = answer["data"]["result"]["result"]
    return found


def run_job(cluster: FakeCluster, seen: Seen, started: float, name: str, flags: Sequence[str]) -> None:
    """Run a job on the cluster; its log in JSON tells its progress."""
    job: dict[str, Any] = {"name": name, "begin": time.monotonic() - started, "progress": []}
    begun = datetime.now().astimezone()
    environment = {**cluster.environment, "GENEFORMER_LOG_FORMAT": "json"}
    done = subprocess.run(
        [sys.executable, "-m", f"ray_jobs.{name}", *flags], env=environment, text=True, capture_output=True,
        timeout=600, check=False,
    )  # fmt: skip
    for line in done.stderr.splitlines():
        if line.startswith("{") and "done" in (said := json.loads(line)) and said["message"] == name:
            after = (datetime.fromisoformat(said["time"]) - begun).total_seconds()
            job["progress"].append({"second": round(job["begin"] + after, 1), "done": said["done"]})
            job["unit"] = said["unit"]
    job |= {"end": time.monotonic() - started, "code": done.returncode, "errors": done.stderr}
    job["summary"] = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}
    seen.jobs.append(job)


def until_no_node_is_left(seen: Seen) -> None:
    """Wait until the nodes are gone again."""
    deadline = time.monotonic() + SECONDS_UNTIL_GONE
    while seen.samples[-1]["nodes"] and time.monotonic() < deadline:
        time.sleep(SECONDS_BETWEEN_SAMPLES)


def make_inputs(folder: Path) -> tuple[Path, Path]:
    """Write cells of two types and three donors, and a small random model."""
    vocabulary = GeneVocabulary.from_medians({f"GENE{n:04d}": 1.0 for n in range(GENES)}, max_length=LENGTH)
    torch.manual_seed(0)
    save_model(new_model(vocabulary, layers=3, width=64, heads=2, feed_forward=128), vocabulary, folder / "model")
    rng = np.random.default_rng(0)
    table = pa.table(
        {
            "cell_id": [f"cell{number}" for number in range(CELLS)],
            "input_ids": [rng.permutation(np.arange(2, 2 + GENES))[:LENGTH].tolist() for _ in range(CELLS)],
            "cell_type": [("alpha", "beta")[number % 2] for number in range(CELLS)],
            "donor": [f"donor{number // 2 % 3}" for number in range(CELLS)],
        }
    )
    write_shard(str(folder / "cells"), "", 0, table, vocabulary=vocabulary.digest)
    return folder / "cells", folder / "model"


def observe(folder: Path) -> Seen:
    """Run both jobs, one after the other's nodes are gone; give what was seen."""
    cells, model = make_inputs(folder)
    seen, over = Seen(), threading.Event()
    with fake_cluster(cpus_of_node=1, most_nodes=NODES, idle_minutes=IDLE_MINUTES) as cluster:
        cluster.environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"
        started = time.monotonic()
        watcher = threading.Thread(target=watch, args=(cluster, seen, started, over))
        watcher.start()
        try:
            time.sleep(5)
            common = ("--cells", str(cells), "--model", str(model))
            workers = ("--min-workers", str(NODES), "--max-workers", str(NODES))
            run_job(cluster, seen, started, "screen", (*common, "--output", str(folder / "screen"), *workers))
            until_no_node_is_left(seen)
            label = (
                "--label",
                "cell_type",
                "--group",
                "donor",
                "--epochs",
                "30",
                "--tokens-per-batch",
                "1200",
                "--min-cells",
                "2",
            )
            flags = (*common, *label, "--num-workers", str(NODES), "--output", str(folder / "finetune"))
            run_job(cluster, seen, started, "finetune", flags)
            until_no_node_is_left(seen)
            time.sleep(3)
        finally:
            over.set()
            watcher.join()
    return seen


def draw(seen: Seen) -> Figure:
    """Draw nodes, actors and throughput over time, the jobs behind them."""
    figure, (nodes, actors, rate) = new_figure(9.6, 7.0, rows=3)
    seconds = [sample["second"] for sample in seen.samples]
    nodes.step(seconds, seen.nodes(), where="post", color=BLUE, linewidth=2)
    actors.step(seconds, [sample["actors"] for sample in seen.samples], where="post", color=VERMILLION, linewidth=2)
    for job in seen.jobs:
        second, done = np.array(_spaced([(job["begin"], 0)], job["progress"])).T
        highest = np.diff(done) / np.maximum(np.diff(second), 1e-9)
        share = highest / max(highest.max(initial=0), 1e-9)
        rate.stairs(share, second, color=GREEN, linewidth=2, baseline=None)
        text = f"{job['name']}: at most {highest.max(initial=0):,.0f} {job.get('unit', 'units')}/s"
        rate.annotate(text, (job["begin"], 1.1), fontsize=9, color=GREY)
    for axes, title, unit in (
        (nodes, "Nodes beside the head", "nodes"),
        (actors, "Actors that work", "actors"),
        (rate, "Throughput", "share of its highest"),
    ):
        dress(axes, title, "seconds" if axes is rate else "", unit)
        axes.set_xlim(0, max(seconds))
        axes.set_ylim(0, 1.3 if axes is rate else NODES + 0.5)
        for job in seen.jobs:
            axes.axvspan(job["begin"], job["end"], color=GREY, alpha=0.12, linewidth=0)
    for axes in (nodes, actors):
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _spaced(points: list[tuple[float, float]], progress: Sequence[dict[str, float]]) -> list[tuple[float, float]]:
    """Give the points of a job's progress, the last of those that follow each other too fast for a rate."""
    for point in progress:
        if len(points) > 1 and point["second"] - points[-1][0] < SECONDS_OF_A_RATE:
            points.pop()
        points.append((point["second"], point["done"]))
    return points


def table(seen: Seen) -> str:
    """Say for each job when nodes came, how many, and when they were gone."""
    lines = ["| job | seconds | first node after | nodes at most | nodes gone after its end |", "|---|---|---|---|---|"]
    for number, job in enumerate(seen.jobs):
        during = [s for s in seen.samples if job["begin"] <= s["second"] <= job["end"]]
        came = min(sample["second"] for sample in during if sample["nodes"]) - job["begin"]
        lines.append(
            f"| `{job['name']}` | {job['end'] - job['begin']:.0f} | {came:.0f} s | "
            f"{max(sample['nodes'] for sample in during):.0f} | {seen.gone_after(number):.0f} s |"
        )
    return "\n".join(lines)


def main() -> None:
    """Observe, print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/autoscaling"))
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    folder = arguments.output.absolute()
    folder.mkdir(parents=True)
    seen = observe(folder)
    (folder / "seen.json").write_text(json.dumps({"machine": machine(), **asdict(seen)}, indent=1))
    print(table(seen))
    if arguments.figure:
        draw(seen).savefig(arguments.figure, dpi=110)
    for job in seen.jobs:
        if job["code"]:
            raise SystemExit(f"{job['name']} ended with exit code {job['code']}:\n{job['errors']}")


if __name__ == "__main__":
    main()
