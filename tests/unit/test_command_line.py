"""The command line of every job: flags, the YAML file, exit codes and the summary line."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from geneformer_ray.errors import InputError, RegistryUnavailable
from ray_jobs import pretrain
from ray_jobs.command_line import JobConfig, build, in_submitted_copy, main, parse, place, store_directory
from ray_jobs.screen_flags import ScreenConfig, check_flags
from ray_jobs.tokenize import TokenizeConfig

JOBS = {
    "tokenize": "TokenizeConfig",
    "vocabulary": "VocabularyConfig",
    "pretrain": "PretrainConfig",
    "finetune": "FinetuneConfig",
    "pooling_study": "PoolingStudyConfig",
    "embed": "EmbedConfig",
    "screen": "ScreenConfig",
    "statistics": "StatisticsConfig",
    "promote": "PromoteConfig",
    "register": "RegisterConfig",
}
REQUIRED = ["--cells", "cells", "--model", "model", "--output", "out"]


class SmallConfig(JobConfig):
    """One field of each kind."""

    output: str = Field(description="directory")
    files: tuple[str, ...] = Field((), description="some", json_schema_extra={"several": True, "metavar": "FILE"})
    names: tuple[str, ...] = Field(("a", "b"), description="names")
    seeds: tuple[int, ...] = Field((0,), description="seeds")
    filter: dict[str, tuple[str, ...]] = Field({}, description="f", json_schema_extra={"metavar": "COLUMN=A,B"})
    layer: Literal[-1, 0] = Field(-1, description="layer")
    kind: Literal["one", "two"] = Field("one", description="kind")
    epochs: int = Field(3, ge=1, description="passes, 100 % of the cells each")
    share: float = Field(0.0, ge=0, lt=1, description="share")
    optional: str | None = Field(None, description="optional")
    quick: bool = Field(False, description="quick")
    checked: bool = Field(True, description="checked")


def small(*arguments: str) -> SmallConfig:
    return parse(SmallConfig, ["--output", "out", *arguments], prog="job")


def run_main(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], run: Any = None
) -> tuple[int, str, str]:
    """Run a job as the command line does: exit code, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["/somewhere/ray_jobs/small.py", *arguments])
    with pytest.raises(SystemExit) as raised:
        main(SmallConfig, run or (lambda config: config.model_dump(mode="json")), "A small job.")
    captured = capsys.readouterr()
    return int(raised.value.code or 0), captured.out, captured.err


# ---------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--names", "x, y,,z"], "names", ("x", "y", "z")),
        (["--names", "x"], "names", ("x",)),
        (["--seeds", "0,1,2"], "seeds", (0, 1, 2)),
        (["--files", "a,b.h5ad", "c.h5ad"], "files", ("a,b.h5ad", "c.h5ad")),
        (["--filter", "type=alpha,beta"], "filter", {"type": ("alpha", "beta")}),
        (["--filter", "a=1", "--filter", "b=2,3"], "filter", {"a": ("1",), "b": ("2", "3")}),
        (["--filter", "formula=x=y"], "filter", {"formula": ("x=y",)}),
        (["--layer", "-1"], "layer", -1),
        (["--layer", "0"], "layer", 0),
        (["--layer=-1"], "layer", -1),
        (["--kind", "two"], "kind", "two"),
        (["--epochs", "7"], "epochs", 7),
        (["--share", "0.25"], "share", 0.25),
        (["--optional", "text"], "optional", "text"),
        (["--quick"], "quick", True),
        (["--no-checked"], "checked", False),
        (["--overwrite"], "overwrite", True),
        (["--overwrite", "--no-overwrite"], "overwrite", False),
        ([], "names", ("a", "b")),
    ],
)
def test_flags_hold_what_they_say(arguments: list[str], field: str, value: object) -> None:
    found = getattr(small(*arguments), field)
    assert found == value
    assert type(found) is type(value)


@given(
    filters=st.dictionaries(
        st.text(st.characters(exclude_characters="=\0", exclude_categories=["Cs"]), min_size=1).filter(
            lambda text: not text.startswith("-")
        ),
        st.lists(st.text(st.characters(exclude_characters=",\0", exclude_categories=["Cs"]), min_size=1), min_size=1),
        max_size=3,
    )
)
@settings(max_examples=40)
def test_any_column_and_values_can_be_chosen(filters: dict[str, list[str]]) -> None:
    arguments = [part for name, values in filters.items() for part in ("--filter", f"{name}={','.join(values)}")]
    assert small(*arguments).filter == {name: tuple(values) for name, values in filters.items()}


