"""Several label columns at once, through the job: missing labels, files, MLflow, folds, kills, and real cells."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file
from sklearn.metrics import f1_score

from geneformer_ray.compute.baseline import baseline_scores
from geneformer_ray.compute.cell_states import states_in_file
from geneformer_ray.compute.classifier import predict_logits
from geneformer_ray.compute.embedding import cell_embeddings
from geneformer_ray.compute.encoder import Encoder
from geneformer_ray.compute.execution import choose_execution
from geneformer_ray.compute.model_directory import save_model
from geneformer_ray.compute.multitask import MultiTaskClassifier, load_classifier
from geneformer_ray.compute.pretraining import new_model
from geneformer_ray.data.cells import CellTable
from geneformer_ray.data.shards import VOCABULARY_KEY
from geneformer_ray.data.splits import NO_LABEL, ROLES
from geneformer_ray.data.task_splits import UNLABELLED, TaskSplit, split_tasks
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.distribute import finetune as training
from geneformer_ray.distribute import train_workers
from geneformer_ray.distribute.learned_labels import SeveralLabels
from geneformer_ray.distribute.train_workers import Workers
from geneformer_ray.errors import InputError, RegistryUnavailable
from geneformer_ray.manage import demo, registry
from geneformer_ray.manage.registry import open_store
from geneformer_ray.manage.trials import Trial, read_predictions
from ray_jobs import finetune, promote, register, tokenize
from ray_jobs.command_line import build
from tests.conftest import random_cells
from tests.integration.killed_finetune import kill_finetune
from tests.integration.test_finetune_job import locked_once, runs
from tests.integration.test_training_job import assert_same, killed_once

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]

CELLS = 150
ROLE_OF = {"d0": "train", "d1": "choose", "d2": "report"}
TASKS = {"type": ["high", "low", "mid"], "sex": ["f", "m"]}
OPTIONS: dict[str, Any] = {"epochs": 3, "learning_rate": 5e-3, "tokens_per_batch": 256}


@dataclass(frozen=True)
class Setting:
    """Cells with two labels, some without, a table and a model of them."""

    folder: Path
    columns: dict[str, np.ndarray]
    model: Path

    @property
    def cells(self) -> str:
        return str(self.folder / "cells")

    def flags(self, output: Path, **others: Any) -> dict[str, Any]:
        roles = {f"{role}_groups": [group] for group, role in ROLE_OF.items()}
        return {
            "cells": self.cells, "model": str(self.model), "output": str(output), "label": "type,sex",
            "group": "donor", "min_cells": 3, **roles, **OPTIONS, **others,
        }  # fmt: skip

    def run(self, output: Path, **others: Any) -> dict[str, Any]:
        return finetune.run(build(finetune.FinetuneConfig, self.flags(output, **others)))

    def split(self) -> TaskSplit:
        """What the job is to split the cells into."""
        assigned = {role: (group,) for group, role in ROLE_OF.items()}
        labels = {task: self.columns[task] for task in TASKS}
        return split_tasks(np.arange(CELLS), labels, self.columns["donor"], assigned=assigned, min_cells=3)[0]

    def train(self, output: Path, trial: Trial, *, workers: int = 1, every: int | None = None, **changes: Any) -> Path:
        """Train without the job."""
        config = {
            "cells": self.cells, "model": str(self.model), "vocabulary": None, "tracking_uri": None,
            "options": OPTIONS, "class_weights": "balanced", "label_smoothing": 0.0, "attention_dropout": 0.0,
            "freeze_layers": 0, "freeze_embeddings": False, "patience": None, "examples": True,
            "output": str(output), **changes,
        }  # fmt: skip
        learned = SeveralLabels(self.split(), {"sex": 0.5})
        training.finetune_trials(
            config, [trial], [learned], workers=Workers(workers, 1, False, every), precision="fp32"
        )
        return Path(trial.directory(str(output)))


@pytest.fixture(scope="module")
def setting(
    vocabulary: GeneVocabulary, model_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Setting]:
    folder = tmp_path_factory.mktemp("several")
    rng = np.random.default_rng(11)
    cells = random_cells(vocabulary, rng, rng.integers(3, 17, size=CELLS).tolist())
    middle, first = np.array([np.median(ids) for ids in cells]), np.array([ids[0] for ids in cells])
    columns = {
        "type": np.where(middle > 24, "high", np.where(middle < 19, "low", "mid")).astype(object),
        "sex": np.where(first % 2 == 0, "f", "m").astype(object),
        "donor": np.repeat(["d0", "d1", "d2"], [80, 35, 35]).astype(object),
    }
    columns["type"][rng.random(CELLS) < 0.2] = None
    columns["sex"][rng.random(CELLS) < 0.4] = ""
    columns["type"][:2], columns["sex"][:2] = "rare", ["", "f"]
    table = pa.table(
        {"cell_id": [f"cell{i}" for i in range(CELLS)], "input_ids": pa.array(cells, pa.list_(pa.int32())),
         "length": pa.array([len(ids) for ids in cells], pa.int32()), **columns}
    )  # fmt: skip
    table = table.replace_schema_metadata({VOCABULARY_KEY: vocabulary.digest.encode()})
    (folder / "cells").mkdir()
    pq.write_table(table, folder / "cells" / "part-0.parquet", row_group_size=25)
    # Dropout draws by worker: without it, one worker and two take the same steps.
    shutil.copytree(model_directory, folder / "model")
    config = folder / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_dropout_prob": 0.0}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        open_store(str(folder))
        yield Setting(folder, columns, folder / "model")


def labelled(setting: Setting, task: str, cell_ids: list[str]) -> list[str | None]:
    """The label of each cell; None where it has none that is learned."""
    found = [setting.columns[task][int(cell_id.removeprefix("cell"))] for cell_id in cell_ids]
    return [one if one in TASKS[task] else None for one in found]


# ---------------------------------------------------------------------- the job


def test_two_tasks_from_the_cells_to_the_champion(setting: Setting, vocabulary: GeneVocabulary, tmp_path: Path) -> None:
    output, trial = tmp_path / "out", Trial("cls", 0)
    summary = setting.run(
        output, pooling=["cls"], task_weights={"sex": 0.5}, class_weights="balanced", freeze_layers=1,
        freeze_embeddings=True, registered_model="several",
    )  # fmt: skip
    directory = Path(trial.directory(str(output)))
    check_cells(setting, summary, json.loads((output / "split.json").read_text()))
    found = check_scores(setting, directory, summary)
    check_baseline(setting, vocabulary, output, summary)
    check_class_files(setting, vocabulary, directory)

    # Frozen parts are the pretrained model's to the last bit: it was read, which upstream's of several tasks never is.
    pretrained, kept = (load_file(place / "model.safetensors") for place in (setting.model, directory / "model"))
    frozen = [name for name in pretrained if name.startswith(("bert.embeddings.", "bert.encoder.layer.0."))]
    assert len(frozen) > 15
    for name in frozen:
        assert np.array_equal(kept[name][: len(pretrained[name])], pretrained[name]), name
    moved = "bert.encoder.layer.1.attention.self.query.weight"
    assert 0 < float((kept[moved] - pretrained[moved]).abs().max()) < 0.5

    history = json.loads((directory / "history.json").read_text())
    for entry in history:
        for name in ("macro_f1", "accuracy"):
            mean = np.mean([entry[f"choosing_{name}_{task}"] for task in TASKS])
            assert entry[f"choosing_{name}"] == pytest.approx(mean)
    # The kept epoch is the best by the mean, whatever is best for a task.
    assert max(entry["choosing_macro_f1"] for entry in history) == pytest.approx(found["choosing"]["macro_f1"])
    check_store(setting, found, history, summary, tmp_path)
    champion = promote.run(build(promote.PromoteConfig, {"registered_model": "several"}))
    assert champion["promoted"]
    assert champion["macro_f1"] == pytest.approx(found["reporting"]["macro_f1"], abs=1e-6)
    assert champion["accuracy"] == pytest.approx(found["reporting"]["accuracy"], abs=1e-6)


def check_cells(setting: Setting, summary: dict[str, Any], manifest: dict[str, Any]) -> None:
    """One role a group for all tasks; cells without any label take no part, and are counted."""
    for role in ROLES:
        ids = manifest["cells"][role]
        assert {setting.columns["donor"][int(one[4:])] for one in ids} == {
            next(g for g, r in ROLE_OF.items() if r == role)
        }
        known = [labelled(setting, task, ids) for task in TASKS]
        assert all(any(one) for one in zip(*known, strict=True))
        assert summary["cells"][role] == len(ids)
        assert any(None in one for one in known)
    assert summary["tasks"] == manifest["tasks"] == TASKS
    assert summary["labels"] == sorted(f"{task}: {label}" for task, labels in TASKS.items() for label in labels)
    everyone = [f"cell{i}" for i in range(CELLS)]
    without = sum(not any(one) for one in zip(*(labelled(setting, task, everyone) for task in TASKS), strict=True))
    assert summary["dropped_labels"] == {
        NO_LABEL: without, "type: rare": 2, f"type: {NO_LABEL}": int(pd.isna(setting.columns["type"]).sum()),
        f"sex: {NO_LABEL}": int((setting.columns["sex"] == "").sum()),
    }  # fmt: skip
    assert without > 3 and sum(summary["cells"].values()) == CELLS - without


def check_scores(setting: Setting, directory: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """Predictions hold each cell's labels; scores are of the cells that have one; the summary has their means."""
    scores: dict[str, Any] = json.loads((directory / "scores.json").read_text())
    (line,) = summary["trials"]
    for role, name in {"choose": "choosing", "report": "reporting"}.items():
        ids, targets, logits = read_predictions(str(directory), role)
        assert (targets.shape, logits.shape) == ((len(ids), 2), (len(ids), 5))
        for number, (task, columns) in enumerate({"type": slice(0, 3), "sex": slice(3, 5)}.items()):
            truth, labels = labelled(setting, task, ids), TASKS[task]
            assert [None if t == UNLABELLED else labels[t] for t in targets[:, number]] == truth
            said = [labels[best] for best in logits[:, columns].argmax(axis=1)]
            pairs = [(a, b) for a, b in zip(truth, said, strict=True) if a is not None]
            wanted = f1_score(*zip(*pairs, strict=True), average="macro", zero_division=0)
            assert scores[name]["tasks"][task]["macro_f1"] == pytest.approx(wanted)
            assert scores[name]["tasks"][task]["cells"] == len(pairs) < len(ids)
            assert line["tasks"][task][f"{name}_macro_f1"] == pytest.approx(wanted)
        for metric in ("macro_f1", "accuracy", "expected_calibration_error"):
            means = np.mean([its[f"{name}_{metric}"] for its in line["tasks"].values()])
            assert line[f"{name}_{metric}"] == scores[name][metric] == pytest.approx(means)
    beside = summary["pooling"]["cls"]
    assert beside["macro_f1"] == pytest.approx(line["reporting_macro_f1"], abs=1e-4)
    for task, its in line["tasks"].items():
        assert beside["tasks"][task]["macro_f1"] == pytest.approx(its["reporting_macro_f1"], abs=1e-4)
    wrong = pd.read_csv(directory / "misclassified.csv")
    for task, its in scores["reporting"]["tasks"].items():
        mine = wrong[wrong["task"] == task]
        assert len(mine) == round((1 - its["accuracy"]) * its["cells"]) and set(mine["group"]) <= {"d2"}
        assert mine["true_label"].tolist() == labelled(setting, task, mine["cell_id"].tolist())
        assert set(mine["predicted_label"]) <= set(TASKS[task])
    return scores


