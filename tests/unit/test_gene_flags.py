"""Which flags a training of gene classes takes."""

from __future__ import annotations

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
