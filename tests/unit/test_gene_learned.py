"""What workers of a group make of classes of genes together, and what it leaves in the output."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.compute.gene_baseline import GeneOccurrence
from geneformer_ray.compute.gene_classifier import GeneClassifier
from geneformer_ray.compute.gene_scores import RocCurve
from geneformer_ray.compute.training import Share
from geneformer_ray.data.cell_schema import cells_schema
from geneformer_ray.data.cells import CellTable
from geneformer_ray.data.gene_classes import GeneClasses
from geneformer_ray.data.gene_folds import GeneFolds, GeneSplit, cell_blocks
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.distribute import learned_genes
from geneformer_ray.distribute.learned_genes import LearnedGenes
from geneformer_ray.errors import InputError
from geneformer_ray.manage.gene_run import GeneRecord, GeneRun
from geneformer_ray.manage.trained_run import kind_of
from geneformer_ray.manage.trials import Trial
from tests.conftest import random_cells, randomise

CELLS, FOLDS = 60, 3
EXECUTION = choose_execution(cpus=1)


def read_csv(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, keep_default_na=False)


@dataclass(frozen=True)
class Genes:
    """Random cells, twenty-one genes in two classes, one of which is called NA, and their folds."""

    table: CellTable
    vocabulary: GeneVocabulary
    classes: GeneClasses
    occurrence: GeneOccurrence
    splits: list[GeneSplit]

    def learned(self, fold: int, **options: Any) -> LearnedGenes:
        split = self.splits[fold]
        return LearnedGenes(split, self.occurrence.held_V[split.tokens["train"]], **options)


@pytest.fixture(scope="module")
def genes(vocabulary: GeneVocabulary, tmp_path_factory: pytest.TempPathFactory) -> Genes:
    rng = np.random.default_rng(3)
    cells = random_cells(vocabulary, rng, rng.integers(1, 9, size=CELLS).tolist())
    path = tmp_path_factory.mktemp("cells") / "cells.parquet"
    columns = {
        "cell_id": [f"cell{number}" for number in range(CELLS)], "input_ids": pa.array(cells, pa.list_(pa.int32())),
        "length": pa.array([len(ids) for ids in cells], pa.int32()),
    }  # fmt: skip
    pq.write_table(pa.table(columns, schema=cells_schema(vocabulary.digest)), path)
    table, rows = CellTable(str(path)), np.arange(CELLS)
    named = {"NA": vocabulary.genes[:15], "b": vocabulary.genes[15:21]}
    occurrence = GeneOccurrence.count(cell_blocks(table, rows, vocabulary), vocabulary)
    classes = GeneClasses.of(named, vocabulary)
    dealt = GeneFolds.deal(classes, FOLDS, seed=1)
    splits = dealt.splits(rows, dealt.count_held(cell_blocks(table, rows, vocabulary), len(vocabulary)))
    return Genes(table, vocabulary, classes, occurrence, splits)


@pytest.fixture(scope="module")
def kept(genes: Genes, model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier's directory, with a head of large random weights."""
    directory = tmp_path_factory.mktemp("kept")
    trial = Trial("genes", 0, 0)
    model, vocabulary = genes.learned(0).new_model(model_directory, genes.vocabulary, trial, attention_dropout=0.0)
    torch.manual_seed(2)
    randomise(model.classifier, 0.5)
    model.save(directory, vocabulary)
    return directory


