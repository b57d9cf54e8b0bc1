"""Submit a job to a running cluster, follow its log, and end with its exit code and its summary.

    python -m ray_jobs.submit [FLAGS] JOB FLAGS_OF_THE_JOB
    python -m ray_jobs.submit --logs ID
    python -m ray_jobs.submit --stop ID

The job's flags are checked here first. What is uploaded is our packages and a local file of the job's --config; the
installation's settings go along as environment variables, secrets never. The job's log goes to standard error, its
summary to standard output. The exit code is the job's: 0, 1, 2 for bad input; 130 if it was stopped, 137 if its driver
was killed, 1 if it never started. Ctrl-C ends the following, not the job. A job that is stopped gets SIGTERM, and is
killed when RAY_JOB_STOP_WAIT_TIME_S is over: 3 s, too few for a checkpoint, unless the head was started with more.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

from geneformer_ray.errors import InputError
from geneformer_ray.progress import say
from geneformer_ray.settings import Settings
from ray_jobs.submit_flags import PROG, read_flags
from ray_jobs.submitted_flags import check

if TYPE_CHECKING:
    from argparse import Namespace

    from geneformer_ray.distribute.job_submission import JobsApi


def _address(given: Namespace) -> str:
    """Give the cluster's address, and say in the environment that a running one is meant.

    For a local one a token is made up when Ray is first imported, which would take the place of this cluster's.
    """
    address: str | None = given.jobs_address or Settings.read().jobs_address
    if address is None:
        raise InputError("--jobs-address", "nothing", "http://HOST:8265, or RAY_API_SERVER_ADDRESS in the environment")
    os.environ.setdefault("RAY_ADDRESS", address)
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    return address


def _submit(address: str, given: Namespace) -> int:
    from geneformer_ray.distribute.job_package import CONFIG_FILE, packed
    from geneformer_ray.distribute.job_submission import JobsApi, check_flag, travelling_variables

    variables = travelling_variables(Settings.read(), given.env)
    job, *flags = given.command
    for flag in flags:
        check_flag(flag)
    submitted = check(job, flags, CONFIG_FILE)
    with packed(submitted.config) as folder:
        api = JobsApi(address)
        submission_id = api.submit(
            submitted.command, folder, variables, submission_id=given.submission_id, cpus=given.entrypoint_num_cpus,
            gpus=given.entrypoint_num_gpus, memory=given.entrypoint_memory,
        )  # fmt: skip
    say(f"{submission_id} submitted to {api.address}")
    return _print({"submission_id": submission_id}) if given.no_wait else _follow(api, submission_id)


def _follow(api: JobsApi, submission_id: str) -> int:
    from geneformer_ray.distribute.job_log import JobLog
    from geneformer_ray.distribute.job_submission import STOPPED_CODE, exit_code

    log = JobLog()
    try:
        job = api.follow(submission_id, log)
    except KeyboardInterrupt:
        say(f"{submission_id} goes on; {PROG} --logs {submission_id} follows it again, --stop {submission_id} stops it")
        return STOPPED_CODE
    code = exit_code(job)
    summary = log.end(code)
    if code and job.driver_exit_code is None:
        say(f"{PROG}: {submission_id} {job.status.value}: {job.message}")
    if summary is not None:
        print(summary, flush=True)
    return code


def _run(given: Namespace) -> int:
    address = _address(given)
    if given.command:
        return _submit(address, given)
    from geneformer_ray.distribute.job_submission import JobsApi

    api = JobsApi(address)
    if given.stop:
        say(f"waiting until {given.stop} has ended")
        return _print({"submission_id": given.stop, "status": api.stop(given.stop).status.value})
    return _follow(api, given.logs)


def _print(summary: dict[str, str]) -> int:
    print(json.dumps(summary), flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(_run(read_flags(__doc__ or "")))
    except InputError as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{PROG}: given up; what was submitted goes on", file=sys.stderr)
        sys.exit(130)
