"""Masked-gene pretraining on a group of workers."""

from __future__ import annotations

import tempfile
from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import BertForMaskedLM

from geneformer_ray.compute import model_directory
from geneformer_ray.compute.encoder import attention_mask
from geneformer_ray.compute.lora import Adapters, LoraOptions
from geneformer_ray.compute.masked_scores import MaskedSums, count_genes, frequency_ranking, score_masked_genes
from geneformer_ray.compute.pretraining import MaskedGeneModel, count_masked, masked_genes, masked_loss, new_model
from geneformer_ray.compute.training import TrainingOptions
from geneformer_ray.data import storage
from geneformer_ray.data.batching import length_batches, pad
from geneformer_ray.data.cells import CellTable
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.distribute.streamed_training import StreamedTraining, lengths_in_model
from geneformer_ray.distribute.trial_on_worker import diverged
from geneformer_ray.distribute.worker import Worker
from geneformer_ray.manage.registry import local_source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from geneformer_ray.distribute.streamed_training import History

__all__ = ["pretrain_worker"]

VALIDATION_SEED = 2**31
# Cells of which tokens are held at once to measure the loss.
CELLS_AT_ONCE = 4_096


def pretrain_worker(config: dict[str, Any]) -> None:
    """Pretrain from scratch or from a model, and measure what came of it; runs on each worker.

    The output holds ``model/``, ``adapters/`` where some were learned, ``history.json`` and ``measured.json``.

    Parameters
    ----------
    config
        ``cells``, ``vocabulary``, ``model`` (source or None), ``tracking_uri``, ``base`` (the model's digest),
        ``shape`` (of a new model), ``lora`` (fields of :class:`LoraOptions`, or None), ``rows`` with ``train`` and
        ``validate`` (int64 arrays), ``options`` of the training, ``output``.
    """
    worker = Worker(config)
    vocabulary = GeneVocabulary.load(config["vocabulary"])
    options = TrainingOptions(**config["options"])
    table = CellTable(config["cells"])
    rows: dict[str, NDArray[np.int64]] = config["rows"]
    model = _model(config, vocabulary, options.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    adapters = Adapters(model, LoraOptions(**config["lora"])) if config["lora"] else None
    masked = _count_masked(
        lengths_in_model(table.lengths[rows["train"]], vocabulary, table.vocabulary_digest), vocabulary
    )

    def end_epoch(history: History) -> bool:
        history[-1] |= _validate(worker, model, table, rows["validate"], vocabulary)
        return False

    history = StreamedTraining(
        worker, model, vocabulary, table, rows["train"], table.vocabulary_digest,
        masked_loss(vocabulary), lambda batch: int(masked[batch].sum()), options,
        undecayed=adapters.undecayed if adapters else (),
    ).run(end_epoch)  # fmt: skip
    worker.tell(len(rows["train"]) * options.epochs, "trained; measuring", now=True)
    trained = _merged(adapters, options) if adapters else model
    # From its source, so that a training that was resumed tells the same.
    before = _model(config, vocabulary, options.seed) if config["model"] else None
    scores = _measure(worker, trained, before, table, rows, vocabulary, options.seed) | {
        "parameters": parameters,
        "trainable_parameters": sum(one.numel() for one in model.parameters() if one.requires_grad),
    }
    if worker.leads:
        output = config["output"]
        _upload(lambda folder: _plain(trained, vocabulary, folder), storage.join(output, "model"))
        if adapters:
            _upload(lambda folder: adapters.save(folder, config["base"]), storage.join(output, "adapters"))
        storage.write_json(storage.join(output, "history.json"), history)
        measured = {"scores": scores, "execution": worker.execution.reason}
        storage.write_json(storage.join(output, "measured.json"), measured)


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
        sequences = _read(table, mine[start : start + CELLS_AT_ONCE], vocabulary)
        masked = count_masked(sequences, vocabulary)
        for batch in length_batches(np.array([len(ids) for ids in sequences]), 8_192):
            ids, lengths = pad([sequences[i] for i in batch], vocabulary.pad_id)
            ids_BL = torch.from_numpy(ids).to(worker.execution.device)
            mask_BL = attention_mask(torch.from_numpy(lengths).to(worker.execution.device), ids_BL.shape[1])
            loss, correct = loss_of(model, ids_BL, mask_BL, batch)
            sums += (float(loss), int(masked[batch].sum()), correct)
    loss, items, correct = np.sum(worker.gather(sums), axis=0)
    return {"validation_loss": loss / max(1, items), "validation_accuracy": correct / max(1, items)}


def _measure(
    worker: Worker,
    trained: MaskedGeneModel,
    before: MaskedGeneModel | None,
    table: CellTable,
    rows: dict[str, NDArray[np.int64]],
    vocabulary: GeneVocabulary,
    seed: int,
) -> dict[str, float]:
    """Name hidden genes of the held-out cells by the model, by the one it came from, and by frequency alone."""
    counts = np.zeros(len(vocabulary), dtype=np.int64)
    for part in _share(worker, rows["train"]):
        counts += count_genes(_read(table, part, vocabulary), vocabulary)
    ranking = frequency_ranking(np.sum(worker.gather(counts), axis=0), vocabulary)

    def scores_of(model: MaskedGeneModel) -> dict[str, float]:
        model.to(worker.execution.device)
        sums = MaskedSums()
        for part in _share(worker, rows["validate"]):
            sums += score_masked_genes(
                model, _read(table, part, vocabulary), part, ranking, vocabulary,
                seed=seed, execution=worker.execution,
            )  # fmt: skip
        every: list[MaskedSums] = worker.gather(sums)
        return reduce(add, every).scores()

    scores = scores_of(trained)
    del scores["cells"]  # all held-out ones
    if before is not None:
        own = ("masked_accuracy", "masked_top10_accuracy")
        scores |= {f"before_{name}": value for name, value in scores_of(before).items() if name in own}
    return scores | {"frequency_cells": len(rows["train"])}


def _share(worker: Worker, rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Give this worker's cells, some at a time, in the table's order: each part of the table is read about once."""
    mine = np.array_split(np.sort(rows), worker.share.workers)[worker.share.rank]
    return (mine[start : start + CELLS_AT_ONCE] for start in range(0, len(mine), CELLS_AT_ONCE))


def _read(table: CellTable, rows: NDArray[np.int64], vocabulary: GeneVocabulary) -> list[NDArray[np.int32]]:
    return [vocabulary.adapt(ids, table.vocabulary_digest) for ids in table.read(rows).input_ids]


def _merged(adapters: Adapters, options: TrainingOptions) -> MaskedGeneModel:
    try:
        merged: Any = adapters.merged()
    except ValueError as error:
        raise diverged(options.learning_rate, "adapters hold what is no number") from error
    model: MaskedGeneModel = merged
    return model


def _upload(save: Callable[[Path], None], place: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        storage.upload(Path(folder), place)


def _plain(model: MaskedGeneModel, vocabulary: GeneVocabulary, directory: Path) -> None:
    """Save as the stock class: the weights are the same, and any tool can read them."""
    plain = BertForMaskedLM(model.config)
    plain.load_state_dict(model.state_dict())
    model_directory.save_model(plain, vocabulary, directory)
