"""Turn a screen's shifts into ranked tables: genes, pairs of genes, combinations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from geneformer_ray.compute.shift_anndata import obs_of_cells, shift_anndata, write_anndata
from geneformer_ray.data import storage
from geneformer_ray.data.shards import write_shard
from geneformer_ray.errors import InputError
from geneformer_ray.manage.statistics_report import write_statistics_report
from ray_jobs.command_line import main, place
from ray_jobs.statistics_flags import StatisticsConfig, check_flags
from ray_jobs.statistics_inputs import StatisticsInputs, open_inputs
from ray_jobs.statistics_tables import exact_shares, run_test

if TYPE_CHECKING:
    import pandas as pd

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
        tables, about = run_test(config, inputs)
        ranked = next(iter(tables.values()))
        if config.anndata:
            _write_anndata(storage.join(output, "statistics.h5ad"), inputs, ranked, config.measure)
        exact = exact_shares(config, inputs)
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
        groups=inputs.groups, group=config.group or "group", measure=config.measure, exact=exact.get("exact_share"),
    )  # fmt: skip
    report = pictures.pop("report")
    summary = {
        "test": config.test,
        **({"state": inputs.state} if inputs.state else {}),
        **({"measure": config.measure} if config.measure != "shift" else {}),
        **about,
        **exact,
        "top": ranked["perturbed_symbol" if config.test == "gene_shifts" else "symbol"].head(10).tolist(),
        "output": output,
        "tables": {name: storage.join(output, name) for name in tables},
        "report": report,
        "figures": pictures,
        **({"anndata": storage.join(output, "statistics.h5ad")} if config.anndata else {}),
    }
    storage.finish_output(output, plan, summary)
    return summary


def _write_anndata(path: str, inputs: StatisticsInputs, ranked: pd.DataFrame, measure: str) -> None:
    obs = obs_of_cells(inputs.cells) if inputs.cells else None
    shifts, about = inputs.screen.table("cell_shifts"), inputs.screen.plan
    write_anndata(shift_anndata(shifts, ranked, state=inputs.state, obs=obs, about=about, measure=measure), path)


def _arrow(table: pd.DataFrame) -> pa.Table:
    """Give a table to be written, with plain strings for what is held as categories."""
    rows = pa.Table.from_pandas(table, preserve_index=False)
    plain = [field.with_type(pa.string()) if pa.types.is_dictionary(field.type) else field for field in rows.schema]
    return rows.cast(pa.schema(plain, metadata=rows.schema.metadata))


if __name__ == "__main__":
    main(StatisticsConfig, run, __doc__ or "")
