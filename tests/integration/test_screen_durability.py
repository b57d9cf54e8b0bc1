"""Screens that are killed, lose a node, fill the disk or meet bad cells: the same table in the end, nothing twice."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from geneformer_ray.compute.model_directory import save_model
from geneformer_ray.compute.pretraining import new_model
from geneformer_ray.data import storage
from geneformer_ray.data.shards import write_shard
from geneformer_ray.data.vocabulary import GeneVocabulary
from tests.conftest import random_cells
from tests.integration.processes import titles_below

pytestmark = [pytest.mark.integration, pytest.mark.slow]

REPOSITORY = Path(__file__).resolve().parents[2]
GENES, LONGEST = 1_200, 1_050
# A cell of all these is split; hundreds of small ones are joined.
LENGTHS = [1_040, *np.random.default_rng(1).integers(80, 240, size=900).tolist(), 1_050]
ITEMS_BEFORE = 5


@dataclass(frozen=True)
class Run:
    """A finished or failed command."""

    code: int
    summary: dict[str, Any]
    errors: str


@dataclass(frozen=True)
class Setting:
    """Cells, a model, and the command that screens them."""

    folder: Path
    vocabulary: GeneVocabulary

    @property
    def cells(self) -> list[np.ndarray]:
        return random_cells(self.vocabulary, np.random.default_rng(2), LENGTHS)

    def write_cells(self, name: str, cells: list[np.ndarray], ids: list[str]) -> None:
        states = [["alpha", "beta"][number % 2] for number in range(len(cells))]
        table = pa.table({"cell_id": ids, "input_ids": [cell.tolist() for cell in cells], "state": states})
        write_shard(str(self.folder / name), "", 0, table, vocabulary=self.vocabulary.digest, row_group_size=64)

    def start(
        self, output: Path, *flags: str, cells: str = "cells", model: str = "model", **environment: str
    ) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "ray_jobs.screen", "--cells", str(self.folder / cells), "--model"]
        command += [str(self.folder / model), "--output", str(output), *flags]
        variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return subprocess.Popen(
            command, cwd=REPOSITORY, env={**variables, **environment}, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, output: Path, *flags: str, **options: str) -> Run:
        with self.start(output, *flags, **options) as process:
            return finished(process)


def finished(process: subprocess.Popen[str]) -> Run:
    said, complaints = process.communicate(timeout=300)
    return Run(process.returncode, json.loads(said) if said else {}, complaints)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    names = {f"GENE{number:04d}": 1.0 for number in range(GENES)}
    vocabulary = GeneVocabulary.from_medians(names, max_length=LONGEST)
    setting = Setting(tmp_path_factory.mktemp("screens"), vocabulary)
    torch.manual_seed(0)
    model = new_model(vocabulary, layers=2, width=16, heads=2, feed_forward=24)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.4)
    save_model(model, vocabulary, setting.folder / "model")
    cells = setting.cells
    setting.write_cells("cells", cells, [f"cell{number}" for number in range(len(cells))])
    return setting


@pytest.fixture(scope="module")
def whole(setting: Setting) -> Path:
    """What a run leaves that nobody disturbs."""
    output = setting.folder / "whole"
    run = setting.run(output)
    assert run.code == 0, run.errors
    assert run.summary["events"] == run.summary["rows"] == sum(LENGTHS)
    assert items_done(output) > 5 * ITEMS_BEFORE
    shards_of_last = sum("cell901" in pq.read_table(file)["cell_id"].to_pylist() for file in shards(output))
    assert shards_of_last > 1
    return output


def items_done(output: Path) -> int:
    return len(list(output.glob("_progress/*.json")))


def shards(output: Path) -> list[Path]:
    return sorted(output.glob("cell_shifts/*.parquet"))


def wait_for_items(process: subprocess.Popen[str], output: Path) -> None:
    deadline = time.monotonic() + 300
    while items_done(output) < ITEMS_BEFORE:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.01)


def sorted_rows(output: Path) -> pa.Table:
    """The table in one order, each (cell, genes, state) once."""
    table = pq.read_table(output / "cell_shifts")
    keys = pa.table(
        {
            "cell": table["cell_id"],
            "genes": pa.compute.binary_join(table["genes"].combine_chunks(), "+"),
            "state": table["state"],
            "value": table["value"],
        }
    )
    assert len(keys.group_by(["cell", "genes", "state"]).aggregate([])) == len(keys)
    return keys.sort_by([("cell", "ascending"), ("genes", "ascending"), ("state", "ascending")])


def digest_of_rows(table: pa.Table) -> str:
    sha = hashlib.sha256()
    for name in ("cell", "genes", "state"):
        sha.update("\n".join(table[name].to_pylist()).encode())
    sha.update(table["value"].to_numpy().tobytes())
    return sha.hexdigest()


def assert_same(output: Path, whole: Path) -> None:
    assert digest_of_rows(sorted_rows(output)) == digest_of_rows(sorted_rows(whole))
    assert [shard.name for shard in shards(output)] == [shard.name for shard in shards(whole)]
    assert [shard.read_bytes() for shard in shards(output)] == [shard.read_bytes() for shard in shards(whole)]
    mine, theirs = (json.loads((folder / "_manifest.json").read_text()) for folder in (output, whole))
    assert mine["finished"]
    counts = ("cells", "events", "rows", "events_skipped", "rejected")
    assert [mine["summary"][name] for name in counts] == [theirs["summary"][name] for name in counts]


def actors_below(pid: int) -> list[int]:
    """The actor processes that descend from a driver, as Ray names them."""
    return [child for child, title in titles_below(pid).items() if re.match(r"ray::.*(MapWorker|_Actor)", title)]


# ---------------------------------------------------------------------- processes that die


def test_a_killed_driver_goes_on_where_it_stopped(setting: Setting, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with setting.start(output) as process:
        wait_for_items(process, output)
        process.kill()
        process.communicate()
    assert items_done(output) < items_done(whole)
    other = setting.run(output, "--layer", "0")
    assert (other.code, other.summary) == (2, {})
    assert "layer was -1, is 0" in other.errors
    again = setting.run(output)
    assert again.code == 0, again.errors
    assert_same(output, whole)


def test_a_killed_driver_keeps_its_states(setting: Setting, tmp_path: Path) -> None:
    """They are computed once: a second time, in another order of sums, they might differ in the last bit."""
    flags = ("--state-column", "state", "--start", "alpha", "--goal", "beta")
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "out"
    assert setting.run(undisturbed, *flags).code == 0
    with setting.start(output, *flags) as process:
        wait_for_items(process, output)
        process.kill()
        process.communicate()
    states = (output / "states.json").read_bytes()
    again = setting.run(output, *flags)
    assert again.code == 0, again.errors
    assert (output / "states.json").read_bytes() == states == (undisturbed / "states.json").read_bytes()
    assert_same(output, undisturbed)


def test_a_killed_actor_is_replaced(setting: Setting, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with setting.start(output) as process:
        wait_for_items(process, output)
        actors = actors_below(process.pid)
        assert actors
        os.kill(actors[0], signal.SIGKILL)
        run = finished(process)
    assert run.code == 0, run.errors
    assert_same(output, whole)


def test_a_node_that_goes_takes_nothing_with_it(setting: Setting, whole: Path, tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    size = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=size)
    output = tmp_path / "out"
    try:
        node = cluster.add_node(**size)
        token = {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH")}
        with setting.start(output, "--min-workers", "2", RAY_ADDRESS=cluster.address, **token) as process:
            wait_for_items(process, output)
            cluster.remove_node(node, allow_graceful=False)
            run = finished(process)
    finally:
        cluster.shutdown()
    assert run.code == 0, run.errors
    assert_same(output, whole)


# ---------------------------------------------------------------------- an object store


@pytest.fixture
def store() -> Iterator[dict[str, str]]:
    """An S3 server on a free port of loopback, and the environment that leads Arrow to it."""
    from moto.server import ThreadedMotoServer
    from pyarrow import fs

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        fs.S3FileSystem(allow_bucket_creation=True, endpoint_override=environment["AWS_ENDPOINT_URL"]).create_dir("lab")
        yield environment
    server.stop()


def test_a_killed_screen_in_a_store_goes_on(
    setting: Setting, whole: Path, store: dict[str, str], tmp_path: Path
) -> None:
    """Cells, model and output have no directory and no rename; the shards are those of a disk."""
    for name in ("cells", "model"):
        storage.upload(setting.folder / name, f"s3://lab/{name}")
    output = "s3://lab/out"
    command = [sys.executable, "-m", "ray_jobs.screen", "--cells", "s3://lab/cells", "--model", "s3://lab/model"]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    for attempt in range(2):
        with subprocess.Popen(
            [*command, "--output", output], cwd=REPOSITORY, env=variables, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            if attempt == 0:
                deadline = time.monotonic() + 120
                while len(storage.list_files(f"{output}/_progress")) < ITEMS_BEFORE:
                    assert time.monotonic() < deadline and process.poll() is None, process.communicate()
                    time.sleep(0.1)
                process.kill()
                process.communicate()
                assert 0 < len(storage.list_files(f"{output}/_progress")) < items_done(whole)
            else:
                run = finished(process)
                assert run.code == 0, run.errors
    copy = storage.local_copy(output)
    assert_same(copy, whole)
    shutil.rmtree(copy)


# ---------------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A disk that holds some of the shards, and what makes it large."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=320k", "tmpfs", str(place)], capture_output=True, check=False, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system of limited size can be mounted here: {mounted.stderr.strip()}")
    yield place, lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True) and None
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_ends_the_run_and_a_larger_one_goes_on(
    setting: Setting, whole: Path, small_disk: tuple[Path, Callable[[], None]]
) -> None:
    place, enlarge = small_disk
    output = place / "out"
    full = setting.run(output)
    assert (full.code, full.summary) == (1, {})
    (line,) = [line for line in full.errors.splitlines() if line.startswith("python -m ray_jobs.screen")]
    assert "No space left" in line
    assert "Traceback" not in full.errors
    assert 0 < items_done(output) < items_done(whole)
    for shard in shards(output):
        assert pq.read_table(shard).num_rows > 0  # whole, or not there
    enlarge()
    again = setting.run(output)
    assert again.code == 0, again.errors
    assert_same(output, whole)


# ---------------------------------------------------------------------- cells that cannot be screened


def test_bad_cells_are_set_aside_and_the_others_keep_their_numbers(
    setting: Setting, whole: Path, tmp_path: Path
) -> None:
    """One is too long, one holds foreign tokens, and of one the model makes no finite number."""
    vocabulary, cells = setting.vocabulary, setting.cells
    ids, spoilt = [f"cell{number}" for number in range(len(cells))], 8
    bad = {
        "long": np.arange(2, 2 + LONGEST + 5) % len(vocabulary),
        "foreign": np.array([5, 6, len(vocabulary) + 7]),
        "nan": np.array([7, spoilt, 9]),
    }
    without = [number for number, cell in enumerate(cells) if spoilt not in cell]
    kept, kept_ids = [cells[number] for number in without], [ids[number] for number in without]
    middle = len(kept) // 2
    setting.write_cells("bad", [*kept[:middle], *bad.values(), *kept[middle:]],
                        [*kept_ids[:middle], *bad, *kept_ids[middle:]])  # fmt: skip
    assert len(kept) > 300
    spoil_model(setting, spoilt)
    flags = {"cells": "bad", "model": "spoilt"}
    output, share = tmp_path / "out", 3 / (len(kept) + 3)

    early = setting.run(tmp_path / "early", "--max-rejected", "0", **flags)
    assert early.code == 2
    assert "--max-rejected: got 0, and 2 of" in early.errors
    assert not (tmp_path / "early").exists()

    failed = setting.run(output, "--max-rejected", f"{2.5 / 3 * share:.6f}", **flags)
    assert (failed.code, failed.summary) == (2, {})
    assert "and 3 of" in failed.errors
    assert "goes on" in failed.errors
    done = items_done(output)
    assert done > 0

    run = setting.run(output, **flags)
    assert run.code == 0, run.errors
    assert (run.summary["rejected"], run.summary["events_rejected"]) == (3, 3)
    assert run.summary["share_rejected"] == pytest.approx(share, abs=1e-6)
    rejects = pq.read_table(run.summary["tables"]["rejects"]).to_pylist()
    assert {row["cell_id"] for row in rejects} == set(bad)
    reasons = {row["cell_id"]: row["reason"] for row in rejects}
    assert "input size" in reasons["long"]
    assert "vocabulary" in reasons["foreign"]
    assert "not a finite number" in reasons["nan"]
    rows, usual = sorted_rows(output), sorted_rows(whole)
    assert np.isfinite(rows["value"].to_numpy()).all()
    assert digest_of_rows(rows) == digest_of_rows(usual.filter(pa.compute.is_in(usual["cell"], pa.array(kept_ids))))


def test_a_large_cell_is_whole_or_set_aside(setting: Setting, tmp_path: Path) -> None:
    """Its events lie in several items; the one that inserts a spoilt gene fails, and takes all others with it."""
    spoilt = 1_150
    long = np.setdiff1d(np.arange(2, 1_045), [spoilt])
    short = np.array([5, 6, 7])
    setting.write_cells("large", [short, long], ["short", "long"])
    spoil_model(setting, spoilt)
    names = [name for name in setting.vocabulary.genes if name != setting.vocabulary.names[spoilt]]
    flags = {"cells": "large", "model": "spoilt"}
    fine = setting.run(tmp_path / "fine", "--perturbation", "overexpress", "--genes", ",".join(names), **flags)
    assert fine.code == 0, fine.errors
    assert fine.summary["rejected"] == 0
    every = ",".join(setting.vocabulary.genes)
    more = ("--perturbation", "overexpress", "--genes", every, "--max-rejected", "1")
    run = setting.run(tmp_path / "out", *more, **flags)
    assert run.code == 0, run.errors
    assert items_done(tmp_path / "out") > 2
    assert (run.summary["rejected"], run.summary["events"], run.summary["rows"]) == (2, 0, 0)
    assert run.summary["events_rejected"] == 2 * len(setting.vocabulary.genes)
    assert sorted_rows(tmp_path / "out").num_rows == 0
    rejects = pq.read_table(run.summary["tables"]["rejects"]).to_pylist()
    assert sorted(row["cell_id"] for row in rejects) == ["long", "short"]


def spoil_model(setting: Setting, token: int) -> None:
    """Give one gene an embedding that is no number."""
    from transformers import BertForMaskedLM

    model = BertForMaskedLM.from_pretrained(setting.folder / "model")
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[token] = float("nan")
    save_model(model, setting.vocabulary, setting.folder / "spoilt")
