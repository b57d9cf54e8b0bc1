"""The command that does what is too large for one request."""

from __future__ import annotations

import shlex

from geneformer_ray.data.task_splits import class_name
from serve.model import ServedModel
from serve.schemas import PerturbRequest
from serve.settings import ServeSettings

__all__ = ["screen_command"]

# Longer lists of genes are better kept in a file, one a line.
GENES_LENGTH = 1_000


def screen_command(request: PerturbRequest, served: ServedModel, settings: ServeSettings) -> str:
    """Give the screen that measures the events of a request over any number of cells.

    What the service cannot know stands in capitals: where the cells lie, where they start, and their column of states,
    aside from a state of one of several tasks: a task is called as the column that it was learned from.
    """
    genes = ",".join(request.genes)
    # A name with a comma would be taken for two.
    fits = len(genes) <= GENES_LENGTH and genes.count(",") == len(request.genes) - 1
    version = served.version
    words = ["python", "-m", "ray_jobs.screen", "--cells", "CELLS"]
    words += ["--model", settings.model if version is None else f"models:/{served.name}/{version}"]
    if settings.vocabulary is not None:
        words += ["--vocabulary", settings.vocabulary]
    words += ["--perturbation", request.perturbation, "--genes", genes if fits else "FILE"]
    if request.rank_shift is not None:
        words += ["--rank-shift", str(request.rank_shift)]
    words += ["--together"] * request.together + ["--gene-shifts"] * bool(request.affected_genes)
    if request.goal is not None:
        column, goal = _column_and_state(request.goal, served)
        words += ["--state-column", column, "--start", "STATE", "--goal", goal]
    return shlex.join([*words, "--output", "OUTPUT"])


def _column_and_state(goal: str, served: ServedModel) -> tuple[str, str]:
    for task, labels in served.tasks.items():
        for label in labels:
            if goal == class_name(task, label):
                return task, label
    return "COLUMN", goal
