"""Masked-gene pretraining on a group of workers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import BertForMaskedLM

from geneformer_ray.compute import model_directory
from geneformer_ray.compute.encoder import attention_mask
from geneformer_ray.compute.pretraining import MaskedGeneModel, count_masked, masked_loss, new_model
from geneformer_ray.compute.training import Optimisation, TrainingOptions, planned_steps, train_epoch
from geneformer_ray.data import storage
from geneformer_ray.data.batching import length_batches, pad
from geneformer_ray.data.cells import CellTable
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.distribute.train_workers import Worker
from geneformer_ray.manage.registry import local_source

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["pretrain_worker"]

VALIDATION_SEED = 2**31


def pretrain_worker(config: dict[str, Any]) -> None:
    """Pretrain from scratch or from a model; runs on each worker.

    Parameters
    ----------
    config
        ``cells``, ``vocabulary``, ``model`` (source or None), ``shape`` (of a new model), ``rows`` with ``train`` and
        ``validate``, ``options`` of the training, ``output``.
    """
    worker = Worker(config)
    vocabulary = GeneVocabulary.load(config["vocabulary"])
    options = TrainingOptions(**config["options"])
    table = CellTable(config["cells"])
    sequences = {role: _read(table, rows, vocabulary) for role, rows in config["rows"].items()}
    model = _model(config, vocabulary, options.seed)
    parallel = worker.parallel(model.to(worker.execution.device))
    train = sequences["train"]
    masked = count_masked(train, vocabulary)
    steps = planned_steps(np.array([len(ids) for ids in train]), options, worker.share.workers)
    optimisation = Optimisation(model, options, steps)
    history: list[dict[str, float]] = []
    saved = worker.saved()
    if saved is not None:
        state, tensors = saved
        model.load_state_dict(tensors["model"])
        optimisation.restore(tensors)
        history = state["history"]
    for epoch in range(len(history), options.epochs):
        sums, cells = np.zeros(3), 0
        for result in train_epoch(
            parallel, optimisation, train, masked_loss(vocabulary), lambda batch: int(masked[batch].sum()), options,
            epoch=epoch, vocabulary=vocabulary, execution=worker.execution, share=worker.share,
        ):  # fmt: skip
            sums += (result.loss_sum, result.items, result.correct)
            cells += result.cells * worker.share.workers
            note = f"epoch {epoch + 1}, loss {result.loss_sum / max(1, result.items):.3f}"
            worker.tell(min(len(train), cells) + epoch * len(train), note)
        loss, items, correct = np.sum(worker.gather(sums), axis=0)
        history.append({"step": epoch + 1, "train_loss": loss / items, "train_accuracy": correct / items})
        history[-1] |= _validate(worker, model, sequences["validate"], vocabulary)
        worker.save({"trial": 0, "epoch": epoch, "history": history}, model, optimisation, history[-1])
    if worker.leads:
        with tempfile.TemporaryDirectory() as folder:
            _plain(model, vocabulary, Path(folder))
            storage.upload(Path(folder), storage.join(config["output"], "model"))
        storage.write_json(storage.join(config["output"], "history.json"), history)


def _read(table: CellTable, rows: list[int], vocabulary: GeneVocabulary) -> list[NDArray[np.int32]]:
    cells = table.read(np.array(rows, dtype=np.int64))
    return [vocabulary.adapt(ids, table.vocabulary_digest) for ids in cells.input_ids]


def _model(config: dict[str, Any], vocabulary: GeneVocabulary, seed: int) -> MaskedGeneModel:
    torch.manual_seed(seed)
    if config["model"] is None:
        return new_model(vocabulary, **config["shape"])
    source = model_directory.find_model(local_source(config["model"], config["tracking_uri"]))
    return model_directory.load_weights(MaskedGeneModel, source, fresh=("cls.",))


@torch.inference_mode()
def _validate(
    worker: Worker, model: MaskedGeneModel, sequences: list[NDArray[np.int32]], vocabulary: GeneVocabulary
) -> dict[str, float]:
    """Loss and accuracy at masked genes of the held-out cells, the same genes masked every time."""
    model.eval()
    loss_of = masked_loss(vocabulary)
    mine = sequences[worker.share.rank :: worker.share.workers]
    masked = count_masked(mine, vocabulary)
    sums = np.zeros(3)
    torch.manual_seed(VALIDATION_SEED + worker.share.rank)
    for batch in length_batches(np.array([len(ids) for ids in mine]), 8_192):
        ids, lengths = pad([mine[i] for i in batch], vocabulary.pad_id)
        ids_BL = torch.from_numpy(ids).to(worker.execution.device)
        mask_BL = attention_mask(torch.from_numpy(lengths).to(worker.execution.device), ids_BL.shape[1])
        loss, correct = loss_of(model, ids_BL, mask_BL, batch)
        sums += (float(loss), int(masked[batch].sum()), correct)
    loss, items, correct = np.sum(worker.gather(sums), axis=0)
    return {"validation_loss": loss / max(1, items), "validation_accuracy": correct / max(1, items)}


def _plain(model: MaskedGeneModel, vocabulary: GeneVocabulary, directory: Path) -> None:
    """Save as the stock class: the weights are the same, and any tool can read them."""
    plain = BertForMaskedLM(model.config)
    plain.load_state_dict(model.state_dict())
    model_directory.save_model(plain, vocabulary, directory)
