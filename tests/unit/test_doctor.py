"""The doctor's checks, each driven into what it looks for and out of it: files, locks, ports and servers are real."""

from __future__ import annotations

import compileall
import contextlib
import os
import re
import sqlite3
import sys
import threading
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy

from geneformer_ray.compute.model_directory import save_model
from geneformer_ray.compute.pretraining import new_model
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.finding import Finding, examine, ok
from geneformer_ray.manage import authentication, gpu, installation, machine, model_health, places, ports, store_health
from geneformer_ray.manage.registry import open_store
from geneformer_ray.settings import FILE_VARIABLE, VARIABLES
from ray_jobs.doctor import DoctorConfig, run

TOKEN = "0123456789abcdef0123456789abcdef"


def told(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {one.name: one for one in findings}


def only(findings: Iterable[Finding]) -> Finding:
    (one,) = findings
    return one


def write(file: Path, text: str, mode: int = 0o644) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(mode)
    return file


# ---------------------------------------------------------------------- findings


def test_a_check_that_fails_is_a_fault_that_names_the_exception() -> None:
    def check() -> Iterator[Finding]:
        yield ok("disk.first", "fine")
        raise ZeroDivisionError("no\nmore")

    first, second = examine("disk.second", check)
    assert (first.name, first.status) == ("disk.first", "ok")
    assert (second.name, second.status) == ("disk.second", "fault")
    assert "ZeroDivisionError: no more" in second.found


# ---------------------------------------------------------------------- versions, byte-code


def installed(folder: Path, name: str, version: str, *requires: str) -> None:
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {text}" for text in requires)]
    write(folder / f"{name}-{version}.dist-info" / "METADATA", "\n".join(["Metadata-Version: 2.1", *lines, ""]))


def packages(folder: Path, lock: Path, *requirements: str) -> dict[str, Finding]:
    return told(installation.check_packages(lock, requirements=requirements, paths=[str(folder)]))


def test_packages_are_compared_with_the_lock(tmp_path: Path) -> None:
    installed(tmp_path, "alpha", "1.4+cpu", "beta>=2; python_version > '3'", "gamma; extra == 'more'")
    installed(tmp_path, "beta", "2.1")
    lock = write(tmp_path / "requirements.lock", "# pins\nAlpha==1.4\nbeta==2.1\nzeta==3\n")
    found = packages(tmp_path, lock, "alpha>=1", "never; extra == 'dev'")
    assert {name: one.status for name, one in found.items()} == {"versions.packages": "ok"}
    assert "2 packages as pinned" in found["versions.packages"].found
    lock.write_text("alpha==1.4\nbeta==2.2\n")
    found = packages(tmp_path, lock, "alpha>=1")
    assert found["versions.lock"].status == "warning"
    assert "beta 2.1 (tested: 2.2)" in found["versions.lock"].found
    assert str(lock) in found["versions.lock"].do


@pytest.mark.parametrize(
    ("needed", "said"),
    [
        ("alpha>=2", "alpha>=2 for geneformer-ray (here: 1.4)"),
        ("alpha[more]", "gamma for alpha (here: none)"),
        ("beta", "delta>3 for beta (here: 3)"),
    ],
)
def test_what_is_needed_and_not_there_is_a_fault(tmp_path: Path, needed: str, said: str) -> None:
    installed(tmp_path, "alpha", "1.4", "gamma; extra == 'more'")
    installed(tmp_path, "beta", "1", "delta>3")
    installed(tmp_path, "delta", "3")
    one = packages(tmp_path, tmp_path / "no.lock", needed)["versions.packages"]
    assert one.status == "fault"
    assert said in one.found
    fine = packages(tmp_path, tmp_path / "no.lock", "alpha>=1")["versions.packages"]
    assert fine.status == "ok"


def test_this_environment_has_what_it_needs() -> None:
    assert "fault" not in {one.status for one in (*installation.check_packages(), *installation.check_python())}
    assert only(installation.check_python(">=3.99")).status == "fault"


def test_code_alone_does_not_say_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "DISTRIBUTION", "geneformer-ray-that-nobody-installed")
    project = '[project]\nrequires-python = ">=3.99"\ndependencies = ["never>=1"]\n'
    write(tmp_path / "pyproject.toml", project)
    monkeypatch.setattr(installation, "CHECKOUT", tmp_path)
    assert only(installation.check_python()).status == "fault"
    assert only(installation.check_packages()).status == "fault"
    (tmp_path / "pyproject.toml").unlink()
    assert only(installation.check_python()).status == "warning"
    assert list(installation.check_packages()) == []


