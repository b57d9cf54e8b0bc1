"""Which flags of fine-tuning go together."""

from __future__ import annotations

from typing import Any

import pytest

from geneformer_ray.errors import InputError
from ray_jobs.command_line import parse
from ray_jobs.finetune_flags import FinetuneConfig, check_flags

PLACES = ["--cells", "cells", "--model", "model", "--output", "out"]
CELLS = ["--label", "cell_type", "--group", "donor"]
GENES = ["--task", "genes", "--gene-classes", "classes.json"]


def config(*flags: str) -> FinetuneConfig:
    given = parse(FinetuneConfig, [*PLACES, *flags], prog="finetune")
    check_flags(given)
    return given


def test_one_label_several_labels_and_genes() -> None:
    assert config(*CELLS).label == ("cell_type",)
    several = config("--label", "cell_type,sex", "--group", "donor", "--task-weights", "cell_type=1,sex=0.5")
    assert several.label == ("cell_type", "sex")
    assert several.task_weights == {"cell_type": 1.0, "sex": 0.5}
    assert config(*GENES, "--folds", "3").gene_classes == "classes.json"


@pytest.mark.parametrize(
    ("flags", "field", "words"),
    [
        ([], "--label", "requires it"),
        (["--label", "cell_type"], "--group", "requires it"),
        (["--task", "genes"], "--gene-classes", "requires it"),
        ([*GENES, "--label", "cell_type"], "--label", "no use"),
        ([*GENES, "--pooling", "mean"], "--pooling", "no use"),
        ([*GENES, "--gene-dropout", "0.1"], "--gene-dropout", "left out of a step"),
        ([*CELLS, "--gene-classes", "classes.json"], "--gene-classes", "no use"),
        (["--label", "a,a", "--group", "donor"], "--label", "each once"),
        ([*CELLS, "--pooling", "max"], "--pooling", "first_gene"),
        ([*CELLS, "--pooling", "mean,mean"], "--pooling", "each once"),
        ([*CELLS, "--seeds", "0,-1"], "--seeds", "from 0 on"),
        ([*CELLS, "--seeds", ""], "--seeds", "one or several"),
        ([*CELLS, "--lora-rank", "4", "--freeze-layers", "1"], "--freeze-layers", "beside --lora-rank"),
        ([*CELLS, "--lora-rank", "4", "--freeze-embeddings"], "--freeze-embeddings", "beside --lora-rank"),
        ([*CELLS, "--lora-alpha", "4"], "--lora-alpha", "--lora-rank"),
        ([*CELLS, "--task-weights", "cell_type"], "--task-weights", "NAME=NUMBER"),
        ([*CELLS, "--task-weights", "a=1,a=2"], "--task-weights", "each name once"),
        ([*CELLS, "--task-weights", "cell_type=much"], "--task-weights", "number"),
        ([*CELLS, "--task-weights", "cell_type=2"], "--task-weights", "nothing beside one --label"),
        (["--label", "a,b", "--group", "donor", "--task-weights", "c=2"], "--task-weights", "weights of a, b"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_in_one_line(flags: list[str], field: str, words: str) -> None:
    with pytest.raises(InputError) as refused:
        config(*flags)
    assert refused.value.field == field
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_the_plan_has_the_weights_of_several_labels_alone() -> None:
    # Else a run of before, of one label, could not go on.
    assert config(*CELLS).labels_in_plan() == {"label": "cell_type"}
    several = config("--label", "a,b", "--group", "donor", "--task-weights", "b=2")
    assert several.labels_in_plan() == {"label": ["a", "b"], "task_weights": {"a": 1.0, "b": 2.0}}


def test_the_plan_knows_of_adapters_only_where_there_are_some() -> None:
    # Else a run of before could not go on.
    assert "lora" not in config(*CELLS).how()
    lora: dict[str, Any] = config(*CELLS, "--lora-rank", "4").how()["lora"]
    assert (lora["rank"], lora["alpha"]) == (4, 8.0)


@pytest.mark.parametrize("flags", [["--folds", "3"], ["--token-predictions"], ["--no-examples"], ["--lora-rank", "2"]])
def test_what_genes_take(flags: list[str]) -> None:
    assert config(*GENES, *flags).task == "genes"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([*GENES, "--folds", "2"], "--folds: got 2; takes 3 or more with --task genes"),
        ([*GENES, "--examples"], "--examples: got a value beside --task genes"),
        ([*GENES, "--group", "donor"], "--group: got a value beside --task genes"),
        ([*CELLS, "--token-predictions"], "--token-predictions: got a value beside --task cells"),
    ],
)
def test_what_only_one_task_has_a_use_for(flags: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        config(*flags)