def together(workers: int, genes: Genes, trial: Trial, output: Path, kept: Path, work: Callable[[Any], Any]) -> Any:
    """Call `work` with a trial on each worker of a group, at once; what all of them give, which must be one thing."""
    slots: list[Any] = [None] * workers
    barrier, results, errors = threading.Barrier(workers, timeout=60), [None] * workers, []
    # One after another: as transformers loads, it puts its own functions in torch.nn.init, for all threads.
    models = [GeneClassifier.load(kept) for _ in range(workers)]

    def run(rank: int) -> None:
        def gather(mine: Any) -> list[Any]:
            slots[rank] = mine
            barrier.wait()
            everyone = list(slots)
            barrier.wait()
            return everyone

        worker = SimpleNamespace(share=Share(rank, workers), execution=EXECUTION, leads=rank == 0, gather=gather)
        on = SimpleNamespace(
            worker=worker, trial=trial, table=genes.table, vocabulary=genes.vocabulary,
            directory=trial.directory(str(output)), model=models[rank],
            read=lambda rows: next(cell_blocks(genes.table, rows, genes.vocabulary, at_once=len(rows))),
        )  # fmt: skip
        try:
            results[rank] = work(on)
        except BaseException as error:  # noqa: BLE001  (raised below)
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    assert all(result == results[0] for result in results)
    return results[0]


def test_items_are_occurrences_of_training_genes(genes: Genes) -> None:
    learned = genes.learned(0)
    batch = np.array([0, 2, 3])
    tokens = set(genes.splits[0].tokens["train"].tolist())
    cells = genes.table.read(learned.rows["train"][batch]).input_ids
    assert learned.items_of(batch) == sum(token in tokens for ids in cells for token in ids.tolist()) > 0


def test_balanced_classes_pull_the_same_over_occurrences(genes: Genes, kept: Path) -> None:
    """Of a model that says nothing yet, a step over all training cells moves the biases only without the weights."""
    learned, model, split = genes.learned(0), GeneClassifier.load(kept), genes.splits[0]
    torch.nn.init.zeros_(model.classifier.weight)
    torch.nn.init.zeros_(model.classifier.bias)
    occurrences = np.bincount(split.targets["train"], weights=learned.training_cells)
    assert occurrences.sum() == split.held["train"].sum()
    pull = {}
    for weights in ("none", "balanced"):
        model.zero_grad()
        loss = learned.loss(genes.vocabulary, class_weights=weights, label_smoothing=0.0, device="cpu")
        for ids in next(cell_blocks(genes.table, split.rows["train"], genes.vocabulary)):
            ids_BL = torch.from_numpy(ids.astype(np.int64))[None]
            loss(model, ids_BL, torch.ones_like(ids_BL), np.array([0]))[0].backward()
        pull[weights] = model.classifier.bias.grad.numpy()
    np.testing.assert_allclose(pull["none"], occurrences.sum() / 2 - occurrences, rtol=1e-5)
    np.testing.assert_allclose(pull["balanced"], 0, atol=1e-4)
    assert abs(pull["none"][0]) > 1


def predicted(genes: Genes, kept: Path, output: Path, workers: int, fold: int = 0) -> Path:
    learned, trial = genes.learned(fold, token_predictions=True), Trial("genes", 0, fold)
    together(workers, genes, trial, output, kept, lambda on: learned.predict(on, kept))
    return Path(trial.directory(str(output)))