def test_what_must_be_the_same_on_every_node() -> None:
    mine = installation.installed_here()
    assert mine["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"ray", "torch", "mlflow"} <= mine.keys()
    assert re.fullmatch("[0-9a-f]{16}", mine["the code of geneformer_ray"])


def test_modules_that_are_not_compiled_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(10):
        write(tmp_path / "uncompiled_package" / f"module{number}.py", f"number = {number}\n")
    write(tmp_path / "uncompiled_package" / "__init__.py", "")
    monkeypatch.syspath_prepend(str(tmp_path))

    def look(**environment: str) -> dict[str, Finding]:
        return told(installation.check_byte_code(["uncompiled_package"], environment))

    found = look(PYTHONDONTWRITEBYTECODE="1")
    assert found["byte-code.compiled"].status == "warning"
    assert "uncompiled_package 11" in found["byte-code.compiled"].found
    assert "unset PYTHONDONTWRITEBYTECODE; make setup" in found["byte-code.compiled"].do
    assert found["byte-code.written"].status == "note"
    compileall.compile_dir(tmp_path, quiet=1)
    assert {one.status for one in look().values()} == {"ok"}
    for number in range(10):  # a copy with new times, as images make them: Python compiles it again each time
        os.utime(tmp_path / "uncompiled_package" / f"module{number}.py", (1, 1))
    assert look()["byte-code.compiled"].status == "warning"


# ---------------------------------------------------------------------- machine


def test_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(machine.check_disk("working", tmp_path / "not" / "yet")).found.endswith("not/yet")
    monkeypatch.setattr(machine, "FREE_BETTER", 2**60)
    assert only(machine.check_disk("working", tmp_path)).status == "warning"
    monkeypatch.setattr(machine, "FREE_AT_LEAST", 2**60)
    assert only(machine.check_disk("working", tmp_path)).status == "fault"
    assert not (tmp_path / "not").exists()


def test_rays_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(folder: Path) -> Finding:
        return only(machine.check_ray_folder({"RAY_TMPDIR": str(folder)}))

    assert look(Path("/tmp")).status in ("ok", "warning")
    too_long = look(tmp_path / ("x" * 60))
    assert (too_long.status, "too long" in too_long.found) == ("fault", True)
    # As root everything may be written but what the kernel refuses itself.
    refused = look(Path("/proc"))
    assert (refused.status, "cannot be written" in refused.found) == ("fault", True)
    monkeypatch.setattr(machine, "FULL_FOR_RAY", 0.0)
    assert look(Path("/tmp")).status == "fault"


def test_shared_memory() -> None:
    assert only(machine.check_shared_memory("/dev/shm", 1)).status == "ok"
    small = only(machine.check_shared_memory("/dev/shm", 2**50))
    assert (small.status, "--shm-size" in small.do) == ("warning", True)
    assert only(machine.check_shared_memory("/no/such/folder", 1)).status == "warning"


def test_the_store_of_a_local_cluster_is_what_shared_memory_is_compared_with() -> None:
    from geneformer_ray.distribute import cluster

    assert machine.OBJECT_STORE == cluster.OBJECT_STORE_BYTES


def test_memory_under_the_limit_of_a_control_group(tmp_path: Path) -> None:
    memory = write(tmp_path / "meminfo", f"MemTotal: 1 kB\nMemAvailable: {8 * 1024**2} kB\n")
    look = lambda: only(machine.check_memory(tmp_path, memory))  # noqa: E731
    assert (look().status, "8.0 GiB" in look().found) == ("ok", True)
    write(tmp_path / "memory.max", "max\n")
    assert look().status == "ok"
    write(tmp_path / "memory.max", str(3 * 1024**3))
    write(tmp_path / "memory.current", str(1024**3))
    assert (look().status, "2.0 GiB available, under a limit of 3.0 GiB" in look().found) == ("warning", True)


def test_more_threads_than_cpus(tmp_path: Path) -> None:
    cpus = len(os.sched_getaffinity(0))
    look = lambda threads: told(machine.check_cpus({"OMP_NUM_THREADS": threads}, tmp_path))["cpus.threads"]  # noqa: E731
    assert look("").status == "ok"
    assert look(str(cpus)).status == "ok"
    assert (look(str(cpus + 1)).status, look(str(cpus + 1)).do) == ("warning", "unset OMP_NUM_THREADS")
    write(tmp_path / "cpu.max", f"{cpus * 100_000} 100000")
    assert told(machine.check_cpus({}, tmp_path))["cpus.quota"].status == "ok"
    write(tmp_path / "cpu.max", "50000 100000")
    assert "0.5 are granted" in told(machine.check_cpus({}, tmp_path))["cpus.quota"].found


def test_ports() -> None:
    with contextlib.closing(ports.socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]
        taken = only(ports.check_port("service", port))
        assert (taken.status, f"process {os.getpid()} (" in taken.found) == ("warning", True)
        assert ports.is_listening("127.0.0.1", port)
    assert only(ports.check_port("service", port)).status == "ok"
    assert not ports.is_listening("127.0.0.1", port)
    assert only(ports.check_port("service", 10_002)).status == "warning"
    assert only(ports.check_port("service", port, "192.0.2.1")).status == "fault"  # nobody's address


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only nvidia-smi there is: a program that says what a test writes."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path / "bin" / "nvidia-smi"


def test_no_gpu_is_no_fault(nvidia_smi: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert only(gpu.check_gpu()).status == "note"
    write(nvidia_smi, "#!/bin/sh\necho No devices were found >&2; exit 6\n", 0o755)
    broken = only(gpu.check_gpu())
    assert (broken.name, broken.status) == ("gpu.driver", "fault")
    assert "No devices were found" in broken.found
    write(nvidia_smi, "#!/bin/sh\necho 'NVIDIA A10G, 470.57, 23028 MiB'\n", 0o755)
    unused = only(gpu.check_gpu())
    assert unused.status == "fault"
    assert unused.found.startswith("NVIDIA A10G, driver 470.57, 23028 MiB")


@pytest.mark.gpu
def test_a_gpu_computes() -> None:
    assert "gpu.torch" in told(gpu.check_gpu())
    assert {one.status for one in gpu.check_gpu()} <= {"ok", "note"}


# ---------------------------------------------------------------------- authentication, keys


def test_how_a_token_is_found(tmp_path: Path) -> None:
    assert authentication.find_token({"HOME": str(tmp_path)}) is None
    file = write(tmp_path / ".ray" / "auth_token", TOKEN, 0o600)
    found = authentication.find_token({"HOME": str(tmp_path)})
    assert found is not None and (found.value, found.file) == (TOKEN, file)
    assert TOKEN not in repr(found)
    other = authentication.find_token({"HOME": str(tmp_path), "RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")})
    assert other is not None and other.value is None


@pytest.mark.parametrize(
    ("variables", "cluster", "statuses"),
    [
        ({}, False, {"authentication.mode": "ok"}),
        ({}, True, {"authentication.mode": "warning"}),
        ({"RAY_AUTH_MODE": "disabled"}, False, {"authentication.mode": "warning"}),
        ({"RAY_AUTH_MODE": "disabled"}, True, {"authentication.mode": "fault"}),
        ({"RAY_AUTH_MODE": "tokens"}, True, {"authentication.mode": "fault"}),
        ({"RAY_AUTH_MODE": "token"}, True, {"authentication.token": "fault"}),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}, True, {"authentication.mode": "ok"}),
    ],
)
def test_token_settings(tmp_path: Path, variables: dict[str, str], cluster: bool, statuses: dict[str, str]) -> None:
    found = told(authentication.check_token({"HOME": str(tmp_path), **variables}, cluster=cluster))
    assert {name: one.status for name, one in found.items()} == statuses


