"""Settings that jobs, service and doctor share: the environment, and below it one file."""

from __future__ import annotations

from pathlib import Path

import pytest

from geneformer_ray.errors import InputError
from geneformer_ray.settings import FILE_VARIABLE, VARIABLES, Settings, export_file
from ray_jobs.command_line import parse, place
from ray_jobs.finetune import FinetuneConfig
from ray_jobs.pooling_study import PoolingStudyConfig
from ray_jobs.screen_flags import _listed
from serve.settings import ServeSettings


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (FILE_VARIABLE, *VARIABLES.values()):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text("storage: s3://lab/project/\ntracking_uri: http://mlflow:5000\nregistered_model: pancreas\n")
    return path


def test_every_setting_has_a_variable() -> None:
    assert set(VARIABLES) == set(Settings.model_fields)
    assert len(set(VARIABLES.values())) == len(VARIABLES)


def test_the_environment_wins_over_the_file(file: Path) -> None:
    settings = Settings.read({FILE_VARIABLE: str(file), "MLFLOW_TRACKING_URI": "http://other:5000"})
    assert (settings.tracking_uri, settings.registered_model) == ("http://other:5000", "pancreas")
    assert settings.ray_address is None


def test_the_file_is_put_into_the_environment_that_ray_and_mlflow_read(file: Path) -> None:
    environment = {FILE_VARIABLE: str(file), "MLFLOW_TRACKING_URI": "http://other:5000"}
    export_file(environment)
    assert environment == {
        FILE_VARIABLE: str(file),
        "MLFLOW_TRACKING_URI": "http://other:5000",
        "GENEFORMER_STORAGE": "s3://lab/project/",
        "GENEFORMER_REGISTERED_MODEL": "pancreas",
    }


def test_nothing_is_put_there_without_a_file() -> None:
    environment = {"MLFLOW_TRACKING_URI": "http://other:5000"}
    export_file(environment)
    assert environment == {"MLFLOW_TRACKING_URI": "http://other:5000"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("storge: s3://lab", r"storge in .*takes one of ray_address"),
        ("- storage", "takes a YAML mapping of ray_address"),
        ("storage: [1]", r"storage in .*takes a valid string"),
        ("storage: runs", r"storage in .*: got runs; takes an absolute path or a URI"),
        ("log_format: xml", r"log_format in .*: got 'xml'; takes 'text' or 'json'"),
        ("a: b: c", r"GENEFORMER_SETTINGS: got .*takes a readable YAML file"),
    ],
)
def test_a_bad_file_is_named_with_its_field(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(InputError, match=said):
        Settings.read({FILE_VARIABLE: str(tmp_path / "bad.yaml")})


def test_a_bad_variable_is_named() -> None:
    with pytest.raises(InputError, match=r"^GENEFORMER_LOG_FORMAT: got 'xml'"):
        Settings.read({"GENEFORMER_LOG_FORMAT": "xml"})
    with pytest.raises(InputError, match=r"^GENEFORMER_SETTINGS: got /no/file"):
        Settings.read({FILE_VARIABLE: "/no/file"})


@pytest.mark.parametrize("text", ["api_keys: hunter2", "api_key: hunter2"])
def test_keys_are_neither_taken_from_the_file_nor_repeated(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        Settings.read({FILE_VARIABLE: str(tmp_path / "keys.yaml")})
    assert "hunter2" not in str(error.value)


def test_keys_are_shown_nowhere() -> None:
    settings = Settings.read({"GENEFORMER_SERVE_API_KEYS": "hunter2"})
    assert settings.api_keys is not None
    assert settings.api_keys.get_secret_value() == "hunter2"
    assert "hunter2" not in repr(settings)
    assert settings.variables() == {}


def test_relative_paths_lie_below_the_storage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert place("runs/a", "--output") == str(tmp_path / "runs" / "a")
    monkeypatch.setenv("GENEFORMER_STORAGE", "s3://lab/project/")
    assert place("runs/./a", "--output") == "s3://lab/project/runs/a"
    for path in ("/data/cells", "gs://other/cells"):
        assert place(path, "--cells") == path
    with pytest.raises(InputError, match=r"--output: got \.\./a; takes a path below GENEFORMER_STORAGE"):
        place("../a", "--output")


def test_a_flag_wins_over_the_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flags = ["--cells", "c", "--label", "l", "--group", "g", "--model", "m", "--output", "o"]
    assert parse(FinetuneConfig, flags).registered_model is None
    monkeypatch.setenv("GENEFORMER_REGISTERED_MODEL", "shared")
    assert parse(FinetuneConfig, flags).registered_model == "shared"
    (tmp_path / "flags.yaml").write_text("registered-model: of_file")
    assert parse(FinetuneConfig, [*flags, "--config", str(tmp_path / "flags.yaml")]).registered_model == "of_file"
    assert parse(FinetuneConfig, [*flags, "--registered-model", "mine"]).registered_model == "mine"


def test_the_service_serves_the_champion_of_that_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ServeSettings.read().model == "models:/geneformer@champion"
    monkeypatch.setenv("GENEFORMER_REGISTERED_MODEL", "shared")
    assert ServeSettings.read().model == "models:/shared@champion"
    assert ServeSettings.read({"model": "models:/other/3"}).model == "models:/other/3"


def test_a_study_of_toys_takes_no_name_from_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENEFORMER_REGISTERED_MODEL", "shared")
    assert parse(PoolingStudyConfig, ["--output", "o"]).registered_model is None
    assert parse(PoolingStudyConfig, ["--output", "o", "--registered-model", "mine"]).registered_model == "mine"


def test_a_list_of_genes_lies_below_the_storage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "genes.txt").write_text("GENE01\nGENE02\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GENEFORMER_STORAGE", str(tmp_path / "lab"))
    assert _listed("genes.txt") == ["GENE01", "GENE02"]
    assert _listed("GENE01,GENE02") == ["GENE01", "GENE02"]


def test_a_name_may_begin_with_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENEFORMER_STORAGE", "s3://lab")
    assert place("..cells", "--cells") == "s3://lab/..cells"
