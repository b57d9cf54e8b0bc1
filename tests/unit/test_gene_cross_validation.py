"""Gene classification from files to scores: what only its neighbours tell of a gene, a model learns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.compute.gene_baseline import GeneOccurrence, gene_baseline
from geneformer_ray.compute.gene_classifier import GeneClassifier, gene_loss, new_gene_classifier, token_classes
from geneformer_ray.compute.gene_predictions import GenePredictions, predict_occurrences
from geneformer_ray.compute.gene_scores import TokenScores, score_genes
from geneformer_ray.compute.model_directory import save_model
from geneformer_ray.compute.optimisation import Optimisation
from geneformer_ray.compute.pretraining import new_model
from geneformer_ray.compute.training import TrainingOptions, train_step, training_plan
from geneformer_ray.data.cells import CellTable
from geneformer_ray.data.gene_classes import GeneClasses, read_gene_classes
from geneformer_ray.data.gene_folds import GeneFolds, GeneSplit, cell_blocks
from geneformer_ray.data.vocabulary import GeneVocabulary

EXECUTION = choose_execution(cpus=1)


def write_cells(vocabulary: GeneVocabulary, path: Path, rng: np.random.Generator) -> None:
    """Cells of two types, which differ in six marker genes each; genes of a class occur in cells of one type alone.

    All genes with a class are as frequent and rank as high as each other: their neighbours tell them apart.
    """
    genes = np.array([vocabulary.tokens[gene] for gene in vocabulary.genes], dtype=np.int32)
    cells = []
    for number in range(160):
        kind = number % 2
        own, markers = genes[kind * 14 : kind * 14 + 14], genes[28 + kind * 6 : 34 + kind * 6]
        # Every eighth cell holds no gene with a class.
        cells.append(rng.permutation(np.r_[rng.permutation(own)[: 6 * (number % 8 > 1)], rng.permutation(markers)[:4]]))
    pq.write_table(pa.table({"input_ids": cells}), path)


def trained(directory: Path, split: GeneSplit, table: CellTable, vocabulary: GeneVocabulary) -> GeneClassifier:
    torch.manual_seed(0)
    model = new_gene_classifier(directory, split.labels)
    options = TrainingOptions(epochs=8, learning_rate=1e-2, tokens_per_batch=128)
    cells = [ids for block in cell_blocks(table, split.rows["train"], vocabulary) for ids in block]
    lengths = np.array([len(ids) for ids in cells])
    plan = training_plan(lengths, np.zeros_like(lengths), options, 1)
    class_V = token_classes(split.tokens["train"], split.targets["train"], vocabulary)
    steps = [step for epoch in range(options.epochs) for step in plan.steps(epoch)]
    optimisation = Optimisation(model, options, len(steps))
    for step in steps:
        train_step(
            model, optimisation, step, [[cells[i] for i in batch] for (batch,) in step.batches],
            gene_loss(class_V), lambda batch: int(split.held["train"][batch].sum()), options,
            vocabulary=vocabulary, execution=EXECUTION,
        )  # fmt: skip
    return model


def test_what_the_context_tells_is_learned(vocabulary: GeneVocabulary, tmp_path: Path) -> None:
    write_cells(vocabulary, tmp_path / "cells.parquet", np.random.default_rng(0))
    genes = vocabulary.genes
    (tmp_path / "classes.json").write_text(json.dumps({"first": genes[:14], "second": [*genes[14:28], "NOTHING"]}))
    save_model(new_model(vocabulary, layers=2, width=16, heads=2, feed_forward=24), vocabulary, tmp_path / "trunk")

    table, rows = CellTable(str(tmp_path / "cells.parquet")), np.arange(160)
    occurrence = GeneOccurrence.count(cell_blocks(table, rows, vocabulary), vocabulary)
    classes = GeneClasses.of(read_gene_classes(str(tmp_path / "classes.json")), vocabulary)
    classes = classes.held_by(occurrence.held_V, min_cells=5)
    assert classes.report()["unknown_genes"] == {"second": ["NOTHING"]}
    folds = GeneFolds.deal(classes, 4, seed=0)
    splits = folds.splits(rows, folds.count_held(cell_blocks(table, rows, vocabulary), len(vocabulary)))
    assert {split.without for split in splits} == {40}

    areas, baseline = [], []
    for split in splits[:2]:
        model = trained(tmp_path / "trunk", split, table, vocabulary)
        class_V = token_classes(split.tokens["report"], split.targets["report"], vocabulary)
        genes_found, tokens_found = GenePredictions(split.tokens["report"], 2), TokenScores(split.labels)
        blocks = cell_blocks(table, split.rows["report"], vocabulary, at_once=50)
        for found in predict_occurrences(model, blocks, split.tokens["report"], vocabulary.pad_id, execution=EXECUTION):
            genes_found.add(found.tokens, found.logits)
            tokens_found.add(class_V[found.tokens], found.logits)
        assert genes_found.cells_G.sum() == split.held["report"].sum() == tokens_found.scores()["tokens"]
        odds = genes_found.probabilities_GC  # in the order of the tokens, as the split has them
        areas += [score_genes(split.targets["report"], odds, split.labels)["auc"], tokens_found.scores()["auc"]]
        features = {role: occurrence.features(split.tokens[role]) for role in ("train", "report")}
        guessed = gene_baseline(features["train"], split.targets["train"], features["report"], 2)
        baseline.append(score_genes(split.targets["report"], guessed, split.labels)["auc"])
    assert min(areas) > 0.95
    assert np.mean(baseline) < 0.8
