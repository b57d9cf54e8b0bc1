"""The flags of ``python -m ray_jobs.statistics``, and which of them go with which test."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from geneformer_ray.compute.shift_rows import PARTS
from geneformer_ray.errors import InputError
from ray_jobs.command_line import JobConfig

__all__ = ["StatisticsConfig", "check_flags"]

TESTS = ("goal_shift", "vs_null", "mixture", "aggregate", "gene_shifts", "combination", "concordance")
# Which flags a test takes beside --shifts and --output: these it needs, and these it may have.
NEEDS = {"vs_null": ("null",), "combination": ("against",), "concordance": ("against",)}
MAY_HAVE = {
    "goal_shift": ("group", "anndata", "measure"),
    "vs_null": ("group", "state", "anndata", "measure"),
    "mixture": ("state", "anndata", "measure"),
    "aggregate": ("group", "state", "anndata", "measure"),
    "gene_shifts": (),
    "combination": ("group", "state", "anndata", "measure"),
    # One of its two screens raises genes, which has no parts.
    "concordance": ("state", "anndata"),
}


class StatisticsConfig(JobConfig):
    """Flags of ``python -m ray_jobs.statistics``."""

    shifts: str = Field(description="a finished screen's output")
    output: str = Field(description="directory for the table")
    test: Literal[TESTS] = Field(  # type: ignore[valid-type]
        "goal_shift",
        description="goal_shift: genes by shift to the goal; vs_null: against the same genes in --null; mixture: genes "
        "with and without impact; aggregate: the values of each cell, for a few genes; gene_shifts: by perturbed and "
        "affected gene; combination: joint effects against the sum of the single ones in --against; concordance: "
        "deletion against overexpression in --against",
    )
    null: str | None = Field(None, description="the output of a screen of the same genes, for vs_null")
    against: str | None = Field(None, description="the output of another screen, for combination and concordance")
    state: str | None = Field(None, description="whose shifts are tested, in a screen with states (default: its goal)")
    measure: Literal[PARTS] = Field(  # type: ignore[valid-type]
        "shift",
        description="what is tested of a screen with states: shift; of one with --decompose also shift_gene (what the "
        "gene does alone, with all ranks held) or shift_rank (what the ranks do)",
    )
    cells: str | None = Field(None, description="the screened cells, for --group, and for the columns of --anndata")
    group: str | None = Field(
        None, description="column of donors or libraries: intervals over groups instead of cells, and sign consistency"
    )
    anndata: bool = Field(False, description="also statistics.h5ad: cells x genes")
    bootstrap: int = Field(1000, ge=0, description="replicates of the interval; 0 for none")
    seed: int = Field(0, ge=0, description="of the bootstrap and of the mixture's fit")


def check_flags(config: StatisticsConfig) -> None:
    """Refuse flags that do not go together."""
    needs = NEEDS.get(config.test, ())
    for name in ("null", "against", "state", "group", "anndata", "measure"):
        flag, value = f"--{name}", getattr(config, name)
        if value == "shift" and name == "measure":
            continue
        if name in needs and value is None:
            raise InputError(flag, "nothing", f"the output of ray_jobs.screen: --test {config.test} needs it")
        if value and name not in (*needs, *MAY_HAVE[config.test]):
            tests = [test for test in TESTS if name in (*NEEDS.get(test, ()), *MAY_HAVE[test])]
            raise InputError(flag, f"{value} beside --test {config.test}", f"--test {' or '.join(tests)}")
    if config.group is not None and config.cells is None:
        raise InputError("--cells", "nothing", "the screened cells: --group is a column of theirs")
    if config.cells is not None and config.group is None and not config.anndata:
        raise InputError("--cells", f"{config.cells} alone", "--group or --anndata beside it")
