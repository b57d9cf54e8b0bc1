"""What jobs and the service ask a cluster for, taken from the code that asks, for the tests of cluster files.

Imports ray, and starts none.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

__all__ = ["asked_by_the_service", "asked_for", "is_offered", "literals_in_code"]

ROOT = Path(__file__).parents[2]
# By what calls, and by which of their keywords, Ray is asked.
CALLS = {"deployment", "filter", "flat_map", "map", "map_batches", "map_groups", "options", "remote", "ScalingConfig"}
KEYWORDS = {"num_cpus": "CPU", "num_gpus": "GPU"}
OTHERS = {"resources", "accelerator_type", "memory", "label_selector"}


@functools.cache
def asked_for() -> dict[str, dict[str, float]]:
    """Give what each kind of task, actor, worker and replica asks for, by a name for it."""
    from geneformer_ray.distribute.background import _call
    from geneformer_ray.distribute.fan_out import Pool

    pool = Pool(1, 1)
    configured = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text(encoding="utf-8"))
    return {
        "a background call": {"CPU": float(_call._default_options["num_cpus"])},
        "an actor of a pool": {"CPU": pool.cpus, "GPU": pool.gpus},
        "an actor of a pool on a GPU": {"CPU": pool.cpus, "GPU": _most("gpus_per_worker")},
        "a worker of a training": _of_training(gpu=False),
        "a worker of a training on a GPU": _of_training(gpu=True),
        "a replica": asked_by_the_service({}),
        "a replica of serve/config.yaml": asked_by_the_service(configured["applications"][0]["args"]),
        "a replica on a GPU": asked_by_the_service({"num_gpus": 1}),
        **{f"num_cpus, num_gpus in {place}": asked for place, asked in literals_in_code()},
    }


def asked_by_the_service(args: Mapping[str, Any]) -> dict[str, float]:
    """Give what a replica asks for, as Serve is told when the application is built with these arguments."""
    from serve.app import build

    deployment: Any = build(dict(args))._bound_deployment
    options = deployment.ray_actor_options
    return {"CPU": float(options["num_cpus"]), "GPU": float(options["num_gpus"])}


def is_offered(asked: Mapping[str, float], offered: Mapping[str, float]) -> bool:
    """Whether a node with these resources has room for it, alone."""
    return all(offered.get(name, 0) >= number for name, number in asked.items())


def literals_in_code() -> list[tuple[str, dict[str, float]]]:
    """Give each place in the code that writes such a number down; refuse a kind of resource that is not known here.

    So no new task or actor asks for something that no test looks at.
    """
    return [found for package in ("geneformer_ray", "ray_jobs", "serve") for found in _in_package(ROOT / package)]


def _in_package(package: Path) -> Iterator[tuple[str, dict[str, float]]]:
    for file in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or ast.unparse(node.func).split(".")[-1] not in CALLS:
                continue
            place = f"{file.relative_to(ROOT)}:{node.lineno}"
            for keyword in node.keywords:
                assert keyword.arg not in OTHERS, f"{place} asks for {keyword.arg}: offer it in the cluster files"
                if keyword.arg in KEYWORDS and isinstance(keyword.value, ast.Constant):
                    yield place, {KEYWORDS[keyword.arg]: float(keyword.value.value)}


def _of_training(*, gpu: bool) -> dict[str, float]:
    """Give what Ray Train is told for the flags' defaults."""
    from geneformer_ray.distribute.train_workers import TrainingRun, trainer
    from ray_jobs.training_flags import TrainingConfig

    workers = TrainingConfig(gpu=gpu).workers()
    prepared = trainer(lambda config: None, TrainingRun("run", {}, 0), None, workers, "/nowhere", "fp32")
    return dict(prepared.scaling_config._resources_per_worker_not_none)


def _most(flag: str) -> float:
    """Give the most that a flag of a pool takes."""
    from ray_jobs.pool_flags import PoolConfig

    bounds = [limit.le for limit in PoolConfig.model_fields[flag].metadata if hasattr(limit, "le")]
    return float(bounds[0])
