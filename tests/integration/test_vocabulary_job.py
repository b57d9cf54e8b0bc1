"""The vocabulary job on a real Ray cluster, against medians taken slowly in plain Python."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from scipy import sparse

from geneformer_ray.data.median_sketch import ERROR_BOUND, MedianSketch
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.distribute import vocabulary as distribute_vocabulary
from geneformer_ray.errors import InputError, OutputExistsError
from ray_jobs import vocabulary
from ray_jobs.command_line import build

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = [f"ENSG{number:011d}" for number in range(1, 21)]


@dataclass(frozen=True)
class Corpus:
    """Two files, and what is true of them: of each cell that passed, the total and gene -> count."""

    files: list[str]
    totals: list[float]
    counts: list[dict[str, float]]
    cells: int
    left_out: int

    def values(self, same: dict[str, str] | None = None) -> dict[str, list[float]]:
        """Gene -> the normalised counts of the cells that express it; `same` renames genes, which are then summed."""
        found: dict[str, list[float]] = {}
        for total, counts in zip(self.totals, self.counts, strict=True):
            summed: dict[str, float] = {}
            for gene, count in counts.items():
                gene = (same or {}).get(gene, gene)
                summed[gene] = summed.get(gene, 0.0) + count
            for gene, count in summed.items():
                if count:
                    found.setdefault(gene, []).append(count / total * 10_000)
        return found

    def medians(self, min_cells: int = 1, same: dict[str, str] | None = None) -> dict[str, float]:
        values = self.values(same).items()
        return {gene: statistics.median(ours) for gene, ours in values if len(ours) >= min_cells}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Genes in another order, one of them twice in each file; own genes on either side; cells that fail a filter."""
    rng = np.random.default_rng(11)
    folder = tmp_path_factory.mktemp("corpus")
    first = [*SHARED, "ENSG00000000003.7", "only-first", "never"]
    second = [*reversed([name.lower() + ".2" for name in SHARED]), "only-second", "ENSG00000000005.1", "<cls>"]
    files, totals, counts, left_out = [], [], [], 0
    for number, names in enumerate((first, second)):
        n_cells = 70 - 15 * number
        dense = rng.poisson(rng.lognormal(-1, 1, len(names)), (n_cells, len(names))).astype(np.float32)
        dense[:, [name == "never" or name.upper().startswith(SHARED[-1]) for name in names]] = 0
        dense[3] = 0  # a cell without counts
        matrix = sparse.csr_matrix(dense)
        matrix.data[::9] = 0  # explicit zeros
        dense = matrix.toarray()
        obs = pd.DataFrame(index=[f"cell{row}" for row in range(n_cells)])  # the same ids in both
        passed = np.ones(n_cells, bool)
        if number == 1:
            passed = np.arange(n_cells) % 5 != 0
            obs["filter_pass"] = passed.astype(np.int64)
        files.append(str(folder / f"part{number}.h5ad"))
        anndata.AnnData(matrix, obs=obs, var=pd.DataFrame(index=names)).write_h5ad(files[-1])
        left_out += int((~passed).sum())
        for row in dense[passed].tolist():
            expressed: dict[str, float] = {}
            for name, count in zip(names, row, strict=True):
                gene = name.upper().partition(".")[0] if name.upper().startswith("ENSG") else name
                expressed[gene] = expressed.get(gene, 0.0) + count
            totals.append(sum(row))
            counts.append({gene: count for gene, count in expressed.items() if gene != "<cls>"})
    return Corpus(files, totals, counts, 70 + 55 - left_out, left_out)


def make(**flags: Any) -> dict[str, Any]:
    return vocabulary.run(build(vocabulary.VocabularyConfig, flags))


