"""The flags of adapters: which go together, and what they give."""

from __future__ import annotations

from typing import Any

import pytest

from geneformer_ray.compute.lora import LoraOptions
from geneformer_ray.errors import InputError
from ray_jobs import finetune, pretrain
from ray_jobs.command_line import parse
from ray_jobs.lora_flags import LoraFlags

OTHERS = {
    "--lora-alpha": "4", "--lora-dropout": "0.1", "--lora-projections": "key", "--lora-layers": "0,2",
}  # fmt: skip


def given(*flags: str) -> LoraFlags:
    return parse(LoraFlags, flags)


def test_without_a_rank_there_are_no_adapters() -> None:
    assert given().lora() is None


@pytest.mark.parametrize("flag", OTHERS)
def test_what_says_how_adapters_are_made_needs_a_rank(flag: str) -> None:
    with pytest.raises(InputError, match=rf"^{flag}: got .* without --lora-rank; takes a --lora-rank beside it"):
        given(flag, OTHERS[flag]).lora()


def test_a_default_that_is_given_needs_one_too() -> None:
    """Whoever writes it expects it to count."""
    with pytest.raises(InputError, match=r"--lora-dropout: got 0\.0 without --lora-rank"):
        given("--lora-dropout", "0").lora()


def test_the_scale_is_twice_the_rank_unless_it_is_given() -> None:
    expected = {"rank": 3, "alpha": 6.0, "dropout": 0.0, "projections": ("query", "value"), "layers": None}
    assert given("--lora-rank", "3").lora() == expected
    flags = [part for pair in OTHERS.items() for part in pair]
    assert LoraOptions(**given("--lora-rank", "3", *flags).lora() or {}) == LoraOptions(3, 4.0, 0.1, ("key",), (0, 2))


@pytest.mark.parametrize(
    ("flag", "value"), [("rank", "0"), ("rank", "many"), ("alpha", "0"), ("dropout", "1"), ("layers", "first")]
)
def test_numbers_that_no_adapter_takes_are_refused(flag: str, value: str) -> None:
    with pytest.raises(InputError, match=f"^--lora-{flag}: got"):
        given("--lora-rank", "2", f"--lora-{flag}", value)


def test_no_layers_at_all_are_not_all_layers(model_config: Any) -> None:
    for flag in ("layers", "projections"):
        options = LoraOptions(**given("--lora-rank", "2", f"--lora-{flag}", "").lora() or {})
        with pytest.raises(InputError, match=f"^--lora-{flag}: got nothing"):
            options.check(model_config)


@pytest.fixture
def model_config() -> Any:
    from transformers import BertConfig

    return BertConfig(num_hidden_layers=2)


@pytest.mark.parametrize("kind", [finetune.FinetuneConfig, pretrain.PretrainConfig])
def test_both_trainings_have_them(kind: type[LoraFlags]) -> None:
    assert set(LoraFlags.model_fields) <= set(kind.model_fields)
