"""Turn a screen's shifts into a ranked table of genes."""

from __future__ import annotations

from typing import Any, Literal

import pyarrow as pa
import pyarrow.dataset as ds
from pydantic import Field

from geneformer_ray.compute.statistics import goal_shift_table
from geneformer_ray.data import storage
from geneformer_ray.data.cells import CellTable
from geneformer_ray.data.shards import VOCABULARY_KEY, write_shard
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError, NotThereYetError, VocabularyMismatch
from ray_jobs.command_line import JobConfig, main, place

TESTS = ("goal_shift", "vs_null", "mixture", "aggregate", "gene_shifts", "combination", "concordance")


class StatisticsConfig(JobConfig):
    """Flags of ``python -m ray_jobs.statistics``."""

    shifts: str = Field(description="a finished screen's output")
    output: str = Field(description="directory for the table")
    test: Literal[TESTS] = Field("goal_shift", description="goal_shift so far; the others are not there yet")  # type: ignore[valid-type]
    null: str | None = Field(None, description="a screen of a null set of genes, for vs_null (not there yet)")
    against: str | None = Field(None, description="another screen, for concordance (not there yet)")
    cells: str | None = Field(None, description="the screened cells, for --group")
    group: str | None = Field(None, description="column of donors or libraries: intervals over groups instead of cells")
    bootstrap: int = Field(1000, ge=0, description="replicates of the interval; 0 for none")
    seed: int = Field(0, ge=0, description="of the bootstrap")


def run(config: StatisticsConfig) -> dict[str, Any]:
    """Rank genes by their shift towards the goal state."""
    if config.test != "goal_shift":
        raise NotThereYetError.flag("--test", config.test, "goal_shift so far")
    for flag in ("null", "against"):
        if getattr(config, flag) is not None:
            raise NotThereYetError.flag(f"--{flag}", getattr(config, flag), "--test goal_shift without it so far")
    if (config.group is None) != (config.cells is None):
        raise InputError("--cells, --group", "one of them", "both, or neither")
    output, shifts = place(config.output, "--output"), place(config.shifts, "--shifts")
    if not storage.exists(storage.join(shifts, storage.MANIFEST)):
        raise InputError("--shifts", shifts, "the output directory of ray_jobs.screen")
    manifest = storage.read_json(storage.join(shifts, storage.MANIFEST), "--shifts")
    if not manifest["finished"]:
        raise InputError(
            "--shifts", f"{shifts}, an unfinished screen", "a finished one: run its command again to resume it"
        )
    screen = manifest["plan"]
    if not screen.get("goal"):
        raise InputError(
            "--shifts", f"{shifts}, a screen without states", "one with --state-column, --start and --goal"
        )
    plan = {
        "job": "statistics",
        "screen": screen,
        **config.model_dump(mode="json", exclude={"overwrite", "output", "shifts"}),
    }
    storage.claim_output(output, plan, overwrite=config.overwrite, inputs=[shifts])
    vocabulary = GeneVocabulary.load(storage.join(shifts, "_vocabulary"), "--shifts")
    filesystem, inside = storage.locate(storage.join(shifts, "cell_shifts"))
    dataset = ds.dataset(inside, filesystem=filesystem, format="parquet")
    carried = (dataset.schema.metadata or {}).get(VOCABULARY_KEY, vocabulary.digest.encode()).decode()
    if carried != vocabulary.digest:
        takes = f"shifts of its own _vocabulary, {vocabulary.digest}"
        raise VocabularyMismatch("--shifts", f"{shifts} with shifts of vocabulary {carried}", takes)
    table = goal_shift_table(
        dataset,
        goal=screen["goal"],
        start=screen["start"],
        alternatives=screen["alternatives"],
        symbols=vocabulary.symbols,
        bootstrap=config.bootstrap,
        seed=config.seed,
        groups=_groups(config),
    )
    write_shard(
        output, "statistics", 0, pa.Table.from_pandas(table, preserve_index=False), vocabulary=vocabulary.digest
    )
    storage.write_bytes(storage.join(output, "statistics.csv"), table.to_csv(index=False).encode())
    summary = {
        "test": config.test,
        "genes": len(table),
        "significant": int(table["significant"].sum()),
        "top": table["symbol"].head(10).tolist(),
        "output": output,
        "tables": {"statistics": storage.join(output, "statistics")},
    }
    storage.finish_output(output, plan, summary)
    return summary


def _groups(config: StatisticsConfig) -> dict[str, str] | None:
    if config.cells is None or config.group is None:
        return None
    table = CellTable(place(config.cells, "--cells"))
    column = table.column(config.group, "--group").astype(str)
    return dict(zip(table.cell_ids.tolist(), column.tolist(), strict=True))


if __name__ == "__main__":
    main(StatisticsConfig, run, __doc__ or "")