# ---------------------------------------------------------------------- the YAML file


YAML = """
output: from-yaml
epochs: 9
names: [p, q]
seeds: 4,5
filter:
  type: [alpha, "beta, mature"]
layer: 0
quick: true
"""


def test_a_flag_on_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(YAML)
    config = parse(SmallConfig, ["--config", str(file)])
    assert (config.output, config.epochs, config.names, config.seeds) == ("from-yaml", 9, ("p", "q"), (4, 5))
    assert config.filter == {"type": ("alpha", "beta, mature")}
    assert (config.layer, config.quick, config.kind) == (0, True, "one")
    flags = ["--epochs", "2", "--filter", "donor=1", "--names", "z", "--no-quick", "--layer", "-1"]
    for arguments in (["--config", str(file), *flags], [*flags, "--config", str(file)]):
        config = parse(SmallConfig, arguments)
        assert (config.epochs, config.filter, config.names) == (2, {"donor": ("1",)}, ("z",))
        assert (config.quick, config.layer, config.output, config.seeds) == (False, -1, "from-yaml", (4, 5))


@pytest.mark.parametrize("spelling", ["gene-sets", "gene_sets", "--gene-sets"])
def test_a_flag_in_the_file_may_be_spelt_as_on_the_command_line(tmp_path: Path, spelling: str) -> None:
    (tmp_path / "job.yaml").write_text(f"{spelling}: sets.gmt\n")
    assert parse(ScreenConfig, [*REQUIRED, "--config", str(tmp_path / "job.yaml")]).gene_sets == "sets.gmt"


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("# nothing yet\n")
    assert small("--config", str(tmp_path / "job.yaml")) == small()


@pytest.mark.parametrize(
    ("content", "field", "says"),
    [
        ("epoch: 3", "--config", "epoch"),
        ("config: other.yaml", "--config", "config"),
        ("- output", "--config", "mapping"),
        ("just text", "--config", "mapping"),
        ("output: [", "--config", "readable YAML"),
        ("epochs: many", "--epochs", "many"),
        ("epochs: [1]", "--epochs", "integer"),
        ("filter: 5", "--filter", "COLUMN=A,B"),
        ("filter: [1]", "--filter", "COLUMN=A,B"),
        ("filter: {type: {a: b}}", "--filter", "tuple"),
        ("layer: 7", "--layer", "-1 or 0"),
        ("names: {a: b}", "--names", "tuple"),
        ("output: 5", "--output", "string"),
    ],
)
def test_a_bad_file_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    content: str,
    field: str,
    says: str,
) -> None:
    (tmp_path / "job.yaml").write_text(content)
    arguments = [] if content.startswith("output") else ["--output", "out"]
    code, out, err = run_main(monkeypatch, capsys, [*arguments, "--config", str(tmp_path / "job.yaml")])
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith(f"python -m ray_jobs.small: {field}: got ")
    assert says in line


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--config: got .*nowhere\.yaml; takes a file that exists"):
        small("--config", str(tmp_path / "nowhere.yaml"))


# ---------------------------------------------------------------------- exit codes and the summary


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        ([], "--output"),
        (["--output"], "--output"),
        (["--output", "out", "--epochs", "0"], "--epochs"),
        (["--output", "out", "--epochs", "x"], "--epochs"),
        (["--output", "out", "--epochs", "1.5"], "--epochs"),
        (["--output", "out", "--share", "1"], "--share"),
        (["--output", "out", "--share", "nan"], "--share"),
        (["--output", "out", "--seeds", "1,x"], "--seeds"),
        (["--output", "out", "--layer", "1"], "--layer"),
        (["--output", "out", "--layer", "-2"], "--layer"),
        (["--output", "out", "--kind", "three"], "--kind"),
        (["--output", "out", "--filter", "type"], "--filter"),
        (["--output", "out", "--filter", "type="], "--filter"),
        (["--output", "out", "--filter", "=alpha"], "--filter"),
        (["--output", "out", "--quick=yes"], "--quick"),
        (["--output", "out", "--epoch", "3"], "--epoch"),
        (["--output", "out", "stray"], "stray"),
        (["--output", "out", "--files"], "--files"),
    ],
)
def test_a_bad_value_ends_with_2_and_one_line_that_names_the_flag(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], flag: str
) -> None:
    code, out, err = run_main(monkeypatch, capsys, arguments)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("python -m ray_jobs.small: ")
    assert flag in line


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "stopped; the same command goes on where it can"),
        (PermissionError(13, "Permission denied", "/out"), 1, "PermissionError: [Errno 13] Permission denied: '/out'"),
    ],
)
def test_what_is_nobodys_input_ends_in_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, text: str
) -> None:
    def run(config: SmallConfig) -> dict[str, Any]:
        raise error

    ended, out, err = run_main(monkeypatch, capsys, ["--output", "out"], run)
    assert (ended, out) == (code, "")
    assert err == f"python -m ray_jobs.small: {text}\n"