def test_any_number_of_workers_predicts_the_same(
    genes: Genes, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learned_genes, "CELLS_AT_ONCE", 7)
    one, three = (predicted(genes, kept, tmp_path / str(workers), workers) for workers in (1, 3))
    scores, others = (json.loads((place / "scores.json").read_text()) for place in (one, three))
    for role, its in (("choosing", "choose"), ("reporting", "report")):
        assert scores[role]["tokens"]["tokens"] == genes.splits[0].held[its].sum()
        for name in ("auc", "macro_f1", "accuracy", "genes", "genes_without_cells"):
            assert scores[role][name] == pytest.approx(others[role][name])
        assert scores[role]["confusion_matrix"] == others[role]["confusion_matrix"]
        assert scores[role]["tokens"]["confusion_matrix"] == others[role]["tokens"]["confusion_matrix"]
        assert scores[role]["tokens"]["auc"] == pytest.approx(others[role]["tokens"]["auc"], abs=1e-3)
    for role in ("choose", "report"):
        tables = [read_csv(place / f"genes-{role}.csv") for place in (one, three)]
        pd.testing.assert_frame_equal(*tables, atol=1e-6)
        assert tables[0]["gene"].tolist() == genes.splits[0].genes[role]
    parts = [sorted((place / "predictions-report-tokens").iterdir()) for place in (one, three)]
    assert {part.name[:8] for part in parts[1]} == {"part-000", "part-001", "part-002"}
    tokens = [
        pq.read_table(place / "predictions-report-tokens").to_pandas().sort_values(["cell_id", "gene"])
        for place in (one, three)
    ]
    pd.testing.assert_frame_equal(*(table.reset_index(drop=True) for table in tokens), atol=1e-5)
    expected = {
        (f"cell{row}", genes.vocabulary.names[token])
        for row in range(CELLS)
        for token in genes.table.read(np.array([row])).input_ids[0].tolist()
        if token in genes.splits[0].tokens["report"]
    }
    assert set(zip(tokens[0]["cell_id"], tokens[0]["gene"], strict=True)) == expected
    assert len(tokens[0]) == len(expected)
    right = (tokens[0]["true_class"] == tokens[0]["predicted_class"]).mean()
    assert scores["reporting"]["tokens"]["accuracy"] == pytest.approx(right)
    exact = RocCurve.from_scores(tokens[0]["true_class"].to_numpy() == "b", tokens[0]["probability_b"].to_numpy())
    assert exact is not None
    assert scores["reporting"]["tokens"]["auc"] == pytest.approx(exact.auc, abs=0.01)  # ties of a few pairs
    split = genes.splits[0]
    class_of = {
        gene: split.labels[its] for gene, its in zip(split.genes["report"], split.targets["report"], strict=True)
    }
    assert tokens[0]["true_class"].tolist() == [class_of[gene] for gene in tokens[0]["gene"]]
    assert (genes.splits[0].labels, set(tokens[0]["true_class"])) == (["NA", "b"], {"NA", "b"})


def test_an_epoch_is_scored_on_a_sample_of_cells_that_stays(
    genes: Genes, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learned_genes, "CHOOSING_CELLS", 25)
    learned, trial, asked = genes.learned(1), Trial("genes", 4, 1), []

    def choose(on: Any) -> dict[str, float]:
        read = on.read
        on.read = lambda rows: asked.append(sorted(rows.tolist())) or read(rows)
        return learned.choose(on)

    first = together(1, genes, trial, tmp_path, kept, choose)
    assert (
        first == together(2, genes, trial, tmp_path, kept, choose) == together(1, genes, trial, tmp_path, kept, choose)
    )
    assert set(first) == {"choosing_auc", "choosing_macro_f1", "choosing_accuracy"}
    assert learned.chosen_by in first
    assert len(asked[0]) == 25 < len(learned.rows["choose"]) and asked[0] == asked[-1]
    assert sorted(asked[1] + asked[2]) == asked[0]
    assert not list(tmp_path.iterdir())


