"""The flags of jobs that read count matrices."""

from __future__ import annotations

from pydantic import Field

from geneformer_ray.distribute.count_inputs import CountReading
from ray_jobs.command_line import JobConfig

__all__ = ["INPUT", "ReadingConfig"]

INPUT = "h5ad, zarr, 10x .h5 and loom files, 10x matrix directories, or directories of these"


class ReadingConfig(JobConfig):
    """Where the raw counts lie."""

    counts: str = Field("X", description="where the raw counts lie: X, raw.X or layers/NAME")
    gene_column: str | None = Field(
        None,
        description="var column of gene names, or index (default: ensembl_id, gene_ids, the index; loom also "
        "Accession, Gene; 10x: gene_ids, or gene_symbols)",
    )
    allow_non_integer: bool = Field(
        False, description="accept counts that are not whole numbers: Smart-seq, corrected for ambient RNA"
    )

    @property
    def reading(self) -> CountReading:
        """What :class:`CountFile` takes."""
        return CountReading(self.counts, self.gene_column, self.allow_non_integer)
