"""Who becomes champion, on a real MLflow store in SQLite: versions with made-up figures, no model behind them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import mlflow
import pandas as pd
import pytest

from geneformer_ray.compute.scores import calibration
from geneformer_ray.errors import InputError, RegistryUnavailable
from geneformer_ray.manage.calibration_plot import reliability_diagram
from geneformer_ray.manage.promotion import promote, rollback
from geneformer_ray.manage.registry import check_name, open_store, reaching_store, version_of_alias, without_credentials
from ray_jobs import promote as job
from ray_jobs.command_line import build

SAME = {"split_digest": "split", "test_digest": "test", "labels_digest": "labels", "vocabulary_digest": "vocabulary"}
NUMBER = itertools.count()

AddVersion = Callable[..., int]


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        open_store(str(folder))
        yield


@pytest.fixture
def name() -> str:
    name = f"model{next(NUMBER)}"
    mlflow.MlflowClient().create_registered_model(name)
    return name


@pytest.fixture
def add(name: str) -> AddVersion:
    """Register a version of some macro F1 on the reporting and the choosing cells."""

    def add_version(reporting: float | None, choosing: float | None = 0.5, **tags: str) -> int:
        figures = {"reporting_macro_f1": reporting, "choosing_macro_f1": choosing}
        texts = SAME | {key: f"{value:.6f}" for key, value in figures.items() if value is not None} | tags
        made = mlflow.MlflowClient().create_model_version(name, f"s3://models/{next(NUMBER)}", tags=texts)
        return int(made.version)

    return add_version


def aliases(name: str) -> tuple[int | None, int | None]:
    return version_of_alias(name, "champion"), version_of_alias(name, "previous")


def test_the_first_champion_needs_no_comparison(name: str, add: AddVersion) -> None:
    add(0.1)
    found = promote(name)
    assert (found.promoted, found.champion.version, found.previous) == (True, 1, None)
    assert aliases(name) == (1, None)


def test_the_candidate_is_the_best_on_the_choosing_cells_whatever_it_reports(name: str, add: AddVersion) -> None:
    add(0.9, choosing=0.6)
    add(0.5, choosing=0.8)
    add(0.9, choosing=0.7)
    assert promote(name).champion.version == 2


def test_of_equals_on_the_choosing_cells_the_newest_is_the_candidate(name: str, add: AddVersion) -> None:
    add(0.5)
    add(0.5)
    assert promote(name).candidate.version == 2


def test_versions_of_another_split_are_no_candidates(name: str, add: AddVersion) -> None:
    add(0.5, choosing=0.99, split_digest="other")
    add(0.5, choosing=0.6)
    add(0.5, choosing=0.5)
    add(0.5, choosing=float("nan"))
    assert promote(name).candidate.version == 2


@pytest.mark.parametrize(
    ("champion", "candidate", "margin", "promoted"),
    [
        (0.80, 0.81, 0.0, True),
        (0.80, 0.800001, 0.0, True),
        (0.80, 0.80, 0.0, False),
        (0.80, 0.79, 0.0, False),
        (0.79, 0.81, 0.02, False),  # though 0.81 - 0.79 > 0.02 in floats
        (0.79, 0.810001, 0.02, True),
        (0.80, 0.79, -0.02, True),
        (0.80, 0.78, -0.02, False),
    ],
)
def test_a_candidate_must_beat_the_champion_by_the_margin(
    name: str, add: AddVersion, champion: float, candidate: float, margin: float, promoted: bool
) -> None:
    first = add(champion)
    promote(name)
    second = add(candidate, choosing=0.9)
    found = promote(name, margin=margin)
    assert (found.promoted, found.candidate.version) == (promoted, second)
    assert found.champion.version == (second if promoted else first)
    assert aliases(name) == ((second, first) if promoted else (first, None))
    assert f"{candidate:.4f} against {champion:.4f} of champion 1" in found.reason


def test_promoting_the_champion_changes_nothing(name: str, add: AddVersion) -> None:
    add(0.5)
    promote(name)
    add(0.6, choosing=0.9)
    promote(name)
    found = promote(name)
    assert (found.promoted, found.reason) == (False, "version 2 is the champion already")
    assert aliases(name) == (2, 1)


@pytest.mark.parametrize(
    ("tag", "says"),
    [
        ("labels_digest", "another label set"),
        ("vocabulary_digest", "another vocabulary"),
        ("test_digest", "other reporting cells"),
    ],
)
@pytest.mark.parametrize("side", ["champion", "candidate"])
def test_what_cannot_be_compared_is_refused_without_leave(
    name: str, add: AddVersion, tag: str, says: str, side: str
) -> None:
    """Also where one of the two does not say: a version of an earlier release."""
    add(0.5, **({tag: "another"} if side == "champion" else {}))
    promote(name)
    add(0.9, **({tag: "another"} if side == "candidate" else {}))
    for version, flag in ((None, "--registered-model"), (2, "--version")):
        with pytest.raises(InputError) as raised:
            promote(name, version)
        assert str(raised.value) == (
            f"{flag}: got version 2, which has {says} than champion 1; takes --version 2 --allow-change, or a version "
            "trained on the champion's cells and labels"
        )
    assert aliases(name) == (1, None)
    assert promote(name, 2, allow_change=True).promoted
    assert aliases(name) == (2, 1)


def test_a_version_that_does_not_say_is_refused_too(name: str, add: AddVersion) -> None:
    add(0.5)
    promote(name)
    add(0.9)
    mlflow.MlflowClient().delete_model_version_tag(name, "1", "test_digest")
    with pytest.raises(InputError, match="other reporting cells"):
        promote(name)
    mlflow.MlflowClient().delete_model_version_tag(name, "2", "test_digest")
    with pytest.raises(InputError, match="other reporting cells"):
        promote(name)


def test_leave_to_change_the_labels_is_no_leave_to_be_worse(name: str, add: AddVersion) -> None:
    add(0.5)
    promote(name)
    add(0.4, labels_digest="another")
    assert not promote(name, 2, allow_change=True).promoted
    add(0.3, test_digest="another")
    found = promote(name, 3, allow_change=True)  # on other cells there is nothing to compare
    assert found.promoted
    assert "nothing was compared" in found.reason


def test_rollback_needs_no_reason_and_can_be_taken_back(name: str, add: AddVersion) -> None:
    add(0.5)
    promote(name)
    with pytest.raises(InputError, match=r"--rollback.*without a previous champion"):
        rollback(name)
    add(0.6, labels_digest="another", test_digest="another")
    promote(name, 2, allow_change=True)
    assert rollback(name).champion.version == 1
    assert aliases(name) == (1, 2)
    assert rollback(name).previous == 1
    assert aliases(name) == (2, 1)


@pytest.mark.parametrize(("broken", "left"), [("promote", (1, 1)), ("rollback", (1, 1))])
def test_a_failure_between_the_two_aliases_can_be_mended(
    name: str, add: AddVersion, monkeypatch: pytest.MonkeyPatch, broken: str, left: tuple[int, int]
) -> None:
    """There is always a champion; and a rollback has left the unwanted one, whatever fails next."""
    add(0.5)
    promote(name)
    add(0.6, choosing=0.9)
    if broken == "rollback":
        promote(name)
    original, calls = mlflow.MlflowClient.set_registered_model_alias, []

    def fail(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError("down")
        original(*arguments)

    monkeypatch.setattr(mlflow.MlflowClient, "set_registered_model_alias", fail)
    with pytest.raises(OSError, match="down"):
        promote(name) if broken == "promote" else rollback(name)
    assert aliases(name) == left
    if broken == "promote":
        assert promote(name).promoted
        assert aliases(name) == (2, 1)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"version": 7}, "--version: got 7; takes one of 1, 2"),
        ({"version": 1, "rollback": True}, "--version: got 1; takes nothing with --rollback"),
        ({"registered_model": "nobody"}, "--registered-model: got nobody; takes a registered model"),
        ({"registered_model": "no'body"}, '--registered-model: got "no\'body"; takes a name of letters'),
        ({"margin": 2}, "--margin: got 2"),
        ({"margin": float("nan")}, "--margin: got nan"),
        ({"version": 2}, "--version: got version 2 without reporting_macro_f1"),
    ],
)
def test_bad_flags_are_named(name: str, add: AddVersion, flags: dict[str, Any], text: str) -> None:
    add(0.5)
    promote(name)
    add(None)
    with pytest.raises(InputError) as raised:
        job.run(build(job.PromoteConfig, {"registered_model": name, **flags}))
    assert str(raised.value).startswith(text)


def test_nothing_measured_is_no_candidate(name: str, add: AddVersion) -> None:
    add(0.5, choosing=None)
    with pytest.raises(InputError, match="--version: got nothing; takes a version: none of"):
        promote(name)


def test_the_summary_shows_the_champion_and_why(name: str, add: AddVersion) -> None:
    add(0.5, pooling="mean", reporting_accuracy="0.75")
    promote(name)
    add(0.4, pooling="cls", reporting_accuracy="0.25", choosing=0.9)
    summary = job.run(build(job.PromoteConfig, {"registered_model": name}))
    expected = {
        "name": name, "version": 1, "previous": None, "promoted": False, "candidate": 2, "margin": 0.0,
        "pooling": "mean", "macro_f1": 0.5, "accuracy": 0.75,
    }  # fmt: skip
    assert {key: summary[key] for key in expected} == expected
    assert summary["reason"].startswith("reporting macro F1 0.4000 against 0.5000")


# ---------------------------------------------------------------------- errors of the store


def test_errors_of_a_store_are_one_line_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@host/db")
    with pytest.raises(RegistryUnavailable) as raised, reaching_store("try again"):
        raise OSError("no answer from http://me:secret@host/db\nand a second line")
    assert str(raised.value) == "MLflow at postgresql://host/db failed (no answer from http://host/db); try again"
    assert without_credentials("sqlite:////a/b@c.db") == "sqlite:////a/b@c.db"


@pytest.mark.parametrize("name", ["", "a/b", "a:b", "a@b", "a'b", "a\nb"])
def test_names_that_no_uri_can_hold_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="--registered-model"):
        check_name(name)
    assert check_name("cell types-2.1") == "cell types-2.1"


# ---------------------------------------------------------------------- what is recorded


def test_a_reliability_diagram_has_a_bar_for_each_bin_with_cells() -> None:
    logits = pd.DataFrame([[2.0, 0], [0.1, 0], [9, 0], [0, 3]]).to_numpy()
    figure = reliability_diagram(calibration(pd.Series([0, 1, 0, 1]).to_numpy(), logits))
    reliability, counts = figure.axes
    assert [bar.get_height() for bar in reliability.patches] == [0, 1, 1]  # type: ignore[attr-defined]
    assert [bar.get_height() for bar in counts.patches] == [1, 1, 2]  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="no cells"):
        reliability_diagram(calibration(pd.Series([], dtype=int).to_numpy(), logits[:0]))
