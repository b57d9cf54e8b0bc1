"""What stands behind the routes: a model that may be replaced while it serves, and the thread that computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from serve.model import CellVector, ServedModel
from serve.settings import ServeSettings

__all__ = ["Service"]

ResultT = TypeVar("ResultT")


class Service(Protocol):
    """One replica, as the routes see it.

    A request takes :attr:`model` once and goes on with what it took: the next request may meet another version.
    """

    settings: ServeSettings

    @property
    def model(self) -> ServedModel:
        """The model that new requests are answered with."""
        ...

    async def vectors(
        self, model: ServedModel, sequences: Sequence[NDArray[np.integer]], what: CellVector
    ) -> NDArray[np.float32]:
        """Compute one vector a cell in batches with other requests' cells; shape (cells, classes) or (cells, width)."""
        ...

    async def run(self, work: Callable[[], ResultT]) -> ResultT:
        """Do other work on the model's thread, in turn with the batches: short pieces, so that nobody waits long."""
        ...