def test_a_sample_that_misses_a_class_gives_way_to_all_cells(
    genes: Genes, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned, trial = genes.learned(1), Trial("genes", 0, 1)
    whole = together(1, genes, trial, tmp_path, kept, learned.choose)
    monkeypatch.setattr(learned_genes, "CHOOSING_CELLS", 1)
    assert together(1, genes, trial, tmp_path, kept, learned.choose) == whole


def test_a_training_that_diverged_is_named(genes: Genes, kept: Path, tmp_path: Path) -> None:
    """What is no number has no place on a curve, and is not a gene that no cell holds."""
    learned, trial = genes.learned(0), Trial("genes", 0, 0)

    def choose(on: Any) -> dict[str, float]:
        on.options = SimpleNamespace(learning_rate=7.0)
        with torch.no_grad():
            on.model.classifier.bias.fill_(float("nan"))
        return learned.choose(on)

    with pytest.raises(InputError, match=r"--learning-rate: got 7\.0; takes a lower one: the training has diverged"):
        together(1, genes, trial, tmp_path, kept, choose)


# ---------------------------------------------------------------------- what lies in the output


@pytest.fixture
def record(genes: Genes, kept: Path, tmp_path: Path) -> GeneRecord:
    """Two trials a fold, the second of another seed with the same predictions but for their sign."""
    trials = [Trial("genes", seed, fold) for seed in (0, 1) for fold in range(FOLDS)]
    for trial in trials:
        learned = genes.learned(trial.fold or 0)
        together(1, genes, trial, str(tmp_path), kept, lambda on, its=learned: its.predict(on, kept))
        if trial.seed:
            path = Path(trial.directory(str(tmp_path)), "genes-report.csv")
            table = read_csv(path)
            table[["probability_NA", "probability_b"]] = np.tile([0.9, 0.1], (len(table), 1))
            table.to_csv(path, index=False)
    for split in genes.splits:
        (tmp_path / f"split-fold{split.fold}.json").write_text(json.dumps(split.manifest()))
    plan = {
        "cells": "c", "vocabulary": genes.vocabulary.digest, "folds": FOLDS, "chosen_cells": CELLS, "min_cells": 1,
        "classes": {**genes.classes.report(), "unknown_genes": {"NA": ["NA", "<b>"]}},
        "options": {"epochs": 1},
    }  # fmt: skip
    return GeneRecord(genes.vocabulary, genes.splits, genes.occurrence, trials, str(tmp_path), None, plan)


def test_a_finished_run_puts_folds_and_seeds_together(record: GeneRecord, genes: Genes, tmp_path: Path) -> None:
    run = GeneRun.of(record)
    assert GeneRun.of(record) == run == GeneRun.load(str(tmp_path))
    assert kind_of(str(tmp_path)) == "genes"
    table = run.genes()
    assert sorted(table["gene"]) == sorted(genes.classes.genes)
    features = genes.occurrence.features(genes.classes.tokens)
    by_gene = table.set_index("gene").loc[genes.classes.genes]
    np.testing.assert_allclose(by_gene[["frequency", "mean_rank"]], features)
    assert by_gene["true_class"].tolist() == [genes.classes.labels[target] for target in genes.classes.targets]
    for split in genes.splits:
        first = read_csv(Path(Trial("genes", 0, split.fold).directory(str(tmp_path)), "genes-report.csv"))
        its = by_gene.loc[first["gene"]]
        assert set(its["fold"]) == {split.fold}
        np.testing.assert_allclose(its["probability_NA"], (first["probability_NA"] + 0.9) / 2)
        np.testing.assert_array_equal(its["cells"], first["cells"])
        baseline = run.baseline(split.fold)["reporting"]
        right = int((its["baseline_class"] == its["true_class"]).sum())
        assert baseline["accuracy"] == pytest.approx(right / len(its))
        assert baseline["tokens"]["tokens"] == first["cells"].sum()
    assert len(run.reporting()["model"]) == 2 * FOLDS and len(run.reporting()["baseline"]) == FOLDS
    assert run.example == [[2, 3, 4]]
    assert (tmp_path / "roc.png").stat().st_size > 10_000
    page = (tmp_path / "report.html").read_text()
    assert "NA, &lt;b&gt;" in page and "without a target gene" in page
    assert f"{run.spread()['model']['auc']:.3f} ± {run.spread()['model']['auc_std']:.3f}" in page


def test_a_broken_record_is_refused(record: GeneRecord, tmp_path: Path) -> None:
    GeneRun.of(record)
    content = json.loads((tmp_path / "record.json").read_text())
    for change in ({"kind": "cells"}, {"trials": [{"colour": 1}]}, {"surplus": 1}):
        (tmp_path / "record.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(InputError, match=r"--output: got .*broken record\.json"):
            GeneRun.load(str(tmp_path))
