"""Screens that keep their states, write to an object store or meet bad cells: the same table in the end, nothing twice.

What is killed is in ``tests/chaos``.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from geneformer_ray.compute.model_directory import save_model
from geneformer_ray.data import storage
from tests.integration.processes import Job
from tests.integration.screen_setting import (
    ITEMS_BEFORE,
    LONGEST,
    ScreenSetting,
    assert_same,
    digest_of_rows,
    items_done,
    sorted_rows,
    whole_run,
)

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> ScreenSetting:
    return ScreenSetting.of(tmp_path_factory.mktemp("screens"))


@pytest.fixture(scope="module")
def whole(setting: ScreenSetting) -> Path:
    """What a run leaves that nobody disturbs."""
    output = setting.folder / "whole"
    whole_run(setting, output)
    return output


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
    setting: ScreenSetting, whole: Path, store: dict[str, str], tmp_path: Path
) -> None:
    """Cells, model and output have no directory and no rename; the shards are those of a disk."""
    for name in ("cells", "model"):
        storage.upload(setting.folder / name, f"s3://lab/{name}")
    output = "s3://lab/out"
    flags = ("--cells", "s3://lab/cells", "--model", "s3://lab/model", "--output", output)

    def done() -> int:
        return len(storage.list_files(f"{output}/_progress"))

    with Job("screen", *flags) as job:
        job.wait_until(lambda: done() >= ITEMS_BEFORE)
        job.kill()
    assert done() < items_done(whole)
    with Job("screen", *flags) as job:
        run = job.finished()
    assert run.code == 0, run.errors
    copy = storage.local_copy(output)
    assert_same(copy, whole)
    shutil.rmtree(copy)


# ---------------------------------------------------------------------- cells that cannot be screened


def test_bad_cells_are_set_aside_and_the_others_keep_their_numbers(
    setting: ScreenSetting, whole: Path, tmp_path: Path
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


def test_a_large_cell_is_whole_or_set_aside(setting: ScreenSetting, tmp_path: Path) -> None:
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


def spoil_model(setting: ScreenSetting, token: int) -> None:
    """Give one gene an embedding that is no number."""
    from transformers import BertForMaskedLM

    model = BertForMaskedLM.from_pretrained(setting.folder / "model")
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[token] = float("nan")
    save_model(model, setting.vocabulary, setting.folder / "spoilt")