def test_a_token_that_others_may_read_is_a_fault(tmp_path: Path) -> None:
    file = write(tmp_path / "token", TOKEN)
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)}
    one = told(authentication.check_token(variables, cluster=True))["authentication.token_file"]
    assert (one.status, one.do) == ("fault", f"chmod 600 {file}")
    file.chmod(0o640)  # a token runs code: also its group is others
    assert told(authentication.check_token(variables, cluster=True))["authentication.token_file"].status == "fault"
    file.chmod(0o600)
    assert told(authentication.check_token(variables, cluster=True))["authentication.token_file"].status == "ok"


@contextlib.contextmanager
def dashboard(without: int, wanted: str = TOKEN) -> Iterator[str]:
    """A server that answers as a Ray dashboard with a token does, or otherwise as told."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            given = self.headers.get("Authorization")
            code = without if given is None else 200 if given == f"Bearer {wanted}" else 403
            self.send_response(code)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with serving(Handler) as address:
        yield address


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("without", "wanted", "token", "status", "said"),
    [
        (401, TOKEN, TOKEN, "ok", "401 without the token and 200 with it"),
        (200, TOKEN, TOKEN, "fault", "answers without a token"),
        (404, TOKEN, TOKEN, "fault", "answers 404"),
        (401, "another", TOKEN, "fault", "the cluster has another"),
        (401, TOKEN, None, "fault", "none is known here"),
    ],
)
def test_the_jobs_api(without: int, wanted: str, token: str | None, status: str, said: str) -> None:
    known = None if token is None else authentication.RayToken("RAY_AUTH_TOKEN", None, token)
    with dashboard(without, wanted) as address:
        one = only(authentication.check_jobs_api(address, known))
    assert (one.name, one.status) == ("authentication.jobs_api", status)
    assert said in one.found
    assert TOKEN not in one.found + one.do


def test_a_dashboard_that_is_down() -> None:
    one = only(authentication.check_jobs_api("http://127.0.0.1:1", None))
    assert (one.status, "does not answer" in one.found) == ("fault", True)


def test_a_dashboard_that_only_its_head_reaches_is_no_fault() -> None:
    one = only(authentication.check_jobs_api("http://127.0.0.1:1", None, named=False))
    assert (one.status, "does not answer" in one.found) == ("note", True)
    assert "RAY_API_SERVER_ADDRESS" in one.do
    with dashboard(200) as address:
        assert only(authentication.check_jobs_api(address, None, named=False)).status == "fault"


def test_api_keys(tmp_path: Path) -> None:
    def look(file: Path | None, host: str = "127.0.0.1", given: str | None = None) -> dict[str, str]:
        found = authentication.check_api_keys(None if file is None else str(file), given, host)
        return {one.name: one.status for one in found}

    file = write(tmp_path / "keys", "# none yet\n\n", 0o600)
    assert look(None) == {"keys.service": "ok"}
    assert look(None, "0.0.0.0") == {"keys.service": "fault"}
    assert look(None, "0.0.0.0", "anna key1, key2") == {"keys.service": "ok"}
    assert look(file) == {"keys.file": "ok", "keys.service": "fault"}
    file.write_text("anna sesame-open-the-door\n")
    assert look(file, "0.0.0.0") == {"keys.file": "ok", "keys.service": "ok"}
    for mode, status in ((0o440, "note"), (0o640, "note"), (0o444, "fault"), (0o620, "fault"), (0o602, "fault")):
        file.chmod(mode)
        assert look(file) == {"keys.file": status, "keys.service": "ok"}, oct(mode)
    assert look(tmp_path / "none") == {"keys.service": "fault"}


# ---------------------------------------------------------------------- storage, store, model


def test_a_place_is_left_as_it_was(tmp_path: Path) -> None:
    assert only(places.check_place("storage.written", str(tmp_path / "a" / "b"), "mend it")).status == "ok"
    assert list(tmp_path.iterdir()) == []
    file = write(tmp_path / "file", "kept")
    below = only(places.check_place("storage.written", str(file / "folder"), "mend it"))
    assert (below.status, below.do) == ("fault", "mend it")
    assert file.read_text() == "kept"
    with places.lent_folder(str(tmp_path)) as folder:
        places.leave_word(folder, "driver")
        assert places.read_word(folder, "driver") == ""
        assert "FileNotFoundError" in places.read_word(folder, "node")
        Path(folder, "driver").write_text("someone")
        assert "another's" in places.read_word(folder, "driver")
    assert list(tmp_path.iterdir()) == [file]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An MLflow store with our experiment, as the first job makes it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return open_store(str(tmp_path))


def content(folder: Path) -> tuple[list[str], list[str]]:
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as database:
        return list(database.iterdump()), sorted(str(path) for path in folder.rglob("*"))


def test_a_store_that_works_is_left_as_it_was(store: str, tmp_path: Path) -> None:
    before = content(tmp_path)
    assert only(store_health.check_store(store)).status == "ok"
    location = store_health.artifact_location()
    assert only(store_health.check_artifacts(location)).status == "ok"
    assert store_health.keeps_artifacts(location, store) == ""
    assert content(tmp_path)[0] == before[0]
    artifacts = {str(tmp_path / "artifacts")}  # the empty folder that MLflow itself makes
    assert set(content(tmp_path)[1]) <= {*before[1], *artifacts}


def test_what_cannot_be_deleted_is_named_and_the_rest_is_cleared(store: str, tmp_path: Path) -> None:
    def refuse(table: str, event: str = "DELETE") -> None:
        with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
            database.execute(f"CREATE TRIGGER {table}_{event} BEFORE {event} ON {table} "
                             "BEGIN SELECT RAISE(ABORT, 'append only'); END")  # fmt: skip
            database.commit()

    def kept() -> tuple[int, int]:
        with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
            counts = [
                database.execute(f"SELECT count(*) FROM {table} WHERE {column} LIKE 'geneformer-ray%doctor%'")
                for table, column in (("experiment_tags", "key"), ("registered_models", "name"))
            ]
            tags, models = (count.fetchone()[0] for count in counts)
            return tags, models

    refuse("registered_models")
    found = told(store_health.check_store(store))
    assert (found["registry.store"].status, found["registry.cleared"].status) == ("ok", "fault")
    assert "the registered model geneformer-ray-doctor-" in found["registry.cleared"].found
    assert "append only" in found["registry.cleared"].found
    assert "deleted again" not in found["registry.store"].found
    assert kept() == (0, 1)
    refuse("experiment_tags")
    both = told(store_health.check_store(store))["registry.cleared"].found
    assert "the registered model" in both and "the tag geneformer-ray.doctor of experiment" in both
    assert kept() == (1, 2)
    refuse("registered_models", "INSERT")
    refused = only(store_health.check_store(store))
    assert (refused.name, refused.status) == ("registry.store", "fault")
    assert "the tag geneformer-ray.doctor" in refused.found
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.execute("DROP TRIGGER experiment_tags_DELETE")
        database.commit()
    assert only(store_health.check_store(store)).status == "fault"
    assert kept() == (0, 2)


def test_an_artifact_that_cannot_be_deleted_is_named() -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()

        def do_DELETE(self) -> None:
            self.send_response(403)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with serving(Handler) as address:
        one = only(store_health.check_artifacts(f"{address}/api/2.0/mlflow-artifacts/artifacts/0"))
    assert (one.name, one.status) == ("registry.artifacts", "fault")
    assert re.search(r"doctor-[0-9a-f]{12}/word was not deleted and is left \(.*403", one.found), one.found


def test_options_of_a_database_are_no_part_of_its_name(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store_health.sqlite_file(f"{store}?timeout=3") == tmp_path / "mlflow.db"
    before = content(tmp_path)
    assert only(store_health.check_store(f"{store}?timeout=3")).status == "ok"
    monkeypatch.chdir(tmp_path)
    found = told(store_health.check_store("sqlite:///mlflow.db?timeout=3"))
    assert found["registry.place"].do == f"export MLFLOW_TRACKING_URI='{store}?timeout=3'"
    assert content(tmp_path) == before


@pytest.mark.parametrize("uri", ["databricks", "databricks://nobody", "databricks-uc"])
def test_a_store_that_mlflow_knows_by_name_is_no_folder(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("DATABRICKS_")]:
        monkeypatch.delenv(name)
    import mlflow

    before = mlflow.get_tracking_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # put back afterwards: the check sets it
    try:
        one = only(store_health.check_store(uri))
    finally:
        mlflow.set_tracking_uri(before)
    assert (one.name, one.status) == ("registry.store", "fault")
    assert "folder" not in one.found
    assert "atabricks" in one.found or "Unity Catalog" in one.found


def test_a_locked_store_is_a_fault_within_seconds(store: str, tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        one = only(store_health.check_store(store))
        assert (one.status, "locked" in one.found) == ("fault", True)
        other.execute("ROLLBACK")
    assert only(store_health.check_store(store)).status == "ok"


def test_stores_that_cannot_be_used(tmp_path: Path) -> None:
    write(tmp_path / "text", "this is no database, it is a text of some length\n" * 30)
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as other:
        other.execute("CREATE TABLE cells (id INTEGER)")
        other.commit()
    before = sorted(tmp_path.iterdir())
    for uri, said in (
        (f"file://{tmp_path}/mlruns", "no longer takes"),
        (f"{tmp_path}/mlruns", "no longer takes"),
        (f"sqlite:///{tmp_path}/text/mlflow.db", "cannot be written"),
        (f"sqlite:///{tmp_path}/text", "not a database"),
        (f"sqlite:///{tmp_path}/other.db", "not MLflow's"),
        ("http://user:hunter2@127.0.0.1:1", "does not answer"),
        ("http://[::1", "does not answer"),
    ):
        one = only(store_health.check_store(uri))
        assert (one.status, said in one.found) == ("fault", True), one
        assert one.do
        assert "hunter2" not in one.found
    assert only(store_health.check_store(f"sqlite:///{tmp_path}/new/mlflow.db")).status == "note"
    assert sorted(tmp_path.iterdir()) == before


def test_artifacts_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    one = only(store_health.check_artifacts((write(tmp_path / "file", "") / "artifacts").as_uri()))
    assert (one.name, one.status) == ("registry.artifacts", "fault")


def test_a_registered_model_and_its_champion(store: str, tmp_path: Path) -> None:
    import mlflow

    client = mlflow.MlflowClient()
    absent = only(store_health.check_registered("pancreas"))
    assert (absent.status, "no version of pancreas" in absent.found) == ("warning", True)
    client.create_registered_model("pancreas")
    client.create_model_version("pancreas", (tmp_path / "model").as_uri())
    without = only(store_health.check_registered("pancreas"))
    assert (without.status, without.do) == ("warning", "python -m ray_jobs.promote --registered-model pancreas")
    client.set_registered_model_alias("pancreas", "champion", "1")
    assert only(store_health.check_registered("pancreas")).status == "ok"


def test_a_model_opens_whole_or_not_at_all(vocabulary: GeneVocabulary, tmp_path: Path) -> None:
    model = new_model(vocabulary, layers=1, width=8, heads=1, feed_forward=8)
    save_model(model, vocabulary, tmp_path / "model")
    one = only(model_health.check_model(str(tmp_path / "model"), None))
    assert (one.status, "1 layers, 8 wide" in one.found) == ("ok", True), one
    weights = tmp_path / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    cut = only(model_health.check_model(str(tmp_path / "model"), None))
    assert (cut.status, "cannot be read" in cut.found) == ("fault", True)
    weights.write_bytes(whole)
    arrays = safetensors.numpy.load(whole)
    shorter = {key: array[:-1] if "word_embeddings" in key else array for key, array in arrays.items()}
    safetensors.numpy.save_file(shorter, weights)
    other = only(model_health.check_model(str(tmp_path / "model"), None))
    assert (other.status, "config.json of" in other.found) == ("fault", True)
    absent = only(model_health.check_model(str(tmp_path / "none"), None))
    assert (absent.status, "--model" in absent.found) == ("fault", True)


# ---------------------------------------------------------------------- the whole report


@pytest.fixture
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without settings, in a folder of its own, and with the environment put back afterwards."""
    for name in (FILE_VARIABLE, *VARIABLES.values(), "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_alone")