def test_a_prefix_may_be_empty() -> None:
    flags = ["--input", "a", "b", "--vocabulary", "v", "--output", "o", "--cell-id-prefix", ",b_"]
    assert parse(TokenizeConfig, flags).cell_id_prefix == ("", "b_")


def test_what_a_choice_takes_is_listed() -> None:
    with pytest.raises(InputError, match="--kind: got 'three'; takes 'one' or 'two'"):
        small("--kind", "three")


def test_an_input_error_of_the_run_ends_with_2_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: SmallConfig) -> dict[str, Any]:
        print("a library's chatter")
        raise InputError("--kind", config.kind, "two")

    code, out, err = run_main(monkeypatch, capsys, ["--output", "out"], run)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == "python -m ray_jobs.small: --kind: got one; takes two"
    assert "Traceback" not in err


def test_a_registry_that_is_down_ends_with_1_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: SmallConfig) -> dict[str, Any]:
        raise RegistryUnavailable("http://mlflow:5000", "connection refused", "`register` finishes the job")

    code, out, err = run_main(monkeypatch, capsys, ["--output", "out"], run)
    assert (code, out) == (1, "")
    assert err == (
        "python -m ray_jobs.small: MLflow at http://mlflow:5000 failed (connection refused); "
        "`register` finishes the job\n"
    )


def test_our_own_mistakes_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(config: SmallConfig) -> dict[str, Any]:
        raise ZeroDivisionError

    monkeypatch.setattr(sys, "argv", ["small.py", "--output", "out"])
    with pytest.raises(ZeroDivisionError):
        main(SmallConfig, run, "")


def test_standard_output_is_the_summary_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: SmallConfig) -> dict[str, Any]:
        print("a library's chatter")
        return {"rows": 3, "name": "β\ncell"}

    code, out, err = run_main(monkeypatch, capsys, ["--output", "out"], run)
    assert code == 0
    (line,) = out.splitlines()
    summary = json.loads(line)
    assert summary.pop("run")
    assert summary == {"rows": 3, "name": "β\ncell"}
    assert "chatter" in err


def test_build_checks_like_the_command_line() -> None:
    assert build(SmallConfig, {"output": "out", "epochs": 5}) == small("--epochs", "5")
    with pytest.raises(InputError, match="--epochs: got 0"):
        build(SmallConfig, {"output": "out", "epochs": 0})
    with pytest.raises(InputError, match="--unknown"):
        build(SmallConfig, {"output": "out", "unknown": 0})


# ---------------------------------------------------------------------- help


def config_of(job: str) -> type[JobConfig]:
    kind: type[JobConfig] = getattr(importlib.import_module(f"ray_jobs.{job}"), JOBS[job])
    return kind


