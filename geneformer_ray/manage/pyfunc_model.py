"""What MLflow runs when it loads a registered classifier: models from code, no pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow.models
import numpy as np
import pandas as pd
from mlflow.pyfunc.model import PythonModel

from geneformer_ray.compute.classifier import CellClassifier, predict_logits
from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = ["PyfuncClassifier"]


class PyfuncClassifier(PythonModel):
    """Classifies cells given as rank value encodings: a column ``input_ids`` of token id lists."""

    def load_context(self, context: Any) -> None:
        """Load the self-contained model directory."""
        directory = Path(context.artifacts["model"])
        self.vocabulary = GeneVocabulary.load(str(directory))
        self.model = CellClassifier.load(directory, self.vocabulary)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Give each cell's probabilities, one column a label."""
        sequences = [
            self.vocabulary.adapt(np.asarray(ids, dtype=np.int32), self.vocabulary.parent_digest)
            for ids in model_input["input_ids"]
        ]
        logits = predict_logits(self.model, sequences, self.vocabulary.pad_id, execution=choose_execution())
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return pd.DataFrame(odds / odds.sum(axis=1, keepdims=True), columns=self.model.labels)


mlflow.models.set_model(PyfuncClassifier())
