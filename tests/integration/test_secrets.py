"""Secrets of a job's environment are in nothing that it leaves behind."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from geneformer_ray.compute.model_directory import save_model
from geneformer_ray.compute.pretraining import new_model
from geneformer_ray.data.vocabulary import GeneVocabulary
from tests.integration.head import OURS, free_ports
from tests.integration.processes import Job
from tests.integration.small_data import SmallData

pytestmark = [pytest.mark.slow, pytest.mark.integration]

STARTUP_SECONDS = 120.0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[int]:
    """An MLflow server's port; its database and artifacts lie below ``tmp_path``."""
    (port,) = free_ports(1)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db",
         "--artifacts-destination", str(tmp_path / "artifacts"), "--host", "127.0.0.1", "--port", str(port),
         "--workers", "1"],
        env={**environment, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + STARTUP_SECONDS
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx.TransportError:
                assert process.poll() is None
                assert time.monotonic() < deadline
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait(30)


def test_secrets_are_neither_in_logs_nor_in_the_store(small_data: SmallData, store: int, tmp_path: Path) -> None:
    vocabulary = GeneVocabulary.load(small_data.vocabulary)
    torch.manual_seed(0)
    model = new_model(vocabulary, layers=1, width=16, heads=2, feed_forward=32)
    save_model(model, vocabulary, tmp_path / "model")
    api_key, token, password = (secrets.token_hex(16) for _ in range(3))
    # Not pytest's own folder: Ray's sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="gfr", ignore_cleanup_errors=True) as ray_folder:
        environment = {
            "GENEFORMER_SERVE_API_KEYS": f"anna {api_key}", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token,
            "MLFLOW_TRACKING_URI": f"http://anna:{password}@127.0.0.1:{store}", "RAY_TMPDIR": ray_folder,
        }  # fmt: skip
        cells, output = str(tmp_path / "cells"), str(tmp_path / "classifiers")
        encode = ("--input", small_data.h5ad, "--vocabulary", small_data.vocabulary, "--output", cells)
        with Job("tokenize", *encode, "--obs-columns", "cell_type,donor", **environment) as job:
            tokenized = job.finished()
        tune = ("--cells", cells, "--model", str(tmp_path / "model"), "--output", output, "--pooling", "mean")
        split = ("--label", "cell_type", "--group", "donor", "--epochs", "1", "--registered-model", "small")
        with Job("finetune", *tune, *split, **environment) as job:
            tuned = job.finished()
        assert (tokenized.code, tuned.code) == (0, 0), tokenized.errors + tuned.errors
        said = [str(run.summary) + run.errors for run in (tokenized, tuned)]
        assert f"http://127.0.0.1:{store}" in said[1]  # the store is named, without its password
        files = [path for root in (ray_folder, tmp_path) for path in Path(root).rglob("*")]
        written = {path: path.read_bytes() for path in files if path.is_file() and not path.is_symlink()}
        # Ray's logs of both jobs, the job's manifest, the store's runs and its copy of the model.
        for part in ("/logs/", "classifiers/_manifest.json", "mlflow.db", "artifacts/"):
            assert any(part in str(path) for path in written), part
        for secret in (api_key, token, password):
            assert [line for text in said for line in text.splitlines() if secret in line] == []
            assert [path for path, content in written.items() if secret.encode() in content] == []