def check_baseline(setting: Setting, vocabulary: GeneVocabulary, output: Path, summary: dict[str, Any]) -> None:
    """Each task's baseline is that of a training of this task alone on its labelled cells."""
    found, table, split = json.loads((output / "baseline.json").read_text()), CellTable(setting.cells), setting.split()
    for number, (task, labels) in enumerate(TASKS.items()):
        known = {role: split.targets[role][:, number] != UNLABELLED for role in ROLES}
        cells = {role: table.read(split.rows[role][its]).input_ids for role, its in known.items()}
        targets = {role: split.targets[role][its, number] for role, its in known.items()}
        (logits,) = baseline_scores(cells["train"], targets["train"], [cells["report"]], vocabulary, len(labels))
        wanted = f1_score(targets["report"], logits.argmax(axis=1), average="macro", zero_division=0)
        assert found["reporting"]["tasks"][task]["macro_f1"] == pytest.approx(wanted)
        assert summary["baseline"]["tasks"][task]["macro_f1"] == pytest.approx(wanted, abs=1e-4)
    means = [its["macro_f1"] for its in found["reporting"]["tasks"].values()]
    assert summary["baseline"]["macro_f1"] == pytest.approx(np.mean(means), abs=1e-4)


def check_class_files(setting: Setting, vocabulary: GeneVocabulary, directory: Path) -> None:
    """States are the means of each task's classes over training cells; examples are labelled by the first task."""
    model, table, split = directory / "model", CellTable(setting.cells), setting.split()
    own = GeneVocabulary.load(str(model))
    content = json.loads((model / "states.json").read_text())
    states = states_in_file(content, {name: content[name] for name in ("model", "embedding", "layer")})
    assert list(states) == sorted(split.labels)
    sequences = [own.adapt(ids, vocabulary.digest) for ids in table.read(split.rows["train"]).input_ids]
    encoder = Encoder.load(model, layer=-1, execution=choose_execution(cpus=1))
    embedded = cell_embeddings(encoder, sequences, own)
    for number, (task, labels) in enumerate(TASKS.items()):
        for code, label in enumerate(labels):
            of = split.targets["train"][:, number] == code
            assert content["cells_by_state"][f"{task}: {label}"] == of.sum()
            np.testing.assert_allclose(states[f"{task}: {label}"], embedded[of].mean(axis=0), atol=1e-5)

    classifier = load_classifier(model, own)
    assert isinstance(classifier, MultiTaskClassifier) and classifier.tasks == TASKS
    examples = json.loads((model / "examples.json").read_text())
    ids = [np.array(cell["input_ids"]) for cell in examples]
    logits = classifier.by_task(predict_logits(classifier, ids, own.pad_id, execution=choose_execution(cpus=1)))
    said = [TASKS["type"][best] for best in logits["type"].argmax(axis=1)]
    assert 0 < len(examples) <= 3
    assert (
        [cell["label"] for cell in examples]
        == said
        == labelled(setting, "type", [cell["cell_id"] for cell in examples])
    )