def test_a_new_vocabulary_has_the_very_medians_of_the_corpus(corpus: Corpus, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    summary = make(input=corpus.files, output=output)
    made = GeneVocabulary.load(output)
    assert dict(made.medians) == corpus.medians()
    assert {"only-first", "only-second", *SHARED} - {"never"} >= made.medians.keys()
    assert made.names == ["<pad>", "<mask>", *sorted(made.medians)]
    assert made.max_length == 2048
    assert (summary["cells"], summary["cells_left_out"]) == (corpus.cells, corpus.left_out)
    assert (summary["exact"], summary["error_bound"], summary["digest"]) == (True, 0, made.digest)
    assert (summary["genes"], summary["genes_left_out"]) == (len(made.genes), 22 + 1 - len(made.genes))
    table = pq.read_table(summary["tables"]["medians"])
    assert table.column_names == ["gene", "cells", "median", "exact"]
    rows = {row["gene"]: row for row in table.to_pylist()}
    assert {gene: row["cells"] for gene, row in rows.items() if row["cells"]} == {
        gene: len(values) for gene, values in corpus.values().items()
    }
    assert rows["never"] == {"gene": "never", "cells": 0, "median": None, "exact": True}
    assert not (tmp_path / "out" / "_sketches").exists()
    with pytest.raises(OutputExistsError, match="--overwrite"):
        make(input=corpus.files, output=output)
    assert make(input=corpus.files[::-1], output=output, overwrite=True)["digest"] == made.digest
    assert dict(GeneVocabulary.load(output).medians) == corpus.medians()


def test_files_that_lie_gene_by_gene_are_sorted_first(corpus: Corpus, tmp_path: Path) -> None:
    for number, file in enumerate(corpus.files):
        adata = anndata.read_h5ad(file)
        adata.X = sparse.csc_matrix(adata.X)
        (tmp_path / "csc").mkdir(exist_ok=True)
        adata.write_h5ad(tmp_path / "csc" / f"{number}.h5ad")
    make(input=[str(tmp_path / "csc")], output=str(tmp_path / "out"))
    assert dict(GeneVocabulary.load(str(tmp_path / "out")).medians) == corpus.medians()
    assert not [folder for folder in (tmp_path / "out").iterdir() if folder.name in ("_sorted", "_sketches")]


def test_genes_cells_tokens_and_length_are_chosen(corpus: Corpus, tmp_path: Path) -> None:
    listed = tmp_path / "genes.txt"
    listed.write_text(
        "\n".join(["ensg00000000003.9", *SHARED[4:12], "", "only-second", "no-such-gene", "never", "gone"])
    )
    chosen = {"ENSG00000000003", *SHARED[4:12], "only-second"}
    fewest = sorted(len(corpus.values()[gene]) for gene in chosen)[3]
    summary = make(
        input=corpus.files, output=str(tmp_path / "out"), genes=str(listed), min_cells=fewest,
        special_tokens=["eos", "cls"],
    )  # fmt: skip
    made = GeneVocabulary.load(str(tmp_path / "out"))
    expected = {gene: median for gene, median in corpus.medians(fewest).items() if gene in chosen}
    assert dict(made.medians) == expected
    assert len(expected) < len(chosen)
    assert made.names == ["<pad>", "<mask>", "<cls>", "<eos>", *sorted(expected)]
    assert made.max_length == 4096
    assert (summary["genes_unknown"], summary["genes_unknown_examples"]) == (2, ["no-such-gene", "gone"])
    assert make(input=corpus.files, output=str(tmp_path / "short"), max_length=64)["max_length"] == 64


@pytest.fixture
def known(tmp_path: Path) -> str:
    """A vocabulary that knows half of the genes, one by a symbol alone, and one that nothing expresses."""
    genes = [*SHARED[::2], "ENSG00000000020", "ENSG00000000999"]
    symbols = {"ENSG00000000999": "only-first"}
    mapping = {"ENSG00000000002": "ENSG00000000001"}
    made = GeneVocabulary.from_medians(
        dict.fromkeys(reversed(genes), 1.0), max_length=100, symbols=symbols, mapping=mapping
    )
    made.save(str(tmp_path / "known"))
    return str(tmp_path / "known")


def test_a_vocabulary_keeps_its_tokens_and_gets_medians_of_the_corpus(
    corpus: Corpus, known: str, tmp_path: Path
) -> None:
    summary = make(input=corpus.files, vocabulary=known, output=str(tmp_path / "out"))
    made, old = GeneVocabulary.load(str(tmp_path / "out")), GeneVocabulary.load(known)
    assert made.digest == old.digest == summary["digest"]
    assert (made.symbols, made.mapping, made.max_length) == (old.symbols, old.mapping, 100)
    # One gene is found by its symbol, and one holds a retired id as well.
    same = {"only-first": "ENSG00000000999", "ENSG00000000002": "ENSG00000000001"}
    expected = {gene: median for gene, median in corpus.medians(same=same).items() if gene in old.tokens}
    assert dict(made.medians) == expected
    assert expected["ENSG00000000001"] != corpus.medians()["ENSG00000000001"]
    assert summary["genes_without_median"] == 1  # ENSG00000000020, which no cell expresses
    assert summary["cells"] == corpus.cells


def test_special_tokens_come_behind_a_vocabularys_own(corpus: Corpus, known: str, tmp_path: Path) -> None:
    old = GeneVocabulary.load(known)
    for number, flags in enumerate(({}, {"input": corpus.files})):
        output = str(tmp_path / str(number))
        summary = make(vocabulary=known, output=output, special_tokens=["cls", "eos"], max_length=50, **flags)
        made = GeneVocabulary.load(output)
        assert made.names == [*old.names, "<cls>", "<eos>"]
        assert (made.parent_digest, made.max_length, summary["max_length"]) == (old.digest, 50, 50)
    assert dict(GeneVocabulary.load(str(tmp_path / "0")).medians) == dict(old.medians)


def test_a_vocabulary_alone_is_written_as_it_is(known: str, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.json"
    tokens.write_text(json.dumps({"<pad>": 0, "<mask>": 1, "B": 2, "A": 3}))
    summary = make(vocabulary=str(tokens), output=str(tmp_path / "out"))
    made = GeneVocabulary.load(str(tmp_path / "out"))
    assert made.names == ["<pad>", "<mask>", "B", "A"]
    assert (summary["genes"], summary["genes_without_median"], summary["digest"]) == (2, 2, made.digest)
    make(vocabulary=known, output=str(tmp_path / "copy"))
    assert GeneVocabulary.load(str(tmp_path / "copy")) == GeneVocabulary.load(known)


def test_more_values_than_are_kept_stay_within_the_bound(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both in this process and in the workers': they make their sketches from what the worker's class is given.
    monkeypatch.setattr(distribute_vocabulary, "SketchWorker", BinnedWorker)
    monkeypatch.setattr(distribute_vocabulary, "MedianSketch", Binned)
    monkeypatch.setattr(distribute_vocabulary, "CELLS_PER_BLOCK", 16)
    summary = make(input=corpus.files, output=str(tmp_path / "out"))
    assert (summary["exact"], summary["error_bound"]) == (False, ERROR_BOUND)
    found = GeneVocabulary.load(str(tmp_path / "out")).medians
    assert found.keys() == corpus.medians().keys()
    for gene, median in corpus.medians().items():
        assert abs(found[gene] - median) < ERROR_BOUND * median
    assert any(found[gene] != median for gene, median in corpus.medians().items())


class Binned(MedianSketch):
    """A sketch that keeps hardly any values."""

    def __init__(self, genes: int, *, exact_values: int = 100) -> None:
        super().__init__(genes, exact_values=exact_values)


class BinnedWorker(distribute_vocabulary.SketchWorker):
    """A worker whose sketches keep hardly any values."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        distribute_vocabulary.MedianSketch = Binned  # type: ignore[misc]


def test_a_broken_off_run_resumes_to_the_identical_vocabulary(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    monkeypatch.setattr(distribute_vocabulary, "CELLS_PER_BLOCK", 16)
    with monkeypatch.context() as patch:
        patch.setattr(vocabulary.Corpus, "discard_sketches", lambda *_: None)
        make(input=corpus.files, output=str(whole))
    assert len(list((whole / "_sketches").iterdir())) == 5 + 4
    shutil.copytree(whole, broken)
    plan = json.loads((whole / "_manifest.json").read_text())["plan"]
    (broken / "_manifest.json").write_text(json.dumps({"finished": False, "plan": plan}))
    (broken / "vocabulary.json").unlink()
    (broken / "_progress" / "000003.json").unlink()
    (broken / "_sketches" / "000003.parquet").write_bytes(b"half a file")
    kept = (broken / "_sketches" / "000002.parquet").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(vocabulary.Corpus, "discard_sketches", lambda *_: None)
        make(input=corpus.files, output=str(broken))
    assert (broken / "_sketches" / "000002.parquet").stat().st_mtime_ns == kept
    assert (broken / "vocabulary.json").read_bytes() == (whole / "vocabulary.json").read_bytes()
    assert pq.read_table(broken / "_medians").equals(pq.read_table(whole / "_medians"))
    (broken / "_manifest.json").write_text(json.dumps({"finished": False, "plan": plan}))
    (tmp_path / "list.txt").write_text(SHARED[0] + "\n")
    with pytest.raises(OutputExistsError, match="genes was"):
        make(input=corpus.files, output=str(broken), genes=str(tmp_path / "list.txt"))
    # What shapes the vocabulary and not the sketches may change between the runs.
    make(input=corpus.files, output=str(broken), min_cells=50)
    medians = GeneVocabulary.load(str(broken)).medians
    assert medians == pytest.approx(corpus.medians(min_cells=50))
    assert 0 < len(medians) < len(corpus.medians())
    assert not (broken / "_sketches").exists()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({}, "--input, --vocabulary: got neither"),
        ({"vocabulary": "KNOWN", "genes": "LIST"}, "--genes: .*beside --vocabulary"),
        ({"input": "FILES", "genes": "LIST"}, "--genes: .*with 2 lines .nobody, knows.*none of them"),
        ({"input": "FILES", "genes": "/nowhere"}, "--genes: got /nowhere; takes a readable text file"),
        ({"input": "FILES", "min_cells": 1000}, "--input, --min-cells: .*1,000 of 114 cells"),
        ({"input": ["/nowhere.h5ad"]}, "--input.*nowhere"),
        ({"vocabulary": "/nowhere"}, "--vocabulary.*nowhere"),
        ({"vocabulary": "KNOWN", "special_tokens": ["sep"]}, "--special-tokens.*'cls' or 'eos'"),
        ({"vocabulary": "KNOWN", "output": "KNOWN"}, "--output.*a directory of its own"),
    ],
)
def test_bad_flags_are_refused(corpus: Corpus, known: str, tmp_path: Path, flags: dict[str, Any], text: str) -> None:
    (tmp_path / "list.txt").write_text("nobody\nknows\n")
    stands_for = {"KNOWN": known, "LIST": str(tmp_path / "list.txt"), "FILES": corpus.files}
    given = {name: stands_for.get(value, value) if isinstance(value, str) else value for name, value in flags.items()}
    with pytest.raises(InputError, match=text):
        make(**{"output": str(tmp_path / "out"), **given})


def test_from_the_command_line(corpus: Corpus, tmp_path: Path) -> None:
    def command(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ray_jobs.vocabulary", *flags], cwd=REPOSITORY, text=True, capture_output=True,
            env=dict(os.environ), timeout=200, check=False,
        )  # fmt: skip

    done = command("--input", *corpus.files, "--output", str(tmp_path / "out"), "--special-tokens", "cls,eos")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["digest"] == GeneVocabulary.load(str(tmp_path / "out")).digest
    assert f"from {corpus.cells:,} cells" in done.stderr
    shown = command("--help").stdout
    assert "--input alone makes a new vocabulary" in " ".join(shown.split())
    bad = command("--output", str(tmp_path / "other"))
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1)
    assert "--input, --vocabulary" in bad.stderr
