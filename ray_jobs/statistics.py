"""Turn a screen's shifts into ranked tables: genes, pairs of genes, combinations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from geneformer_ray.compute.cell_values import aggregate_tables
from geneformer_ray.compute.combination import combination_table
from geneformer_ray.compute.concordance import concordance_table, rank_correlation
from geneformer_ray.compute.gene_pairs import gene_shift_table
from geneformer_ray.compute.impact_mixture import mixture_table
from geneformer_ray.compute.null_comparison import vs_null_table
from geneformer_ray.compute.shift_anndata import obs_of_cells, shift_anndata, write_anndata
from geneformer_ray.compute.statistics import goal_shift_table
from geneformer_ray.data import storage
from geneformer_ray.data.shards import write_shard
from geneformer_ray.errors import InputError
from geneformer_ray.manage.statistics_report import write_statistics_report
from ray_jobs.command_line import main, place
from ray_jobs.statistics_flags import StatisticsConfig, check_flags
from ray_jobs.statistics_inputs import StatisticsInputs, open_inputs

if TYPE_CHECKING:
    import pandas as pd

    # The tables by name, the ranked one first, and what the summary says of them.
    Tables = tuple[dict[str, pd.DataFrame], dict[str, Any]]

__all__ = ["StatisticsConfig", "run"]

# The library names its parameters; a person gave flags.
FLAGS = {"groups": "--group", "obs": "--cells", **{name: f"--{name}" for name in StatisticsConfig.model_fields}}


def run(config: StatisticsConfig) -> dict[str, Any]:
    """Read the screens, test, and write the tables."""
    check_flags(config)
    output, inputs = place(config.output, "--output"), open_inputs(config)
    plan = {
        "job": "statistics",
        "screen": inputs.screen.plan,
        "other_screen": inputs.other.plan if inputs.other else None,
        **config.model_dump(mode="json", exclude={"overwrite", "output", "shifts"}),
    }
    storage.claim_output(output, plan, overwrite=config.overwrite, resume=True, inputs=inputs.paths)
    try:
        tables, about = _tables(config, inputs)
        ranked = next(iter(tables.values()))
        if config.anndata:
            _write_anndata(storage.join(output, "statistics.h5ad"), inputs, ranked)
    except InputError as error:
        # Nothing has been written that the next command, with better flags, would have to overwrite.
        storage.remove(storage.join(output, storage.MANIFEST))
        raise type(error)(FLAGS.get(error.field, error.field), error.got, error.takes) from error
    for name, table in tables.items():
        write_shard(output, name, 0, _arrow(table), vocabulary=inputs.screen.vocabulary.digest)
        storage.write_bytes(storage.join(output, f"{name}.csv"), table.to_csv(index=False).encode())
    pictures = write_statistics_report(
        output, test=config.test, table=ranked, screen=inputs.screen, state=inputs.state,
        options=config.model_dump(mode="json", exclude={"overwrite", "output"}),
        groups=inputs.groups, group=config.group or "group",
    )  # fmt: skip
    report = pictures.pop("report")
    summary = {
        "test": config.test,
        **({"state": inputs.state} if inputs.state else {}),
        **about,
        "top": ranked["perturbed_symbol" if config.test == "gene_shifts" else "symbol"].head(10).tolist(),
        "output": output,
        "tables": {name: storage.join(output, name) for name in tables},
        "report": report,
        "figures": pictures,
        **({"anndata": storage.join(output, "statistics.h5ad")} if config.anndata else {}),
    }
    storage.finish_output(output, plan, summary)
    return summary


def _tables(config: StatisticsConfig, inputs: StatisticsInputs) -> Tables:
    """Run the test."""
    screen, state = inputs.screen, inputs.state
    symbols = screen.vocabulary.symbols
    if config.test == "gene_shifts":
        table = gene_shift_table(screen.table("gene_shifts_summary", "gene_shifts"), symbols=symbols)
        return {"statistics": table}, {"pairs": len(table), "genes": table["perturbed"].nunique()}
    shifts = screen.table("cell_shifts")
    if config.test == "mixture":
        table, mixture = mixture_table(shifts, state=state, symbols=symbols, seed=config.seed)
        components = {name: list(getattr(mixture, name)) for name in ("mean", "deviation", "weight")}
        counts = {"genes": len(table), "with_impact": int(table["impact_component"].sum())}
        return {"statistics": table}, {**counts, "impact_of_components": components}
    if config.test == "aggregate":
        table, cells = aggregate_tables(shifts, state=state, symbols=symbols, groups=inputs.groups)
        return {"statistics": table, "cells": cells}, {"genes": len(table), "rows": len(cells)}
    resampling: dict[str, Any] = {"bootstrap": config.bootstrap, "seed": config.seed, "groups": inputs.groups}
    if inputs.other is None:
        goal, plan = screen.states[0], screen.plan
        table = goal_shift_table(
            shifts, goal=goal, start=plan["start"], alternatives=plan["alternatives"], symbols=symbols, **resampling
        )
    elif config.test == "concordance" and state is not None:
        names = screen.plan["perturbation"], inputs.other.plan["perturbation"]
        against = inputs.other.table("cell_shifts")
        table = concordance_table(shifts, against, state=state, names=names, symbols=symbols)
        correlation = rank_correlation(table[f"shift_{names[0]}"], table[f"shift_{names[1]}"])
        about = {"genes": len(table), "concordant": int(table["concordant"].sum()), "rank_correlation": correlation}
        return {"statistics": table}, about
    else:
        test = vs_null_table if config.test == "vs_null" else combination_table
        table = test(shifts, inputs.other.table("cell_shifts"), state=state, symbols=symbols, **resampling)
    return {"statistics": table}, {"genes": len(table), "significant": int(table["significant"].sum())}


def _write_anndata(path: str, inputs: StatisticsInputs, ranked: pd.DataFrame) -> None:
    obs = obs_of_cells(inputs.cells) if inputs.cells else None
    shifts, about = inputs.screen.table("cell_shifts"), inputs.screen.plan
    write_anndata(shift_anndata(shifts, ranked, state=inputs.state, obs=obs, about=about), path)


def _arrow(table: pd.DataFrame) -> pa.Table:
    """Give a table to be written, with plain strings for what is held as categories."""
    rows = pa.Table.from_pandas(table, preserve_index=False)
    plain = [field.with_type(pa.string()) if pa.types.is_dictionary(field.type) else field for field in rows.schema]
    return rows.cast(pa.schema(plain, metadata=rows.schema.metadata))


if __name__ == "__main__":
    main(StatisticsConfig, run, __doc__ or "")
