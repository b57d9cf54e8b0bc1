"""A finetune of its own process and cluster, each step slowed down, that is killed as soon as it has come so far."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE = 300  # seconds, on a busy machine

_DRIVER = """
import sys
import geneformer_ray.distribute
from geneformer_ray.distribute import finetune as distributed
from geneformer_ray.distribute.train_workers import fit_all
from ray_jobs import finetune
from ray_jobs.command_line import main

def slow(config):
    import time
    from geneformer_ray.distribute import finetune, streamed_training
    take = streamed_training.train_step
    def step(*values, **options):
        time.sleep(0.3)
        return take(*values, **options)
    streamed_training.train_step = step
    finetune.finetune_worker(config)

distributed.fit_all = lambda _, runs, **options: fit_all(slow, runs, **options)
main(finetune.FinetuneConfig, finetune.run, "")
"""


def kill_finetune(flags: Sequence[str], output: Path, reached: str) -> None:
    """Run ``finetune`` with `flags`, and kill it once a path of the pattern `reached` lies in its output."""
    driver = subprocess.Popen(
        [sys.executable, "-c", _DRIVER, *flags], cwd=REPOSITORY,
        env={name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
    )  # fmt: skip
    deadline = time.monotonic() + PATIENCE
    while not list(output.glob(reached)):
        assert time.monotonic() < deadline and driver.poll() is None
        time.sleep(0.1)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    time.sleep(3)  # its cluster ends with it
    assert not list(output.glob("trials/*/finished.json"))
