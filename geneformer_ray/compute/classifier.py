"""The cell classifier: one trunk, one head, and a choice of which vector enters the head (the pooling)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from geneformer_ray.compute import model_directory
from geneformer_ray.compute.encoder import add_token, attention_mask
from geneformer_ray.data.batching import length_batches, pad
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from geneformer_ray.compute.execution import Execution
    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = [
    "POOLINGS",
    "CellClassifier",
    "check_pooling",
    "mean_over_genes",
    "new_classifier",
    "predict_logits",
    "stock_pooling",
]

POOLINGS = ("first_gene", "cls", "mean")


def check_pooling(pooling: str, flag: str = "--pooling") -> str:
    """Check the name of a pooling."""
    if pooling not in POOLINGS:
        raise InputError(flag, pooling, f"one of {', '.join(POOLINGS)}")
    return pooling


def stock_pooling(vocabulary: GeneVocabulary) -> str:
    """Say what position 0 is for a stock classifier, which does not record a pooling."""
    return "cls" if vocabulary.cls_id is not None else "first_gene"


class CellClassifier(BertForSequenceClassification):
    """BERT with a pooler (dense + tanh), dropout and a linear layer on a pooled vector.

    All three poolings feed the same head, so that they compare:

    - ``first_gene``: the hidden state of the first gene, position 0, or 1 behind a ``<cls>``;
    - ``cls``: the hidden state of the ``<cls>`` token, position 0;
    - ``mean``: the mean of the gene positions' hidden states, without padding and special tokens.

    The parameters have the names of ``BertForSequenceClassification``. Where the pooled vector is position 0, the saved
    directory is a plain checkpoint of that class too.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.pooling = check_pooling(getattr(config, "pooling", ""), "config.json: pooling")

    def pool(self, hidden_BLD: torch.Tensor, input_ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        """Give the vector that enters the head: shape (batch, width)."""
        if self.pooling == "cls":
            return hidden_BLD[:, 0]
        if self.pooling == "first_gene":
            return hidden_BLD[:, 1 if self.config.has_cls else 0]
        # From the configuration: from_pretrained leaves a buffer that the weights do not hold uninitialised.
        special_ids = torch.tensor(self.config.special_ids, device=input_ids_BL.device)
        return mean_over_genes(hidden_BLD, input_ids_BL, mask_BL, special_ids)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> torch.Tensor:
        """Compute logits of shape (batch, labels) from token ids and mask of shape (batch, length)."""
        hidden_BLD = self.hidden(input_ids, attention_mask)
        mask_BL = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        pooled_BD = self.pool(hidden_BLD, input_ids, mask_BL)
        # BertPooler reads position 0 of a sequence: hand it the pooled vector as a sequence of one.
        logits: torch.Tensor = self.classifier(self.dropout(self.bert.pooler(pooled_BD[:, None])))
        return logits

    def hidden(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the last layer's hidden states, shape (batch, length, width)."""
        hidden_BLD: torch.Tensor = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden_BLD

    @property
    def labels(self) -> list[str]:
        """The class names, in the order of the logits."""
        return [self.config.id2label[number] for number in range(self.config.num_labels)]

    # ------------------------------------------------------------------ files

    @classmethod
    def load(cls, directory: Path, vocabulary: GeneVocabulary, flag: str = "--model") -> CellClassifier:
        """Load a classifier directory with the pooling it was trained with; a stock one by what its position 0 is."""
        config = model_directory.read_config(directory, flag)
        if not _is_classifier(config):
            raise InputError(flag, f"{directory}, which is no classifier", "a classifier that finetune made")
        if not hasattr(config, "pooling"):
            _describe(config, stock_pooling(vocabulary), vocabulary)
        model: CellClassifier = model_directory.load_weights(cls, directory, config=config).eval()
        return model

    def save(self, directory: Path, vocabulary: GeneVocabulary) -> None:
        """Write a self-contained model directory."""
        model_directory.save_model(self, vocabulary, directory)
        path = directory / "config.json"
        content = json.loads(path.read_text())
        # The class that loads it: stock transformers where position 0 is what is pooled.
        content["architectures"] = ["BertForSequenceClassification" if self.is_stock else "CellClassifier"]
        path.write_text(json.dumps(content, indent=2) + "\n")

    @property
    def is_stock(self) -> bool:
        """Whether stock ``BertForSequenceClassification`` gives the same logits."""
        return self.pooling == "cls" or (self.pooling == "first_gene" and not self.config.has_cls)


def mean_over_genes(
    hidden_BLD: torch.Tensor, input_ids_BL: torch.Tensor, mask_BL: torch.Tensor, special_ids: torch.Tensor
) -> torch.Tensor:
    """Average hidden states over gene positions, without padding and special tokens: shape (batch, width)."""
    genes_BL = mask_BL.bool() & ~torch.isin(input_ids_BL, special_ids)
    weights_BL1 = genes_BL.to(hidden_BLD.dtype)[:, :, None]
    return (hidden_BLD * weights_BL1).sum(dim=1) / weights_BL1.sum(dim=1).clamp(min=1)


def _is_classifier(config: BertConfig) -> bool:
    return hasattr(config, "pooling") or "BertForSequenceClassification" in (config.architectures or [])


def _describe(config: BertConfig, pooling: str, vocabulary: GeneVocabulary) -> None:
    config.pooling = pooling
    config.has_cls = vocabulary.cls_id is not None
    config.special_ids = sorted(vocabulary.special_ids)
    config.__dict__.pop("task", None)  # of a classifier of genes, whose trunk this may be


def new_classifier(
    directory: Path, vocabulary: GeneVocabulary, labels: Sequence[str], pooling: str, *, attention_dropout: float = 0.0
) -> tuple[CellClassifier, GeneVocabulary]:
    """Put a fresh head on a pretrained trunk.

    Parameters
    ----------
    directory
        The trunk's model directory.
    vocabulary
        Its vocabulary.
    labels
        Class names, in the order of the logits.
    pooling
        ``cls`` on a vocabulary without the token adds it, to be learned in fine-tuning.
    attention_dropout
        On CPU it dominates a training step, so it is 0 unless asked for.

    Returns
    -------
    classifier, vocabulary
        The vocabulary that the classifier uses: extended by ``<cls>`` where that was needed.
    """
    config = model_directory.read_config(directory)
    _describe(config, check_pooling(pooling), vocabulary)
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    config.attention_probs_dropout_prob = attention_dropout
    # The head of a former task may have another number of labels.
    model = model_directory.load_weights(
        CellClassifier, directory, fresh=("bert.pooler.", "classifier."), config=config
    )
    # A head of the trunk's own former task would be a head start that the other poolings do not have.
    for module in (model.bert.pooler.dense, model.classifier):
        nn.init.normal_(module.weight, std=config.initializer_range)
        nn.init.zeros_(module.bias)
    if pooling == "cls" and vocabulary.cls_id is None:
        vocabulary = vocabulary.with_cls()
        add_token(model.bert, vocabulary)
        _describe(model.config, pooling, vocabulary)
    return model, vocabulary


@torch.inference_mode()
def predict_logits(
    model: CellClassifier,
    sequences: Sequence[NDArray[np.integer]],
    pad_id: int,
    *,
    execution: Execution,
    tokens_per_batch: int = 16_384,
) -> NDArray[np.float32]:
    """Compute logits of cells, in batches of like length; shape (cells, labels), in the order given."""
    model.eval()
    logits = np.empty((len(sequences), model.config.num_labels), dtype=np.float32)
    lengths = np.array([len(ids) for ids in sequences])
    for batch in length_batches(lengths, tokens_per_batch):
        ids, real = pad([sequences[i] for i in batch], pad_id)
        ids_BL = torch.from_numpy(ids).to(execution.device)
        mask_BL = attention_mask(torch.from_numpy(real).to(execution.device), ids_BL.shape[1])
        with execution.autocast():
            logits[batch] = model(ids_BL, mask_BL).float().cpu().numpy()
    return logits