def check_store(
    setting: Setting, scores: dict[str, Any], history: list[dict[str, float]], summary: dict[str, Any], folder: Path
) -> None:
    """The run has each task's metrics, curves and figures; the version has what promotion compares."""
    client, (line,) = mlflow.MlflowClient(), summary["trials"]
    run = client.get_run(line["run_id"])
    metrics, parameters = run.data.metrics, run.data.params
    for task, its in scores["reporting"]["tasks"].items():
        assert metrics[f"reporting_macro_f1_{task}"] == its["macro_f1"]
        assert metrics[f"reporting_f1_{task}_{TASKS[task][1]}"] == its["per_class"][TASKS[task][1]]["f1"]
        curve = [point.value for point in client.get_metric_history(line["run_id"], f"choosing_macro_f1_{task}")]
        assert set(curve) >= {entry[f"choosing_macro_f1_{task}"] for entry in history}
    assert metrics["reporting_macro_f1"] == scores["reporting"]["macro_f1"]
    assert (parameters["label"], parameters["task_weights"]) == ("type, sex", "type=1, sex=0.5")
    files = {item.path for item in client.list_artifacts(line["run_id"])}
    assert {"misclassified.csv", "confusion_matrix_reporting_sex.png", "calibration_choosing_type.png"} <= files
    (version,) = client.search_model_versions("name = 'several'")
    assert float(version.tags["choosing_macro_f1"]) == pytest.approx(scores["choosing"]["macro_f1"], abs=1e-6)
    baseline = client.get_run(summary["baseline_run"]).data.metrics
    assert {"reporting_macro_f1", "reporting_macro_f1_sex", "reporting_f1_type_low"} <= baseline.keys()
    assert registry.find_registered("models:/several/1").is_dir()


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"task_weights": {"age": 1.0}}, "--task-weights: got age; takes weights of type, sex"),
        ({"label": "type", "task_weights": {"type": 2.0}}, "got type=2; takes nothing beside one --label"),
        ({"label": "type,age"}, "--label: got age; takes a column"),
        ({"min_cells": 30}, "with at least 30 cells in every role .*, for the label type"),
    ],
)  # fmt: skip
def test_what_no_training_can_come_of_is_refused(
    setting: Setting, tmp_path: Path, others: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        setting.run(tmp_path / "out", **others)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_folds_report_every_cell_once_for_all_tasks(setting: Setting, tmp_path: Path) -> None:
    without_roles: dict[str, Any] = {f"{role}_groups": [] for role in ROLES}
    summary = setting.run(tmp_path / "out", folds=3, **without_roles)
    reported: list[str] = []
    for fold in range(3):
        manifest = json.loads((tmp_path / "out" / f"split-fold{fold}.json").read_text())
        assert manifest["tasks"] == TASKS
        ids, targets, _ = read_predictions(Trial("mean", 0, fold).directory(str(tmp_path / "out")), "report")
        assert ids == manifest["cells"]["report"] and len({setting.columns["donor"][int(one[4:])] for one in ids}) == 1
        assert ((targets != UNLABELLED).any(axis=1)).all()
        reported += ids
    assert len(set(reported)) == len(reported) == CELLS - summary["dropped_labels"][NO_LABEL]
    for found in (summary["pooling"]["mean"], summary["baseline"]):
        assert found["trials"] == 3
        for task in TASKS:
            assert found["tasks"][task]["trials"] == 3 and found["tasks"][task]["macro_f1_std"] >= 0
    lines = [trial["tasks"]["sex"]["reporting_macro_f1"] for trial in summary["trials"]]
    assert summary["pooling"]["mean"]["tasks"]["sex"]["macro_f1"] == pytest.approx(np.mean(lines), abs=1e-4)


# ---------------------------------------------------------------------- workers


@pytest.mark.slow
def test_two_workers_take_the_steps_of_one(setting: Setting, tmp_path: Path) -> None:
    """Whichever of them holds the labelled cells: labels are counted over all."""
    # All cells in one step, so that it has the same cells whoever has them.
    whole_epochs = {**OPTIONS, "epochs": 8, "learning_rate": 2e-2, "tokens_per_batch": 10_000}
    for workers in (1, 2):
        setting.train(tmp_path / str(workers), Trial("mean", 0), workers=workers, options=whole_epochs)
    assert_same(tmp_path / "1", tmp_path / "2", Trial("mean", 0))
    directory = Path(Trial("mean", 0).directory(str(tmp_path / "2")))
    losses = [entry["train_loss"] for entry in json.loads((directory / "history.json").read_text())]
    assert losses[0] - losses[-1] > 0.01  # far more than what is allowed for rounding


@pytest.mark.slow
def test_a_killed_worker_leaves_the_same_result(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial, small = Trial("mean", 0), {**OPTIONS, "tokens_per_batch": 64}
    setting.train(tmp_path / "whole", trial, workers=2, options=small)
    dying, marker = killed_once(tmp_path / "killed", at_step=9), tmp_path / "killed"
    fit_all = train_workers.fit_all
    monkeypatch.setattr(training, "fit_all", lambda _, runs, **options: fit_all(dying, runs, **options))
    setting.train(tmp_path / "out", trial, workers=2, every=2, options=small)
    assert marker.exists()
    assert_same(tmp_path / "out", tmp_path / "whole", trial)


@pytest.mark.slow
def test_a_driver_killed_and_a_store_lost_leave_the_same_tasks(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed within the second epoch, then the same command; the store is locked as it trains, and then `register`."""
    whole, output, trial = tmp_path / "whole", tmp_path / "out", Trial("mean", 0)
    setting.run(whole)
    flags = setting.flags(output, registered_model="late")
    command = [
        part
        for name, value in flags.items()
        for part in (f"--{name.replace('_', '-')}", ",".join(value) if isinstance(value, list) else str(value))
    ]
    kill_finetune(command, output, "ray_train/*/epoch-0001-step-000000")
    before = len(runs())
    monkeypatch.setattr(registry, "LOCKED_AT_MOST", 0.5)
    locked_at = Path(trial.directory(str(output))) / "scores.json"
    with (
        locked_once(locked_at, setting.folder / "mlflow.db"),
        pytest.raises(RegistryUnavailable, match="database is locked"),
    ):
        setting.run(output, registered_model="late")
    assert len(runs()) == before
    summary = register.run(build(register.RegisterConfig, {"output": str(output)}))
    assert [found["version"] for found in summary["trials"]] == [1]
    assert_same(output, whole, trial)


@pytest.mark.slow
def test_adapters_leave_the_trunk_as_it_is(setting: Setting, tmp_path: Path) -> None:
    summary = setting.run(tmp_path / "out", lora_rank=2, lora_projections=["query"], learning_rate=3e-2)
    directory = Path(Trial("mean", 0).directory(str(tmp_path / "out")))
    pretrained, kept = (load_file(place / "model.safetensors") for place in (setting.model, directory / "model"))
    for name in pretrained:
        if name.startswith("bert."):
            assert np.array_equal(kept[name], pretrained[name]) == ("query.weight" not in name), name
    assert {"classifier.0.weight", "classifier.1.weight"} <= kept.keys()
    assert (directory / "adapters" / "adapter_model.safetensors").exists()
    run = mlflow.MlflowClient().get_run(summary["trials"][0]["run_id"])
    # Two matrices of rank 2 a layer; the dense layer and the heads, of 3 and 2 classes.
    learned = 3 * 2 * 2 * 16 + 17 * 16 + 17 * 5
    assert (run.data.params["lora_rank"], run.data.params["learned_parameters"]) == ("2", str(learned))
    assert run.data.tags["adapters"] == str(directory / "adapters")


# ---------------------------------------------------------------------- real cells

COMPARTMENTS = {
    "endocrine": ("alpha", "beta", "delta", "gamma", "epsilon"), "exocrine": ("acinar", "ductal"),
    "stroma": ("activated_stellate", "quiescent_stellate", "endothelial", "schwann"),
}  # fmt: skip


@pytest.mark.slow
def test_pancreas_cells_by_type_and_compartment(tmp_path: Path) -> None:
    """Beside each task alone and the baseline; which of them is better is not ours to say."""
    adata = demo.read_pancreas()
    types = adata.obs["cell_type"].astype(str).to_numpy()
    of = {one: name for name, its in COMPARTMENTS.items() for one in its}
    compartment = np.array([of.get(one) for one in types], dtype=object)
    compartment[np.random.default_rng(0).random(len(types)) < 0.3] = None
    adata.obs["compartment"] = pd.Categorical(compartment)
    paths = demo.prepare(str(tmp_path))
    adata.write_h5ad(paths["h5ad"])
    tokenize.run(build(tokenize.TokenizeConfig, {
        "input": [paths["h5ad"]], "vocabulary": paths["vocabulary"], "output": str(tmp_path / "cells"),
        "obs_columns": ["cell_type", "library", "compartment"], "max_length": 64,
    }))  # fmt: skip
    vocabulary = GeneVocabulary.load(paths["vocabulary"])
    save_model(
        new_model(vocabulary, layers=2, width=32, heads=4, feed_forward=64, initializer_range=0.08),
        vocabulary, tmp_path / "model",
    )  # fmt: skip
    flags = {
        "cells": str(tmp_path / "cells"), "model": str(tmp_path / "model"), "group": "library", "epochs": 3,
        "learning_rate": 5e-3, "class_weights": "balanced", "tokens_per_batch": 512,
        **{f"{role}_groups": [group] for role, group in demo.GROUPS.items()},
    }  # fmt: skip
    found = {
        label: finetune.run(build(finetune.FinetuneConfig, {**flags, "label": label, "output": str(tmp_path / label)}))
        for label in ("cell_type,compartment", "cell_type", "compartment")
    }
    both = found.pop("cell_type,compartment")
    for task, alone in found.items():
        together = both["pooling"]["mean"]["tasks"][task]
        # The same cells with the same classes, so the very same baseline.
        assert both["tasks"][task] == alone["labels"]
        assert both["baseline"]["tasks"][task]["macro_f1"] == alone["baseline"]["macro_f1"] > 0.8
        for scores in (together, alone["pooling"]["mean"]):
            # More than by naming one class, whichever.
            assert scores["macro_f1"] > 1 / len(alone["labels"])
