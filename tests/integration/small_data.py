"""The small data set of the integration tests."""

from __future__ import annotations

from dataclasses import dataclass

GROUPS = {"train": "donor1", "choose": "donor2", "report": "donor3"}


@dataclass(frozen=True)
class SmallData:
    """Raw counts on disk, and their vocabulary."""

    h5ad: str
    vocabulary: str
    cells: int
