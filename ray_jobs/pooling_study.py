"""Which pooling? Fine-tune every pooling with several seeds, and compare them in pairs and with a baseline."""

from __future__ import annotations

import os
from typing import Any

from pydantic import Field

from geneformer_ray.compute.classifier import POOLINGS
from geneformer_ray.data import storage
from geneformer_ray.data.cells import CellTable
from geneformer_ray.distribute.cluster import connected
from geneformer_ray.errors import InputError
from geneformer_ray.manage.pooling_report import markdown, summarise, write_findings
from geneformer_ray.manage.pooling_study import Study, analyse, baseline_predictions, read_trial
from geneformer_ray.manage.trials import Trial
from geneformer_ray.progress import say
from ray_jobs import finetune
from ray_jobs.command_line import build, main, place
from ray_jobs.demo_stages import FINETUNING, SPLIT, Stages, encode_and_pretrain
from ray_jobs.model_argument import open_model

# Other cells come with these; the embedded ones have their own.
OF_CELLS = ("cells", "label", "group", "model")
# The quickstart's two workers of half the tokens make the same steps; with one a trial, two trials train at once.
OF_DEMO: dict[str, Any] = {**SPLIT, **FINETUNING, "num_workers": 1, "tokens_per_batch": 4096}


class PoolingStudyConfig(finetune.FinetuneConfig):
    """Flags of ``python -m ray_jobs.pooling_study``: those of finetune, and a few of its own."""

    # A study registers models where it is told to; the embedded cells' are toys.
    of_settings = frozenset()

    cells: str = Field("", description="table of tokenised cells; without it the embedded pancreas cells")
    label: tuple[str, ...] = Field((), description="column of cell types or states to learn; comes with --cells")
    group: str | None = Field(None, description="column of donors, libraries, individuals; comes with --cells")
    model: str = Field("", description="pretrained model: directory, hub id, or models:/NAME@ALIAS; with --cells")
    output: str = Field(description="directory for tables, figure and trials")
    pooling: tuple[str, ...] = Field(POOLINGS, description="what is compared, comma-separated")
    seeds: tuple[int, ...] = Field((0, 1, 2), description="of weights and order: the spread is over them")
    bootstrap: int = Field(2000, ge=100, description="draws of cells for the intervals")


def run(config: PoolingStudyConfig) -> dict[str, Any]:
    """Fine-tune, compare, write ``pooling_study.csv``, ``pooling_differences.csv`` and ``pooling_study.png``."""
    given = [name for name in OF_CELLS if getattr(config, name)]
    if given and len(given) < len(OF_CELLS):
        missing = ", ".join(f"--{name}" for name in OF_CELLS if name not in given)
        raise InputError(missing, "nothing", "a value beside the other three of --cells, --label, --group and --model")
    if len(config.label) > 1 or config.task != "cells":
        got = f"--label {','.join(config.label)}" if config.task == "cells" else f"--task {config.task}"
        raise InputError("--label", got, "one column of cell labels: it is their poolings that are compared")
    if len(config.seeds) < 2:
        raise InputError("--seeds", len(config.seeds), "two seeds or more, better three: the spread is over them")
    output = place(config.output, "--output")
    plan = {"job": "pooling_study", **config.model_dump(mode="json", exclude={"overwrite", "output"})}
    inputs = [place(config.cells, "--cells"), open_model(config.model, config.vocabulary).source] if given else []
    storage.claim_output(output, plan, overwrite=config.overwrite, resume=True, inputs=inputs)
    stage = Stages(output)
    flags: dict[str, Any] = {
        name: getattr(config, name) for name in config.model_fields_set - {"bootstrap", "overwrite"}
    }
    flags |= {"pooling": config.pooling, "seeds": config.seeds, "output": stage.at("classifiers")}
    with connected():
        if not given:
            os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{stage.at('mlflow.db')}")
            encode_and_pretrain(stage, seed=0)
            made = {"cells": stage.at("cells"), "model": stage.at("pretrained", "model")}
            flags = {**OF_DEMO, **made, **flags}
        settings = build(finetune.FinetuneConfig, flags)
        tuned = stage("finetune", lambda: finetune.run(settings), settings.output)
    findings = analyse(_study(settings, tuned), replicates=config.bootstrap)
    say(f"\n{markdown(findings)}\n")
    summary: dict[str, Any] = {
        **summarise(findings),
        "seeds": list(config.seeds),
        **{name: tuned[name] for name in ("labels", "dropped_labels", "cells", "folds", "mlflow") if name in tuned},
        "files": write_findings(findings, output),
        "output": output,
        "seconds": stage.seconds,
    }
    say(summary["reading"])
    storage.finish_output(output, plan, summary)
    return summary


def _study(settings: finetune.FinetuneConfig, tuned: dict[str, Any]) -> Study:
    """Read what finetune left: its trials' predictions and its split, on which the baseline is fitted."""
    table = CellTable(place(settings.cells, "--cells"))
    vocabulary = open_model(settings.model, settings.vocabulary).vocabulary
    trials = [Trial(one["pooling"], one["seed"], one.get("fold")) for one in tuned["trials"]]
    splits = {trial.fold: "split.json" if trial.fold is None else f"split-fold{trial.fold}.json" for trial in trials}
    manifests = {fold: storage.read_json(storage.join(settings.output, name)) for fold, name in splits.items()}
    groups = table.column(str(settings.group), "--group").astype(str)
    return Study(
        labels=tuned["labels"],
        trials={trial: read_trial(trial, settings.output) for trial in trials},
        baseline={
            fold: baseline_predictions(table, vocabulary, its, settings.label[0]) for fold, its in manifests.items()
        },
        group_of=dict(zip(map(str, table.cell_ids), groups, strict=True)),
    )


if __name__ == "__main__":
    main(PoolingStudyConfig, run, __doc__ or "")
