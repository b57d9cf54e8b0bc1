"""Classes of genes, as a trial learns them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from geneformer_ray.compute.gene_classifier import (
    GeneClassifier,
    balanced_gene_weights,
    gene_loss,
    new_gene_classifier,
    token_classes,
)
from geneformer_ray.compute.gene_predictions import GenePredictions, predict_occurrences
from geneformer_ray.compute.gene_scores import TokenScores, score_genes
from geneformer_ray.compute.scores import probabilities
from geneformer_ray.data import storage
from geneformer_ray.distribute.trial_on_worker import diverged

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from geneformer_ray.compute.gene_predictions import Occurrences
    from geneformer_ray.compute.training import BatchLoss
    from geneformer_ray.data.gene_folds import GeneSplit
    from geneformer_ray.data.vocabulary import GeneVocabulary
    from geneformer_ray.distribute.trial_on_worker import TrialOnWorker
    from geneformer_ray.manage.trials import Trial

__all__ = ["TOKEN_PREDICTIONS", "LearnedGenes"]

# Cells of which tokens are held at once to predict them.
CELLS_AT_ONCE = 4_096
# Nearly all cells hold genes to choose on: a sample of them tells as much of an epoch.
CHOOSING_CELLS = 2_000
TOKEN_PREDICTIONS = "predictions-report-tokens"


@dataclass(frozen=True)
class LearnedGenes:
    """The classes of genes, wherever cells hold them.

    Parameters
    ----------
    split
        Which genes train, choose and report, and the cells that hold them.
    training_cells
        How many cells hold each training gene, shape (genes,).
    token_predictions
        Whether to write what is predicted of every reporting gene in every cell.
    """

    split: GeneSplit
    training_cells: NDArray[np.int64]
    token_predictions: bool = False
    # Of few genes, macro F1 goes in steps too coarse to tell epochs apart.
    chosen_by: ClassVar[str] = "choosing_auc"

    @property
    def rows(self) -> Mapping[str, NDArray[np.int64]]:
        """Role -> row numbers of the cells that hold one of its genes."""
        return self.split.rows

    def new_model(
        self, source: Path, parent: GeneVocabulary, trial: Trial, *, attention_dropout: float
    ) -> tuple[Any, GeneVocabulary]:
        """Put a fresh head for genes on a pretrained trunk."""
        return new_gene_classifier(source, self.split.labels, attention_dropout=attention_dropout), parent

    def loss(self, vocabulary: GeneVocabulary, *, class_weights: str, label_smoothing: float, device: str) -> BatchLoss:
        """Give the cross entropy, summed over the training genes' occurrences."""
        targets, weights = self.split.targets["train"], None
        if class_weights == "balanced":
            weights = balanced_gene_weights(targets, self.training_cells, len(self.split.labels)).to(device)
        return gene_loss(token_classes(self.split.tokens["train"], targets, vocabulary), weights, label_smoothing)

    def items_of(self, batch: NDArray[np.int64]) -> int:
        """Count the training genes' occurrences."""
        return int(self.split.held["train"][batch].sum())

    def choose(self, on: TrialOnWorker) -> dict[str, float]:
        """Score the choosing genes over a sample of the cells that hold them; the same sample in every epoch.

        Where it misses a class altogether, for its genes are in few cells, over all of them.
        """
        rows = self.rows["choose"]
        scores: dict[str, Any] = {"auc": None}
        if len(rows) > CHOOSING_CELLS:
            sample = np.random.default_rng(on.trial.seed).choice(rows, CHOOSING_CELLS, replace=False)
            scores = self._scored(self._predicted(on, "choose", np.sort(sample))[0], "choose")
        if scores["auc"] is None:
            scores = self._scored(self._predicted(on, "choose", rows)[0], "choose")
        return {f"choosing_{name}": scores[name] for name in ("auc", "macro_f1", "accuracy")}

    def predict(self, on: TrialOnWorker, kept: Path) -> None:
        """Predict choosing and reporting genes in all cells that hold them, and write it all.

        ::

            TRIAL/scores.json                           per gene and, as ``tokens``, per occurrence
            TRIAL/genes-{choose,report}.csv             a row a gene
            TRIAL/predictions-report-tokens/*.parquet   a row a gene and cell, where asked for
        """
        on.model = GeneClassifier.load(kept).to(on.worker.execution.device)
        scores = {}
        for role, name in (("choose", "choosing"), ("report", "reporting")):
            keep = _TokenFiles(on, self.split) if self.token_predictions and role == "report" else None
            genes, tokens = self._predicted(on, role, self.rows[role], keep)
            scores[name] = {**self._scored(genes, role), "tokens": tokens.scores()}
            if on.worker.leads:
                split = self.split
                table = genes.table(split.tokens[role], split.targets[role], split.labels, on.vocabulary)
                path = storage.join(on.directory, f"genes-{role}.csv")
                storage.write_bytes(path, table.to_csv(index=False).encode())
        if on.worker.leads:
            storage.write_json(storage.join(on.directory, "scores.json"), scores)

    def _scored(self, genes: GenePredictions, role: str) -> dict[str, Any]:
        odds_GC = genes.probabilities_GC[np.searchsorted(genes.tokens, self.split.tokens[role])]
        return score_genes(self.split.targets[role], odds_GC, self.split.labels)

    def _predicted(
        self,
        on: TrialOnWorker,
        role: str,
        rows: NDArray[np.int64],
        keep: _TokenFiles | None = None,
    ) -> tuple[GenePredictions, TokenScores]:
        """Predict a role's genes in some cells, shared among the workers; the same sums on every worker."""
        split, share = self.split, on.worker.share
        class_V = token_classes(split.tokens[role], split.targets[role], on.vocabulary)
        genes, tokens = self._nothing(role)
        mine = rows[share.rank :: share.workers]
        blocks = (on.read(mine[start : start + CELLS_AT_ONCE]) for start in range(0, len(mine), CELLS_AT_ONCE))
        for found in predict_occurrences(
            on.model, blocks, split.tokens[role], on.vocabulary.pad_id, execution=on.worker.execution
        ):
            if not np.isfinite(found.logits).all():
                # Else it would be taken for genes that no cell holds, and for no place on a curve.
                raise diverged(on.options.learning_rate, "the model's answers are no numbers")
            genes.add(found.tokens, found.logits)
            tokens.add(class_V[found.tokens], found.logits)
            if keep is not None:
                keep.write(mine, found)
        genes_of_all, tokens_of_all = self._nothing(role)
        for its_genes, its_tokens in on.worker.gather((genes, tokens)):
            genes_of_all.merge(its_genes)
            tokens_of_all.merge(its_tokens)
        return genes_of_all, tokens_of_all

    def _nothing(self, role: str) -> tuple[GenePredictions, TokenScores]:
        return GenePredictions(self.split.tokens[role], len(self.split.labels)), TokenScores(self.split.labels)


