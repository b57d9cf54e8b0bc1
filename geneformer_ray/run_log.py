"""Which run this process is, and its log as one JSON object a line for those who collect logs.

A run's id stands in every such line, in the job's summary, in MLflow's tags and in Ray's metrics. Under ``ray job
submit`` it is the submission's id.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

__all__ = ["Run", "begin_run", "current_run", "in_json", "json_line"]

# Where Ray tells the driver of a submitted job what it was submitted as.
RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


@dataclass(frozen=True)
class Run:
    """One run of a job: its id, and the job's name."""

    id: str = ""
    job: str = ""


_run, _in_json = Run(), False


def begin_run(job: str, log_format: str = "text") -> Run:
    """Name this process's run, and write the package's log to standard error.

    Parameters
    ----------
    job
        The job's name.
    log_format
        ``text``, or ``json``: one object a line with ``time``, ``level``, ``run``, ``job`` and ``message``.
    """
    global _run, _in_json
    submission = json.loads(os.environ.get(RAY_JOB) or "{}").get("metadata", {}).get("job_submission_id")
    _run, _in_json = Run(str(submission or secrets.token_hex(6)), job), log_format == "json"
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    if _in_json:
        for handler in logging.getLogger().handlers:
            handler.setFormatter(_JsonFormatter())
    logging.getLogger("geneformer_ray").setLevel(logging.INFO)
    return _run


def current_run() -> Run:
    """Give this process's run; its id is empty where the library is used without a job."""
    return _run


def in_json() -> bool:
    """Whether what a job tells is written as JSON."""
    return _in_json


def json_line(message: str, level: str = "info", **values: Any) -> str:
    """Give one line of the log."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": now, "level": level, "run": _run.id, "job": _run.job, "message": message, **values})


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        trace = {"trace": self.formatException(record.exc_info)} if record.exc_info else {}
        return json_line(record.getMessage(), record.levelname.lower(), logger=record.name, **trace)
