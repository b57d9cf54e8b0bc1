"""The tables of each statistical test, and what the summary says of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from geneformer_ray.compute.cell_values import aggregate_tables
from geneformer_ray.compute.combination import combination_table
from geneformer_ray.compute.concordance import concordance_table, rank_correlation
from geneformer_ray.compute.exact_values import exact_sentence, exact_share
from geneformer_ray.compute.gene_pairs import gene_shift_table
from geneformer_ray.compute.impact_mixture import mixture_table
from geneformer_ray.compute.null_comparison import vs_null_table
from geneformer_ray.compute.rank_share import rank_of_top, rank_sentence
from geneformer_ray.compute.statistics import goal_shift_table
from geneformer_ray.progress import say

if TYPE_CHECKING:
    import pandas as pd

    from ray_jobs.statistics_flags import StatisticsConfig
    from ray_jobs.statistics_inputs import StatisticsInputs

    # The tables by name, the ranked one first, and what the summary says of them.
    Tables = tuple[dict[str, pd.DataFrame], dict[str, Any]]

__all__ = ["exact_shares", "run_test"]


def run_test(config: StatisticsConfig, inputs: StatisticsInputs) -> Tables:
    """Run the test: its tables, and what the summary says of them."""
    screen, state = inputs.screen, inputs.state
    symbols = screen.vocabulary.symbols
    about: dict[str, Any]
    if config.test == "gene_shifts":
        table = gene_shift_table(screen.table("gene_shifts_summary", "gene_shifts"), symbols=symbols)
        return {"statistics": table}, {"pairs": len(table), "genes": table["perturbed"].nunique()}
    shifts = screen.table("cell_shifts")
    if config.test == "concordance" and inputs.other is not None and state is not None:
        names = screen.plan["perturbation"], inputs.other.plan["perturbation"]
        against = inputs.other.table("cell_shifts")
        table = concordance_table(shifts, against, state=state, names=names, symbols=symbols)
        correlation = rank_correlation(table[f"shift_{names[0]}"], table[f"shift_{names[1]}"])
        about = {"genes": len(table), "concordant": int(table["concordant"].sum()), "rank_correlation": correlation}
        return {"statistics": table}, about
    usual: dict[str, Any] = {"symbols": symbols, "measure": config.measure}
    if config.test == "mixture":
        table, mixture = mixture_table(shifts, state=state, seed=config.seed, **usual)
        components = {name: list(getattr(mixture, name)) for name in ("mean", "deviation", "weight")}
        about = {"genes": len(table), "with_impact": int(table["impact_component"].sum())}
        return {"statistics": table}, {**about, "impact_of_components": components}
    if config.test == "aggregate":
        table, cells = aggregate_tables(shifts, state=state, groups=inputs.groups, **usual)
        return {"statistics": table, "cells": cells}, {"genes": len(table), "rows": len(cells)}
    usual |= {"bootstrap": config.bootstrap, "seed": config.seed, "groups": inputs.groups}
    if inputs.other is None:
        start, alternatives = screen.plan["start"], screen.plan["alternatives"]
        table = goal_shift_table(shifts, goal=screen.states[0], start=start, alternatives=alternatives, **usual)
    else:
        test = vs_null_table if config.test == "vs_null" else combination_table
        table = test(shifts, inputs.other.table("cell_shifts"), state=state, **usual)
    about = {"genes": len(table), "significant": int(table["significant"].sum())}
    if state is not None and "rank_share" in table:
        of_rank = rank_of_top(table, state)
        about["rank_shift"] = {**of_rank, "told": rank_sentence(of_rank)}
        say(rank_sentence(of_rank))
    return {"statistics": table}, about


def exact_shares(config: StatisticsConfig, inputs: StatisticsInputs) -> dict[str, float]:
    """Give the share of exact values of each screen that says which are: `exact_share`, `other_exact_share`."""
    if config.test == "gene_shifts":
        return {}
    found: dict[str, float] = {}
    for name, screen in (("exact_share", inputs.screen), ("other_exact_share", inputs.other)):
        share = exact_share(screen.table("cell_shifts"), inputs.state, config.measure) if screen else None
        if screen is not None and share is not None:
            found[name] = share
            say(f"{screen.flag}: {exact_sentence(share)}")
    return found