class _TokenFiles:
    """What is predicted of each reporting gene in each cell, a file for each block of cells that a worker reads.

    Their names follow from the plan: an attempt that died left the same files, or some of them.
    """

    def __init__(self, on: TrialOnWorker, split: GeneSplit) -> None:
        self._on, self._labels = on, split.labels
        self._class_V = token_classes(split.tokens["report"], split.targets["report"], on.vocabulary)
        self._written = 0

    def write(self, rows: NDArray[np.int64], found: Occurrences) -> None:
        """Write the occurrences found in the next block of the cells `rows`, which all of them number."""
        on, labels, names = self._on, pa.array(self._labels), pa.array(self._on.vocabulary.names)
        cells = np.unique(found.cells)
        ids = pa.array(on.table.ids_of(rows[cells]))
        odds = probabilities(found.logits).astype(np.float32)
        columns = {
            "cell_id": ids.take(np.searchsorted(cells, found.cells)),
            "gene": names.take(found.tokens),
            "true_class": labels.take(self._class_V[found.tokens]),
            "predicted_class": labels.take(odds.argmax(axis=1)),
            **{f"probability_{label}": odds[:, number] for number, label in enumerate(self._labels)},
        }
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns), buffer)
        name = f"part-{on.worker.share.rank:03d}-{self._written:05d}.parquet"
        storage.write_bytes(storage.join(on.directory, TOKEN_PREDICTIONS, name), buffer.getvalue())
        self._written += 1
