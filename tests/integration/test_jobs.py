"""The jobs in turn, on a real Ray cluster and a real MLflow store, and the same again from the command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from geneformer_ray.compute.classifier import POOLINGS, CellClassifier, predict_logits
from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.compute.model_directory import weights_digest
from geneformer_ray.data.cells import CellTable
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError, OutputExistsError, UnknownGeneError, VocabularyMismatch
from geneformer_ray.manage.registry import find_registered
from ray_jobs import embed, finetune, pretrain, promote, screen, screen_flags, statistics, tokenize
from ray_jobs.command_line import build
from tests.integration.small_data import GROUPS, SmallData

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Chain:
    """What the whole chain left: folder, and the summary of each job."""

    folder: Path
    summaries: dict[str, dict[str, Any]]

    def at(self, *parts: str) -> str:
        return str(self.folder.joinpath(*parts))


def run_screen(**flags: Any) -> dict[str, Any]:
    return screen.run(build(screen_flags.ScreenConfig, flags))


@pytest.fixture(scope="module")
def chain(small_data: SmallData, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Iterator[Chain]:
    folder = tmp_path_factory.mktemp("chain")
    chain = Chain(folder, {})
    at, cells = chain.at, {"cells": chain.at("cells")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{at('mlflow.db')}")
        chain.summaries["tokenize"] = tokenize.run(build(tokenize.TokenizeConfig, {
            "input": [small_data.h5ad], "vocabulary": small_data.vocabulary, "output": at("cells"),
            "obs_columns": ["cell_type", "donor"],
        }))  # fmt: skip
        chain.summaries["pretrain"] = pretrain.run(build(pretrain.PretrainConfig, cells | {
            "vocabulary": small_data.vocabulary, "output": at("pretrained"), "layers": 2, "width": 16, "heads": 2,
            "feed_forward": 32, "epochs": 2, "tokens_per_batch": 256, "initializer_range": 0.1,
        }))  # fmt: skip
        chain.summaries["finetune"] = finetune.run(build(finetune.FinetuneConfig, cells | {
            "model": at("pretrained", "model"), "output": at("classifiers"), "label": "cell_type", "group": "donor",
            "pooling": list(POOLINGS), "epochs": 6, "learning_rate": 5e-3, "tokens_per_batch": 256, "num_workers": 2,
            "registered_model": "small", **{f"{role}_groups": [group] for role, group in GROUPS.items()},
        }))  # fmt: skip
        chain.summaries["promote"] = promote.run(build(promote.PromoteConfig, {"registered_model": "small"}))
        model = cells | {"model": "models:/small@champion"}
        chain.summaries["embed"] = embed.run(build(embed.EmbedConfig, model | {
            "output": at("embeddings"), "state_column": "cell_type",
        }))  # fmt: skip
        chain.summaries["screen"] = run_screen(
            **model, output=at("screen"), state_column="cell_type", start="alpha", goal="beta",
            filter={"donor": ["donor3"]},
        )  # fmt: skip
        chain.summaries["statistics"] = statistics.run(build(statistics.StatisticsConfig, {
            "shifts": at("screen"), "output": at("statistics"), "bootstrap": 50,
        }))  # fmt: skip
        yield chain


def test_tokenised_cells_carry_their_columns_and_digest(chain: Chain, small_data: SmallData) -> None:
    table = pq.read_table(chain.summaries["tokenize"]["tables"]["cells"])
    assert table.column_names == ["cell_id", "input_ids", "length", "cell_type", "donor"]
    assert table.schema.field("input_ids").type == pa.list_(pa.int32())
    assert table.num_rows == small_data.cells == chain.summaries["tokenize"]["cells"]
    digest = GeneVocabulary.load(small_data.vocabulary).digest
    assert (table.schema.metadata or {})[b"vocabulary_digest"].decode() == digest


def test_pretraining_leaves_a_self_contained_model(chain: Chain) -> None:
    directory = Path(chain.summaries["pretrain"]["model"])
    assert {"config.json", "model.safetensors", "vocabulary.json"} <= {file.name for file in directory.iterdir()}
    assert 0 < chain.summaries["pretrain"]["validation_loss"] < 10
    assert not Path(chain.at("pretrained", "ray_train")).exists()


def test_pretraining_says_what_it_learned_beside_a_frequency_baseline(chain: Chain) -> None:
    summary = chain.summaries["pretrain"]
    assert (summary["held_out"], summary["frequency_cells"]) == ({"cells": 9, "group": None}, 81)
    assert summary["masked_genes"] > 9
    run = mlflow.MlflowClient().get_run(summary["run_id"])
    for who in ("masked", "baseline"):
        assert 0 <= summary[f"{who}_accuracy"] <= summary[f"{who}_top10_accuracy"] <= 1
        assert run.data.metrics[f"{who}_top10_accuracy"] == summary[f"{who}_top10_accuracy"]
    assert run.data.params["layers"] == "2"
    assert len(mlflow.MlflowClient().get_metric_history(summary["run_id"], "validation_loss")) == 2
    files = {item.path for item in mlflow.MlflowClient().list_artifacts(summary["run_id"])}
    assert {"config.json", "training_curves.png"} <= files
    assert Path(chain.at("pretrained", "training_curves.png")).exists()


def test_every_pooling_learns_these_types(chain: Chain) -> None:
    scores = chain.summaries["finetune"]["pooling"]
    assert set(scores) == set(POOLINGS)
    assert max(score["macro_f1"] for score in scores.values()) > 0.9
    assert chain.summaries["finetune"]["baseline"]["macro_f1"] > 0.9


def test_the_champion_is_the_best_on_the_choosing_cells(chain: Chain) -> None:
    trials = chain.summaries["finetune"]["trials"]
    best = max(trials, key=lambda trial: (round(trial["choosing_macro_f1"], 6), trial["version"]))
    assert chain.summaries["promote"]["version"] == best["version"]
    directory = find_registered("models:/small@champion")
    vocabulary = GeneVocabulary.load(str(directory))
    assert CellClassifier.load(directory, vocabulary).pooling == best["pooling"]


def test_the_champion_carries_the_states_of_its_classes_and_examples(chain: Chain) -> None:
    directory = find_registered("models:/small@champion")
    table = CellTable(chain.at("cells"))
    of_donor = table.column("donor", "--group") == GROUPS["train"]
    types = table.column("cell_type", "--label")
    embedded = pq.read_table(chain.summaries["embed"]["tables"]["embeddings"])
    assert embedded["cell_id"].to_pylist() == table.cell_ids.tolist()
    vectors = np.array(embedded["embedding"].to_pylist())
    stored = json.loads((directory / "states.json").read_text())
    assert (stored["model"], stored["embedding"], stored["layer"]) == (weights_digest(directory), "mean", -1)
    assert stored["cells_by_state"] == {"alpha": 15, "beta": 15} and sorted(stored["states"]) == ["alpha", "beta"]
    for label, mean in stored["states"].items():
        np.testing.assert_allclose(mean, vectors[of_donor & (types == label)].mean(axis=0), atol=1e-6)

    classifier = CellClassifier.load(directory, GeneVocabulary.load(str(directory)))
    examples = json.loads((directory / "examples.json").read_text())
    assert [cell["label"] for cell in examples] == ["alpha", "beta"]
    for cell in examples:
        row = table.cell_ids.tolist().index(cell["cell_id"])
        assert (table.column("donor", "--group")[row], types[row]) == (GROUPS["report"], cell["label"])
        (logits,) = predict_logits(classifier, [np.array(cell["input_ids"])], 0, execution=choose_execution(cpus=1))
        assert classifier.labels[logits.argmax()] == cell["label"]


def test_promote_keeps_the_previous_champion_and_rolls_back(chain: Chain) -> None:
    champion = chain.summaries["promote"]["version"]
    other = 1 if champion != 1 else 2
    moved = promote.run(build(promote.PromoteConfig, {"registered_model": "small", "version": other, "margin": -1}))
    assert (moved["version"], moved["previous"]) == (other, champion)
    back = promote.run(build(promote.PromoteConfig, {"registered_model": "small", "rollback": True}))
    assert (back["version"], back["previous"]) == (champion, other)


def test_runs_hold_parameters_curves_figures_and_split(chain: Chain) -> None:
    client = mlflow.MlflowClient()
    for trial in chain.summaries["finetune"]["trials"]:
        run = client.get_run(trial["run_id"])
        assert run.data.params["pooling"] == trial["pooling"]
        assert run.data.params["execution"].startswith("cpu, float32 (fp32 was asked for), attention sdpa, 1 threads")
        assert len(client.get_metric_history(trial["run_id"], "train_loss")) == 6
        files = {item.path for item in client.list_artifacts(trial["run_id"])}
        assert {"confusion_matrix_reporting.png", "split.json", "scores.json", "training_curves.png"} <= files
    assert str(chain.folder) in client.get_run(trial["run_id"]).info.artifact_uri


def test_registered_model_predicts_through_mlflow(chain: Chain) -> None:
    model = mlflow.pyfunc.load_model("models:/small@champion")
    cells = pq.read_table(chain.at("cells")).slice(60, 5)
    frame = cells.select(["input_ids"]).to_pandas()
    probabilities = model.predict(frame)
    assert list(probabilities.columns) == ["alpha", "beta"]
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)


def test_embeddings_and_states(chain: Chain) -> None:
    table = pq.read_table(chain.summaries["embed"]["tables"]["embeddings"])
    assert table.column_names == ["cell_id", "embedding"]
    states = json.loads(Path(chain.at("embeddings", "states.json")).read_text())["states"]
    vectors = np.array(table["embedding"].to_pylist())
    types = {row["cell_id"]: row["cell_type"] for row in pq.read_table(chain.at("cells")).to_pylist()}
    alpha = np.array([types[cell_id] == "alpha" for cell_id in table["cell_id"].to_pylist()])
    np.testing.assert_allclose(states["alpha"], vectors[alpha].mean(axis=0), atol=1e-6)


def test_gene_embeddings(chain: Chain, tmp_path: Path) -> None:
    summary = embed.run(build(embed.EmbedConfig, {
        "cells": chain.at("cells"), "model": chain.at("pretrained", "model"), "output": str(tmp_path / "genes"),
        "embedding": "gene",
    }))  # fmt: skip
    table = pq.read_table(summary["tables"]["embeddings"])
    assert table.column_names == ["gene", "cells", "embedding"]
    assert table.num_rows == summary["genes"] <= 60


def test_screen_rows(chain: Chain) -> None:
    table = pq.read_table(chain.summaries["screen"]["tables"]["cell_shifts"])
    cells = {
        row["cell_id"]: row
        for row in pq.read_table(chain.at("cells")).to_pylist()
        if row["cell_type"] == "alpha" and row["donor"] == "donor3"
    }
    assert set(table["cell_id"].to_pylist()) == set(cells)
    assert set(table["measure"].to_pylist()) == {"shift"}
    assert set(table["state"].to_pylist()) == {"alpha", "beta"}
    names = GeneVocabulary.load(chain.at("cells", "_vocabulary")).names
    for cell_id, row in cells.items():
        events = table.filter(pa.compute.equal(table["cell_id"], cell_id))["genes"].to_pylist()
        assert sorted(gene for (gene,) in events) == sorted(2 * [names[token] for token in row["input_ids"]])
    assert table.num_rows == chain.summaries["screen"]["rows"] == 2 * chain.summaries["screen"]["events"]


def test_every_table_carries_the_digest_of_its_vocabulary(chain: Chain, small_data: SmallData, tmp_path: Path) -> None:
    digest = GeneVocabulary.load(chain.at("screen", "_vocabulary")).digest  # the model's, which may have added a <cls>
    tables = {chain.at("cells"): GeneVocabulary.load(small_data.vocabulary).digest}
    for name in (("screen", "cell_shifts"), ("embeddings", "embeddings"), ("statistics", "statistics")):
        tables[chain.at(*name)] = digest
    for table, expected in tables.items():
        schemas = [pq.read_schema(file) for file in Path(table).glob("*.parquet")]
        carried = {(schema.metadata or {}).get(b"vocabulary_digest") for schema in schemas}
        assert carried == {expected.encode()}, table
    shutil.copytree(chain.at("screen"), tmp_path / "screen")
    GeneVocabulary.from_medians({"A": 1.0, "B": 2.0}, max_length=8).save(str(tmp_path / "screen" / "_vocabulary"))
    with pytest.raises(VocabularyMismatch, match=f"--shifts.*{digest}"):
        statistics.run(build(statistics.StatisticsConfig, {
            "shifts": str(tmp_path / "screen"), "output": str(tmp_path / "statistics"),
        }))  # fmt: skip


def test_statistics_table(chain: Chain) -> None:
    table = pq.read_table(chain.summaries["statistics"]["tables"]["statistics"])
    assert {"gene", "symbol", "shift_to_beta", "p_beta", "fdr_beta", "effect", "ci_low", "ci_high", "cells",
            "significant"} <= set(table.column_names)  # fmt: skip
    shifts = pq.read_table(chain.summaries["screen"]["tables"]["cell_shifts"]).to_pandas()
    gene = table["gene"][0].as_py()
    mine = shifts[(shifts["genes"].str[0] == gene) & (shifts["state"] == "beta")]["value"]
    assert table["shift_to_beta"][0].as_py() == pytest.approx(mine.mean(), abs=1e-7)
    assert table["cells"][0].as_py() == len(mine)


@pytest.mark.slow
def test_an_interrupted_screen_resumes_to_the_same_table(chain: Chain, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = {"cells": chain.at("cells"), "model": chain.at("pretrained", "model"), "genes": "GENE00,GENE15"}
    run_screen(**flags, output=str(whole))
    shutil.copytree(whole, broken)
    manifest = json.loads((broken / "_manifest.json").read_text())
    (broken / "_manifest.json").write_text(json.dumps({"finished": False, "plan": manifest["plan"]}))
    shutil.rmtree(broken / "_progress")
    for shard in (broken / "cell_shifts").iterdir():
        shard.write_bytes(b"half a file")
    assert run_screen(**flags, output=str(broken))["rows"] == pq.read_table(whole / "cell_shifts").num_rows
    assert pq.read_table(broken / "cell_shifts").equals(pq.read_table(whole / "cell_shifts"))
    with pytest.raises(OutputExistsError, match="overwrite"):
        run_screen(**flags, output=str(broken))
    assert run_screen(**{**flags, "genes": "GENE00"}, output=str(broken), overwrite=True)["rows"] > 0


def test_a_screen_in_lower_precision_states_its_error(chain: Chain, tmp_path: Path) -> None:
    """Against the same screen in float32, which it must not lie further from than it says."""
    flags = {"cells": chain.at("cells"), "model": chain.at("pretrained", "model"), "max_cells": 6}
    exact = run_screen(**flags, output=str(tmp_path / "exact"))
    rough = run_screen(**flags, output=str(tmp_path / "rough"), precision="bf16")
    assert "precision_error" not in exact
    stated = rough["precision_error"]
    values = [
        pq.read_table(tmp_path / name / "cell_shifts").to_pandas()["value"].to_numpy() for name in ("exact", "rough")
    ]
    first = json.loads((tmp_path / "rough" / "_progress" / "000000.json").read_text())
    # All of these small cells are one item, of which the first is compared.
    assert first["precision"]["events"] == stated["events"] > 0
    error = np.abs(values[0] - values[1])
    assert error[: stated["events"]].max() == pytest.approx(stated["largest_error"], rel=1e-3)
    assert 0 < stated["root_mean_square_error"] <= stated["largest_error"] < stated["largest_value"]


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_screen_gives_upstreams_numbers(golden: Path, version: str, tmp_path: Path) -> None:
    folder = golden / version
    flags = {
        "cells": str(folder / "cells.parquet"), "model": str(folder / "model_mlm"), "comparison": "upstream",
        "vocabulary": str(folder / "token_dictionary.json"), "embedding": {"v1": "mean", "v2": "cls"}[version],
    }  # fmt: skip
    tokens = GeneVocabulary.load(flags["vocabulary"]).tokens
    run_screen(**flags, output=str(tmp_path / "genes"), gene_shifts=True)
    ours: dict[tuple[Any, ...], float] = {}
    for row in pq.read_table(tmp_path / "genes" / "cell_shifts").to_pylist():
        assert (row["measure"], row["state"]) == ("similarity", "")
        ours[row["cell_id"], tokens[row["genes"][0]], "cell", ""] = row["value"]
    for row in pq.read_table(tmp_path / "genes" / "gene_shifts").to_pylist():
        ours[row["cell_id"], tokens[row["genes"][0]], "gene", str(tokens[row["affected"]])] = row["value"]
    compare(ours, folder / "isp" / "delete_all_and_gene.parquet")
    compare({key: value for key, value in ours.items() if key[2] == "cell"}, folder / "isp" / "delete_all.parquet")
    run_screen(
        **flags, output=str(tmp_path / "states"), state_column="disease", start="dcm", goal="nf", alternatives=["hcm"],
        state_embeddings=str(folder / "state_embs.json"),
    )  # fmt: skip
    ours = {
        (row["cell_id"], tokens[row["genes"][0]], "cell", row["state"]): row["value"]
        for row in pq.read_table(tmp_path / "states" / "cell_shifts").to_pylist()
    }
    compare(ours, folder / "isp" / "delete_all_states.parquet")


def compare(ours: dict[tuple[Any, ...], float], file: Path) -> None:
    theirs = {
        (str(row["cell_id"]), row["perturbed"][0], row["kind"], str(row["target"] or "")): row["value"]
        for row in pq.read_table(file).to_pylist()
    }
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[key] - theirs[key]) for key in theirs) < 2e-5


@pytest.mark.parametrize(
    ("flags", "error", "text"),
    [
        ({"genes": "GENE0O"}, UnknownGeneError, "GENE0"),
        ({"state_column": "cell_type", "start": "alpha", "goal": "gamma"}, InputError, "--goal.*gamma.*alpha, beta"),
        ({"state_column": "type", "start": "alpha", "goal": "beta"}, InputError, "--state-column.*cell_type"),
        ({"cells": "/nowhere"}, InputError, "--cells.*nowhere"),
        ({"embedding": "cls"}, InputError, "--embedding.*mean"),
        ({"gene_sets": "nowhere.gmt"}, InputError, "--gene-sets.*readable text file"),
        ({"combine": 2}, InputError, "--combine: got 2; takes a list of genes"),
        ({"rank_shift": 2}, InputError, "--rank-shift: got 2 to delete; takes inhibit or activate"),
        ({"state_column": "cell_type", "start": "alpha", "goal": "alpha"}, InputError, "states that differ"),
        ({"filter": {"donor": ["donor9"]}}, InputError, "--filter.*donor9"),
    ],
)
def test_screen_refuses_bad_input(chain: Chain, tmp_path: Path, flags: Any, error: type, text: str) -> None:
    usual = {"cells": chain.at("cells"), "model": chain.at("pretrained", "model"), "output": str(tmp_path / "out")}
    with pytest.raises(error, match=text):
        run_screen(**{**usual, **flags})
    assert not (tmp_path / "out").exists()


def test_cells_as_a_hugging_face_dataset(small_data: SmallData, tmp_path: Path) -> None:
    output = tokenize.run(build(tokenize.TokenizeConfig, {
        "input": [small_data.h5ad], "vocabulary": small_data.vocabulary, "output": str(tmp_path / "cells"),
        "obs_columns": ["donor"], "format": "datasets",
    }))["output"]  # fmt: skip
    ours, theirs = CellTable(output), CellTable(f"{output}/_dataset")
    assert theirs.digest == ours.digest
    assert theirs.column("donor", "donor").tolist() == ours.column("donor", "donor").tolist()


def test_bad_counts_found_by_a_worker_are_the_users_to_mend(small_data: SmallData, tmp_path: Path) -> None:
    adata = anndata.read_h5ad(small_data.h5ad)
    adata.X = adata.X * 0.5
    adata.write_h5ad(tmp_path / "halves.h5ad")
    with pytest.raises(InputError, match=r"--counts.*fractions"):
        tokenize.run(build(tokenize.TokenizeConfig, {
            "input": [str(tmp_path / "halves.h5ad")], "vocabulary": small_data.vocabulary,
            "output": str(tmp_path / "cells"),
        }))  # fmt: skip


def test_a_resumed_run_needs_the_same_rows(chain: Chain, tmp_path: Path) -> None:
    output = tmp_path / "screen"
    flags = {"cells": chain.at("cells"), "model": chain.at("pretrained", "model"), "genes": "GENE15"}
    run_screen(**flags, output=str(output), filter={"donor": ["donor1"]}, max_cells=3)
    manifest = json.loads((output / "_manifest.json").read_text())
    (output / "_manifest.json").write_text(json.dumps({"finished": False, "plan": manifest["plan"]}))
    with pytest.raises(OutputExistsError, match="rows was"):
        run_screen(**flags, output=str(output), filter={"donor": ["donor1"]}, max_cells=3, seed=1)


def test_cells_of_another_vocabulary_are_refused(chain: Chain, small_data: SmallData, tmp_path: Path) -> None:
    other = GeneVocabulary.from_medians({f"GENE{number:02d}": 1.0 for number in range(30)}, max_length=32)
    other.save(str(tmp_path / "other"))
    cells = tokenize.run(build(tokenize.TokenizeConfig, {
        "input": [small_data.h5ad], "vocabulary": str(tmp_path / "other"), "output": str(tmp_path / "cells"),
    }))  # fmt: skip
    with pytest.raises(VocabularyMismatch, match="--cells"):
        run_screen(cells=cells["output"], model=chain.at("pretrained", "model"), output=str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"label": "type"}, "--label.*cell_type"),
        ({"label": "donor", "group": "donor"}, "--label.*0 classes"),
        ({"filter": {"cell_type": ["alpha"]}}, "--label.*1 classes"),
        ({"pooling": ["median"]}, "--pooling.*first_gene, cls, mean"),
        ({"group": "cell_type"}, "--group.*2 groups"),
    ],
)
def test_finetune_refuses_bad_input(chain: Chain, tmp_path: Path, flags: Any, text: str) -> None:
    usual = {
        "cells": chain.at("cells"), "model": chain.at("pretrained", "model"), "output": str(tmp_path / "out"),
        "label": "cell_type", "group": "donor", "pooling": ["mean"],
    }  # fmt: skip
    with pytest.raises(InputError, match=text):
        finetune.run(build(finetune.FinetuneConfig, {**usual, **flags}))


def command(job: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"ray_jobs.{job}", *flags], cwd=REPOSITORY, text=True, capture_output=True,
        env={**os.environ, **environment}, timeout=200, check=False,
    )  # fmt: skip


def test_a_job_from_the_command_line_starts_its_own_ray(small_data: SmallData, tmp_path: Path) -> None:
    config = tmp_path / "flags.yaml"
    config.write_text(f"input: [{small_data.h5ad}]\nvocabulary: {small_data.vocabulary}\nobs-columns: cell_type\n")
    done = command("tokenize", "--config", str(config), "--output", str(tmp_path / "cells"), "--obs-columns", "donor")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cells"] == small_data.cells
    assert "donor" in pq.read_table(tmp_path / "cells").column_names


def test_bad_input_on_the_command_line_is_one_line_and_exit_code_2(small_data: SmallData, tmp_path: Path) -> None:
    flags = ("--input", "/nowhere.h5ad", "--vocabulary", small_data.vocabulary, "--output", str(tmp_path))
    done = command("tokenize", *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "--input" in done.stderr
