"""Classes of genes from the command line to the registry: what only its neighbours tell of a gene is learned."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from geneformer_ray.compute.gene_baseline import GeneOccurrence
from geneformer_ray.compute.gene_classifier import GeneClassifier
from geneformer_ray.compute.model_directory import save_model
from geneformer_ray.compute.pretraining import new_model
from geneformer_ray.data.cells import CellTable
from geneformer_ray.data.gene_classes import GeneClasses, read_gene_classes
from geneformer_ray.data.gene_folds import GeneFolds, cell_blocks
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.distribute.finetune import finetune_trials
from geneformer_ray.distribute.learned_genes import LearnedGenes
from geneformer_ray.distribute.train_workers import Workers
from geneformer_ray.errors import InputError, OutputExistsError, RegistryUnavailable
from geneformer_ray.manage import registry
from geneformer_ray.manage.registry import open_store
from geneformer_ray.manage.trials import Trial
from ray_jobs import finetune, register
from ray_jobs.command_line import build, parse
from tests.integration.killed_finetune import kill_finetune
from tests.integration.test_finetune_job import locked_once, runs
from tests.unit.test_gene_cross_validation import write_cells

pytestmark = [pytest.mark.slow, pytest.mark.integration]

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY.parent / "shared" / "data"
FOLDS = 3
# Cells that hold a target gene have ten tokens each, so that two workers with half of these see the same steps.
TOKENS = 120
OPTIONS = {"epochs": 8, "learning_rate": 1e-2, "tokens_per_batch": TOKENS, "weight_decay": 0.001}


@dataclass(frozen=True)
class Setting:
    """Cells on disk, a model without dropout, classes of genes, and a finished job's output and summary."""

    folder: Path
    output: Path
    summary: dict[str, Any]

    def trial(self, fold: int) -> Path:
        return Path(Trial("genes", 0, fold).directory(str(self.output)))


