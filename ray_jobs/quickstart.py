"""The main job, end to end, on the embedded pancreas cells: encode, pretrain, fine-tune, screen, serve, report."""

from __future__ import annotations

import json
import os
from typing import Any

from pydantic import Field

from geneformer_ray.compute.projection import compute_umap
from geneformer_ray.data import storage
from geneformer_ray.distribute.background import Background
from geneformer_ray.distribute.cluster import connected
from geneformer_ray.distribute.demo_service import served_answers
from geneformer_ray.manage.demo import REGISTERED_MODEL
from geneformer_ray.manage.quickstart_report import read_embeddings, write_quickstart_report
from geneformer_ray.progress import say
from ray_jobs import embed, finetune, promote, screen, screen_flags, statistics
from ray_jobs.command_line import JobConfig, build, main, place
from ray_jobs.demo_stages import FINETUNING, SPLIT, Stages, encode_and_pretrain


class QuickstartConfig(JobConfig):
    """Flags of ``python -m ray_jobs.quickstart``."""

    output: str = Field("runs/quickstart", description="directory for everything")
    seed: int = Field(0, ge=0, description="of weights, order, masks")


SCREEN = {
    "filter": {"cell_type": ["alpha"]}, "min_cells": 30, "state_column": "cell_type", "start": "alpha", "goal": "beta",
    "alternatives": ["delta"],
}  # fmt: skip


def run(config: QuickstartConfig) -> dict[str, Any]:
    """Do everything once, and write ``report.html``."""
    output = place(config.output, "--output")
    plan = {"job": "quickstart", "seed": config.seed}
    storage.claim_output(output, plan, overwrite=config.overwrite)
    stage = Stages(output)
    at = stage.at
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{at('mlflow.db')}")
    cells = {"cells": at("cells")}
    with connected():
        encode_and_pretrain(stage, config.seed)
        tuned = stage("finetune", lambda: finetune.run(build(finetune.FinetuneConfig, cells | SPLIT | FINETUNING | {
            "model": at("pretrained", "model"), "output": at("classifiers"), "seeds": [config.seed],
            "registered_model": REGISTERED_MODEL,
        })))  # fmt: skip
        champion = stage("promote", lambda: promote.run(build(promote.PromoteConfig, {
            "registered_model": REGISTERED_MODEL, "margin": -1, "allow_change": True,  # whatever the store held before
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
