"""The flags that say which cells train, choose and report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, field_validator

from geneformer_ray.data.splits import folds_by_group, split_by_group
from geneformer_ray.data.task_splits import split_tasks
from geneformer_ray.errors import InputError
from ray_jobs.training_flags import TrainingConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from geneformer_ray.data.cells import CellTable
    from geneformer_ray.data.task_splits import LabelSplit

__all__ = ["SplittingConfig"]


class SplittingConfig(TrainingConfig):
    """A training of labels, on whole groups of cells."""

    label: tuple[str, ...] = Field(
        (), description="column of cell types or states to learn; several, comma-separated: a task each"
    )
    group: str | None = Field(
        None, description="column of donors, libraries, individuals: no group is on both sides of the split"
    )
    train_groups: tuple[str, ...] = Field((), description="groups to train on (default: dealt out by size)")
    choose_groups: tuple[str, ...] = Field((), description="groups to choose epoch and champion on")
    report_groups: tuple[str, ...] = Field((), description="groups to report on")
    folds: int | None = Field(None, ge=2, description="cross-validate over groups, in so many folds")
    min_cells: int = Field(10, ge=1, description="labels with fewer cells in some role are dropped, and listed")
    max_cells: int | None = Field(None, ge=1, description="a random sample of so many cells (default: all)")
    split_seed: int = Field(0, ge=0, description="of that sample, and of how genes are dealt into folds")

    @field_validator("label", mode="before")
    @classmethod
    def _split_by_commas(cls, value: Any) -> Any:
        return tuple(value.split(",")) if isinstance(value, str) else value

    def rows(self, table: CellTable) -> NDArray[np.int64]:
        """Give the row numbers of the cells that take part, in order."""
        rows = table.select(self.filter)
        if self.max_cells is None or self.max_cells >= len(rows):
            return rows
        return np.sort(np.random.default_rng(self.split_seed).choice(rows, self.max_cells, replace=False))

    def splits(self, table: CellTable) -> Sequence[LabelSplit]:
        """Say which cells train, choose and report, for one label or for several: once, or once a fold."""
        rows, groups = self.rows(table), table.column(str(self.group), "--group")
        labels = {name: table.column(name, "--label") for name in self.label}
        assigned = {"train": self.train_groups, "choose": self.choose_groups, "report": self.report_groups}
        if self.folds is not None:
            for flag, given in (("--train-groups", self.train_groups), ("--choose-groups", self.choose_groups)):
                if given:
                    raise InputError(flag, f"{','.join(given)} beside --folds", "nothing: folds deal these groups out")
        if len(labels) > 1:
            return split_tasks(
                rows, labels, groups, assigned=assigned, min_cells=self.min_cells, folds=self.folds,
                held_out=self.report_groups,
            )  # fmt: skip
        (column,) = labels.values()
        if self.folds is None:
            return [split_by_group(rows, column, groups, assigned=assigned, min_cells=self.min_cells)]
        return folds_by_group(
            rows, column, groups, folds=self.folds, min_cells=self.min_cells, held_out=self.report_groups
        )
