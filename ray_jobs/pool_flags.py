"""The flags of jobs that fan out over a pool of actors, each of which holds the model."""

from __future__ import annotations

from pydantic import Field

from geneformer_ray.distribute.fan_out import Pool
from geneformer_ray.errors import InputError
from ray_jobs.command_line import JobConfig

__all__ = ["PoolConfig"]


class PoolConfig(JobConfig):
    """How many actors, and what each is given."""

    min_workers: int | None = Field(
        None,
        ge=1,
        description="workers at least, which an autoscaling cluster grows to (default: all there is room for)",
    )
    max_workers: int | None = Field(None, ge=1, description="workers at most (default: all there is room for)")
    gpus_per_worker: float | None = Field(
        None, ge=0, le=1, description="a part of a GPU lets several share it; 0: none (default: 1 where there are GPUs)"
    )

    def check_workers(self) -> None:
        """Refuse bounds that leave nothing between them."""
        if self.min_workers and self.max_workers and self.min_workers > self.max_workers:
            got = f"{self.min_workers} and {self.max_workers}"
            raise InputError("--min-workers, --max-workers", got, "no more at least than at most")

    def pool(self) -> Pool:
        """Give the pool that the connected cluster has room for."""
        return Pool.of_cluster(
            model=True, smallest=self.min_workers, largest=self.max_workers, gpus=self.gpus_per_worker
        )
