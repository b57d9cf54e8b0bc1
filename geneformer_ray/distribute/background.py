"""A function that runs on the cluster while the driver goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

import ray

from geneformer_ray.compute.execution import use_threads

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Background"]

ResultT = TypeVar("ResultT")


@ray.remote(num_cpus=1)
def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    use_threads(1)
    return function(*arguments)


class Background(Generic[ResultT]):
    """A call that has been handed to the cluster, on one CPU."""

    def __init__(self, function: Callable[..., ResultT], *arguments: Any) -> None:
        self._reference = _call.remote(function, arguments)

    def result(self) -> ResultT:
        """Wait for the result; raise what the function raised."""
        result: ResultT = ray.get(self._reference)
        return result