def arguments(folder: Path, output: Path, **others: Any) -> list[str]:
    given = {
        "task": "genes", "cells": folder / "cells.parquet", "model": folder / "model", "output": output,
        "gene_classes": folder / "classes.json", "folds": FOLDS, "min_cells": 5, **OPTIONS, **others,
    }  # fmt: skip
    return [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def finetuned(folder: Path, output: Path, *flags: str, **others: Any) -> dict[str, Any]:
    return finetune.run(parse(finetune.FinetuneConfig, [*arguments(folder, output, **others), *flags]))


def prepared(vocabulary: GeneVocabulary, folder: Path) -> None:
    """Forty of 160 cells hold no gene with a class; one name is unknown, and one gene is in no cell."""
    write_cells(vocabulary, folder / "cells.parquet", np.random.default_rng(0))
    genes = vocabulary.genes
    classes = {"first": [*genes[:14], "GENE40"], "second": [*genes[14:28], "NOTHING"]}
    (folder / "classes.json").write_text(json.dumps(classes))
    wider = GeneVocabulary.from_medians({**vocabulary.medians, "GENE40": 1.0}, max_length=16)
    torch.manual_seed(0)
    model = new_model(wider, layers=2, width=16, heads=2, feed_forward=24)
    model.config.hidden_dropout_prob = 0.0
    save_model(model, wider, folder / "model")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        open_store(str(folder))
        yield folder


@pytest.fixture(scope="module")
def setting(
    vocabulary: GeneVocabulary, tmp_path_factory: pytest.TempPathFactory, store: Path, ray_cluster: None
) -> Setting:
    folder = tmp_path_factory.mktemp("genes")
    prepared(vocabulary, folder)
    summary = finetuned(folder, folder / "out", "--token-predictions")
    return Setting(folder, folder / "out", summary)


def test_what_the_context_tells_of_a_gene_is_learned_beside_a_baseline_at_chance(setting: Setting) -> None:
    summary = setting.summary
    assert summary["genes"] == {"first": 14, "second": 14}
    assert summary["unknown_genes"] == {"second": ["NOTHING"]}
    assert summary["genes_in_too_few_cells"] == {"first": ["GENE40"]}
    assert (summary["cells"], summary["cells_without_target_gene"]) == (160, 40)
    assert summary["model"]["auc"] > 0.95 and summary["model"]["tokens"]["auc"] > 0.95
    assert summary["baseline"]["auc"] < 0.8
    assert [(trial["seed"], trial["fold"]) for trial in summary["trials"]] == [(0, fold) for fold in range(FOLDS)]
    areas = [trial["reporting_auc"] for trial in summary["trials"]]
    assert summary["model"]["auc"] == pytest.approx(fmean(areas), abs=1e-4)
    assert summary["model"]["auc_std"] == pytest.approx(stdev(areas), abs=1e-4)
    for fold, trial in enumerate(summary["trials"]):
        history = json.loads((setting.trial(fold) / "history.json").read_text())
        best = max(history, key=lambda entry: entry["choosing_auc"])
        for name in ("auc", "macro_f1", "accuracy"):  # the kept weights are those of the best epoch
            assert trial[f"choosing_{name}"] == pytest.approx(best[f"choosing_{name}"], abs=1e-6)


def test_every_gene_is_reported_once_by_a_model_that_never_saw_its_class(setting: Setting) -> None:
    table = pd.read_csv(setting.output / "genes.csv")
    classes = json.loads((setting.folder / "classes.json").read_text())
    assert sorted(table["gene"]) == sorted(gene for genes in classes.values() for gene in genes[:14])
    assert all(gene in classes[its] for gene, its in zip(table["gene"], table["true_class"], strict=True))
    for fold in range(FOLDS):
        split = json.loads((setting.output / f"split-fold{fold}.json").read_text())
        roles = {role: {gene for its in genes.values() for gene in its} for role, genes in split["genes"].items()}
        assert roles["report"] == set(table["gene"][table["fold"] == fold])
        assert not roles["report"] & (roles["train"] | roles["choose"])
        assert sum(map(len, roles.values())) == 28
    recognised = (table["true_class"] == table["predicted_class"]).mean()
    assert recognised > 0.9


def test_a_gene_s_probabilities_are_the_mean_over_its_tokens(setting: Setting) -> None:
    table = pd.read_csv(setting.output / "genes.csv").set_index("gene")
    cells = pq.read_table(setting.folder / "cells.parquet")["input_ids"].to_pylist()
    tokens_of = GeneVocabulary.load(str(setting.folder / "model")).tokens
    for fold in range(FOLDS):
        tokens = pq.read_table(setting.trial(fold) / "predictions-report-tokens").to_pandas()
        assert not tokens.duplicated(["cell_id", "gene"]).any()
        for cell, gene in zip(tokens["cell_id"], tokens["gene"], strict=True):
            assert tokens_of[gene] in cells[int(cell)]
        its = table[table["fold"] == fold]
        assert len(tokens) == its["cells"].sum() == setting.summary["folds"][fold]["tokens"]["report"]
        odds = tokens.groupby("gene")[["probability_first", "probability_second"]].mean()
        np.testing.assert_allclose(odds.loc[its.index], its[list(odds.columns)], atol=1e-6)
        right = (tokens["true_class"] == tokens["predicted_class"]).mean()
        scores = json.loads((setting.trial(fold) / "scores.json").read_text())
        assert scores["reporting"]["tokens"]["accuracy"] == pytest.approx(right)


def test_a_run_of_all_folds_holds_a_run_of_each_and_versions_can_follow(setting: Setting) -> None:
    client, summary = mlflow.MlflowClient(), setting.summary
    whole = client.get_run(summary["run_id"])
    assert whole.data.metrics["reporting_auc"] == pytest.approx(summary["model"]["auc"], abs=1e-4)
    assert whole.data.metrics["reporting_auc_std"] == pytest.approx(summary["model"]["auc_std"], abs=1e-4)
    assert whole.data.metrics["reporting_baseline_auc"] == pytest.approx(summary["baseline"]["auc"], abs=1e-4)
    assert {"roc.png", "report.html", "genes.csv", "config.json"} <= {
        file.path for file in client.list_artifacts(summary["run_id"])
    }
    below = {run.info.run_id for run in runs() if run.data.tags.get("mlflow.parentRunId") == summary["run_id"]}
    assert below == {*summary["baseline_run"], *(trial["run_id"] for trial in summary["trials"])}
    for trial in summary["trials"]:
        run = client.get_run(trial["run_id"])
        assert run.data.metrics["reporting_auc"] == pytest.approx(trial["reporting_auc"])
        curve = client.get_metric_history(trial["run_id"], "choosing_auc")
        assert max(point.step for point in curve) == OPTIONS["epochs"]
    page = (setting.output / "report.html").read_text()
    for text in (f"{summary['model']['auc']:.3f}", f"{summary['baseline']['auc']:.3f}", "NOTHING", "GENE40"):
        assert text in page

    before = len(runs())
    config = build(register.RegisterConfig, {"output": str(setting.output), "registered_model": "genes"})
    later = register.run(config)
    assert [trial["version"] for trial in later["trials"]] == [1, 2, 3]
    assert register.run(config) == later and len(runs()) == before
    without = {**later, "trials": [{**trial, "version": None} for trial in later["trials"]]}
    assert without == {name: summary[name] for name in without}
    model = mlflow.pyfunc.load_model("models:/genes/1")
    assert [list(ids) for ids in model.input_example["input_ids"]] == [[2, 3, 4]]  # no cell: its first genes
    tokens = pq.read_table(setting.trial(0) / "predictions-report-tokens").to_pandas()
    cells = pq.read_table(setting.folder / "cells.parquet")["input_ids"].to_pylist()
    cell = tokens["cell_id"].iloc[0]
    answer = model.predict(pd.DataFrame({"input_ids": [cells[int(cell)]]})).set_index("gene")
    assert len(answer) == len(cells[int(cell)])
    its = tokens[tokens["cell_id"] == cell].set_index("gene")
    np.testing.assert_allclose(answer.loc[its.index, "probability_second"], its["probability_second"], atol=1e-5)
    found = registry.find_registered("models:/genes/1")
    assert GeneClassifier.load(found).labels == ["first", "second"]


def test_a_finished_output_and_classes_too_small_are_refused(setting: Setting, tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError, match="a finished run"):
        finetuned(setting.folder, setting.output, "--token-predictions")
    with pytest.raises(InputError, match="--gene-classes: got the class 'first' with 0 genes"):
        finetuned(setting.folder, tmp_path, min_cells=200)
    assert not list(tmp_path.iterdir())


def test_two_workers_learn_what_one_does(setting: Setting, tmp_path: Path) -> None:
    """One fold, with balanced classes: the same loss, areas and probabilities to rounding."""
    vocabulary = GeneVocabulary.load(str(setting.folder / "model"))
    table, rows = CellTable(str(setting.folder / "cells.parquet")), np.arange(160)
    occurrence = GeneOccurrence.count(cell_blocks(table, rows, vocabulary), vocabulary)
    classes = GeneClasses.of(read_gene_classes(str(setting.folder / "classes.json")), vocabulary)
    dealt = GeneFolds.deal(classes.held_by(occurrence.held_V, min_cells=5), FOLDS, seed=0)
    split = dealt.splits(rows, dealt.count_held(cell_blocks(table, rows, vocabulary), len(vocabulary)))[0]
    learned = LearnedGenes(split, occurrence.held_V[split.tokens["train"]], token_predictions=True)
    config = {
        "cells": table.path, "model": str(setting.folder / "model"), "vocabulary": None, "tracking_uri": None,
        "class_weights": "balanced", "label_smoothing": 0.1, "attention_dropout": 0.0, "freeze_layers": 1,
        "freeze_embeddings": False, "patience": None,
    }  # fmt: skip
    trial, outputs = Trial("genes", 0, 0), [tmp_path / "one", tmp_path / "two"]
    for workers, output in enumerate(outputs, start=1):
        options = {**OPTIONS, "tokens_per_batch": TOKENS // workers}
        finetune_trials(
            {**config, "options": options, "output": str(output)}, [trial], [learned],
            workers=Workers(workers), precision="fp32",
        )  # fmt: skip
    one, two = (Path(trial.directory(str(output))) for output in outputs)
    histories = [json.loads((place / "history.json").read_text()) for place in (one, two)]
    for entry, other in zip(*histories, strict=True):
        assert entry == pytest.approx(other, abs=1e-5)
    assert histories[0][-1]["train_loss"] < histories[0][0]["train_loss"]
    tables = [pd.read_csv(place / "genes-report.csv") for place in (one, two)]
    pd.testing.assert_frame_equal(*tables, atol=1e-5)
    sort = ["cell_id", "gene"]
    tokens = [
        pq.read_table(place / "predictions-report-tokens").to_pandas().sort_values(sort, ignore_index=True)
        for place in (one, two)
    ]
    pd.testing.assert_frame_equal(*tokens, atol=1e-5)
    assert len(list((two / "predictions-report-tokens").iterdir())) == 2


@pytest.mark.slow
def test_a_driver_killed_and_a_store_lost_leave_the_same_genes(
    setting: Setting, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed within a fold, then the same command; the store is locked as it trains, and `register` does the rest."""
    output = tmp_path / "out"
    command = [*arguments(setting.folder, output), "--token-predictions", "--registered-model", "late"]
    kill_finetune(command, output, "ray_train/*/epoch-0001-step-000000")
    before = len(runs())
    monkeypatch.setattr(registry, "LOCKED_AT_MOST", 0.5)
    locked_at = Path(Trial("genes", 0, 0).directory(str(output))) / "scores.json"
    with locked_once(locked_at, store / "mlflow.db"), pytest.raises(RegistryUnavailable, match="database is locked"):
        finetuned(setting.folder, output, "--token-predictions", "--registered-model", "late")
    assert len(runs()) == before
    summary = register.run(build(register.RegisterConfig, {"output": str(output)}))
    assert [trial["version"] for trial in summary["trials"]] == [1, 2, 3]
    assert not (output / "ray_train").exists()
    for name in ("model", "baseline", "folds", "cells_without_target_gene"):
        assert summary[name] == setting.summary[name]
    pd.testing.assert_frame_equal(pd.read_csv(output / "genes.csv"), pd.read_csv(setting.output / "genes.csv"))


def test_real_cells_give_every_gene_of_the_file_its_place(tmp_path: Path, store: Path, ray_cluster: None) -> None:
    """Real cells, upstream's own vocabulary, symbols; a model with random weights, of which nothing is expected."""
    source = DATA / "genecorpus_500_tokenized_v1.parquet"
    if not source.exists():
        pytest.skip(f"no real cells at {source}")
    vocabulary = GeneVocabulary.load(str(DATA / "dictionaries" / "v1_gc30M"))
    cells = pq.read_table(source)["input_ids"].to_pylist()[:60]
    pq.write_table(pa.table({"input_ids": cells}), tmp_path / "cells.parquet")
    symbols = sorted(filter(None, map(vocabulary.symbol, vocabulary.genes)))
    classes = {
        "ribosome": [name for name in symbols if name.startswith(("RPL", "RPS")) and "P" not in name[3:]][:40],
        "respiration": [*[name for name in symbols if name.startswith(("NDUFA", "NDUFB", "COX"))][:40], "NOGENE1"],
    }
    lines = [f"{gene}\t{name}\n" for name, genes in classes.items() for gene in genes]
    (tmp_path / "classes.tsv").write_text("gene\tclass\n" + "".join(lines))
    model = new_model(vocabulary, layers=1, width=16, heads=2, feed_forward=24)
    save_model(model, vocabulary, tmp_path / "model")
    summary = finetuned(
        tmp_path, tmp_path / "out", gene_classes=tmp_path / "classes.tsv", epochs=1, min_cells=3, tokens_per_batch=8192
    )
    table = pd.read_csv(tmp_path / "out" / "genes.csv")
    assert not table["gene"].duplicated().any() and set(table["fold"]) == {0, 1, 2}
    for name, genes in classes.items():
        reported = set(table["symbol"][table["true_class"] == name])
        rare = {vocabulary.symbol(gene) for gene in summary["genes_in_too_few_cells"].get(name, [])}
        unknown = set(summary["unknown_genes"].get(name, []))
        assert len(reported) == summary["genes"][name] > 5
        assert reported | rare | unknown == set(genes)
        assert len(reported) + len(rare) + len(unknown) == len(genes)
    assert "NOGENE1" in summary["unknown_genes"]["respiration"]
    for found in (summary["model"], summary["baseline"]):
        assert 0 <= found["auc"] <= 1 and found["auc_std"] is not None
    assert summary["cells"] == 60 and summary["cells_without_target_gene"] < 60
