"""Flags of pretraining that do not go together."""

from __future__ import annotations

import pytest

from geneformer_ray.errors import InputError
from ray_jobs import pretrain
from ray_jobs.command_line import parse

REQUIRED = ["--cells", "/nowhere", "--output", "/nowhere/out"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--lora-rank", "2"], "--lora-rank: got 2 without --model; takes a --model beside it"),
        (["--lora-alpha", "2"], "--lora-alpha: got 2.0 without --lora-rank"),
        (["--validation-groups", "d1,d2"], "--validation-groups: got d1,d2 without --group; takes a --group"),
        (
            ["--group", "d", "--validation-groups", "d1", "--validation-share", "0.2"],
            "--validation-share: got 0.2 beside --validation-groups; takes nothing",
        ),
        (["--heads", "3"], "--heads: got 3; takes a divisor of the width 256"),
        (["--model", "m", "--width", "64"], "--width: got 64 beside --model; takes nothing"),
    ],
)
def test_flags_that_do_not_go_together(flags: list[str], says: str) -> None:
    with pytest.raises(InputError, match=f"^{says}"):
        pretrain.check_flags(parse(pretrain.PretrainConfig, [*REQUIRED, *flags]))


def test_flags_that_do() -> None:
    for flags in (
        [],
        ["--model", "m", "--lora-rank", "2"],
        ["--group", "donor", "--validation-groups", "d1"],
        ["--width", "64", "--heads", "2"],
    ):
        pretrain.check_flags(parse(pretrain.PretrainConfig, [*REQUIRED, *flags]))