def test_one_broken_thing_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "file", "")
    secret = "a-key-that-nobody-may-see"
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv(VARIABLES["api_keys"], f"anna {secret}")
    with dashboard(200) as address:
        summary = run(
            DoctorConfig(
                overwrite=False, jobs_address=address, storage=str(file / "storage"), host="127.0.0.1", port=8000,
                tracking_uri=f"sqlite:///{file}", registered_model="pancreas", model=str(tmp_path / "none"),
                api_keys_file=str(tmp_path / "keys"), ray_address="127.0.0.1:1", registry_uri=None, vocabulary=None,
                local=False,
            )
        )  # fmt: skip
    faults = {one["name"] for one in summary["checks"] if one["status"] == "fault"}
    wanted = {"authentication.jobs_api", "storage.written", "model.opens", "keys.service", "cluster.reachable"}
    assert wanted <= faults
    assert summary["faults"] == len([one for one in summary["checks"] if one["status"] == "fault"])
    assert all(one["do"] for one in summary["checks"] if one["status"] in ("fault", "warning"))
    said = capsys.readouterr()
    assert said.out == ""
    assert "storage\n" in said.err and "  fault    written: " in said.err
    for text in (said.err, str(summary)):
        assert TOKEN not in text
        assert secret not in text


@pytest.mark.usefixtures("_alone")
def test_a_submitted_copy_is_no_place_for_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runtime_resources").mkdir()
    monkeypatch.chdir(tmp_path / "runtime_resources")
    summary = run(DoctorConfig.model_validate({}))
    found = {one["name"]: one for one in summary["checks"]}
    assert (found["registry.store"]["status"], "thrown away" in found["registry.store"]["found"]) == ("fault", True)
    assert list((tmp_path / "runtime_resources").iterdir()) == []
