"""A model opened for serving: loaded once, then asked. Nothing here knows of HTTP or Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from geneformer_ray.compute.cell_events import cell_events
from geneformer_ray.compute.cell_states import check_states, states_in_file
from geneformer_ray.compute.classifier import CellClassifier, predict_logits
from geneformer_ray.compute.embedding import cell_embeddings
from geneformer_ray.compute.encoder import Encoder
from geneformer_ray.compute.execution import Execution, choose_execution
from geneformer_ray.compute.model_directory import model_vocabulary, read_config
from geneformer_ray.compute.perturbation import PerturbationPlan
from geneformer_ray.compute.reading import Reading
from geneformer_ray.compute.shifts import shift_cell
from geneformer_ray.data import storage
from geneformer_ray.data.rank_value import RankValueEncoder
from geneformer_ray.data.vocabulary import GeneVocabulary, gene_mask
from geneformer_ray.errors import InputError
from serve.found_model import FoundModel

__all__ = ["CellVector", "EncodedCell", "PerturbedCell", "ServedModel", "probabilities"]

# What is computed of a cell in batches: logits, or its embedding.
CellVector = Literal["logits", "mean", "cls"]
STATES_FILE = "states.json"
# Perturbation reads the layer before the last, as the screen does by default; states.json holds that layer's means.
LAYER = -1
READ = {"embedding": "mean", "layer": LAYER}


@dataclass(frozen=True)
class EncodedCell:
    """A cell as the model takes it.

    Parameters
    ----------
    input_ids
        Token ids, int32, shape (length,).
    unknown_share
        The share of its expressed genes that the vocabulary does not know.
    """

    input_ids: NDArray[np.int32]
    unknown_share: float = 0.0


@dataclass(frozen=True)
class PerturbedCell:
    """The numbers of one cell's events.

    Parameters
    ----------
    probabilities
        Of the unperturbed cell, shape (labels,).
    genes
        The perturbed genes of each event, as vocabulary keys.
    values_ES
        float32: one column a state in the order asked for, or one column of similarities.
    changes_EC
        float32: the probabilities after each event, less those before; shape (events, labels).
    absent
        Genes that the cell does not express: no event was made of them.
    without_comparison
        Events that leave no gene to compare.
    """

    probabilities: NDArray[np.float32]
    genes: list[list[str]]
    values_ES: NDArray[np.float32]
    changes_EC: NDArray[np.float32]
    absent: list[str]
    without_comparison: list[list[str]]


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
        self.name, self.version = found.name, found.version
        self.digest = found.digest
        self.execution = execution or choose_execution()
        self.tokens_per_batch = tokens_per_batch
        own = model_vocabulary(found.directory, vocabulary, config)
        # What is encoded here must fit the model, whatever length the vocabulary's corpus was cut to.
        self.max_length = min(own.max_length, int(config.max_position_embeddings))
        self.vocabulary: GeneVocabulary = replace(own, max_length=self.max_length)
        self._classifier = CellClassifier.load(found.directory, own, "model").to(self.execution.device)
        # Loaded a second time: the trunk is cut off at the layer that is read.
        self._trunk: Encoder | None = None
        if config.num_hidden_layers + LAYER >= 1:
            self._trunk = Encoder.load(found.directory, layer=LAYER, execution=self.execution)
        self.states = _read_states(found.directory, int(config.hidden_size), {"model": self.digest, **READ})

    @property
    def labels(self) -> list[str]:
        """The classes, in the order of the probabilities."""
        return list(self._classifier.labels)

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

    # ------------------------------------------------------------------ cells

    def encode(
        self, counts: Mapping[str, float], *, total: float | None = None, whole: bool = True, field: str = "counts"
    ) -> EncodedCell:
        """Encode a cell given as counts, with the code that encodes files.

        Parameters
        ----------
        counts
            Gene -> raw count; genes by the vocabulary's key, Ensembl id or symbol.
        total
            The cell's total over all its genes; by default the sum of `counts`.
        whole
            Refuse counts that are not whole numbers.
        field
            Named in errors.
        """
        if not self.vocabulary.medians:
            raise InputError(
                field, "counts", "input_ids only: this model's vocabulary has no medians, which encoding needs"
            )
        values = np.fromiter(counts.values(), dtype=np.float64, count=len(counts))
        if whole and not np.equal(np.floor(values), values).all():
            raise InputError(field, "fractions", "raw counts, or allow_non_integer for corrected ones")
        expressed = [gene for gene, count in counts.items() if count > 0]
        if not expressed:
            raise InputError(field, "no count above 0", "a cell with at least one expressed gene")
        try:
            encoder = RankValueEncoder(self.vocabulary, list(counts))
        except InputError as error:
            raise InputError(field, error.got, error.takes) from error
        cell = encoder.encode(values[None], np.array([values.sum() if total is None else total]))
        if cell.genes_before_cut[0] == 0:
            raise InputError(field, "no expressed gene that the vocabulary knows", "at least one")
        unmatched = set(encoder.unmatched)
        return EncodedCell(cell.cell(0), sum(gene in unmatched for gene in expressed) / len(expressed))

    def accept(self, input_ids: Sequence[int], *, field: str = "input_ids") -> EncodedCell:
        """Check a cell given as token ids, and adapt it where it was encoded with the vocabulary that this one extends.

        A wrong sequence would get an answer that looks like any other, so it is refused here.
        """
        ids = np.asarray(input_ids, dtype=np.int64)
        if len(ids) and int(ids.max()) >= len(self.vocabulary):
            raise InputError(field, f"token id {ids.max()}", f"ids below {len(self.vocabulary)}, the vocabulary's size")
        if len(ids) > self.max_length:
            raise InputError(field, f"{len(ids)} tokens", f"up to {self.max_length}, the model's input size")
        adapted = self.vocabulary.adapt(ids, self.vocabulary.parent_digest)
        self._check_order(adapted, field)
        return EncodedCell(adapted)

    def _check_order(self, ids: NDArray[np.int32], field: str) -> None:
        vocabulary = self.vocabulary
        is_gene = gene_mask(vocabulary, ids)
        genes = ids[is_gene]
        if len(genes) == 0:
            raise InputError(field, "no gene", "at least one")
        if len(np.unique(genes)) < len(genes):
            values, times = np.unique(genes, return_counts=True)
            raise InputError(field, f"token id {values[times > 1][0]} twice", "each gene once")
        if vocabulary.cls_id is not None and ids[0] != vocabulary.cls_id:
            raise InputError(field, f"{ids[0]} in front", f"{vocabulary.cls_id} (<cls>) in front")
        front = int(vocabulary.cls_id is not None)
        behind = int(vocabulary.eos_id is not None and ids[-1] == vocabulary.eos_id)
        if len(genes) != len(ids) - front - behind:
            misplaced = np.flatnonzero(~is_gene[front:]) + front
            name = vocabulary.names[int(ids[misplaced[0]])]
            raise InputError(f"{field}[{misplaced[0]}]", name, "a gene: special tokens only at the ends, no padding")

    # ------------------------------------------------------------------ answers

    def logits(self, sequences: Sequence[NDArray[np.integer]]) -> NDArray[np.float32]:
        """Compute logits of encoded cells, shape (cells, labels)."""
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
        return cell_embeddings(self.trunk, sequences, self.vocabulary, embedding=what)

    def classify(self, sequences: Sequence[NDArray[np.integer]]) -> NDArray[np.float32]:
        """Compute class probabilities of encoded cells, shape (cells, labels)."""
        return probabilities(self.logits(sequences))

    def perturb(
        self,
        input_ids: NDArray[np.integer],
        genes: Sequence[str],
        *,
        perturbation: str = "delete",
        rank_shift: int = 1,
        together: bool = False,
        states: Sequence[str] = (),
    ) -> PerturbedCell:
        """Perturb genes of an encoded cell and measure every event, as the screen does.

        Parameters
        ----------
        input_ids
            The cell, shape (length,).
        genes
            Names of genes; each is one event.
        perturbation, rank_shift
            As :class:`PerturbationPlan` takes them.
        together
            Perturb all in one event.
        states
            Measure shifts towards these; without them similarities.
        """
        keys = [self.vocabulary.resolve(gene, f"genes[{i}]") for i, gene in enumerate(genes)]
        # A gene that was named twice, by id and by symbol, is one gene.
        tokens = {self.vocabulary.tokens[key]: key for key in keys}
        plan = PerturbationPlan(perturbation, tuple(tokens), together, rank_shift=rank_shift)
        reading = Reading(states={state: self.states[state] for state in states})
        shifts = shift_cell(self.trunk, input_ids, plan, reading, self.vocabulary)
        events = cell_events(input_ids, plan, self.vocabulary, self.trunk.max_length)
        measured = set(shifts.genes)
        perturbed = {
            events.events[number]: ids
            for batch in events.batches(max(1, len(events)))
            for number, ids in zip(batch.numbers_E.tolist(), batch.input_ids_EL, strict=True)
        }
        computed = self.classify([np.asarray(input_ids), *(perturbed[event] for event in shifts.genes)])
        before_C, after_EC = computed[0], computed[1:]
        present = set(np.asarray(input_ids).tolist())
        return PerturbedCell(
            before_C,
            [[tokens[token] for token in event] for event in shifts.genes],
            shifts.values_ES,
            after_EC - before_C,
            [key for token, key in tokens.items() if token not in present and not plan.inserts],
            [[tokens[token] for token in event] for event in events.events if event not in measured],
        )


def probabilities(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Turn logits into probabilities, along the last axis."""
    return np.asarray(softmax(logits, axis=-1), dtype=np.float32)


def _read_states(directory: Path, width: int, made_with: Mapping[str, object]) -> dict[str, NDArray[np.float32]]:
    path = directory / STATES_FILE
    if not path.exists():
        return {}
    states = states_in_file(storage.read_json(str(path), "model"), made_with, "model")
    return check_states(states, width, list(states))
