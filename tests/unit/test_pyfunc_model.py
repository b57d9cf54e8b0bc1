"""What MLflow runs of a registered classifier: of one task the columns that it always had, of several each task's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlflow.pyfunc.model import PythonModelContext

from geneformer_ray.compute.classifier import CellClassifier, predict_logits
from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.manage.pyfunc_model import PyfuncClassifier
from tests.unit.served import LABELS, TASKS, make_classifier, make_multitask, offline_odds_by_task

CELLS = [[9, 4, 21, 30, 17], [11], [7, 6, 5]]


def predicted(directory: Path) -> pd.DataFrame:
    context = PythonModelContext({"model": str(directory)}, {})
    model = PyfuncClassifier()
    model.load_context(context)
    return model.predict(context, pd.DataFrame({"input_ids": CELLS}))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_every_task_has_its_columns(
    model_directory: Path, vocabulary: GeneVocabulary, tmp_path: Path, pooling: str
) -> None:
    own = make_multitask(model_directory, vocabulary, tmp_path, pooling)
    answers = predicted(tmp_path)
    assert list(answers.columns) == [f"{task}: {label}" for task in TASKS for label in TASKS[task]]
    adapted = [own.adapt(np.array(ids, dtype=np.int32), own.parent_digest) for ids in CELLS]
    for task, odds in offline_odds_by_task(tmp_path, own, adapted).items():
        got = answers[[f"{task}: {label}" for label in TASKS[task]]].to_numpy()
        np.testing.assert_allclose(got, odds, atol=1e-6)
        np.testing.assert_allclose(got.sum(axis=1), 1, atol=1e-6)


def test_one_task_is_answered_bit_for_bit_as_before_there_were_several(
    model_directory: Path, vocabulary: GeneVocabulary, tmp_path: Path
) -> None:
    make_classifier(model_directory, vocabulary, "mean", tmp_path)
    answers = predicted(tmp_path)
    model = CellClassifier.load(tmp_path, vocabulary)
    cells = [np.array(ids, dtype=np.int32) for ids in CELLS]
    logits = predict_logits(model, cells, vocabulary.pad_id, execution=choose_execution())
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    pd.testing.assert_frame_equal(
        answers, pd.DataFrame(odds / odds.sum(axis=1, keepdims=True), columns=LABELS), check_exact=True
    )
