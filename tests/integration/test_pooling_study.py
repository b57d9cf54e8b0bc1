"""The pooling study as a job: real trainings of every pooling, two seeds, and the tables that come of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from geneformer_ray.compute.classifier import POOLINGS
from geneformer_ray.data import storage
from geneformer_ray.errors import InputError, OutputExistsError
from ray_jobs import pooling_study, pretrain, tokenize
from ray_jobs.command_line import build
from tests.integration.small_data import GROUPS, SmallData

pytestmark = [pytest.mark.slow, pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]


def study(**flags: Any) -> dict[str, Any]:
    return pooling_study.run(build(pooling_study.PoolingStudyConfig, flags))


@pytest.fixture(scope="module")
def flags(small_data: SmallData, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> dict[str, Any]:
    """A tiny pretrained model and encoded cells."""
    folder = tmp_path_factory.mktemp("study")
    cells = str(folder / "cells")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        tokenize.run(build(tokenize.TokenizeConfig, {
            "input": [small_data.h5ad], "vocabulary": small_data.vocabulary, "output": cells,
            "obs_columns": ["cell_type", "donor"],
        }))  # fmt: skip
        pretrain.run(build(pretrain.PretrainConfig, {
            "cells": cells, "vocabulary": small_data.vocabulary, "output": str(folder / "pretrained"), "layers": 1,
            "width": 16, "heads": 2, "feed_forward": 32, "epochs": 1, "initializer_range": 0.1,
        }))  # fmt: skip
    return {
        "cells": cells, "model": str(folder / "pretrained" / "model"), "label": "cell_type", "group": "donor",
        "seeds": [0, 1], "epochs": 3, "learning_rate": 5e-3, "tokens_per_batch": 256, "bootstrap": 200,
        "output": str(folder / "study"), **{f"{role}_groups": [group] for role, group in GROUPS.items()},
    }  # fmt: skip


@pytest.fixture(scope="module")
def found(flags: dict[str, Any]) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{Path(flags['output']).parent / 'mlflow.db'}")
        return study(**flags)


def test_every_pooling_is_scored_beside_the_baseline(found: dict[str, Any], flags: dict[str, Any]) -> None:
    scores = pd.read_csv(found["files"]["pooling_study.csv"], keep_default_na=False)
    assert set(scores["pooling"]) == set(POOLINGS)
    assert set(scores["role"]) == {"choosing", "reporting"}
    assert set(zip(scores["metric"], scores["label"], strict=True)) == {
        ("macro_f1", ""), ("accuracy", ""), ("f1", "alpha"), ("f1", "beta"),
    }  # fmt: skip
    assert len(scores) == 3 * 2 * 4
    assert (scores["n"] == 2).all()
    assert scores["baseline"].astype(float).between(0, 1).all()
    # The very numbers that finetune recorded, trial by trial.
    tuned = storage.read_json(storage.join(flags["output"], "classifiers", storage.MANIFEST))["summary"]
    for pooling in POOLINGS:
        trials = [trial["reporting_macro_f1"] for trial in tuned["trials"] if trial["pooling"] == pooling]
        assert len(trials) == 2
        assert found["pooling"][pooling]["macro_f1"]["mean"] == pytest.approx(sum(trials) / 2, abs=1e-4)
    assert found["baseline"]["macro_f1"] == pytest.approx(tuned["baseline"]["macro_f1"], abs=1e-4)


def test_differences_are_paired_and_drawn(found: dict[str, Any]) -> None:
    differences = pd.read_csv(found["files"]["pooling_differences.csv"], keep_default_na=False)
    macro = differences[differences["metric"] == "macro_f1"].set_index(["pooling", "other"])
    assert len(macro) == 6
    for (pooling, other), row in macro.iterrows():
        other_mean = found["baseline"] if other == "baseline" else found["pooling"][other]
        expected = other_mean["macro_f1"] if other == "baseline" else other_mean["macro_f1"]["mean"]
        assert row["mean"] == pytest.approx(found["pooling"][pooling]["macro_f1"]["mean"] - expected, abs=2e-4)
        assert row["ci_low"] <= row["mean"] <= row["ci_high"]
    assert Path(found["files"]["pooling_study.png"]).read_bytes().startswith(b"\x89PNG")
    assert "macro F1" in found["reading"]


def test_a_finished_study_stays_and_an_unfinished_one_trains_nothing_twice(
    found: dict[str, Any], flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OutputExistsError, match="a finished run"):
        study(**flags)
    manifest = storage.join(flags["output"], storage.MANIFEST)
    whole = storage.read_json(manifest)
    storage.write_json(manifest, {"finished": False, "plan": whole["plan"]})
    monkeypatch.setattr(pooling_study.finetune, "run", lambda config: pytest.fail("trained again"))
    again = study(**flags)
    assert {**again, "seconds": None} == {**found, "seconds": None}


@pytest.mark.parametrize(
    ("changed", "field"),
    [({"label": ""}, "--label"), ({"seeds": [0]}, "--seeds"), ({"bootstrap": 5}, "--bootstrap")],
)
def test_bad_flags_are_refused_before_anything_is_written(
    flags: dict[str, Any], changed: dict[str, Any], field: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as raised:
        study(**flags | {"output": str(tmp_path / "new")} | changed)
    assert raised.value.field == field
    assert not (tmp_path / "new").exists()
