"""Trainings on two workers that lose a worker, a node, their driver or the disk: the same model, registered once."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray.job_submission import JobSubmissionClient

from tests.chaos.cluster import LivingCluster, living_cluster
from tests.chaos.disk import Disk, limited_disk
from tests.chaos.record import Record
from tests.chaos.training_setting import TrainingSetting, assert_recorded_once, assert_same, trained, within_an_epoch
from tests.integration.processes import REPOSITORY, Run, processes_of, seconds_until_none

pytestmark = [pytest.mark.chaos, pytest.mark.integration, pytest.mark.timeout(1200)]

SAME = "the same weights, predictions and metrics to the last bit; one version"
KILLED = "after a checkpoint within the second epoch or a later one"
AGENTS_OF_RAY = 90.0


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> TrainingSetting:
    return TrainingSetting.of(tmp_path_factory.mktemp("trainings"))


@dataclass(frozen=True)
class Place:
    """Where a scenario's outputs, store and processes are."""

    folder: Path
    ray: Path

    @property
    def store(self) -> str:
        return f"sqlite:///{self.folder}/mlflow.db"

    @property
    def local(self) -> dict[str, str]:
        """The environment of a command with a cluster of its own."""
        return {"MLFLOW_TRACKING_URI": self.store, "RAY_TMPDIR": str(self.ray)}


@pytest.fixture
def place(ray_folder: Path, tmp_path: Path) -> Place:
    return Place(tmp_path, ray_folder)


def whole_run(setting: TrainingSetting, output: Path, **environment: str) -> Run:
    run = setting.run(output, **environment)
    assert run.code == 0, run.errors
    return run


def workers_of(folder: Path) -> list[int]:
    return [pid for pid, title in processes_of(folder).items() if title.startswith("ray::RayTrainWorker")]


def test_a_killed_worker_is_replaced(setting: TrainingSetting, place: Place, record: Callable[[Record], None]) -> None:
    whole, output = place.folder / "whole", place.folder / "out"
    baseline = whole_run(setting, whole, **place.local)
    with setting.start(output, **place.local) as job:
        job.wait_until(lambda: within_an_epoch(output))
        workers = workers_of(place.ray)
        assert len(workers) == 2
        os.kill(workers[-1], signal.SIGKILL)
        assert not trained(output)
        run = job.finished()
    assert run.code == 0, run.errors
    assert_same(output, whole)
    assert_recorded_once(place.store, 2)
    free = seconds_until_none(place.ray, AGENTS_OF_RAY)
    killed = f"1 of 2 training workers, {KILLED}"
    record(Record("fine-tune, local", killed, baseline.seconds, run.seconds, free, SAME))


def test_a_killed_driver_goes_on_where_it_stopped(
    setting: TrainingSetting, place: Place, record: Callable[[Record], None]
) -> None:
    whole, output = place.folder / "whole", place.folder / "out"
    baseline = whole_run(setting, whole, **place.local)
    with setting.start(output, **place.local) as job:
        job.wait_until(lambda: within_an_epoch(output))
        before = job.kill()
    assert not trained(output)
    # At once: what the killed driver has left is still there.
    again = setting.run(output, **place.local)
    assert again.code == 0, again.errors
    assert_same(output, whole)
    assert_recorded_once(place.store, 2)
    free = seconds_until_none(place.ray, AGENTS_OF_RAY)
    killed = f"the driver, {KILLED}; the same command again, at once"
    record(Record("fine-tune, local", killed, baseline.seconds, before + again.seconds, free, SAME))


# ---------------------------------------------------------------------- a cluster that lives on


def test_a_node_that_goes_is_done_without(
    setting: TrainingSetting, place: Place, record: Callable[[Record], None]
) -> None:
    """A head without work on it, and three nodes for two workers."""
    whole, output = place.folder / "whole", place.folder / "out"
    with living_cluster(place.ray, head_cpus=0) as cluster:
        nodes = {node.node_id: node for node in (cluster.add_node() for _ in range(3))}
        environment = {"MLFLOW_TRACKING_URI": place.store, **cluster.environment}
        baseline = whole_run(setting, whole, **environment)
        with setting.start(output, **environment) as job:
            job.wait_until(lambda: within_an_epoch(output))
            with_worker = cluster.ask("where", "RayTrainWorker")["nodes"]
            assert len(set(with_worker)) == 2
            # The board by which the workers find each other's run lies with the driver: no other node takes it along.
            assert not set(cluster.ask("where", "Board")["nodes"]) & set(nodes)
            cluster.kill_node(nodes[with_worker[0]])
            assert not trained(output)
            run = job.finished()
        assert run.code == 0, run.errors
        assert_same(output, whole)
        assert_recorded_once(place.store, 2)
        free = cluster.seconds_until_free(60)
    killed = f"1 of 3 nodes, with a worker on it, {KILLED}; it stayed away"
    record(Record("fine-tune, cluster of 3 nodes", killed, baseline.seconds, run.seconds, free, SAME))


