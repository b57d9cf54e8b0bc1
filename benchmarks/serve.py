"""Serving: how long requests wait, and how much of the bare model's rate arrives, by proxy, with and without batches.

``python -m benchmarks.serve --output runs/benchmarks`` makes a classifier with random weights, starts the real service
several times over, asks it over HTTP from another process, prints a table and writes ``serve.json``. It needs an
otherwise idle machine of two CPUs: the replica has one, and the clients, the proxy and Ray share the other.

- ``bare forward``: the model's own classification of cells in one process and thread, one at a time and 32 at once.
- ``service``: one cell a request, as token ids; every client asks again as soon as it has its answer. Each answer is
  compared with the offline one.
- ``unbatched``: the same application, in which every cell is computed alone.

Milliseconds are those that a client waits; ``of bare`` is the share of the bare rate at 32 cells at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measure

# V1-10M's shape.
LAYERS, WIDTH, HEADS, FEED_FORWARD = 6, 256, 4, 512
GENES, LENGTH, LABELS = 25_000, 512, 20
CELLS = 64
CLIENTS = (1, 8, 32)
WARM_SECONDS = 3.0
PROXIES = {
    "default": {},
    "throughput mode": {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"},
    "HAProxy": {"RAY_SERVE_ENABLE_HA_PROXY": "1"},
}


def write_model(folder: Path) -> None:
    """Make a classifier with random weights, and cells with their offline probabilities."""
    import torch

    from geneformer_ray.compute.classifier import new_classifier
    from geneformer_ray.compute.model_directory import save_model
    from geneformer_ray.compute.pretraining import new_model
    from geneformer_ray.data.vocabulary import GeneVocabulary
    from serve.found_model import find_served_model
    from serve.model import ServedModel

    vocabulary = GeneVocabulary.from_medians({f"GENE{number:05d}": 1.0 for number in range(GENES)}, max_length=2_048)
    torch.manual_seed(0)
    trunk = new_model(vocabulary, layers=LAYERS, width=WIDTH, heads=HEADS, feed_forward=FEED_FORWARD)
    save_model(trunk, vocabulary, folder / "trunk")
    labels = [f"type {number}" for number in range(LABELS)]
    classifier, own = new_classifier(folder / "trunk", vocabulary, labels, "mean")
    classifier.save(folder / "model", own)
    rng = np.random.default_rng(0)
    cells = [(rng.permutation(GENES)[:LENGTH] + 2).astype(np.int32) for _ in range(CELLS)]
    odds = ServedModel(find_served_model(str(folder / "model"))).classify(cells)
    np.savez(folder / "cells.npz", cells=np.stack(cells), odds=odds)


def bare(folder: Path, seconds: float) -> dict[str, float]:
    """Classify in this process."""
    from geneformer_ray.compute.execution import choose_execution, use_threads
    from serve.found_model import find_served_model
    from serve.model import ServedModel

    use_threads(1)
    model = ServedModel(find_served_model(str(folder / "model")), execution=choose_execution(cpus=1, gpu=False))
    cells = list(np.load(folder / "cells.npz")["cells"])
    rates = {}
    for size in (1, 32):
        model.classify(cells[:size])
        started, times = time.perf_counter(), []
        while time.perf_counter() - started < seconds:
            before = time.perf_counter()
            model.classify(cells[:size])
            times.append(time.perf_counter() - before)
        rates[f"cells/s {size}"] = size * len(times) / sum(times)
        rates[f"ms {size}"] = 1000 * float(np.median(times))
    return rates


def service(folder: Path, *, batches: bool) -> None:
    """Serve until standard input ends; the first line of standard output is the URL."""
    from geneformer_ray.distribute.cluster import connected
    from serve.run import running
    from serve.settings import ServeSettings

    settings = {"model": str(folder / "model"), **({} if batches else {"batch_tokens": 1})}
    with connected(cpus=2), running(ServeSettings.read(settings)) as url:
        print(url, flush=True)
        sys.stdin.read()


async def ask(url: str, folder: Path, clients: int, seconds: float) -> dict[str, float]:
    """Ask from so many clients; give waiting times and the rate, once warm."""
    import aiohttp

    held = np.load(folder / "cells.npz")
    bodies = [json.dumps({"cells": [{"input_ids": cell.tolist()}], "top": 1}).encode() for cell in held["cells"]]
    best = held["odds"].max(axis=1)
    times: list[float] = []
    started = time.perf_counter() + WARM_SECONDS
    end = started + seconds

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        turn = number
        while time.perf_counter() < end:
            before = time.perf_counter()
            headers = {"Content-Type": "application/json"}
            async with session.post(f"{url}/v1/classify", data=bodies[turn % CELLS], headers=headers) as response:
                answer = await response.json()
            after = time.perf_counter()
            if response.status != 200 or abs(answer["cells"][0]["probability"] - best[turn % CELLS]) > 1e-5:
                raise SystemExit(f"a wrong answer: {response.status} {str(answer)[:200]}")
            # What ends within the time counts, whenever it began: at the start as many have begun as go on at the end.
            if started <= after <= end:
                times.append(after - before)
            turn += clients

    connector = aiohttp.TCPConnector(limit=clients)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(120)) as session:
        await asyncio.gather(*(client(session, number) for number in range(clients)))
    return {
        "cells/s": len(times) / seconds,
        "p50 ms": 1000 * float(np.percentile(times, 50)),
        "p99 ms": 1000 * float(np.percentile(times, 99)),
    }


def served(
    what: str, folder: Path, seconds: float, found: dict[str, float], **environment: str
) -> list[dict[str, object]]:
    """Start a service and ask it from 1, 8 and 32 clients."""
    command = [sys.executable, "-m", "benchmarks.serve", "--way", what, "--folder", str(folder)]
    rows: list[dict[str, object]] = []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise SystemExit(f"{what} did not start")
        for clients in CLIENTS:
            figures = asyncio.run(ask(url, folder, clients, seconds))
            rows.append(
                {
                    "clients": clients,
                    **{name: f"{value:.1f}" for name, value in figures.items()},
                    "of bare": f"{figures['cells/s'] / found['cells/s 32']:.2f}",
                    "p50 above bare, ms": f"{figures['p50 ms'] - found['ms 1']:.1f}" if clients == 1 else "",
                }
            )
        process.communicate(input="")
    return rows


def main() -> None:
    """Serve, ask, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/benchmarks", help="directory for inputs and figures")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement, after 3 s to get warm")
    parser.add_argument("--proxies", default=",".join(PROXIES), help="which proxies, comma-separated")
    parser.add_argument(
        "--way", choices=["bare", "batched", "unbatched"], help="run one way (what the benchmark calls)"
    )
    parser.add_argument("--folder", help="inputs of that way")
    given = parser.parse_args()
    if given.way == "bare":
        print(json.dumps(bare(Path(given.folder), given.seconds)))
        return
    if given.way:
        service(Path(given.folder), batches=given.way == "batched")
        return
    folder = Path(given.output).absolute() / "serve"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_model(folder)
    way = [sys.executable, "-m", "benchmarks.serve", "--way", "bare", "--folder", str(folder)]
    found = json.loads(measure.run([*way, "--seconds", str(given.seconds)], [0], OMP_NUM_THREADS="1").last_line)
    print(f"bare forward: {found['cells/s 1']:.1f} cells/s one at a time ({found['ms 1']:.1f} ms), "
          f"{found['cells/s 32']:.1f} cells/s 32 at once\n", flush=True)  # fmt: skip
    rows: list[dict[str, Any]] = []
    for proxy in given.proxies.split(","):
        for what in ("batched", "unbatched"):
            for row in served(what, folder, given.seconds, found, **PROXIES[proxy]):
                rows.append({"proxy": proxy, "what": what, **row})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    shutil.rmtree(folder)
    print(measure.table(rows))
    content = {"machine": measure.machine(), "flags": vars(given), "bare": found, "service": rows}
    measure.write(str(Path(given.output) / "serve.json"), content)


if __name__ == "__main__":
    main()
