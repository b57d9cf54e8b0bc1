"""What a trial learns of one label column, and of several."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from geneformer_ray.compute.multitask import MultiTaskClassifier, balanced_task_weights, multitask_loss
from geneformer_ray.data.task_splits import UNLABELLED, TaskSplit, split_tasks
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.distribute.class_states import example_cells
from geneformer_ray.distribute.learned_labels import OneLabel, SeveralLabels, learn_labels
from geneformer_ray.manage.trials import Trial
from tests.conftest import random_cells

CELLS = 60
DONORS = np.repeat(["d0", "d1", "d2"], 20).astype(object)
TYPE = np.tile(["a", "b", "c", "a"], 15).astype(object)
SEX = np.array([None if i % 3 == 0 else "fm"[i % 2] for i in range(CELLS)], dtype=object)
ROLES = {"train": ("d0",), "choose": ("d1",), "report": ("d2",)}


@pytest.fixture(scope="module")
def split() -> TaskSplit:
    return split_tasks(np.arange(CELLS), {"type": TYPE, "sex": SEX}, DONORS, assigned=ROLES, min_cells=2)[0]


def test_a_split_says_what_is_learned_of_it(split: TaskSplit) -> None:
    several = learn_labels(split, {"sex": 0.5})
    assert isinstance(several, SeveralLabels) and several.task_weights == {"sex": 0.5}
    assert isinstance(learn_labels(split.by_task["type"], {}), OneLabel)
    assert several.chosen_by == OneLabel.chosen_by == "choosing_macro_f1"
    for role, rows in split.rows.items():
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(several)).rows[role], rows)


def test_labels_are_counted_not_cells(split: TaskSplit) -> None:
    several = SeveralLabels(split, {})
    for batch in (np.array([0, 1, 2]), np.arange(len(split.rows["train"])), np.zeros(0, dtype=int)):
        rows = split.rows["train"][batch]
        assert several.items_of(batch) == len(rows) + sum(SEX[row] is not None for row in rows)
    assert OneLabel(split.by_task["type"]).items_of(np.array([0, 1, 2])) == 3


@pytest.mark.parametrize("class_weights", ["none", "balanced"])
def test_the_loss_has_the_weights_of_tasks_and_classes(
    class_weights: str, split: TaskSplit, model_directory: Path, vocabulary: GeneVocabulary
) -> None:
    torch.manual_seed(0)
    weights, trial = {"type": 1.0, "sex": 0.2}, Trial("cls", 0)
    several = SeveralLabels(split, weights)
    model, own = several.new_model(model_directory, vocabulary, trial, attention_dropout=0.0)
    assert isinstance(model, MultiTaskClassifier) and model.tasks == split.tasks
    assert (model.pooling, len(own)) == ("cls", len(vocabulary) + 1)
    with torch.no_grad():
        for head in model.classifier:
            head.weight.normal_()
    model.eval()
    batch = np.arange(6)
    lengths = [7] * len(batch)
    cells = [own.adapt(ids, vocabulary.digest) for ids in random_cells(vocabulary, np.random.default_rng(0), lengths)]
    ids_BL = torch.from_numpy(np.stack(cells).astype(np.int64))
    targets_NT = split.targets["train"]
    assert (targets_NT[batch] == UNLABELLED).any()

    def loss(of: dict[str, float], balanced: bool, smoothing: float) -> float:
        classes = balanced_task_weights(targets_NT, split.tasks) if balanced else None
        function = multitask_loss(targets_NT, split.tasks, of, classes, smoothing)
        return float(function(model, ids_BL, torch.ones_like(ids_BL), batch)[0].detach())

    function = several.loss(own, class_weights=class_weights, label_smoothing=0.1, device="cpu")
    found = float(function(model, ids_BL, torch.ones_like(ids_BL), batch)[0].detach())
    balanced = class_weights == "balanced"
    assert found == pytest.approx(loss(weights, balanced, 0.1), rel=1e-6)
    for other in (loss({}, balanced, 0.1), loss(weights, not balanced, 0.1), loss(weights, balanced, 0.0)):
        assert abs(found - other) > 1e-3


def test_examples_are_of_the_first_task_whatever_the_others_say(split: TaskSplit) -> None:
    rows, targets_NT = split.rows["report"], split.targets["report"]
    logits = np.zeros((len(rows), len(split.labels)), dtype=np.float32)
    logits[np.arange(len(rows)), targets_NT[:, 0]] = 1
    logits[targets_NT[:, 0] == 2] = [1, 0, 0, 0, 0]  # no cell of the last class is recognised
    logits[:, 3:] = 5  # of the second task, which is surer of everything
    ids = [f"cell{row}" for row in rows]
    found = example_cells(split, ids, logits, lambda some: [np.array([row]) for row in some], seed=0)
    assert [cell["label"] for cell in found] == ["a", "b"]
    for cell in found:
        (row,) = cell["input_ids"]
        assert (cell["cell_id"], cell["label"]) == (f"cell{row}", TYPE[row])