@dataclass(frozen=True)
class Submitted:
    """A fine-tune that was handed to a cluster with ``ray job submit``."""

    client: JobSubmissionClient
    name: str
    started: float

    @classmethod
    def to(cls, cluster: LivingCluster, setting: TrainingSetting, output: Path, store: str) -> Submitted:
        name, ray = f"chaos-{secrets.token_hex(4)}", str(Path(sys.executable).with_name("ray"))
        command = [ray, "job", "submit", "--no-wait", f"--submission-id={name}", "--working-dir=."]
        command += [f'--runtime-env-json={{"env_vars": {{"MLFLOW_TRACKING_URI": "{store}"}}}}', "--"]
        command += [sys.executable, "-m", "ray_jobs.finetune", *setting.flags(output)]
        deadline = time.monotonic() + 120
        while True:
            started = time.monotonic()
            done = subprocess.run(
                command, cwd=REPOSITORY, env={**os.environ, "RAY_API_SERVER_ADDRESS": cluster.dashboard},
                capture_output=True, text=True, check=False, timeout=120,
            )  # fmt: skip
            # A head takes jobs some seconds after it has started.
            if "No available agent" not in done.stderr or started > deadline:
                break
            time.sleep(1)
        assert done.returncode == 0, done.stdout + done.stderr
        return cls(JobSubmissionClient(cluster.dashboard), name, started)

    def state(self) -> str:
        return str(self.client.get_job_status(self.name).value)

    def wait_until(self, reached: Callable[[], bool]) -> float:
        while not reached():
            assert time.monotonic() - self.started < 300, self.client.get_job_logs(self.name)
            time.sleep(0.1)
        return time.monotonic() - self.started

    def ended(self) -> float:
        """Wait for the job's end; the seconds that it took."""
        return self.wait_until(lambda: self.state() in ("SUCCEEDED", "FAILED", "STOPPED"))


def test_a_submitted_driver_that_is_killed_fails_and_goes_on_when_submitted_again(
    setting: TrainingSetting, place: Place, record: Callable[[Record], None]
) -> None:
    whole, output = place.folder / "whole", place.folder / "out"
    with living_cluster(place.ray, head_cpus=2) as cluster:
        first = Submitted.to(cluster, setting, whole, place.store)
        baseline = first.ended()
        assert first.state() == "SUCCEEDED", first.client.get_job_logs(first.name)
        job = Submitted.to(cluster, setting, output, place.store)
        job.wait_until(lambda: within_an_epoch(output) or job.state() == "FAILED")
        (driver,) = [
            pid for pid, title in processes_of(place.ray).items()
            if "-m ray_jobs.finetune" in title and not title.startswith("/bin/")
        ]  # fmt: skip
        os.kill(driver, signal.SIGKILL)
        before = job.ended()
        assert job.state() == "FAILED"
        assert not trained(output)
        freed = cluster.seconds_until_free(60)
        again = Submitted.to(cluster, setting, output, place.store)
        seconds = again.ended()
        assert again.state() == "SUCCEEDED", again.client.get_job_logs(again.name)
        assert_same(output, whole)
        assert_recorded_once(place.store, 2)
        free = max(freed, cluster.seconds_until_free(60))
    killed = f"the driver, {KILLED}: the job FAILED; submitted again"
    record(Record("fine-tune, `ray job submit`", killed, baseline, before + seconds, free, SAME))


# ---------------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(place: Place) -> Iterator[Disk]:
    """A disk that holds one checkpoint, and not a second one beside it."""
    with limited_disk(place.folder / "disk", kib=512) as disk:
        yield disk


def test_a_full_disk_ends_the_training_and_room_lets_it_go_on(
    setting: TrainingSetting, small_disk: Disk, place: Place, record: Callable[[Record], None]
) -> None:
    whole, output = place.folder / "whole", small_disk.place / "out"
    baseline = whole_run(setting, whole, **place.local)
    full = setting.run(output, **place.local)
    assert not trained(output)
    assert (full.code, full.summary) == (1, {})
    assert "No space left" in full.errors.splitlines()[-1]
    small_disk.enlarge()
    again = setting.run(output, **place.local)
    assert again.code == 0, again.errors
    assert_same(output, whole)
    assert_recorded_once(place.store, 2)
    free = seconds_until_none(place.ray, AGENTS_OF_RAY)
    killed = "the disk was full at the second checkpoint: exit code 1; the same command on a larger one"
    record(Record("fine-tune, local", killed, baseline.seconds, full.seconds + again.seconds, free, SAME))
