"""Models and vocabularies by hub id, from a cache as the hub's library keeps it: no network, the real loading code."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from geneformer_ray.compute.model_directory import find_model, model_vocabulary, read_config, save_model
from geneformer_ray.data.hub import HubId, named
from geneformer_ray.data.vocabulary import MASK, PAD, GeneVocabulary
from geneformer_ray.data.vocabulary_files import dictionary_patterns
from geneformer_ray.errors import InputError
from ray_jobs.model_argument import open_model, place_vocabulary
from tests.conftest import new_model

REPO = "someone/Geneformer"
OLD, NEW = "a" * 40, "b" * 40


class Hub:
    """A cache of the hub's library: files are blobs, snapshots link to them."""

    def __init__(self, cache: Path) -> None:
        self.root = cache / f"models--{REPO.replace('/', '--')}"

    def put(self, commit: str, path: str, content: bytes) -> None:
        blob = self.root / "blobs" / f"{len(list(self.root.glob('blobs/*'))):040x}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link = self.root / "snapshots" / commit / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (len(link.relative_to(self.root).parts) - 1)) / "blobs" / blob.name)

    def name(self, revision: str, commit: str) -> None:
        file = self.root / "refs" / revision
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(commit)

    def put_set(self, commit: str, folder: str, suffix: str, tokens: dict[str, int], median: float = 1.0) -> None:
        numbers: dict[str, Any] = {name: np.int16(token) for name, token in tokens.items()}
        self.put(commit, f"{folder}/token_dictionary{suffix}.pkl", pickle.dumps(numbers))
        medians = {name: np.float64(median) for name in tokens if not name.startswith("<")}
        self.put(commit, f"{folder}/gene_median_dictionary{suffix}.pkl", pickle.dumps(medians))


def tokens(genes: int) -> dict[str, int]:
    return {name: number for number, name in enumerate([PAD, MASK, *(f"ENSG{i:011d}" for i in range(genes))])}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A repository like upstream's, at two commits: models of two sizes, dictionaries for both."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # The library reads its variables when it is imported, which may have been before.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    hub = Hub(cache)
    for folder, genes in {"Geneformer-V1": 5, "Geneformer-V2": 3}.items():
        vocabulary = GeneVocabulary(tokens(genes), max_length=16)
        directory = tmp_path / folder
        save_model(new_model(vocabulary, layers=2, width=8, heads=2, feed_forward=8), vocabulary, directory)
        config = json.loads((directory / "config.json").read_text())
        config.pop("vocabulary_digest")
        for commit in (OLD, NEW):
            hub.put(commit, f"{folder}/config.json", json.dumps(config).encode())
            hub.put(commit, f"{folder}/model.safetensors", (directory / "model.safetensors").read_bytes())
        for file in directory.iterdir():
            file.unlink()
        directory.rmdir()
    for commit, median in ((OLD, 1.0), (NEW, 2.0)):
        hub.put_set(commit, "geneformer", "_gc104M", tokens(3), median)
        hub.put_set(commit, "geneformer/gene_dictionaries_30m", "_gc30M", tokens(5), median)
    hub.name("main", NEW)
    hub.name("v1.0", OLD)
    hub.name("refs/pr/7", OLD)
    return hub


@pytest.mark.parametrize(("folder", "size"), [("Geneformer-V1", 7), ("Geneformer-V2", 5)])
@pytest.mark.parametrize(
    ("revision", "median"), [("", 2.0), ("@main", 2.0), ("@v1.0", 1.0), ("@refs/pr/7", 1.0), (f"@{OLD}", 1.0)]
)
def test_weights_and_dictionaries_come_at_one_revision(
    hub: Hub, folder: str, size: int, revision: str, median: float
) -> None:
    directory = find_model(f"{REPO}/{folder}{revision}")
    vocabulary = model_vocabulary(directory, None, read_config(directory))
    assert len(vocabulary) == size
    assert set(vocabulary.medians.values()) == {median}
    assert vocabulary.max_length == 16


def test_a_job_opens_the_commit_that_it_found(hub: Hub) -> None:
    opened = open_model(f"{REPO}/Geneformer-V1", None)
    assert opened.source == f"{REPO}/Geneformer-V1@{NEW}"
    hub.name("main", OLD)  # the branch moves on; the workers of this job do not
    assert find_model(opened.source) == opened.directory
    assert open_model(f"{REPO}/Geneformer-V1", None).source == f"{REPO}/Geneformer-V1@{OLD}"


def test_a_vocabulary_by_hub_id(hub: Hub) -> None:
    assert len(GeneVocabulary.load(f"{REPO}/geneformer@v1.0")) == 5
    assert len(GeneVocabulary.load(f"{REPO}/geneformer/gene_dictionaries_30m@v1.0")) == 7
    file = f"{REPO}/geneformer/gene_dictionaries_30m/token_dictionary_gc30M.pkl@v1.0"
    assert set(GeneVocabulary.load(file).medians.values()) == {1.0}
    assert len(GeneVocabulary.load(REPO, size=7)) == 7
    assert place_vocabulary(REPO) == f"{REPO}@{NEW}"
    assert place_vocabulary(f"{REPO}/geneformer@v1.0") == f"{REPO}/geneformer@{OLD}"
    opened = open_model(f"{REPO}/Geneformer-V1", f"{REPO}@v1.0")
    assert opened.vocabulary_source == f"{REPO}@{OLD}"
    assert set(opened.vocabulary.medians.values()) == {1.0}


