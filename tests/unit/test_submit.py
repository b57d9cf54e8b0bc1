"""Submitting a job: what is checked before anything is uploaded, what travels, what the log becomes, exit codes."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray.job_submission import JobStatus

from geneformer_ray.distribute import job_package
from geneformer_ray.distribute.job_log import JobLog
from geneformer_ray.distribute.job_package import CONFIG_FILE, packed
from geneformer_ray.distribute.job_submission import JobsApi, check_flag, exit_code, travelling_variables
from geneformer_ray.errors import InputError
from geneformer_ray.settings import FILE_VARIABLE, VARIABLES, Settings
from ray_jobs.submit_flags import read_flags
from ray_jobs.submitted_flags import check, jobs

ROOT = Path(__file__).resolve().parents[2]
SCREEN = ["--cells", "/data/cells", "--model", "models:/islets@champion", "--output", "/data/screen"]


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (FILE_VARIABLE, *VARIABLES.values()):
        monkeypatch.delenv(name, raising=False)


# ---------------------------------------------------------------------- flags


def test_the_jobs_are_those_of_the_package() -> None:
    assert set(jobs()) >= {"embed", "finetune", "pretrain", "promote", "screen", "statistics", "tokenize", "vocabulary"}
    assert not {"submit", "submit_flags", "command_line", "screen_flags"} & set(jobs())


def test_every_job_has_a_target_in_the_makefile() -> None:
    def make(*words: str) -> str:
        return subprocess.run(["make", *words], cwd=ROOT, text=True, capture_output=True, check=True).stdout

    listed = [line.removeprefix("make submit-") for line in make("help").splitlines() if "make submit-" in line]
    assert sorted(listed) == sorted(jobs())
    done = make("--dry-run", "submit-screen", "SUBMIT=--no-wait", "ARGS=--cells 'a b'")
    assert done.splitlines()[-1].endswith("python -m ray_jobs.submit --no-wait screen --cells 'a b'")


def test_what_follows_the_name_of_the_job_is_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ["--env", "A=1", "--env", "B=x=y,z", "--submission-id", "s1", "--entrypoint-num-cpus", "0.5", "--no-wait"]
    rest = ["screen", "--no-wait", "--env", "C=2", "--filter", "type=a b,c", "--config", "f"]
    monkeypatch.setattr(sys, "argv", ["submit", *own, *rest])
    given = read_flags("")
    assert given.command == rest
    assert given.env == {"A": "1", "B": "x=y,z"}
    assert (given.submission_id, given.entrypoint_num_cpus, given.entrypoint_num_gpus) == ("s1", 0.5, None)
    assert given.no_wait


def test_the_own_flags_that_scripts_rely_on_are_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["submit", "--help"])
    with pytest.raises(SystemExit) as ended:
        read_flags("")
    assert ended.value.code == 0
    own = "--jobs-address --submission-id --env --no-wait --logs --stop"
    own += " --entrypoint-num-cpus --entrypoint-num-gpus --entrypoint-memory"
    assert set(own.split()) <= set(capsys.readouterr().out.replace("]", " ").replace("[", " ").split())


@pytest.mark.parametrize(
    "flags", [[], ["--logs", "a", "--stop", "b"], ["--stop", "a", "screen"], ["--env", "x", "screen"]]
)
def test_the_own_flags_are_one_thing_at_a_time(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["submit", *flags])
    with pytest.raises(SystemExit) as ended:
        read_flags("")
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("job", "flags", "said"),
    [
        ("scren", SCREEN, r"^job: got scren; takes one of .*screen"),
        ("submit", [], r"^job: got submit"),
        ("screen", ["--cells", "/data/cells"], r"^--model: got nothing"),
        ("screen", [*SCREEN, "--layer", "3"], r"^--layer: got '3'"),
        ("screen", [*SCREEN, "--start", "alpha"], r"^--state-column, --start, --goal: got some"),
        ("screen", [*SCREEN, "--config", "/no/file"], r"^--config: got /no/file; takes a file that exists"),
        (
            "screen",
            [*SCREEN[:-1], "runs/screen"],
            r"^--output: got the relative path runs/screen; .*GENEFORMER_STORAGE",
        ),
        ("tokenize", ["--input", "/a", "b.h5ad", "--vocabulary", "v", "--output", "/o"], r"^--input: .*b\.h5ad"),
    ],
)
def test_bad_flags_are_named_before_anything_is_uploaded(job: str, flags: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        check(job, flags, CONFIG_FILE)


def test_unknown_flags_end_as_in_the_job_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        check("screen", [*SCREEN, "--genez", "A"], CONFIG_FILE)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "python -m ray_jobs.screen: unrecognized arguments: --genez A\n"


def test_relative_paths_lie_below_the_shared_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENEFORMER_STORAGE", "s3://lab")
    flags = [*SCREEN[:-1], "runs/screen"]
    assert check("screen", flags, CONFIG_FILE).flags == tuple(flags)
    with pytest.raises(InputError, match=r"^--output: got \.\./screen"):
        check("screen", [*SCREEN[:-1], "../screen"], CONFIG_FILE)


def test_a_local_configuration_goes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my.yaml").write_text("seed: 3\n")
    monkeypatch.chdir(tmp_path)
    for given, taken in (
        (["--config", "my.yaml"], ["--config", CONFIG_FILE]),
        ([f"--config={tmp_path}/my.yaml"], [f"--config={CONFIG_FILE}"]),
    ):
        submitted = check("screen", [*SCREEN, *given], CONFIG_FILE)
        assert submitted.command == ["python", "-m", "ray_jobs.screen", *SCREEN, *taken]
        assert submitted.config is not None
        with packed(submitted.config) as folder:
            assert (folder / CONFIG_FILE).read_text() == "seed: 3\n"
    assert check("screen", SCREEN, CONFIG_FILE).config is None


# ---------------------------------------------------------------------- what travels


def test_the_packages_run_where_they_are_unpacked(tmp_path: Path) -> None:
    with packed() as folder:
        assert sorted(path.name for path in folder.iterdir()) == ["geneformer_ray", "ray_jobs", "serve"]
        assert not list(folder.rglob("__pycache__"))
        done = subprocess.run(
            [sys.executable, "-m", "ray_jobs.promote", "--help"], cwd=folder, text=True, capture_output=True, check=True
        )
    assert "--registered-model" in done.stdout
    assert not folder.exists()


def test_too_much_to_upload_is_refused_with_the_largest_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in job_package.PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    for name, size in (("cells.h5ad", 90), ("model.bin", 20), ("small", 1)):
        with (tmp_path / "serve" / name).open("wb") as file:
            file.truncate(size * 1024**2)
    with pytest.raises(
        InputError, match=r"^working directory: got 111 MiB, .* serve/cells.h5ad \(90 MiB\), serve/model"
    ):
        with packed(root=tmp_path):
            pass
    (tmp_path / "serve" / "cells.h5ad").unlink()
    with packed(root=tmp_path) as folder:
        assert (folder / "serve" / "model.bin").stat().st_size == 20 * 1024**2


def test_the_settings_travel_and_secrets_do_not() -> None:
    settings = Settings.read(
        {
            "RAY_ADDRESS": "10.0.0.1:6379", "RAY_API_SERVER_ADDRESS": "http://10.0.0.1:8265",
            "GENEFORMER_STORAGE": "s3://lab", "MLFLOW_TRACKING_URI": "http://mlflow:5000",
            "GENEFORMER_SERVE_API_KEYS": "hunter2-hunter2-hunter2", "RAY_AUTH_TOKEN": "hunter2",
        }
    )  # fmt: skip
    assert travelling_variables(settings, {"OMP_NUM_THREADS": "2"}) == {
        "GENEFORMER_STORAGE": "s3://lab", "MLFLOW_TRACKING_URI": "http://mlflow:5000", "OMP_NUM_THREADS": "2",
    }  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["GENEFORMER_SERVE_API_KEYS", "RAY_AUTH_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD"],
)
def test_a_secret_is_refused_by_its_name_and_not_repeated(name: str) -> None:
    with pytest.raises(InputError, match=rf"^--env: got {name}, .*environment of the nodes") as refused:
        travelling_variables(Settings.read({}), {name: "hunter2"})
    assert "hunter2" not in str(refused.value)


def test_names_that_only_look_like_it_travel() -> None:
    extra = {
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_AUTH_TOKEN_PATH": "/etc/token",
        "GENEFORMER_SERVE_API_KEYS_FILE": "/k",
    }
    assert travelling_variables(Settings.read({}), extra) == extra


def test_a_store_with_a_password_is_refused() -> None:
    settings = Settings.read({"MLFLOW_TRACKING_URI": "http://anna:hunter2@mlflow:5000"})
    with pytest.raises(InputError, match=r"^MLFLOW_TRACKING_URI: got http://mlflow:5000 .*_PASSWORD") as refused:
        travelling_variables(settings, {})
    assert "hunter2" not in str(refused.value)
    with pytest.raises(InputError, match=r"^flags: got --cells=s3://lab/cells"):
        check_flag("--cells=s3://anna:hunter2@lab/cells")
    for flag in ("models:/islets@champion", "s3://lab/cells@2", "org/model@main"):
        check_flag(flag)


@pytest.mark.parametrize("uri", ["sqlite:///mlflow.db", "mlruns"])
def test_a_store_in_the_throw_away_copy_is_refused(uri: str) -> None:
    with pytest.raises(InputError, match=r"^MLFLOW_TRACKING_URI: .* throws away"):
        travelling_variables(Settings.read({"MLFLOW_TRACKING_URI": uri}), {})
    for good in ("sqlite:////data/mlflow.db", "/data/mlruns", "http://mlflow:5000", "databricks://profile"):
        travelling_variables(Settings.read({"MLFLOW_TRACKING_URI": good}), {})


# ---------------------------------------------------------------------- log and exit code

SUMMARY = '{"output": "/data/cells", "cells": 90}'


def told(pieces: list[str], code: int = 0) -> tuple[str, str | None]:
    stream = io.StringIO()
    log = JobLog(stream)
    log.from_the_start()
    for piece in pieces:
        log.add(piece)
    held = log.end(code)
    return stream.getvalue(), held


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_log_is_told_and_the_summary_kept_apart(size: int) -> None:
    text = f'Ray: joined\n{{"level": "info"}}\n{{not json\n\n{SUMMARY}\nbye\n'
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    assert told(pieces) == ('Ray: joined\n{not json\n\n{"level": "info"}\nbye\n', SUMMARY)


@pytest.mark.parametrize(
    ("code", "after", "has_one"),
    [(0, "", True), (0, "bye\n", True), (1, "", True), (1, "Traceback\n", False), (2, "", False), (130, "", False)],
)
def test_a_job_that_failed_has_no_summary_but_one_that_tells_of_faults(code: int, after: str, has_one: bool) -> None:
    heard, held = told([f"{SUMMARY}\n{after}"], code)
    assert held == (SUMMARY if has_one else None)
    assert (SUMMARY in heard) is not has_one


def test_lines_are_told_as_they_come() -> None:
    stream = io.StringIO()
    log = JobLog(stream)
    log.add("one\ntw")
    assert stream.getvalue() == "one\n"


def test_a_broken_connection_tells_nothing_twice() -> None:
    stream = io.StringIO()
    log = JobLog(stream)
    for pieces in (["one\ntwo\nth"], ["one\n", "two\n", "three\nfo"], ["one\ntwo\nthree\nfour\n"]):
        log.from_the_start()
        assert not log.connected
        for piece in pieces:
            log.add(piece)
        assert log.connected
    assert log.end(0) is None
    assert stream.getvalue() == "one\ntwo\nthree\nfour\n"


@dataclass
class Ended:
    """What the jobs API says of a job that has ended."""

    status: JobStatus
    driver_exit_code: int | None = None


@pytest.mark.parametrize(
    ("ended", "code"),
    [
        (Ended(JobStatus.SUCCEEDED, 0), 0),
        (Ended(JobStatus.FAILED, 2), 2),
        (Ended(JobStatus.FAILED, 1), 1),
        (Ended(JobStatus.FAILED, -9), 137),
        (Ended(JobStatus.FAILED), 1),
        (Ended(JobStatus.STOPPED), 130),
    ],
)
def test_exit_codes_mean_something(ended: Ended, code: int) -> None:
    assert exit_code(ended) == code


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://head:10001", "http://", "http://head:port"])
def test_an_address_that_is_none_is_named(address: str) -> None:
    with pytest.raises(InputError, match=r"^--jobs-address: .*takes http://HOST:8265"):
        JobsApi(address)


def test_a_cluster_that_is_not_there_is_said_at_once() -> None:
    with pytest.raises(ConnectionError, match=r"^no cluster answers at http://127\.0\.0\.1:1 "):
        JobsApi("http://127.0.0.1:1")
