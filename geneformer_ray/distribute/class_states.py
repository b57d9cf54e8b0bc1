"""What a trained classifier carries beside its weights: the mean embedding of each class, and example cells.

::

    MODEL/states.json      class -> mean embedding, which perturbations of a served cell are measured towards
    MODEL/examples.json    list of cell_id, label, input_ids: reporting cells to try the served model on

Of several tasks, ``states.json`` has the classes of all, named ``TASK: CLASS``; the examples are of the first task's.
Neither is part of the model's digest, which is of weights and configuration.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from geneformer_ray.compute.cell_states import state_embeddings, states_file, sum_by_state
from geneformer_ray.compute.embedding import cell_embeddings
from geneformer_ray.compute.encoder import Encoder
from geneformer_ray.compute.model_directory import read_config, weights_digest
from geneformer_ray.data import storage
from geneformer_ray.data.task_splits import UNLABELLED, class_name, tasks_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from geneformer_ray.data.task_splits import LabelSplit, Task
    from geneformer_ray.data.vocabulary import GeneVocabulary
    from geneformer_ray.distribute.worker import Worker

    ReadCells = Callable[[NDArray[np.int64]], list[NDArray[np.int32]]]

__all__ = ["class_states", "example_cells", "sample_by_class", "write_class_files"]

# A mean over more cells would not move by anything that a shift towards it shows.
CELLS_A_CLASS = 200
EXAMPLES_AT_MOST = 24
# Cells of which tokens are held at once to embed them.
CELLS_AT_ONCE = 1_024
# What a screen reads by default, and so does the service.
EMBEDDING, LAYER = "mean", -1


def sample_by_class(targets: NDArray[np.int64], at_most: int, seed: int) -> NDArray[np.int64]:
    """Choose all cells of each class, or a sample: positions in `targets`, in order.

    Which cells of a class are chosen does not depend on the other classes.
    """
    chosen = [np.zeros(0, dtype=np.int64)]
    for number in np.unique(targets):
        positions = np.flatnonzero(targets == number)
        if len(positions) > at_most:
            positions = np.random.default_rng([seed, int(number)]).choice(positions, at_most, replace=False)
        chosen.append(positions)
    return np.sort(np.concatenate(chosen))


def class_states(
    directory: Path, split: LabelSplit, read: ReadCells, vocabulary: GeneVocabulary, *, seed: int, worker: Worker
) -> dict[str, Any] | None:
    """Average the embeddings of each class's training cells; every worker of the group takes part.

    Parameters
    ----------
    directory
        The trained model.
    split
        Whose training cells are embedded: all of a class, or a sample of 200. Of several tasks, each has its own
        sample.
    read
        Gives the cells of row numbers, as the model takes them.
    vocabulary
        The model's.
    seed
        Of the sample.
    worker
        This worker's place in its group.

    Returns
    -------
    The content of ``states.json``; None for a model of one layer, which has no layer before the last.
    """
    if int(read_config(directory).num_hidden_layers) + LAYER < 1:
        return None
    names_T = [_sampled(task, len(split.rows["train"]), seed) for task in tasks_of(split)]
    # A cell that several tasks have chosen is embedded once.
    chosen = np.flatnonzero(np.any([pd.notna(names) for names in names_T], axis=0))
    encoder = Encoder.load(directory, layer=LAYER, execution=worker.execution)
    mine = chosen[worker.share.rank :: worker.share.workers]
    sums = []
    for part in np.split(mine, range(CELLS_AT_ONCE, len(mine), CELLS_AT_ONCE)):
        cells = cell_embeddings(encoder, read(split.rows["train"][part]), vocabulary, embedding=EMBEDDING)
        sums += [sum_by_state(cells, names[part]) for names in names_T]
    states = state_embeddings(part for parts in worker.gather(sums) for part in parts)
    ordered = [class_name(task.name, label) for task in tasks_of(split) for label in task.labels]
    counts = {name: int(sum((names == name).sum() for names in names_T)) for name in ordered}
    sampled = f"training cells, at most {CELLS_A_CLASS} a class, chosen by seed {seed}"
    return states_file(
        states,
        {
            "model": weights_digest(directory),
            "embedding": EMBEDDING,
            "layer": LAYER,
            "averaged_over": sampled,
            "cells_by_state": {name: count for name, count in counts.items() if count},
        },
    )


def _sampled(task: Task, cells: int, seed: int) -> NDArray[np.object_]:
    """Give the name of its class to each training cell that is embedded for a task, shape (cells,)."""
    names, targets = np.full(cells, None, dtype=object), task.targets["train"]
    labelled = np.flatnonzero(targets != UNLABELLED)
    chosen = labelled[sample_by_class(targets[labelled], CELLS_A_CLASS, seed)]
    names[chosen] = np.array([class_name(task.name, label) for label in task.labels], dtype=object)[targets[chosen]]
    return names


def example_cells(
    split: LabelSplit, cell_ids: Sequence[str], logits: NDArray[np.floating], read: ReadCells, *, seed: int
) -> list[dict[str, Any]]:
    """Choose one reporting cell of each class that the model takes for what it is, in the order of the classes.

    Of several tasks, the first one's classes: an example is one cell with one label. By seed, not by how sure the model
    is of it: an example is to be like the others. A class of which no reporting cell is recognised has none.

    Parameters
    ----------
    split
        Whose reporting cells.
    cell_ids, logits
        Of the reporting cells, in order; the logits of all tasks.
    read
        Gives the cells of row numbers, as the model takes them.
    seed
        Of the choice.

    Returns
    -------
    The content of ``examples.json``.
    """
    task = tasks_of(split)[0]
    targets = task.targets["report"]
    right = np.flatnonzero(logits[:, : len(task.labels)].argmax(axis=1) == targets)  # never one without a label
    chosen = right[sample_by_class(targets[right], 1, seed)]
    chosen = chosen[np.argsort(targets[chosen])]
    if len(chosen) > EXAMPLES_AT_MOST:
        some = np.random.default_rng(seed).choice(len(chosen), EXAMPLES_AT_MOST, replace=False)
        chosen = chosen[np.sort(some)]
    return [
        {"cell_id": cell_ids[position], "label": task.labels[targets[position]], "input_ids": ids.tolist()}
        for position, ids in zip(chosen, read(split.rows["report"][chosen]), strict=True)
    ]


def write_class_files(directory: str, states: dict[str, Any] | None, examples: Sequence[dict[str, Any]] | None) -> None:
    """Write both files into a model directory, where there is something to write."""
    if states is not None:
        storage.write_json(storage.join(directory, "states.json"), states)
    if examples is not None:
        # On one line a cell: there are thousands of ids.
        lines = ",\n".join(json.dumps(cell, ensure_ascii=False) for cell in examples)
        storage.write_bytes(storage.join(directory, "examples.json"), f"[{lines}]\n".encode())
