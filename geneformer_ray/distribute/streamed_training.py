"""A training over the stream of cells: epochs, history, checkpoints within and between them, and where it stops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from geneformer_ray.compute.optimisation import Optimisation
from geneformer_ray.compute.training import train_step, training_plan
from geneformer_ray.distribute.cell_stream import shards_of, stream_cells

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import nn

    from geneformer_ray.compute.training import BatchLoss, TrainingOptions
    from geneformer_ray.data.cells import CellTable
    from geneformer_ray.data.vocabulary import GeneVocabulary
    from geneformer_ray.distribute.worker import Worker

__all__ = ["History", "StreamedTraining", "lengths_in_model"]

History = list[dict[str, float]]


@dataclass(frozen=True)
class StreamedTraining:
    """What is trained on which cells.

    Parameters
    ----------
    worker
        This worker's place in the group.
    model, vocabulary
        The model on the CPU, and its vocabulary.
    table, rows
        The training cells: their table and row numbers.
    cells_digest
        The vocabulary that encoded the table.
    loss_of, items_of
        As for :func:`geneformer_ray.compute.training.train_step`.
    options
        The training's options.
    name
        Shown with the progress.
    undecayed
        As for :class:`geneformer_ray.compute.optimisation.Optimisation`.
    """

    worker: Worker
    model: nn.Module
    vocabulary: GeneVocabulary
    table: CellTable
    rows: NDArray[np.int64]
    cells_digest: str | None
    loss_of: BatchLoss
    items_of: Callable[[NDArray[np.int64]], int]
    options: TrainingOptions
    name: str = ""
    undecayed: Sequence[nn.Parameter] = ()

    def run(self, end_epoch: Callable[[History], bool]) -> History:
        """Train, going on from the last checkpoint.

        Parameters
        ----------
        end_epoch
            Called on every worker after each epoch with the history so far. It adds to the last entry, and says whether
            the training stops there: the same on every worker.

        Returns
        -------
        list of dict
            One entry an epoch: ``step`` (the epoch, from 1), ``optimiser_steps``, ``train_loss``, ``train_accuracy``.
        """
        share, options = self.worker.share, self.options
        parallel = self.worker.parallel(self.model.to(self.worker.execution.device))
        lengths = lengths_in_model(self.table.lengths[self.rows], self.vocabulary, self.cells_digest)
        plan = training_plan(lengths, shards_of(self.table, self.rows), options, share.workers)
        counts = [plan.count(epoch) for epoch in range(options.epochs)]
        optimisation = Optimisation(self.model, options, sum(counts), self.undecayed)
        state, sums = self._restore(optimisation)
        history: History = state["history"]
        if state["over"]:
            self.worker.safe()
            return history
        stream = stream_cells(
            self.table.path, self.rows, plan, rank=share.rank, epochs=options.epochs,
            first=(state["epoch"], state["step"]),
        )  # fmt: skip
        for step, ids in stream:
            cells = [[self.vocabulary.adapt(one, self.cells_digest) for one in batch] for batch in ids]
            result = train_step(
                parallel, optimisation, step, cells, self.loss_of, self.items_of, options,
                vocabulary=self.vocabulary, execution=self.worker.execution, share=share,
            )  # fmt: skip
            self.worker.metrics.count(
                cells=result.cells, tokens=result.tokens, padding_tokens=result.padded_tokens - result.tokens
            )
            sums += (result.loss_sum, result.items, result.correct)
            done, steps = step.number + 1, sum(counts[: step.epoch]) + step.number + 1
            note = f"{self.name}epoch {step.epoch + 1}, loss {result.loss_sum / max(1, result.items):.3f}"
            self.worker.tell(round((step.epoch + done / counts[step.epoch]) * len(plan)), note)
            if done < counts[step.epoch]:
                stopping = self.worker.stopping()
                if stopping or self.worker.due(steps):
                    state = {"epoch": step.epoch, "step": done, "over": False, "history": history}
                    self._save(state, sums, optimisation)
                if stopping:
                    self.worker.stop_here()
                continue
            loss, items, correct = np.sum(self.worker.gather(sums), axis=0)
            sums = np.zeros(3)
            history.append(
                {
                    "step": step.epoch + 1,
                    "optimiser_steps": steps,
                    "train_loss": loss / max(1, items),
                    "train_accuracy": correct / max(1, items),
                }
            )
            over = end_epoch(history) or step.epoch + 1 == options.epochs
            self._save({"epoch": step.epoch + 1, "step": 0, "over": over, "history": history}, sums, optimisation)
            if over:
                break
            if self.worker.stopping():
                self.worker.stop_here()
        self.worker.safe()
        return history

    def _save(self, state: dict[str, Any], sums: NDArray[np.float64], optimisation: Optimisation) -> None:
        so_far = np.sum(self.worker.gather(sums), axis=0) if state["step"] else sums
        metrics = {key: state[key] for key in ("epoch", "step")}
        self.worker.save({**state, "sums": so_far.tolist()}, self.model, optimisation, metrics)

    def _restore(self, optimisation: Optimisation) -> tuple[dict[str, Any], NDArray[np.float64]]:
        """Give where the training goes on, and this worker's sums over the epoch so far."""
        saved = self.worker.saved()
        if saved is None:
            return {"epoch": 0, "step": 0, "over": False, "history": []}, np.zeros(3)
        state, tensors = saved
        if self.worker.leads:
            self.worker.metrics.resumed()
        self.model.load_state_dict(tensors["model"])
        optimisation.restore(tensors)
        # All workers' sums in one: the first one carries them.
        return state, np.array(state["sums"]) if self.worker.leads else np.zeros(3)


def lengths_in_model(
    lengths: NDArray[np.int64], vocabulary: GeneVocabulary, cells_digest: str | None
) -> NDArray[np.int32]:
    """Say how long cells are once they have the special tokens that a model's extended vocabulary adds; at most.

    Parameters
    ----------
    lengths
        As in the table, shape (cells,).
    vocabulary, cells_digest
        The model's vocabulary, and the digest of the one that encoded the cells.
    """
    if vocabulary.parent_digest is None or cells_digest not in (vocabulary.parent_digest, None):
        return lengths.astype(np.int32)
    return np.minimum(lengths + len(vocabulary.added), vocabulary.max_length).astype(np.int32)
