"""Jobs on a running cluster: submitted, followed live and stopped; what became of one is an exit code."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shlex
import socket
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from geneformer_ray.errors import InputError
from geneformer_ray.manage.registry import without_credentials
from geneformer_ray.settings import VARIABLES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from ray.job_submission import JobDetails

    from geneformer_ray.distribute.job_log import JobLog
    from geneformer_ray.settings import Settings

__all__ = ["STOPPED_CODE", "JobsApi", "check_flag", "exit_code", "travelling_variables"]

KNOCK_SECONDS = 10.0
POLL_SECONDS = 0.5
AGENT_SECONDS = 30.0
# A head that does not answer for longer is gone; a job on it as well, or it goes on without us.
RECONNECT_SECONDS = 60.0
# Beyond any RAY_JOB_STOP_WAIT_TIME_S that makes sense.
STOP_SECONDS = 900.0
FAILED_CODE, STOPPED_CODE, SIGNAL_CODE = 1, 130, 128
# The driver is given these two by the cluster.
NOT_PASSED_ON = ("ray_address", "jobs_address")
NODES_KNOW = "the environment of the nodes: the dashboard shows what travels with a job"
SECRET_WORDS = {"TOKEN", "SECRET", "KEY", "KEYS", "PASSPHRASE"}
# They tell of every upload and connection.
CHATTERING = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
NO_AGENT = "No available agent"
MISSING = re.compile(r"status code 404|does not exist")


def travelling_variables(settings: Settings, extra: Mapping[str, str]) -> dict[str, str]:
    """Give the environment that a job is submitted with: the settings, then `extra`, and no secrets.

    Raises
    ------
    InputError
        If a value holds credentials, a name is that of a secret, or a store would lie in the throw-away copy.
    """
    dropped = {VARIABLES[name] for name in NOT_PASSED_ON}
    shared = {name: value for name, value in settings.variables().items() if name not in dropped}
    for name in extra:
        words = set(name.upper().split("_"))
        # What ends so names a file, which every node has to have.
        of_file = name.upper().endswith(("_FILE", "_PATH"))
        if ("PASSWORD" in name.upper() or words & SECRET_WORDS) and not of_file:
            raise InputError(
                "--env", f"{name}, which looks like a secret", f"no secrets: they belong into {NODES_KNOW}"
            )
    variables = {**shared, **extra}
    for name, value in variables.items():
        if without_credentials(value) != value:
            then = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or their like,"
            takes = f"one without: {then} belong into {NODES_KNOW}"
            raise InputError(name, f"{without_credentials(value)} with user or password", takes)
    for name in (VARIABLES["tracking_uri"], VARIABLES["registry_uri"]):
        uri = variables.get(name, "/")
        if not uri.startswith(("/", "sqlite:////")) and ("://" not in uri or uri.startswith("sqlite:")):
            takes = "an MLflow server or sqlite:////absolute/path: the job works in a copy that Ray throws away"
            raise InputError(name, uri, takes)
    return variables


def check_flag(flag: str) -> None:
    """Refuse a flag of a job with credentials in it: the dashboard shows the command."""
    if without_credentials(flag) != flag:
        raise InputError(
            "flags", f"{without_credentials(flag)} with user or password", f"one without: use {NODES_KNOW}"
        )


def exit_code(job: JobDetails) -> int:
    """Give the code with which a finished job is reported.

    The driver's own where there is one: 0, 1, 2 for bad input. 130 for a job that was stopped; 128 and the signal's
    number for a driver that was killed (137: SIGKILL, by hand or for memory); 1 where it never started.
    """
    if job.status == JobStatus.SUCCEEDED:
        return 0
    if job.status == JobStatus.STOPPED:
        return STOPPED_CODE
    code: int | None = job.driver_exit_code
    if code is None:
        return FAILED_CODE
    return SIGNAL_CODE - code if code < 0 else code


class JobsApi:
    """The jobs API of a running cluster, which is its dashboard's.

    Parameters
    ----------
    address
        ``http://HOST:8265``. The token is Ray's own setting: ``RAY_AUTH_TOKEN`` or ``RAY_AUTH_TOKEN_PATH``.

    Raises
    ------
    InputError
        If the address is none, or the token is not the cluster's.
    ConnectionError
        If nobody answers there.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        _knock(self.address)
        for name in CHATTERING:
            logging.getLogger(name).setLevel(logging.WARNING)
        # Ray's client takes this before what it is told.
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address
        with self._one_line():
            self._client = JobSubmissionClient(self.address)

    def submit(
        self,
        command: Sequence[str],
        working_directory: Path,
        variables: Mapping[str, str],
        *,
        submission_id: str | None = None,
        cpus: float | None = None,
        gpus: float | None = None,
        memory: int | None = None,
    ) -> str:
        """Submit a command; give the job's id.

        Parameters
        ----------
        command
            The driver's, run by a shell on a node of the cluster.
        working_directory
            What is uploaded.
        variables
            The environment of the driver and its workers.
        submission_id
            The job's id; by default Ray makes one up.
        cpus, gpus, memory
            What the driver itself reserves, in bytes of memory. By default nothing: it then runs on the head, also on
            one that offers no CPU.
        """
        deadline = time.monotonic() + AGENT_SECONDS
        with self._one_line("--submission-id", submission_id):
            while True:
                try:
                    return self._client.submit_job(
                        entrypoint=shlex.join(command),
                        submission_id=submission_id,
                        runtime_env={"working_dir": str(working_directory), "env_vars": dict(variables)},
                        entrypoint_num_cpus=cpus,
                        entrypoint_num_gpus=gpus,
                        entrypoint_memory=memory,
                    )
                except RuntimeError as error:
                    # The dashboard of a head that was just started answers before its agent does.
                    if NO_AGENT not in str(error) or time.monotonic() > deadline:
                        raise
                    time.sleep(POLL_SECONDS)

    def info(self, submission_id: str) -> JobDetails:
        """Ask how a job is doing."""
        with self._one_line("job", submission_id):
            return self._client.get_job_info(submission_id)

    def follow(self, submission_id: str, log: JobLog) -> JobDetails:
        """Tell a job's log as it grows, until the job has ended; give what became of it.

        Raises
        ------
        ConnectionError
            If the cluster is out of reach for a minute.
        """
        self.info(submission_id)  # an id that is wrong is said at once
        lost: float | None = None
        while True:
            try:
                asyncio.run(self._tail(submission_id, log))
                if (job := self.info(submission_id)).status.is_terminal():
                    return job
                lost = None
            except (OSError, RuntimeError, aiohttp.ClientError) as error:
                now = time.monotonic()
                lost = now if lost is None or log.connected else lost
                if now - lost > RECONNECT_SECONDS:
                    message = f"{self.address} has not answered for {RECONNECT_SECONDS:.0f} s ({error})"
                    raise ConnectionError(message) from error
            time.sleep(POLL_SECONDS)

    def stop(self, submission_id: str) -> JobDetails:
        """Stop a job and wait until it has ended; give what became of it."""
        with self._one_line("job", submission_id):
            self._client.stop_job(submission_id)
        deadline = time.monotonic() + STOP_SECONDS
        while not (job := self.info(submission_id)).status.is_terminal():
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{submission_id} is still {job.status} {STOP_SECONDS:.0f} s after it was told to stop"
                )
            time.sleep(POLL_SECONDS)
        return job

    async def _tail(self, submission_id: str, log: JobLog) -> None:
        log.from_the_start()  # as Ray tells it whenever it is asked
        async for text in self._client.tail_job_logs(submission_id):
            log.add(text)

    @contextlib.contextmanager
    def _one_line(self, field: str = "job", got: str | None = None) -> Iterator[None]:
        """Say in one line what Ray says in pages and tracebacks."""
        try:
            yield
        except AuthenticationError as error:
            takes = (
                "the cluster's token, in RAY_AUTH_TOKEN or the file of RAY_AUTH_TOKEN_PATH, with RAY_AUTH_MODE=token"
            )
            refused = "a token that it refuses" if "Authentication failed" in str(error) else "none"
            raise InputError(f"token of {self.address}", refused, takes) from error
        except RuntimeError as error:
            said = str(error)
            if "already exists" in said and got is not None:
                raise InputError(field, got, "an id that no job of this cluster has had") from error
            if MISSING.search(said):
                raise InputError(field, got, f"the id of a job that was submitted to {self.address}") from error
            last = ([type(error).__name__] + [line for line in said.splitlines() if line.strip()])[-1]
            raise ConnectionError(f"{self.address}: {last.strip()}") from error


def _knock(address: str) -> None:
    """Find out within seconds that nobody is there: Ray's client would wait for as long as TCP does."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        host = None
    if host is None or parts.scheme not in ("http", "https"):
        raise InputError("--jobs-address", without_credentials(address), "http://HOST:8265, the cluster's dashboard")
    try:
        socket.create_connection((host, port), KNOCK_SECONDS).close()
    except OSError as error:
        raise ConnectionError(f"no cluster answers at {address} ({error})") from error