def help_of(
    kind: type[JobConfig], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """Print the help and cut it into flag -> its text."""
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as raised:
        parse(kind, ["--help"], prog="job")
    assert raised.value.code == 0
    text = capsys.readouterr().out.partition("options:")[2]
    entries = [" ".join(entry.split()) for entry in text.replace("\n  -", "\0-").split("\0")[1:]]
    return {entry.split(" ")[0].rstrip(","): entry for entry in entries}


@pytest.mark.parametrize("job", JOBS)
def test_help_shows_every_flag_with_its_meaning_and_default(
    job: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = config_of(job)
    shown = help_of(kind, capsys, monkeypatch)
    assert "--config" in shown
    for name, field in kind.model_fields.items():
        text = shown["--" + name.replace("_", "-")]
        assert field.description
        assert field.description in text
        if field.is_required():
            assert "(required)" in text
        elif isinstance(field.default, bool):
            assert f"(default: {str(field.default).lower()})" in text
        elif isinstance(field.default, tuple) and field.default:
            assert f"(default: {','.join(map(str, field.default))})" in text
        elif isinstance(field.default, (int, float)) or (isinstance(field.default, str) and field.default):
            assert f"(default: {field.default})" in text


def test_help_survives_percent_signs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shown = help_of(SmallConfig, capsys, monkeypatch)
    assert "passes, 100 % of the cells each (default: 3)" in shown["--epochs"]
    assert "(default: 0.0)" in shown["--share"]
    assert "(default: 0)" in shown["--seeds"]


# ---------------------------------------------------------------------- flags of the screen


@pytest.mark.parametrize(
    "flags",
    [
        ["--start", "alpha", "--goal", "beta"],
        ["--state-column", "type"],
        ["--state-column", "type", "--start", "alpha"],
        ["--alternatives", "delta"],
        ["--state-embeddings", "states.json"],
    ],
)
def test_states_come_together_or_not_at_all(flags: list[str]) -> None:
    with pytest.raises(InputError, match="--state-column, --start"):
        check_flags(parse(ScreenConfig, [*REQUIRED, *flags]))


def test_flags_that_go_together_pass() -> None:
    states = ["--state-column", "type", "--start", "alpha", "--goal", "beta", "--alternatives", "delta,pp"]
    for flags in ([], states, [*states, "--state-embeddings", "states.json"], ["--genes", "A,B", "--together"]):
        check_flags(parse(ScreenConfig, [*REQUIRED, *flags]))


# ---------------------------------------------------------------------- flags of pretraining

SHAPE = {"layers": "6", "width": "512", "heads": "4", "feed-forward": "64", "initializer-range": "0.1"}


@pytest.mark.parametrize("given", ["flag", "file"])
@pytest.mark.parametrize("name", SHAPE)
def test_a_model_to_start_from_has_its_shape(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, given: str
) -> None:
    """A default that is given is refused too: whoever writes it expects it to count."""
    (tmp_path / "job.yaml").write_text(f"{name}: {SHAPE[name]}\n" if given == "file" else "")
    flags = [f"--{name}", SHAPE[name]] if given == "flag" else []
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *REQUIRED, "--config", str(tmp_path / "job.yaml"), *flags])
    with pytest.raises(SystemExit) as raised:
        main(pretrain.PretrainConfig, pretrain.run, "")
    captured = capsys.readouterr()
    assert (raised.value.code, captured.out) == (2, "")
    says = f"--{name}: got {SHAPE[name]} beside --model; takes nothing: the model that training starts from"
    (line,) = captured.err.splitlines()
    assert line.startswith(f"python -m ray_jobs.pretrain: {says}")


def test_a_new_model_takes_a_shape() -> None:
    """What is refused then is the table of cells, which is not there."""
    flags = {"cells": "/nowhere", "vocabulary": "/nowhere", "output": "/nowhere/out", "layers": 2, "width": 16}
    with pytest.raises(InputError, match="--cells: got /nowhere"):
        pretrain.run(build(pretrain.PretrainConfig, flags))
    with pytest.raises(InputError, match="--cells: got /nowhere"):
        pretrain.run(build(pretrain.PretrainConfig, {**{k: flags[k] for k in ("cells", "output")}, "model": "m"}))


# ---------------------------------------------------------------------- where paths lie


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory such as ``ray job submit --working-dir`` unpacks."""
    copy = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    return copy


def test_a_relative_path_in_a_throw_away_copy_is_refused(submitted: Path) -> None:
    assert in_submitted_copy()
    with pytest.raises(InputError, match=r"--output: got the relative path runs/out; takes an absolute path"):
        place("runs/out", "--output")


@pytest.mark.parametrize("path", ["/data/out", "s3://bucket/out", "gs://bucket/out"])
def test_paths_that_last_pass_in_a_throw_away_copy(submitted: Path, path: str) -> None:
    assert place(path, "--output") == path
    assert place("~/out", "--output") == str(Path("~/out").expanduser())


def test_a_relative_path_elsewhere_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not in_submitted_copy()
    assert place("runs/out", "--output") == str(tmp_path / "runs" / "out")


def test_the_store_is_never_thrown_away(submitted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI"):
        store_directory()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert store_directory()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(submitted.parents[2])
    assert store_directory().startswith(str(submitted.parents[2]))
