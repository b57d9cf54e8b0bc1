"""An autoscaling cluster without a worker: jobs bring nodes, and the nodes go when they are idle."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.autoscaling import NODES, Seen, draw, observe, table

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return observe(tmp_path_factory.mktemp("autoscaling"))


def test_both_jobs_finish(seen: Seen) -> None:
    assert [(job["name"], job["code"]) for job in seen.jobs] == [("screen", 0), ("finetune", 0)], seen.jobs
    screen, finetune = (job["summary"] for job in seen.jobs)
    assert screen["events"] == screen["rows"] > 0
    assert finetune["trials"]


@pytest.mark.parametrize("number", [0, 1], ids=["screen", "finetune"])
def test_nodes_come_with_the_job_and_go_after_it(seen: Seen, number: int) -> None:
    job = seen.jobs[number]
    assert seen.nodes(job["begin"] - 3, job["begin"]) == [0] * len(seen.nodes(job["begin"] - 3, job["begin"]))
    assert max(seen.nodes(job["begin"], job["end"])) == NODES
    assert seen.gone_after(number) < 90


def test_workers_tell_ray_what_they_did(seen: Seen) -> None:
    """What a node counted in its last seconds goes with it: never more than was done, and most of it."""
    runs = {job["name"]: job["summary"]["run"] for job in seen.jobs}

    def total(counted: str, job: str) -> float:
        labels = (f"ray_geneformer_job_{counted}_total{{", f'run="{runs[job]}"', f'job="{job}"')
        return sum(value for series, value in seen.metrics.items() if all(label in series for label in labels))

    events = seen.jobs[0]["summary"]["events"]
    assert events / 4 < total("events", "screen") <= events
    assert total("tokens", "screen") > total("events", "screen")
    assert total("cells", "finetune") > 0
    assert total("tokens", "finetune") > total("padding_tokens", "finetune")


def test_the_picture_and_the_table_are_made_of_it(seen: Seen, tmp_path: Path) -> None:
    draw(seen).savefig(tmp_path / "autoscaling.png")
    assert (tmp_path / "autoscaling.png").stat().st_size > 10_000
    assert table(seen).count("| `") == 2
