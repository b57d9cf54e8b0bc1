"""What MLflow runs when it loads a registered classifier of genes: models from code, no pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow.models
import numpy as np
import pandas as pd
from mlflow.pyfunc.model import PythonModel

from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.compute.gene_classifier import GeneClassifier
from geneformer_ray.compute.gene_predictions import predict_occurrences
from geneformer_ray.compute.scores import probabilities
from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = ["PyfuncGeneClassifier"]


class PyfuncGeneClassifier(PythonModel):
    """Classifies the genes of cells given as rank value encodings: a column ``input_ids`` of token id lists."""

    def load_context(self, context: Any) -> None:
        """Load the self-contained model directory."""
        directory = Path(context.artifacts["model"])
        self.vocabulary = GeneVocabulary.load(str(directory))
        self.model = GeneClassifier.load(directory)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Give a row a gene and cell: ``cell`` (its number, from 0), ``gene``, and ``probability_CLASS`` of each class.

        A gene's probabilities over cells are the means of its rows.
        """
        vocabulary = self.vocabulary
        cells = [
            vocabulary.adapt(np.asarray(ids, dtype=np.int32), vocabulary.parent_digest)
            for ids in model_input["input_ids"]
        ]
        genes = np.array([vocabulary.tokens[gene] for gene in vocabulary.genes])
        (found,) = predict_occurrences(self.model, [cells], genes, vocabulary.pad_id, execution=choose_execution())
        odds = probabilities(found.logits)
        return pd.DataFrame(
            {
                "cell": found.cells,
                "gene": [vocabulary.names[token] for token in found.tokens],
                **{f"probability_{label}": odds[:, number] for number, label in enumerate(self.model.labels)},
            }
        )


mlflow.models.set_model(PyfuncGeneClassifier())
