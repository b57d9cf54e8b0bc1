"""What the finished items of a screen came to, in whatever order they came."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from geneformer_ray.compute.first_order_figures import merge_figures
from geneformer_ray.compute.precision_check import merge_precision

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from geneformer_ray.distribute.screen_items import ScreenItems

__all__ = ["ScreenTotals"]

COUNTED = ("events", "rows", "gene_rows", "events_skipped", "events_without_a_gene_to_compare", "events_rejected")


@dataclass
class ScreenTotals:
    """Sums over items.

    Attributes
    ----------
    counts, cells
        Of events and rows, and of the cells that have them.
    precision, figures
        What items found of lower precision, and of first-order estimates.
    first_order_precision
        What of the former is of estimates.
    rejected
        Row number, as text -> why that cell was set aside.
    rejecting
        The items that did so.
    estimated
        Row numbers of the cells of which some value is an estimate, one array an item.
    """

    counts: Counter[str] = field(default_factory=Counter)
    cells: int = 0
    precision: list[dict[str, float]] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    first_order_precision: list[dict[str, float]] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)
    rejecting: set[int] = field(default_factory=set)
    estimated: list[NDArray[np.int64]] = field(default_factory=list)

    def add(self, item: dict[str, Any]) -> int:
        """Add what one item came to; give how many events it is done with."""
        self.counts.update({name: item[name] for name in COUNTED})
        self.cells += item["cells"]
        self.precision += [item["precision"]] if item["precision"] else []
        if "first_order" in item:
            self.figures.append(item["first_order"])
            self.first_order_precision += [item["precision"]] if item["precision"] else []
            self.estimated.append(np.array(item["estimated"], dtype=np.int64))
        # By row: the parts of one cell are one cell.
        self.rejected |= item["rejected"]
        self.rejecting |= {item["item"]} if item["rejected"] else set()
        return sum(item[name] for name in ("events", "events_without_a_gene_to_compare", "events_rejected"))

    @property
    def estimated_rows(self) -> NDArray[np.int64]:
        """Row numbers of the cells of which some value is an estimate, in order; shape (cells,)."""
        return np.sort(np.concatenate([np.empty(0, dtype=np.int64), *self.estimated]))

    def summary(self, items: ScreenItems) -> dict[str, Any]:
        """Say what came of all cells."""
        cells, rejected = len(items.rows), len(self.rejected)
        summary: dict[str, Any] = {
            "cells": cells,
            **{name: self.counts[name] for name in COUNTED},
            "cells_without_events": int((items.counts.events == 0).sum()) - items.counts.unfit,
            "rejected": rejected,
            "share_rejected": round(rejected / cells, 6),
        }
        if self.precision:
            summary["precision_error"] = merge_precision(self.precision)
        if self.figures:
            of_estimates = merge_precision(self.first_order_precision)
            summary["first_order"] = merge_figures(self.figures) | (
                {"precision_error": of_estimates} if of_estimates else {}
            )
        return summary
