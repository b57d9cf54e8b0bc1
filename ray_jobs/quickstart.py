"""The main job, end to end, on the embedded pancreas cells: encode, pretrain, fine-tune, screen, serve, report."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Any

from pydantic import Field

from geneformer_ray.compute.projection import compute_umap
from geneformer_ray.data import storage
from geneformer_ray.distribute.background import Background
from geneformer_ray.distribute.cluster import connected
from geneformer_ray.distribute.demo_service import served_answers
from geneformer_ray.manage.demo import GROUPS, REGISTERED_MODEL, prepare
from geneformer_ray.manage.quickstart_report import read_embeddings, write_quickstart_report
from geneformer_ray.progress import say
from ray_jobs import embed, finetune, pretrain, promote, screen, screen_flags, statistics, tokenize
from ray_jobs.command_line import JobConfig, build, main, place

if TYPE_CHECKING:
    from collections.abc import Callable


class QuickstartConfig(JobConfig):
    """Flags of ``python -m ray_jobs.quickstart``."""

    output: str = Field("runs/quickstart", description="directory for everything")
    seed: int = Field(0, ge=0, description="of weights, order, masks")


PRETRAINING = {
    "layers": 2, "width": 64, "heads": 4, "feed_forward": 128, "initializer_range": 0.08, "epochs": 4,
    "learning_rate": 5e-3, "weight_decay": 0.01, "tokens_per_batch": 2048, "num_workers": 2,
}  # fmt: skip
FINETUNING = {
    "pooling": ["first_gene", "cls", "mean"], "epochs": 8, "learning_rate": 2e-3, "weight_decay": 0.01,
    "warmup_fraction": 0.05, "class_weights": "balanced", "label_smoothing": 0.05, "gene_dropout": 0.2,
    "tokens_per_batch": 2048, "num_workers": 2,
}  # fmt: skip
SCREEN = {
    "filter": {"cell_type": ["alpha"]}, "min_cells": 30, "state_column": "cell_type", "start": "alpha", "goal": "beta",
    "alternatives": ["delta"],
}  # fmt: skip


class _Stages:
    """Runs the stages in turn and keeps their summaries and seconds."""

    def __init__(self, output: str) -> None:
        self.output = output
        self.seconds: dict[str, float] = {}
        self.summaries: dict[str, dict[str, Any]] = {}

    def at(self, *parts: str) -> str:
        return storage.join(self.output, *parts)

    def __call__(self, name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        say(f"== {name}")
        started = time.monotonic()
        self.summaries[name] = run()
        self.seconds[name] = round(time.monotonic() - started, 1)
        return self.summaries[name]


def run(config: QuickstartConfig) -> dict[str, Any]:
    """Do everything once, and write ``report.html``."""
    output = place(config.output, "--output")
    plan = {"job": "quickstart", "seed": config.seed}
    storage.claim_output(output, plan, overwrite=config.overwrite)
    stage = _Stages(output)
    at = stage.at
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{at('mlflow.db')}")
    data = stage("data", lambda: prepare(output))
    cells = {"cells": at("cells")}
    with connected():
        stage("tokenize", lambda: tokenize.run(build(tokenize.TokenizeConfig, {
            "input": [data["h5ad"]], "vocabulary": data["vocabulary"], "output": at("cells"),
            "obs_columns": ["cell_type", "library"],
        })))  # fmt: skip
        stage("pretrain", lambda: pretrain.run(build(pretrain.PretrainConfig, cells | PRETRAINING | {
            "vocabulary": data["vocabulary"], "output": at("pretrained"), "filter": {"library": [GROUPS["train"]]},
            "seed": config.seed,
        })))  # fmt: skip
        tuned = stage("finetune", lambda: finetune.run(build(finetune.FinetuneConfig, cells | FINETUNING | {
            "model": at("pretrained", "model"), "output": at("classifiers"), "label": "cell_type", "group": "library",
            **{f"{role}_groups": [group] for role, group in GROUPS.items()}, "seeds": [config.seed],
            "registered_model": REGISTERED_MODEL,
        })))  # fmt: skip
        champion = stage("promote", lambda: promote.run(build(promote.PromoteConfig, {
            "registered_model": REGISTERED_MODEL,
        })))  # fmt: skip
        model = cells | {"model": f"models:/{REGISTERED_MODEL}@champion"}
        stage("embed", lambda: embed.run(build(embed.EmbedConfig, model | {
            "output": at("embeddings"), "state_column": "cell_type",
        })))  # fmt: skip
        screened = stage("screen", lambda: screen.run(build(screen_flags.ScreenConfig, model | SCREEN | {
            "output": at("screen"), "state_embeddings": at("embeddings", "states.json"),
        })))  # fmt: skip
        cell_map = Background(compute_umap, read_embeddings(at("embeddings"))[1])  # while serving starts
        stage("statistics", lambda: statistics.run(build(statistics.StatisticsConfig, {
            "shifts": at("screen"), "output": at("statistics"),
        })))  # fmt: skip
        served = stage("serve", lambda: served_answers(output, champion, config.seed))
        stage("report", lambda: write_quickstart_report(output, stage.summaries, cell_map.result()))
    summary = {
        "pooling": tuned["pooling"],
        "baseline": tuned["baseline"],
        "champion": {key: champion[key] for key in ("name", "version", "pooling", "macro_f1", "accuracy")},
        "screen_rows": screened["rows"],
        "served_equals_offline": served["equal"],
        "seconds": stage.seconds | {"total": round(sum(stage.seconds.values()), 1)},
    }
    if not served["equal"]:
        raise RuntimeError(
            f"served and offline answers differ by {served['largest_difference']:.2g}: {json.dumps(summary)}"
        )
    storage.finish_output(output, plan, json.loads(json.dumps(summary)))
    say(f"report: {at('report.html')}")
    return summary


if __name__ == "__main__":
    main(QuickstartConfig, run, __doc__ or "")
