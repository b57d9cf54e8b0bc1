"""Screens that lose an actor, a node, their driver or the disk: the same table in the end, nothing twice."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.chaos.cluster import living_cluster
from tests.chaos.disk import Disk, limited_disk
from tests.chaos.record import Record
from tests.integration.processes import processes_of, seconds_until_none
from tests.integration.screen_setting import (
    STATES,
    ScreenSetting,
    assert_same,
    begun,
    items_done,
    shards,
    whole_run,
)

pytestmark = [pytest.mark.chaos, pytest.mark.integration, pytest.mark.timeout(1200)]

SAME = "the same table, byte for byte"
# Ray's two agents of a node that was killed try for a minute to tell its head, which was killed as well.
AGENTS_OF_RAY = 90.0


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> ScreenSetting:
    return ScreenSetting.of(tmp_path_factory.mktemp("screens"))


def actors_of(folder: Path) -> list[int]:
    """The actor processes of a screen, as Ray names them."""
    return [pid for pid, title in processes_of(folder).items() if re.match(r"ray::.*(MapWorker|_Actor)", title)]


def test_a_killed_actor_is_replaced(
    setting: ScreenSetting, ray_folder: Path, tmp_path: Path, record: Callable[[Record], None]
) -> None:
    whole, output = tmp_path / "whole", tmp_path / "out"
    baseline = whole_run(setting, whole, RAY_TMPDIR=str(ray_folder))
    with setting.start(output, RAY_TMPDIR=str(ray_folder)) as job:
        job.wait_until(lambda: begun(output))
        at, actors = items_done(output), actors_of(ray_folder)
        assert len(actors) == len(os.sched_getaffinity(0))
        os.kill(actors[0], signal.SIGKILL)
        run = job.finished()
    assert run.code == 0, run.errors
    assert_same(output, whole)
    killed = f"1 of {len(actors)} actors, after {at} of {items_done(whole)} items"
    free = seconds_until_none(ray_folder, AGENTS_OF_RAY)
    record(Record("screen, local", killed, baseline.seconds, run.seconds, free, SAME))


def test_a_killed_driver_goes_on_where_it_stopped(
    setting: ScreenSetting, ray_folder: Path, tmp_path: Path, record: Callable[[Record], None]
) -> None:
    """With states: they are computed once; a second time, in another order of sums, they might differ in a bit."""
    whole, output = tmp_path / "whole", tmp_path / "out"
    baseline = setting.run(whole, *STATES, RAY_TMPDIR=str(ray_folder))
    assert baseline.code == 0, baseline.errors
    with setting.start(output, *STATES, RAY_TMPDIR=str(ray_folder)) as job:
        job.wait_until(lambda: begun(output))
        before = job.kill()
    at, states = items_done(output), (output / "states.json").read_bytes()
    assert at < items_done(whole)
    # At once: what the killed driver has left is still there.
    again = setting.run(output, *STATES, RAY_TMPDIR=str(ray_folder))
    assert again.code == 0, again.errors
    assert (output / "states.json").read_bytes() == states == (whole / "states.json").read_bytes()
    assert_same(output, whole)
    free = seconds_until_none(ray_folder, AGENTS_OF_RAY)
    killed = f"the driver, after {at} of {items_done(whole)} items; the same command again, at once"
    record(Record("screen with states, local", killed, baseline.seconds, before + again.seconds, free, SAME))


def test_a_node_that_goes_takes_nothing_with_it(
    setting: ScreenSetting, ray_folder: Path, tmp_path: Path, record: Callable[[Record], None]
) -> None:
    whole, output = tmp_path / "whole", tmp_path / "out"
    with living_cluster(ray_folder, head_cpus=1) as cluster:
        node = cluster.add_node()
        baseline = whole_run(setting, whole, "--min-workers", "2", **cluster.environment)
        with setting.start(output, "--min-workers", "2", **cluster.environment) as job:
            job.wait_until(lambda: begun(output))
            at = items_done(output)
            cluster.kill_node(node)
            run = job.finished()
        assert run.code == 0, run.errors
        assert_same(output, whole)
        free = cluster.seconds_until_free(60)
    killed = f"1 of 2 nodes, after {at} of {items_done(whole)} items; it stayed away"
    record(Record("screen, cluster of 2 nodes", killed, baseline.seconds, run.seconds, free, SAME))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk that holds some of the shards."""
    with limited_disk(tmp_path / "disk", kib=320) as disk:
        yield disk


def test_a_full_disk_ends_the_run_and_a_larger_one_goes_on(
    setting: ScreenSetting,
    small_disk: Disk,
    ray_folder: Path,
    tmp_path: Path,
    record: Callable[[Record], None],
) -> None:
    whole, output = tmp_path / "whole", small_disk.place / "out"
    baseline = whole_run(setting, whole, RAY_TMPDIR=str(ray_folder))
    full = setting.run(output, RAY_TMPDIR=str(ray_folder))
    assert (full.code, full.summary) == (1, {})
    (line,) = [line for line in full.errors.splitlines() if line.startswith("python -m ray_jobs.screen")]
    assert "No space left" in line
    assert "Traceback" not in full.errors
    at = items_done(output)
    assert 0 < at < items_done(whole)
    for shard in shards(output):
        assert pq.read_table(shard).num_rows > 0  # whole, or not there
    assert processes_of(ray_folder) == {}
    small_disk.enlarge()
    again = setting.run(output, RAY_TMPDIR=str(ray_folder))
    assert again.code == 0, again.errors
    assert_same(output, whole)
    free = seconds_until_none(ray_folder, AGENTS_OF_RAY)
    killed = f"the disk was full after {at} of {items_done(whole)} items: exit code 1; the same command on a larger one"
    record(Record("screen, local", killed, baseline.seconds, full.seconds + again.seconds, free, SAME))
