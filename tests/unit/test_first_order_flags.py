"""The flags that say how a screen's numbers are made: which go together, and what a plan records of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from geneformer_ray.compute.first_order import FirstOrder
from geneformer_ray.compute.perturbation import PerturbationPlan
from geneformer_ray.compute.reading import Reading
from geneformer_ray.compute.screen_method import ScreenMethod
from geneformer_ray.errors import InputError
from ray_jobs.command_line import parse
from ray_jobs.screen_flags import ScreenConfig, check_flags, recorded_flags
from ray_jobs.screen_notices import notices

REQUIRED = ["--cells", "c", "--model", "m", "--output", "o"]
STATES = {"start": np.empty(0, np.float32), "goal": np.empty(0, np.float32)}
# What a plan recorded of the flags before there were these: an output of then is that of the same command today.
RECORDED = {
    "filter": {}, "perturbation": "delete", "genes": "all", "gene_sets": None, "together": False, "combine": 1,
    "anchor": None, "rank_shift": None, "min_cells": 1, "embedding": "mean", "layer": -1, "comparison": "context",
    "gene_shifts": False, "gene_shifts_summary": False, "state_column": None, "start": None, "goal": None,
    "alternatives": [], "state_embeddings": None, "precision": "fp32", "max_cells": None, "seed": 0,
}  # fmt: skip
ESTIMATES = {"tolerance": 0.1, "most_cost": 0.2, "held_out": 8}


def config_of(*flags: str) -> ScreenConfig:
    return parse(ScreenConfig, [*REQUIRED, *flags])


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--tolerance", "0.1"], r"--tolerance: got 0.1 with --method exact; takes --method first_order or verified"),
        (["--most-cost", "0.5"], "--most-cost: got 0.5 with --method exact"),
        (["--held-out", "8"], "--held-out: got 8 with --method exact"),
        (["--top", "50"], "--top: got 50 with --method exact; takes --method verified beside it"),
        (["--method", "first_order", "--controls", "5"], "--controls: got 5 with --method first_order"),
        (["--method", "first_order", "--control-cells", "2"], "--control-cells"),
        (["--method", "first_order", "--tolerance", "0"], "--tolerance: got 0.0; takes a share above 0"),
        (["--method", "first_order", "--most-cost", "1.5"], "--most-cost: got 1.5"),
        (["--method", "first_order", "--held-out", "1"], "--held-out: got 1; takes at least 2 genes"),
    ],
)  # fmt: skip
def test_flags_of_another_method_and_values_that_cannot_be(flags: list[str], text: str) -> None:
    with pytest.raises(InputError, match=text):
        check_flags(config_of(*flags))


def test_what_is_no_choice() -> None:
    for flag, value in (("--ranks", "keep"), ("--method", "fast")):
        with pytest.raises(InputError, match=f"{flag}: got '{value}'"):
            config_of(flag, value)


def test_the_plan_of_a_plain_screen_is_what_it_was() -> None:
    assert recorded_flags(config_of()) == RECORDED
    given = config_of("--ranks", "shift", "--method", "exact", "--no-decompose")
    check_flags(given)
    assert recorded_flags(given) == RECORDED


@pytest.mark.parametrize(
    ("flags", "more"),
    [
        (["--ranks", "hold"], {"ranks": "hold"}),
        (["--decompose"], {"decompose": True}),
        (["--method", "first_order"], {"method": "first_order", **ESTIMATES}),
        (
            ["--method", "first_order", "--ranks", "hold", "--tolerance", "0.05"],
            {"ranks": "hold", "method": "first_order", **ESTIMATES, "tolerance": 0.05},
        ),
        (
            ["--method", "verified", "--top", "20"],
            {"method": "verified", **ESTIMATES, "top": 20, "controls": 50, "control_cells": 8},
        ),
    ],
)
def test_the_plan_records_what_changes_the_numbers(flags: list[str], more: dict[str, Any]) -> None:
    assert recorded_flags(config_of(*flags)) == RECORDED | more


def test_the_method_is_what_the_flags_say() -> None:
    assert config_of().screen_method(3) == ScreenMethod()
    assert config_of("--decompose").screen_method(3) == ScreenMethod(decompose=True)
    flags = ["--method", "first_order", "--tolerance", "0.3", "--most-cost", "0.4", "--held-out", "5"]
    settings = FirstOrder(tolerance=0.3, most_cost=0.4, held_out=5, seed=3)
    assert config_of(*flags).screen_method(3) == ScreenMethod(first_order=settings)


@pytest.mark.parametrize(
    ("flags", "plan", "reading", "text"),
    [
        (["--method", "first_order"], {"genes": (4, 5), "combine": 2}, {}, "several genes.*--method first_order"),
        (["--method", "verified"], {"anchor": 4}, {}, "--genes: got several genes in one event with --method verified"),
        (["--method", "verified"], {}, {"states": {}}, "--state-column: got no states with --method verified"),
        (["--method", "first_order", "--gene-shifts"], {}, {"gene_shifts": True}, "^--gene-shifts: "),
        (["--method", "first_order", "--gene-shifts-summary"], {}, {"gene_shifts": True}, "^--gene-shifts-summary: "),
        (["--decompose"], {"perturbation": "overexpress"}, {}, "--decompose: got --perturbation overexpress"),
        (["--decompose", "--ranks", "hold"], {"ranks": "hold"}, {}, "--decompose: got --ranks hold"),
        (["--decompose"], {}, {"states": {}}, "--decompose: got a screen without states"),
        (["--decompose", "--method", "first_order"], {"ranks": "hold"}, {}, "--decompose"),
    ],
)  # fmt: skip
def test_what_a_method_cannot_do(flags: list[str], plan: dict[str, Any], reading: dict[str, Any], text: str) -> None:
    config = config_of(*flags)
    with pytest.raises(InputError, match=text):
        config.check_measurable(
            PerturbationPlan(**plan), Reading(**{"states": STATES, **reading}), gene_summary=not config.gene_shifts
        )


def test_what_the_methods_can_do() -> None:
    for flags in ([], ["--decompose"], ["--method", "first_order"], ["--method", "first_order", "--decompose"]):
        config_of(*flags).check_measurable(PerturbationPlan(), Reading(states=STATES), gene_summary=False)
    config_of("--ranks", "hold").check_measurable(
        PerturbationPlan(ranks="hold", genes=(4, 5), combine=2), Reading(gene_shifts=True), gene_summary=True
    )


def test_the_plan_holds_ranks(vocabulary: Any) -> None:
    from ray_jobs.screen_flags import perturbation_plan

    assert perturbation_plan(config_of("--ranks", "hold"), vocabulary, []).ranks == "hold"
    with pytest.raises(InputError, match="--ranks: got hold with --perturbation overexpress"):
        perturbation_plan(config_of("--ranks", "hold", "--perturbation", "overexpress"), vocabulary, [])


def test_what_is_said_at_the_end() -> None:
    summary: dict[str, Any] = {"cells": 2_000, "rejected": 0, "tables": {}}
    assert notices(summary, config_of()) == []
    (line,) = notices(summary | {"rejected": 3, "tables": {"rejects": "o/_rejects"}}, config_of())
    assert line == "3 of 2,000 cells set aside: see o/_rejects"
    estimates = {"over_tolerance": 0, "cells_estimated": 9, "error_mean": 0.2, "error_max": 0.31234}
    config = config_of("--method", "first_order")
    assert notices(summary | {"first_order": estimates}, config) == []
    (line,) = notices(summary | {"first_order": estimates | {"over_tolerance": 4}}, config)
    assert line.startswith("4 of 9 estimated cells stayed above --tolerance 0.1 ")
    assert "(mean 0.2, most 0.312)" in line
    assert "--most-cost above 0.2" in line
    (line,) = notices(
        summary | {"first_order": estimates | {"over_tolerance": 4}},
        config_of("--method", "first_order", "--ranks", "hold"),
    )
    assert "--most-cost above 0.2" in line  # more of the largest estimates are measured
    apart = {**estimates, "over_tolerance": 4, "shift_gene": {**estimates, "over_tolerance": 5, "error_mean": None}}
    of_shift, of_gene = notices(summary | {"first_order": apart}, config)
    assert "ranks held" not in of_shift
    assert of_gene.startswith("5 of 9 estimated cells stayed above --tolerance 0.1 ")
    assert "with ranks held (mean unknown, most 0.312)" in of_gene
    (line,) = notices(summary | {"verification": {"warning": "not to be trusted"}}, config)
    assert line == "warning: not to be trusted"
