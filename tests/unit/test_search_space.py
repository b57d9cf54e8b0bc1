"""The space of a search: what may be declared, what is drawn, and how both are refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import BertConfig

from geneformer_ray.compute.search_space import Choices, Range, SearchSpace
from geneformer_ray.errors import InputError
from ray_jobs.command_line import build
from ray_jobs.search_flags import SearchConfig, check_flags, final_flags, read_space, trial_flags

KINDS = {"learning_rate": float, "accumulate": int, "schedule": None}
ENTRIES = {
    "learning_rate": Range(1e-5, 1e-2, log=True),
    "accumulate": Range(1, 3, whole=True),
    "schedule": Choices(("linear", "cosine")),
}
DEFAULTS = {"learning_rate": 5e-5, "accumulate": 1, "schedule": "linear"}
MODEL = BertConfig(num_hidden_layers=2)


# ------------------------------------------------------------------------ draws


def test_a_trial_draws_the_same_whatever_else_is_drawn() -> None:
    space, turned = SearchSpace(ENTRIES), SearchSpace(dict(reversed(ENTRIES.items())))
    many = space.draws(30, 4, DEFAULTS)
    assert many[0] == DEFAULTS
    assert space.draws(7, 4, DEFAULTS) == many[:7] == turned.draws(7, 4, DEFAULTS)
    assert space.draws(30, 5, DEFAULTS)[1:] != many[1:]
    assert all(many.count(values) == 1 for values in many)


def test_draws_stay_within_bounds_and_fill_them_evenly() -> None:
    drawn = SearchSpace(ENTRIES).draws(3000, 0, DEFAULTS)[1:]
    rates = [values["learning_rate"] for values in drawn]
    assert all(1e-5 <= rate <= 1e-2 and rate == float(f"{rate:.4g}") for rate in rates)
    # Of three orders of magnitude, each has a third.
    for low in (-5, -4, -3):
        assert sum(low <= math.log10(rate) < low + 1 for rate in rates) == pytest.approx(1000, abs=100)
    for name, several in (("accumulate", (1, 2, 3)), ("schedule", ("linear", "cosine"))):
        for value in several:
            share = sum(values[name] == value for values in drawn) / len(drawn)
            assert share == pytest.approx(1 / len(several), abs=0.04)


def test_a_small_space_is_drawn_whole_and_no_further() -> None:
    space = SearchSpace({name: ENTRIES[name] for name in ("accumulate", "schedule")})
    whole = space.draws(6, 0, DEFAULTS)
    assert len(whole) == 6 and all(whole.count(values) == 1 for values in whole)
    with pytest.raises(InputError, match="--trials: got 7; takes at most 6"):
        space.draws(7, 0, DEFAULTS)
    assert len(space.draws(7, 0, {**DEFAULTS, "accumulate": 8})) == 7
    # Drawn numbers have four digits.
    with pytest.raises(InputError, match="takes at most 3"):
        SearchSpace({"learning_rate": Range(0.1, 0.1001)}).draws(4, 0, DEFAULTS)


# ----------------------------------------------------------------- declarations


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "mapping"),
        ({"epochs": {"low": 1, "high": 2}}, "epochs"),
        ({"learning-rate": 1e-3}, "learning_rate: 0.001"),
        ({"learning_rate": {"low": 1, "hihg": 2}}, "hihg"),
        ({"learning_rate": {"low": "much", "high": 2}}, "numbers"),
        ({"learning_rate": {"low": 2, "high": 1}}, "below"),
        ({"learning_rate": {"low": 0, "high": 1, "log": True}}, "above 0"),
        ({"accumulate": {"low": 1, "high": 2.5}}, "whole numbers"),
        ({"schedule": {"low": 1, "high": 2}}, "schedule"),
        ({"schedule": {"choices": []}}, "one value or more"),
        ({"schedule": {"choices": ["linear", "linear"]}}, "different"),
        ({"accumulate": {"choices": [1]}, "--accumulate": {"choices": [2]}}, "twice"),
    ],
)
def test_a_wrong_entry_is_named(content: object, named: str) -> None:
    with pytest.raises(InputError, match=named) as refused:
        SearchSpace.of(content, KINDS)
    assert refused.value.field == "--space"


def test_yaml_may_write_a_small_number_without_a_point() -> None:
    space = SearchSpace.of(yaml.safe_load("learning_rate: {low: 1e-5, high: 1e-2, log: true}"), KINDS)
    assert space.entries == {"learning_rate": ENTRIES["learning_rate"]}


# ---------------------------------------------------------------- flags of trials


def search(folder: Path, space: dict[str, Any], **flags: Any) -> SearchConfig:
    (folder / "space.yaml").write_text(yaml.safe_dump(space))
    given = {"cells": "c", "model": "m", "output": "o", "label": ("type",), "group": "donor", "trials": 3}
    return build(SearchConfig, {**given, "space": str(folder / "space.yaml"), **flags})


@pytest.mark.parametrize(
    ("space", "flags", "named"),
    [
        ({"learning_rate": {"low": -1, "high": 1}}, {}, "learning_rate with low, -1"),
        ({"label_smoothing": {"low": 0.1, "high": 1.5}}, {}, "label_smoothing with high, 1.5"),
        ({"schedule": {"choices": ["linear", "sideways"]}}, {}, "schedule.*sideways"),
        ({"freeze_layers": {"choices": [0, 3]}}, {}, "freeze_layers with choices: 3; takes 0 to 2"),
        ({"pooling": {"choices": ["mean", "median"]}}, {}, 'pooling with choices: "median", median'),
        ({"pooling": {"choices": [["mean", "cls"]]}}, {}, "one pooling a choice"),
        ({"lora_rank": {"choices": [2, 4, 8]}}, {"freeze_layers": 1}, "--freeze-layers 1 in trial 1"),
        # One trial, of the flags as given: none of these is drawn.
        ({"freeze_layers": {"choices": ["3"]}}, {"trials": 1}, 'freeze_layers with choices: "3"; takes 0 to 2'),
        ({"lora_layers": {"choices": [[0], [2]]}}, {"lora_rank": 2, "trials": 1}, r"lora_layers with choices: \[2\]"),
        ({"lora_projections": {"choices": ["up", "gate"]}}, {"lora_rank": 2, "trials": 1}, '"gate"; takes some of'),
        ({"lora_alpha": {"choices": [1, 2]}}, {}, "lora_alpha without lora_rank; takes lora_rank beside it"),
    ],
)
def test_a_value_that_its_flag_refuses_is_named(
    tmp_path: Path, space: dict[str, Any], flags: dict[str, Any], named: str
) -> None:
    config = search(tmp_path, space, **flags)
    with pytest.raises(InputError, match=named) as refused:
        trial_flags(config, read_space(config), MODEL)
    assert refused.value.field == "--space"


def test_the_first_trial_is_of_the_flags_as_given_and_the_others_are_drawn(tmp_path: Path) -> None:
    space = {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}, "pooling": {"choices": ["cls", "first_gene"]}}
    config = search(tmp_path, space, weight_decay=0.3, learning_rate=0.5, registered_model="name", final_seeds=(4, 5))
    (first, as_given), *others = trial_flags(config, read_space(config), MODEL)
    assert first == {"learning_rate": 0.5, "pooling": "mean"}
    assert (as_given.learning_rate, as_given.pooling, as_given.weight_decay) == (0.5, ("mean",), 0.3)
    for values, flags in others:
        assert (flags.learning_rate, flags.pooling) == (values["learning_rate"], (values["pooling"],))
        assert (flags.weight_decay, flags.seeds, flags.registered_model) == (0.3, (0,), None)
    values = others[0][0]
    final = final_flags(config, values, "o/best")
    assert (final.seeds, final.output, final.registered_model) == ((4, 5), "o/best", "name")
    assert (final.learning_rate, final.weight_decay) == (values["learning_rate"], 0.3)


def test_what_is_the_adapters_own_is_left_out_of_a_trial_without_adapters(tmp_path: Path) -> None:
    space = {"lora_rank": {"choices": [None, 2]}, "lora_alpha": {"low": 1, "high": 9}}
    config = search(tmp_path, space, trials=12)
    found = trial_flags(config, read_space(config), MODEL)
    assert found[0][0] == {"lora_rank": None} and found[0][1].lora() is None
    ranks = {values["lora_rank"] for values, _ in found}
    assert ranks == {None, 2}
    # What differs in nothing that counts is one setting.
    assert [values["lora_rank"] for values, _ in found].count(None) == 1
    for values, flags in found:
        assert ("lora_alpha" in values) == (flags.lora() is not None)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"task": "genes"}, "--task"),
        ({"folds": 3}, "--folds"),
        ({"pooling": ("mean", "cls")}, "--pooling"),
        ({"seeds": (0, 1)}, "--seeds"),
        ({"epochs": 2, "grace_epochs": 3}, "--grace-epochs"),
        ({"final_seeds": (1, 1)}, "--final-seeds"),
        ({"task_weights": {"type": 2.0}}, "--task-weights"),
    ],
)
def test_flags_that_do_not_go_with_a_search_are_named(tmp_path: Path, flags: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as refused:
        check_flags(search(tmp_path, {}, **flags))
    assert refused.value.field == named
