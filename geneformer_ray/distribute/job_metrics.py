"""What workers of jobs count, through Ray's own metrics export: names begin with ``ray_geneformer_job_`` there.

Rates are the counters' rates; the share of padding is ``padding_tokens_total / (tokens_total + padding_tokens_total)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray.util.metrics import Counter

from geneformer_ray.run_log import current_run

if TYPE_CHECKING:
    from collections.abc import Sized

    from geneformer_ray.run_log import Run

__all__ = ["JobMetrics", "count_resumed"]


class JobMetrics:
    """Counts for one process of a run.

    Parameters
    ----------
    run
        The driver's; its id and job are labels of every count.
    """

    def __init__(self, run: Run) -> None:
        labels = {"run": run.id, "job": run.job}
        described = {
            "cells": "cells encoded, embedded, screened or trained on",
            "events": "perturbations measured",
            "tokens": "tokens of these cells and events, without padding",
            "padding_tokens": "tokens computed that were padding",
            "resumes": "times that a run or a group of workers went on from what an earlier one had done",
        }
        self._counters = {
            name: Counter(f"geneformer_job_{name}", text, tuple(labels)) for name, text in described.items()
        }
        for counter in self._counters.values():
            counter.set_default_tags(labels)

    def count(self, *, cells: int = 0, events: int = 0, tokens: int = 0, padding_tokens: int = 0) -> None:
        """Count work that is done."""
        counted = {"cells": cells, "events": events, "tokens": tokens, "padding_tokens": padding_tokens}
        for name, number in counted.items():
            if number:  # Ray refuses to add nothing
                self._counters[name].inc(number)

    def resumed(self) -> None:
        """Count that earlier work was taken up."""
        self._counters["resumes"].inc(1)


def count_resumed(done: Sized) -> None:
    """Count on the driver that a run goes on, where an earlier one has done anything."""
    if len(done):
        JobMetrics(current_run()).resumed()