def test_an_ambiguous_repository_names_what_to_write(hub: Hub) -> None:
    for path in (REPO, f"{REPO}@main"):
        with pytest.raises(InputError, match="2 token dictionaries") as raised:
            GeneVocabulary.load(path)
        for choice in ("geneformer", "geneformer/gene_dictionaries_30m"):
            name = f"{REPO}/{choice}@{NEW}"
            assert name in str(raised.value)
            assert GeneVocabulary.load(name).medians
        assert "\n" not in str(raised.value)


def test_an_ambiguous_model_names_what_to_write(hub: Hub) -> None:
    hub.put_set(NEW, "geneformer/gene_dictionaries_95m", "_gc95M", tokens(3), 3.0)
    directory = find_model(f"{REPO}/Geneformer-V2")
    with pytest.raises(InputError, match=r"^--vocabulary: .*2 token dictionaries of 5 tokens") as raised:
        model_vocabulary(directory, None, read_config(directory))
    name = f"{REPO}/geneformer/gene_dictionaries_95m@{NEW}"
    assert name in str(raised.value)
    assert set(model_vocabulary(directory, name, read_config(directory)).medians.values()) == {3.0}


def test_what_is_asked_of_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's own files and every dictionary, and of a repository of many models no other's weights."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked: list[tuple[str, str | None, list[str]]] = []
    real = huggingface_hub.snapshot_download

    def record(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision, allow_patterns))
        return str(real(repo, revision=revision, allow_patterns=allow_patterns))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", record)
    dictionaries = ["geneformer/token_dictionary_gc104M.pkl", "geneformer/gene_dictionaries_30m/gene_name_id_dict.pkl"]
    own = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "vocabulary.json", "states.json"]
    others = ["V2/pytorch_model.bin", "V2/training_args.bin", "V1/model.safetensors", "examples/x.ipynb", "README.md"]
    files = [*dictionaries, *own, *(f"V2/{name}" for name in own), *others]
    hub.put(NEW, "config.json", b"{}")
    hub.put(NEW, "model.safetensors", b"")
    hub.put(NEW, "V2/config.json", b"{}")
    hub.put(NEW, "V2/model.safetensors", b"")
    for model, below in ((f"{REPO}/V2@{NEW}", "V2/"), (REPO, "")):
        find_model(model)
        assert asked[-1][:2] == (REPO, NEW if "@" in model else None)
        brought = set(filter_repo_objects(files, allow_patterns=asked[-1][2]))
        assert brought == {*dictionaries, *(below + name for name in own)}
    GeneVocabulary.load(f"{REPO}/geneformer")
    assert set(filter_repo_objects(files, allow_patterns=asked[-1][2])) == set(dictionaries)
    assert set(filter_repo_objects(files, allow_patterns=dictionary_patterns())) == set(dictionaries)


@pytest.mark.parametrize("name", [f"{REPO}@nowhere", f"{REPO}/nothing@v1.0", "someone/else", f"{REPO}@{'c' * 40}"])
def test_what_is_not_there_is_one_line(hub: Hub, name: str) -> None:
    for load in (find_model, GeneVocabulary.load, place_vocabulary):
        with pytest.raises(InputError) as raised:
            load(name)
        assert name in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_directory_of_that_name_comes_first(hub: Hub, tmp_path: Path) -> None:
    GeneVocabulary(tokens(9)).save(str(tmp_path / REPO))
    assert len(GeneVocabulary.load(REPO)) == 11
    assert place_vocabulary(REPO) == str(tmp_path / REPO)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("o/r", ("o/r", "", None)),
        ("o/r@v1", ("o/r", "", "v1")),
        ("o/r/a/b.c@refs/pr/1", ("o/r", "a/b.c", "refs/pr/1")),
        ("o/r/a/", ("o/r", "a", None)),
        ("o/r/../x", None),
        ("o/r@../../x", None),
        ("o/r@/etc/passwd", None),
        ("./o/r", None),
        ("/o/r", None),
        ("~/o", None),
        ("o", None),
        ("s3://o/r", None),
        ("models:/o/1", None),
        ("o/r\n", None),
        ("o/r/*", None),
    ],
)
def test_what_a_hub_id_is(text: str, parts: tuple[str, str, str | None] | None) -> None:
    found = HubId.parse(text)
    assert (found and (found.repo, found.folder, found.revision)) == parts
    assert found is None or str(found) == text.rstrip("/")


def test_files_of_the_cache_are_named_by_hub_id(hub: Hub, tmp_path: Path) -> None:
    root = hub.root / "snapshots" / OLD
    assert named(root) == f"{REPO}@{OLD}"
    assert named(root / "geneformer" / "x.pkl") == f"{REPO}/geneformer/x.pkl@{OLD}"
    assert named(tmp_path) == str(tmp_path)
