"""The run's id, and its log as one JSON object a line."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime

import pytest

from geneformer_ray import run_log
from geneformer_ray.progress import Progress, say
from geneformer_ray.run_log import Run, begin_run, current_run


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before, formatters = (run_log._run, run_log._in_json), [one.formatter for one in logging.getLogger().handlers]
    yield
    run_log._run, run_log._in_json = before
    for handler, formatter in zip(logging.getLogger().handlers, formatters, strict=True):
        handler.setFormatter(formatter)


def test_a_run_has_an_id_of_its_own() -> None:
    first, second = begin_run("screen"), begin_run("screen")
    assert first.id and second.id and first.id != second.id
    assert current_run() == second == Run(second.id, "screen")


def test_a_submitted_run_has_the_id_of_its_submission(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"metadata": {"job_submission_id": "raysubmit_abc", "job_name": "raysubmit_abc"}}
    monkeypatch.setenv(run_log.RAY_JOB, json.dumps(told))
    assert begin_run("screen").id == "raysubmit_abc"


def test_lines_are_json_with_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    run = begin_run("embed", "json")
    say("dropped alpha: 3 cells")
    stream = io.StringIO()
    with Progress("screen", 10, "events", stream) as progress:
        progress.advance(4, "fold 1")
    first = json.loads(capsys.readouterr().err.splitlines()[0])
    last = json.loads(stream.getvalue())
    for line in (first, last):
        assert (line["run"], line["job"], line["level"]) == (run.id, "embed", "info")
        assert datetime.fromisoformat(line["time"]).tzinfo is not None
    assert first["message"] == "dropped alpha: 3 cells"
    assert {name: last[name] for name in ("message", "done", "total", "unit")} == {
        "message": "screen", "done": 4, "total": 10, "unit": "events",
    }  # fmt: skip


def test_what_is_logged_is_json_too() -> None:
    run = begin_run("embed", "json")
    formatter = run_log._JsonFormatter()
    try:
        raise ValueError("no")
    except ValueError:
        record = logging.getLogger().makeRecord(
            "geneformer_ray.some", logging.WARNING, "", 0, "%d tokens", (7,), sys.exc_info()
        )
    line = json.loads(formatter.format(record))
    assert (line["run"], line["level"], line["logger"], line["message"]) == (
        run.id, "warning", "geneformer_ray.some", "7 tokens",
    )  # fmt: skip
    assert "ValueError: no" in line["trace"]


def test_a_job_that_fails_says_so_in_the_format() -> None:
    command = [sys.executable, "-m", "ray_jobs.register", "--output", "/no/such"]
    environment = {**os.environ, "GENEFORMER_LOG_FORMAT": "json"}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    (said,) = done.stderr.splitlines()
    line = json.loads(said)
    assert (line["level"], line["exit_code"], line["job"]) == ("error", 2, "register")
    assert line["message"].startswith("python -m ray_jobs.register: --output: got")
