"""What MLflow runs when it loads a registered classifier: models from code, no pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow.models
import numpy as np
import pandas as pd
from mlflow.pyfunc.model import PythonModel

from geneformer_ray.compute.classifier import predict_logits
from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.compute.multitask import MultiTaskClassifier, load_classifier
from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = ["PyfuncClassifier"]


class PyfuncClassifier(PythonModel):
    """Classifies cells given as rank value encodings: a column ``input_ids`` of token id lists."""

    def load_context(self, context: Any) -> None:
        """Load the self-contained model directory."""
        directory = Path(context.artifacts["model"])
        self.vocabulary = GeneVocabulary.load(str(directory))
        self.model = load_classifier(directory, self.vocabulary)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Give each cell's probabilities, one column a label; of several tasks ``TASK: LABEL``, each adds up to 1."""
        sequences = [
            self.vocabulary.adapt(np.asarray(ids, dtype=np.int32), self.vocabulary.parent_digest)
            for ids in model_input["input_ids"]
        ]
        logits = predict_logits(self.model, sequences, self.vocabulary.pad_id, execution=choose_execution())
        parts = self.model.by_task(logits).values() if isinstance(self.model, MultiTaskClassifier) else [logits]
        odds = [np.exp(part - part.max(axis=1, keepdims=True)) for part in parts]
        shares = [part / part.sum(axis=1, keepdims=True) for part in odds]
        return pd.DataFrame(np.concatenate(shares, axis=1), columns=self.model.labels)


mlflow.models.set_model(PyfuncClassifier())
