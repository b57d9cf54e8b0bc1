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
from geneformer_ray.compute.pretraining import MaskedGeneModel, count_masked, masked_genes, masked_loss, new_model
from geneformer_ray.compute.training import TrainingOptions
from geneformer_ray.data import storage
from geneformer_ray.data.batching import length_batches, pad
from geneformer_ray.data.cells import CellTable
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.distribute.streamed_training import StreamedTraining, lengths_in_model
from geneformer_ray.distribute.worker import Worker
from geneformer_ray.manage.registry import local_source

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from geneformer_ray.distribute.streamed_training import History

__all__ = ["pretrain_worker"]

VALIDATION_SEED = 2**31
# Cells of which tokens are held at once to measure the loss.
CELLS_AT_ONCE = 4_096


def pretrain_worker(config: dict[str, Any]) -> None:
    """Pretrain from scratch or from a model; runs on each worker.

    Parameters
    ----------
    config
        ``cells``, ``vocabulary``, ``model`` (source or None), ``shape`` (of a new model), ``rows`` with ``train`` and
        ``validate`` (int64 arrays), ``options`` of the training, ``output``.
    """
    worker = Worker(config)
    vocabulary = GeneVocabulary.load(config["vocabulary"])
    options = TrainingOptions(**config["options"])
    table = CellTable(config["cells"])
    rows: dict[str, NDArray[np.int64]] = config["rows"]
    model = _model(config, vocabulary, options.seed)
    masked = _count_masked(
        lengths_in_model(table.lengths[rows["train"]], vocabulary, table.vocabulary_digest), vocabulary
    )

    def end_epoch(history: History) -> bool:
        history[-1] |= _validate(worker, model, table, rows["validate"], vocabulary)
        return False

    history = StreamedTraining(
        worker, model, vocabulary, table, rows["train"], table.vocabulary_digest,
        masked_loss(vocabulary), lambda batch: int(masked[batch].sum()), options,
    ).run(end_epoch)  # fmt: skip
    if worker.leads:
        with tempfile.TemporaryDirectory() as folder:
            _plain(model, vocabulary, Path(folder))
            storage.upload(Path(folder), storage.join(config["output"], "model"))
        storage.write_json(storage.join(config["output"], "history.json"), history)


def _count_masked(lengths: NDArray[np.integer], vocabulary: GeneVocabulary) -> NDArray[np.int64]:
    """Count each cell's masked genes from its length: a cell has each of the vocabulary's special tokens once."""
    genes = lengths - (vocabulary.cls_id is not None) - (vocabulary.eos_id is not None)
    return np.array([masked_genes(n) if n > 0 else 0 for n in genes.tolist()], dtype=np.int64)


def _model(config: dict[str, Any], vocabulary: GeneVocabulary, seed: int) -> MaskedGeneModel:
    torch.manual_seed(seed)
    if config["model"] is None:
        return new_model(vocabulary, **config["shape"])
    source = model_directory.find_model(local_source(config["model"], config["tracking_uri"]))
    return model_directory.load_weights(MaskedGeneModel, source, fresh=("cls.",))


@torch.inference_mode()
def _validate(
    worker: Worker, model: MaskedGeneModel, table: CellTable, rows: NDArray[np.int64], vocabulary: GeneVocabulary
) -> dict[str, float]:
    """Loss and accuracy at masked genes of the held-out cells, the same genes masked every time."""
    model.eval()
    loss_of = masked_loss(vocabulary)
    mine = rows[worker.share.rank :: worker.share.workers]
    sums = np.zeros(3)
    torch.manual_seed(VALIDATION_SEED + worker.share.rank)
    for start in range(0, len(mine), CELLS_AT_ONCE):
        cells = table.read(mine[start : start + CELLS_AT_ONCE]).input_ids
        sequences = [vocabulary.adapt(ids, table.vocabulary_digest) for ids in cells]
        masked = count_masked(sequences, vocabulary)
        for batch in length_batches(np.array([len(ids) for ids in sequences]), 8_192):
            ids, lengths = pad([sequences[i] for i in batch], vocabulary.pad_id)
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
