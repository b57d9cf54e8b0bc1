"""The other front door: ``python -m ray_jobs.submit`` on a running cluster with token authentication."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest

from tests.integration.head import Head, running_head
from tests.integration.small_data import SmallData

pytestmark = pytest.mark.integration

API_KEY = "anna-key-0123456789-of-the-service"
STORE_PASSWORD = "hunter2-of-the-store"
TINY = ("--layers", "1", "--width", "8", "--heads", "1", "--feed-forward", "8")


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    # What a head's environment may hold: secrets, and the time that a driver has to write its checkpoint.
    secrets = {"GENEFORMER_SERVE_API_KEYS": API_KEY, "MLFLOW_TRACKING_PASSWORD": STORE_PASSWORD}
    with running_head(RAY_JOB_STOP_WAIT_TIME_S="60", **secrets) as head:
        yield head


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


def test_a_submitted_job_ends_like_the_job_itself(
    head: Head, small_data: SmallData, storage: Path, tmp_path: Path
) -> None:
    (tmp_path / "flags.yaml").write_text("obs-columns: cell_type,donor\n")
    flags = ("tokenize", "--input", small_data.h5ad, "--vocabulary", small_data.vocabulary, "--output", "its cells",
             "--config", str(tmp_path / "flags.yaml"))  # fmt: skip
    # Here, too, lie secrets that must not travel, and an address that is not the driver's.
    here = {"GENEFORMER_STORAGE": str(storage), "GENEFORMER_SERVE_API_KEYS": API_KEY, "RAY_ADDRESS": head.address}
    done = head.submit("--submission-id", "whole", "--env", "GENEFORMER_LOG_FORMAT=text", *flags, **here)
    assert done.code == 0, done.errors
    assert done.summary["cells"] == small_data.cells
    assert done.summary["output"] == str(storage / "its cells")
    # The local --config went along, and the settings are the driver's.
    assert set(pq.read_table(storage / "its cells").column_names) >= {"input_ids", "cell_type", "donor"}
    # Standard output is the summary's alone; the log is told, once, and says which cluster the driver has joined.
    assert len(done.out.splitlines()) == 1
    assert done.errors.count("Ray: ") == 1
    assert "Ray: a local cluster" not in done.errors
    assert done.out.strip() not in done.errors

    job = httpx.get(f"{head.address}/api/jobs/whole", headers={"Authorization": f"Bearer {head.token}"}).json()
    assert job["runtime_env"]["env_vars"] == {"GENEFORMER_STORAGE": str(storage), "GENEFORMER_LOG_FORMAT": "text"}
    for secret in (API_KEY, STORE_PASSWORD, head.token):
        assert secret not in json.dumps(job)

    again = head.submit("--logs", "whole")
    assert (again.code, again.out) == (0, done.out)
    twice = head.submit("--submission-id", "whole", *flags, **here)
    assert (twice.code, twice.out) == (2, "")
    assert twice.errors.endswith("--submission-id: got whole; takes an id that no job of this cluster has had\n")


def test_the_exit_code_is_the_jobs_own(head: Head) -> None:
    done = head.submit("promote", "--registered-model", "small")
    assert (done.code, done.out) == (2, "")
    # A store in the throw-away copy, which only the driver can tell: the nodes may know of another one.
    assert "python -m ray_jobs.promote: MLFLOW_TRACKING_URI: got nothing" in done.errors


def test_a_wrong_token_is_one_line(head: Head) -> None:
    done = head.submit("promote", "--registered-model", "small", RAY_AUTH_TOKEN="wrong")
    assert (done.code, done.out) == (2, "")
    (line,) = done.errors.splitlines()
    assert line.startswith(f"python -m ray_jobs.submit: token of {head.address}: got a token that it refuses; takes")


@pytest.mark.slow
def test_the_token_of_the_home_directory_counts(head: Head, tmp_path: Path) -> None:
    # Where `ray get-auth-token --generate` puts it. Jobs on a local cluster make up one of their own instead.
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(head.token)
    (tmp_path / ".ray" / "auth_token").chmod(0o600)
    variables = {name: value for name, value in head.environment.items() if name != "RAY_AUTH_TOKEN"}
    done = replace(head, environment=variables | {"HOME": str(tmp_path)}).submit("--logs", "nobody")
    assert done.code == 2
    assert done.errors.endswith(f"job: got nobody; takes the id of a job that was submitted to {head.address}\n")


def read_until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if text in line:
            return
    raise AssertionError(f"it ended without {text!r}")


@pytest.mark.slow
def test_a_job_outlives_who_follows_it_and_is_stopped_with_time_to_unwind(
    head: Head, small_data: SmallData, storage: Path
) -> None:
    data = ("--cells", str(storage / "its cells"), "--vocabulary", small_data.vocabulary, "--output", "model")
    places = {"GENEFORMER_STORAGE": str(storage), "MLFLOW_TRACKING_URI": f"sqlite:///{storage}/mlflow.db"}
    first = head.start("--submission-id", "long", "pretrain", *data, *TINY, "--epochs", "100000", **places)
    read_until(first, "Ray: ")
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=30)
    assert first.returncode == 130
    assert errors.splitlines()[-1].startswith("long goes on; python -m ray_jobs.submit --logs long follows it again")

    second = head.start("--logs", "long")
    read_until(second, "Ray: ")
    stopped = head.submit("--stop", "long")
    assert (stopped.code, json.loads(stopped.out)) == (0, {"submission_id": "long", "status": "STOPPED"})
    out, errors = second.communicate(timeout=30)
    assert (second.returncode, out) == (130, "")
    # The driver's own last words: it was not killed.
    assert "python -m ray_jobs.pretrain: stopped; the same command goes on where it can" in errors


def test_no_secret_is_in_what_the_cluster_wrote_down(head: Head) -> None:
    """The last test of this file: all of the above has been logged by then."""
    looked_at = 0
    for file in (path for path in head.folder.rglob("*") if path.is_file() and not path.is_symlink()):
        content = file.read_bytes()
        looked_at += b"Running entrypoint for job whole" in content
        for secret in (API_KEY, STORE_PASSWORD, head.token):
            assert secret.encode() not in content, file
    assert looked_at


@pytest.mark.slow
def test_a_submitted_training_finds_its_workers_on_the_cluster(
    head: Head, small_data: SmallData, storage: Path
) -> None:
    flags = ("--vocabulary", small_data.vocabulary, "--output")
    done = head.submit("tokenize", "--input", small_data.h5ad, *flags, str(storage / "cells"))
    assert done.code == 0, done.errors
    output = str(storage / "trained")
    two = ("--epochs", "1", "--num-workers", "2")
    store = f"sqlite:///{storage}/mlflow.db"
    done = head.submit(
        "pretrain", "--cells", str(storage / "cells"), *flags, output, *TINY, *two, MLFLOW_TRACKING_URI=store
    )
    assert done.code == 0, done.errors
    assert (storage / "trained" / "model" / "model.safetensors").exists()
