"""A model opened for serving: loaded once, then asked. Nothing here knows of HTTP or Ray."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from transformers import BertForTokenClassification

from geneformer_ray.compute.cell_states import check_states, states_in_file
from geneformer_ray.compute.classifier import predict_logits
from geneformer_ray.compute.embedding import cell_embeddings
from geneformer_ray.compute.encoder import Encoder
from geneformer_ray.compute.execution import Execution, choose_execution
from geneformer_ray.compute.model_directory import model_vocabulary, read_config
from geneformer_ray.compute.multitask import MultiTaskClassifier, load_classifier
from geneformer_ray.data import storage
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError
from serve.cell_encoding import CellEncoder, EncodedCell
from serve.found_model import FoundModel

__all__ = ["LAYER", "CellVector", "ServedModel"]

# What is computed of a cell in batches: logits, or its embedding.
CellVector = Literal["logits", "mean", "cls"]
STATES_FILE = "states.json"
GENE_CLASSIFIER = BertForTokenClassification.__name__
# Perturbation reads the layer before the last, as the screen does by default; states.json holds that layer's means.
LAYER = -1
READ = {"embedding": "mean", "layer": LAYER}


class ServedModel:
    """A classifier, its trunk for perturbations, its vocabulary and its states.

    Parameters
    ----------
    found
        Where it lies.
    vocabulary
        Its vocabulary, where the directory carries none.
    execution
        Device, dtype, threads; by default chosen for this process.
    tokens_per_batch
        Padded tokens computed at once.
    """

    def __init__(
        self,
        found: FoundModel,
        *,
        vocabulary: str | None = None,
        execution: Execution | None = None,
        tokens_per_batch: int = 16_384,
    ) -> None:
        config = read_config(found.directory, "model")
        if GENE_CLASSIFIER in (config.architectures or []):
            raise InputError("model", f"{found.directory}, a classifier of genes", "a classifier of cells")
        self.name, self.version, self.directory = found.name, found.version, found.directory
        self.digest = found.digest
        self.execution = execution or choose_execution()
        self.tokens_per_batch = tokens_per_batch
        own = model_vocabulary(found.directory, vocabulary, config)
        # What is encoded here must fit the model, whatever length the vocabulary's corpus was cut to.
        self.max_length = min(own.max_length, int(config.max_position_embeddings))
        self.vocabulary: GeneVocabulary = replace(own, max_length=self.max_length)
        self.vocabulary.find("")  # makes the index of names now, not in the first request
        self.cells = CellEncoder(self.vocabulary)
        self._classifier = load_classifier(found.directory, own, "model").to(self.execution.device)
        # Loaded a second time: the trunk is cut off at the layer that is read.
        self._trunk: Encoder | None = None
        if config.num_hidden_layers + LAYER >= 1:
            self._trunk = Encoder.load(found.directory, layer=LAYER, execution=self.execution)
        self.states = _read_states(found.directory, int(config.hidden_size), {"model": self.digest, **READ})

    @property
    def labels(self) -> list[str]:
        """The classes, in the order of the probabilities; of several tasks those of the first, which come first."""
        return next(iter(self.tasks.values()), list(self._classifier.labels))

    @property
    def tasks(self) -> dict[str, list[str]]:
        """Task -> its classes, in the order of the probabilities; nothing for a model of one, which has no name."""
        return self._classifier.tasks if isinstance(self._classifier, MultiTaskClassifier) else {}

    @property
    def classes(self) -> int:
        """How many classes all tasks have together: the width of the logits."""
        return int(self._classifier.config.num_labels)

    @property
    def pooling(self) -> str:
        """Which vector enters the classifier's head."""
        return str(self._classifier.pooling)

    @property
    def trunk(self) -> Encoder:
        """The trunk up to the layer that embeddings and perturbations read."""
        if self._trunk is None:
            raise InputError("model", "a model of one layer", "a model of two: the layer before the last is read")
        return self._trunk

    @property
    def embeddings(self) -> list[str]:
        """The kinds of cell embedding that it gives."""
        if self._trunk is None:
            return []
        return ["mean"] if self.vocabulary.cls_id is None else ["mean", "cls"]

    @cached_property
    def vocabulary_directory(self) -> Path:
        """A directory that holds the vocabulary, for processes that encode; it goes when the model goes."""
        directory = tempfile.mkdtemp(prefix="geneformer-vocabulary-")
        weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)
        self.vocabulary.save(directory)
        return Path(directory)

    def accept(self, input_ids: Sequence[int], *, field: str = "input_ids") -> EncodedCell:
        """Check a cell given as token ids: see :meth:`CellEncoder.accept`."""
        return self.cells.accept(input_ids, field=field)

    # ------------------------------------------------------------------ answers

    def logits(self, sequences: Sequence[NDArray[np.integer]]) -> NDArray[np.float32]:
        """Compute logits of encoded cells, of all tasks side by side; shape (cells, classes)."""
        return predict_logits(
            self._classifier,
            sequences,
            self.vocabulary.pad_id,
            execution=self.execution,
            tokens_per_batch=self.tokens_per_batch,
        )

    def vectors(self, sequences: Sequence[NDArray[np.integer]], what: CellVector) -> NDArray[np.float32]:
        """Compute one vector a cell: its logits, or its embedding as the mean of its genes or as its ``<cls>``.

        Embeddings are those of the layer before the last, as the embed job gives them by default.
        """
        if what == "logits":
            return self.logits(sequences)
        return cell_embeddings(
            self.trunk, sequences, self.vocabulary, embedding=what, tokens_per_batch=self.tokens_per_batch
        )

    def classify(self, sequences: Sequence[NDArray[np.integer]]) -> NDArray[np.float32]:
        """Compute class probabilities of encoded cells, of all tasks side by side; shape (cells, classes)."""
        return self.probabilities(self.logits(sequences))

    def probabilities(self, logits_NC: NDArray[np.float32]) -> NDArray[np.float32]:
        """Turn logits into probabilities, each task's for themselves; shape (cells, classes)."""
        parts = list(self.by_task(logits_NC).values()) or [logits_NC]
        return np.concatenate([softmax(part, axis=1) for part in parts], axis=1, dtype=np.float32)

    def by_task(self, values_NC: NDArray[np.float32]) -> dict[str, NDArray[np.floating]]:
        """Take values of all classes apart: task -> shape (cells, its classes); nothing where there are no tasks."""
        return self._classifier.by_task(values_NC) if isinstance(self._classifier, MultiTaskClassifier) else {}


def _read_states(directory: Path, width: int, made_with: Mapping[str, object]) -> dict[str, NDArray[np.float32]]:
    path = directory / STATES_FILE
    if not path.exists():
        return {}
    states = states_in_file(storage.read_json(str(path), "model"), made_with, "model")
    return check_states(states, width, list(states))
