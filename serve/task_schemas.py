"""What answers say of each task, where a model has several.

What an answer says of a model's one task, it says of the first of several under the same names, so that whoever knows
models of one task can ask any. ``tasks`` stands beside it, with the same fields for each task. Answers of a model of
one task have no such field: they are what they were before there were tasks.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, Field

__all__ = ["EachTask", "LabelProbability", "TaskChanges", "TaskClass", "TaskLabels", "TaskProbabilities"]

OfTaskT = TypeVar("OfTaskT")


def _is_absent(tasks: object) -> bool:
    return tasks is None


EachTask = Annotated[
    dict[str, OfTaskT] | None,
    Field(description="task -> the same for it; only where the model has several", exclude_if=_is_absent),
]


class LabelProbability(BaseModel):
    """A class and its probability."""

    label: str
    probability: float


class TaskLabels(BaseModel):
    """The classes of a task."""

    labels: list[str]


class TaskClass(BaseModel):
    """A cell's answer in a task."""

    label: str | None = Field(description="the most probable label; none where the cell has a reason")
    probability: float | None
    top: list[LabelProbability] = Field(description="highest first; a task's probabilities add up to 1")


class TaskProbabilities(BaseModel):
    """A task's probabilities of the unperturbed cell."""

    probabilities: dict[str, float] = Field(description="label -> its probability before")


class TaskChanges(BaseModel):
    """What an event does to a task's probabilities."""

    probability_change: dict[str, float] = Field(description="label -> its probability after, less that before")
