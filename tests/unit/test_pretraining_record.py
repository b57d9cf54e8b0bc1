"""What a pretraining leaves for MLflow, before any store is asked: written once, drawn, summarised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from geneformer_ray.errors import InputError
from geneformer_ray.manage.pretraining_plot import pretraining_figure
from geneformer_ray.manage.pretraining_record import FinishedPretraining

HISTORY = [
    {"step": n, "optimiser_steps": 7 * n, "train_loss": 4 / n, "train_accuracy": 0.1,
     "validation_loss": 5 / n, "validation_accuracy": 0.2}
    for n in (1, 2, 3)
]  # fmt: skip
SCORES = {
    "masked_accuracy": 0.02, "masked_top10_accuracy": 0.1, "baseline_accuracy": 0.03, "baseline_top10_accuracy": 0.2,
}  # fmt: skip
BEFORE = {"before_masked_accuracy": 0.01, "before_masked_top10_accuracy": 0.05}
HELD_OUT = {"cells": 9, "group": None}


def finished(output: Path, plan: dict[str, Any]) -> FinishedPretraining:
    """As after a training that ended well."""
    (output / "history.json").write_text(json.dumps(HISTORY))
    (output / "measured.json").write_text(json.dumps({"scores": SCORES, "execution": "CPU"}))
    return FinishedPretraining.of(str(output), plan, HELD_OUT)


def test_what_is_written_stands(tmp_path: Path) -> None:
    """A second attempt records the first one's run, whatever has happened to the code since."""
    assert not FinishedPretraining.present_in(str(tmp_path))
    first = finished(tmp_path, {"model": None})
    assert FinishedPretraining.present_in(str(tmp_path))
    assert (tmp_path / "training_curves.png").read_bytes().startswith(b"\x89PNG")
    assert FinishedPretraining.of(str(tmp_path), {"model": "another"}, {}) == first


def test_the_summary_has_the_last_epoch_the_scores_and_the_places(tmp_path: Path) -> None:
    last = {key: value for key, value in HISTORY[-1].items() if key != "step"}
    model = {"model": str(tmp_path / "model")}
    assert finished(tmp_path, {}).summary() == last | SCORES | {"held_out": HELD_OUT} | model


def test_adapters_are_named_where_there_are_some(tmp_path: Path) -> None:
    assert finished(tmp_path, {"lora": {"rank": 2}}).summary()["adapters"] == str(tmp_path / "adapters")


def test_a_broken_record_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "pretraining.json").write_text('{"id": "x"}')
    with pytest.raises(InputError, match=r"^--output: got .* with a broken pretraining\.json"):
        FinishedPretraining.load(str(tmp_path))


def test_the_figure_shows_the_model_beside_the_baseline() -> None:
    """Whichever wins; and the model that it began with, where there was one."""
    loss, named = pretraining_figure(HISTORY, SCORES).axes
    assert [list(line.get_ydata()) for line in loss.get_lines()] == [[4, 2, 4 / 3], [5, 2.5, 5 / 3]]  # type: ignore[arg-type]
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in named.containers}  # type: ignore[attr-defined]
    assert heights == {"frequency baseline": [0.03, 0.2], "model after": [0.02, 0.1]}
    _, named = pretraining_figure(HISTORY, SCORES | BEFORE).axes
    assert [bars.get_label() for bars in named.containers] == ["frequency baseline", "model before", "model after"]


def test_a_training_without_epochs_has_no_figure() -> None:
    with pytest.raises(InputError, match="history: got no epoch"):
        pretraining_figure([], SCORES)
