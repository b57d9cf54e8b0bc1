"""The gene classifier: a class for each gene of a cell, from its hidden state there."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import BertConfig, BertForTokenClassification

from geneformer_ray.compute import model_directory
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from geneformer_ray.compute.training import BatchLoss
    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = [
    "NO_CLASS",
    "GeneClassifier",
    "balanced_gene_weights",
    "gene_loss",
    "new_gene_classifier",
    "token_classes",
]

TASK = "genes"
ARCHITECTURE = "BertForTokenClassification"
# The class of a token that the loss passes over, as transformers and upstream have it.
NO_CLASS = -100
# What classifiers of cells record, and this one would be taken for one of them by.
OF_CELLS = ("pooling", "has_cls", "special_ids", "tasks")


class GeneClassifier(BertForTokenClassification):
    """BERT with dropout and a linear layer on each position's hidden state.

    The parameters have the names of ``BertForTokenClassification``, and the saved directory is a plain checkpoint of
    that class. Only where a gene is asked for is the head computed.
    """

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        at_BL: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Compute logits.

        Parameters
        ----------
        input_ids, attention_mask
            Shape (batch, length).
        at_BL
            Boolean: where genes are asked for.

        Returns
        -------
        Shape (positions, labels), in row-major order of the positions in `at_BL`; without it (batch, length, labels).
        """
        hidden_BLD = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits: torch.Tensor = self.classifier(self.dropout(hidden_BLD if at_BL is None else hidden_BLD[at_BL]))
        return logits

    @property
    def labels(self) -> list[str]:
        """The class names, in the order of the logits."""
        return [self.config.id2label[number] for number in range(self.config.num_labels)]

    # ------------------------------------------------------------------ files

    @classmethod
    def load(cls, directory: Path, flag: str = "--model") -> GeneClassifier:
        """Load a gene classifier's directory: one of ours, or any ``BertForTokenClassification``."""
        config = model_directory.read_config(directory, flag)
        if ARCHITECTURE not in (config.architectures or []):
            raise InputError(flag, f"{directory}, which is no gene classifier", "one that finetune --task genes made")
        model: GeneClassifier = model_directory.load_weights(cls, directory, config=config).eval()
        return model

    def save(self, directory: Path, vocabulary: GeneVocabulary) -> None:
        """Write a self-contained model directory."""
        model_directory.save_model(self, vocabulary, directory)
        path = directory / "config.json"
        content = json.loads(path.read_text())
        content["architectures"] = [ARCHITECTURE]  # the class that loads it in stock transformers
        path.write_text(json.dumps(content, indent=2) + "\n")


def new_gene_classifier(directory: Path, labels: Sequence[str], *, attention_dropout: float = 0.0) -> GeneClassifier:
    """Put a fresh head for genes on a pretrained trunk.

    Parameters
    ----------
    directory
        The trunk's model directory.
    labels
        Class names, in the order of the logits.
    attention_dropout
        On CPU it dominates a training step, so it is 0 unless asked for.
    """
    config: BertConfig = model_directory.read_config(directory)
    for name in OF_CELLS:
        if hasattr(config, name):
            delattr(config, name)
    config.task = TASK
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    config.attention_probs_dropout_prob = attention_dropout
    # The head of a former task may have another number of labels.
    model = model_directory.load_weights(GeneClassifier, directory, fresh=("classifier.",), config=config)
    # A head of the trunk's own former task would be a head start that a seed does not decide.
    nn.init.normal_(model.classifier.weight, std=config.initializer_range)
    nn.init.zeros_(model.classifier.bias)
    return model


def token_classes(
    tokens: NDArray[np.integer], targets: NDArray[np.integer], vocabulary: GeneVocabulary
) -> NDArray[np.int64]:
    """Spread classes over a vocabulary: each token's class number, `NO_CLASS` for all other tokens.

    Parameters
    ----------
    tokens, targets
        Token id and class number of some genes, shape (genes,).
    vocabulary
        The model's.

    Raises
    ------
    ValueError
        If a special token is among them: it is no gene.
    """
    if not vocabulary.special_ids.isdisjoint(np.asarray(tokens).tolist()):
        raise ValueError("a special token with a class")
    class_V = np.full(len(vocabulary), NO_CLASS, dtype=np.int64)
    class_V[tokens] = targets
    return class_V


def gene_loss(
    class_V: NDArray[np.int64], class_weights: torch.Tensor | None = None, label_smoothing: float = 0.0
) -> BatchLoss:
    """Give the cross entropy of a gene classifier, summed over the occurrences of the genes that have a class.

    What any other position holds enters only as the context of these.

    Parameters
    ----------
    class_V
        Class number of every token, as :func:`token_classes` gives it, shape (vocabulary,).
    class_weights
        Weight of each class, shape (classes,); None weighs all occurrences the same.
    label_smoothing
        Share of the target spread evenly over all classes.
    """
    classes = torch.from_numpy(class_V)

    def loss_of(
        model: nn.Module, ids_BL: torch.Tensor, mask_BL: torch.Tensor, batch: NDArray[np.int64]
    ) -> tuple[torch.Tensor, int]:
        class_BL = classes.to(ids_BL.device)[ids_BL]
        at_BL = (class_BL != NO_CLASS) & mask_BL.bool()
        target_P = class_BL[at_BL]
        logits_PC = model(ids_BL, mask_BL, at_BL).float()
        loss = nn.functional.cross_entropy(
            logits_PC, target_P, weight=class_weights, reduction="sum", label_smoothing=label_smoothing
        )
        return loss, int((logits_PC.argmax(dim=1) == target_P).sum())

    return loss_of


def balanced_gene_weights(targets: NDArray[np.integer], cells: NDArray[np.integer], classes: int) -> torch.Tensor:
    """Weigh each class so that all count the same in the loss; shape (classes,).

    Parameters
    ----------
    targets
        Class number of each training gene, shape (genes,).
    cells
        In how many training cells each occurs: what the loss sums over are occurrences.
    classes
        How many classes there are.
    """
    occurrences = np.bincount(targets, weights=cells, minlength=classes)
    return torch.from_numpy((occurrences.sum() / (classes * occurrences)).astype(np.float32))
