"""Classes of genes: every form that users have them in, found as genes are found everywhere."""

from __future__ import annotations

import json
import pickle
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geneformer_ray.data.gene_classes import GeneClasses, read_gene_classes
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError

SENSITIVE, INSENSITIVE = "dosage_sensitive", "dosage_insensitive"


@pytest.fixture(scope="module")
def ensembl() -> GeneVocabulary:
    """Six genes under Ensembl ids, some with symbols; one symbol stands for two of them."""
    ids = [f"ENSG{number:011d}" for number in range(1, 7)]
    symbols = {ids[0]: "GCG", ids[1]: "TTR", ids[2]: "ARX", ids[3]: "TWIN", ids[4]: "TWIN"}
    retired = "ENSG00000000099"
    return GeneVocabulary.from_medians(
        dict.fromkeys(ids, 1.0), max_length=8, symbols=symbols, mapping={retired: ids[5]}
    )


def write(folder: Path, name: str, content: str | bytes) -> str:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder / name)


# ------------------------------------------------------------------ files

CLASSES = {SENSITIVE: ["GCG", "TTR"], INSENSITIVE: ["ARX"]}
FORMS = {
    "classes.json": json.dumps(CLASSES),
    "with_mark.json": b"\xef\xbb\xbf" + json.dumps(CLASSES).encode(),
    "classes.csv": f"symbol,class,gene\nx,{SENSITIVE},GCG\ny,{INSENSITIVE}, ARX \nz,{SENSITIVE},TTR\n",
    "classes.TSV": f"gene\tclass\r\nGCG\t{SENSITIVE}\r\nTTR\t{SENSITIVE}\r\nARX\t{INSENSITIVE}\r\n",
    "quoted.csv": f'"gene","class"\n"GCG","{SENSITIVE}"\n"TTR","{SENSITIVE}"\n"ARX","{INSENSITIVE}"\n',
    "classes.gmt": f"{SENSITIVE}\t\tGCG\tTTR\n{INSENSITIVE}\twhy\tARX\n",
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_says_the_same(name: str, tmp_path: Path) -> None:
    assert read_gene_classes(write(tmp_path, name, FORMS[name])) == CLASSES


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", "{", "readable JSON"),
        ("a.json", "[" * 100_000, "readable JSON"),
        ("a.json", '["GCG"]', "a list in place of classes"),
        ("a.json", '{"a": ["GCG"], "b": ["TTR"], "a": ["ARX"]}', "'a' 2 times"),
        ("a.json", '{"a": ["GCG"], "b": "TTR"}', "'b' is no list"),
        ("a.json", '{"GCG": "a", "TTR": "b"}', "'GCG' is no list"),
        ("a.json", '{"a": ["GCG"], "b": [1]}', "'b' is no list"),
        ("a.json", '{"a": ["GCG"], "b": [" "]}', "'b' is no list"),
        ("a.json", '{"a": ["GCG"], "b": []}', "'b' without genes"),
        ("a.json", '{"a": ["GCG"], " ": ["TTR"]}', "a class without a name"),
        ("a.json", '{"a": ["GCG", "TTR"]}', "1 class; takes two or more"),
        ("a.json", "{}", "0 classes"),
        ("a.csv", "", "columns .none."),
        ("a.csv", "gene;class\nGCG;a\n", "columns gene;class"),
        ("a.tsv", "gene,class\nGCG,a\n", "columns gene,class"),
        ("a.csv", "gene,class\nGCG,a\nTTR,\n", "line 3 of"),
        ("a.csv", "gene,class\nGCG,a\n,b\n", "line 3 of"),
        ("a.csv", "gene,class\nGCG,a\nTTR\n", "line 3 of"),
        ("a.csv", 'gene,class\nGCG,"a\n', "readable table"),
        ("a.csv", "gene,class\nGCG,a\n", "1 class"),
        ("a.gmt", "a ARX\n", "line 1 of"),
        ("a.txt", "GCG\n", "a JSON object of class"),
        ("a.json", b"\xff\xfe\x00", "readable text"),
    ],
)
def test_what_is_no_file_of_classes_is_refused(name: str, content: str | bytes, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^--gene-classes.*{says}"):
        read_gene_classes(write(tmp_path, name, content))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--gene-classes.*nowhere\.json"):
        read_gene_classes(str(tmp_path / "nowhere.json"))


@pytest.mark.parametrize("name", ["classes.pickle", "classes.pkl", "classes.json"])
def test_upstreams_pickle_is_not_read_but_converted(name: str, tmp_path: Path) -> None:
    """The refusal holds the command that turns it into what is read."""
    path = write(tmp_path, name, pickle.dumps({kind: set(genes) for kind, genes in CLASSES.items()}))
    with pytest.raises(InputError, match="never a pickle") as refused:
        read_gene_classes(path)
    program, options = shlex.split(refused.value.takes.split(": ", 1)[1]), ["<", "classes.pkl", ">", "classes.json"]
    assert program[:2] == ["python", "-c"] and program[3:] == options
    done = subprocess.run(
        [sys.executable, *program[1:3]], input=Path(path).read_bytes(), capture_output=True, check=True
    )
    converted = read_gene_classes(write(tmp_path, "converted.json", done.stdout))
    assert {kind: sorted(genes) for kind, genes in converted.items()} == CLASSES


# ------------------------------------------------------------------ genes


def test_genes_go_by_any_of_their_names(ensembl: GeneVocabulary) -> None:
    named = {"b": ["GCG", "ENSG00000000002.7", "ensg00000000003"], "a": ["ENSG00000000099", "ENSG00000000004"]}
    found = GeneClasses.of(named, ensembl)
    assert found.labels == ["a", "b"]
    assert found.genes == [f"ENSG{number:011d}" for number in (1, 2, 3, 4, 6)]
    assert found.tokens.tolist() == [ensembl.tokens[gene] for gene in found.genes]
    assert found.targets.tolist() == [1, 1, 1, 0, 0]
    assert found.report() == {
        "genes_per_class": {"a": 2, "b": 3},
        "matched_as": {"key": 1, "ensembl id": 1, "version stripped": 1, "retired id": 1, "symbol": 1},
        "unknown_genes": {},
        "genes_in_too_few_cells": {},
    }


def test_unknown_genes_are_listed_and_ambiguous_ones_never_guessed(ensembl: GeneVocabulary) -> None:
    found = GeneClasses.of({"a": ["GCG", "NOTHING", "TWIN", "NOTHING", "<pad>"], "b": ["ARX"]}, ensembl)
    assert found.unknown == {"a": ["NOTHING", "TWIN", "<pad>"]}
    assert found.genes == ["ENSG00000000001", "ENSG00000000003"]


def test_one_gene_under_two_names_counts_once(ensembl: GeneVocabulary) -> None:
    found = GeneClasses.of({"a": ["GCG", "ENSG00000000001", "GCG"], "b": ["ARX"]}, ensembl)
    assert found.report()["genes_per_class"] == {"a": 1, "b": 1}


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ({"a": ["GCG"], "b": ["ARX", "GCG"]}, "'GCG' in the classes 'a' and 'b'"),
        ({"a": ["GCG"], "b": ["ENSG00000000001.2"]}, "names of one gene, in the classes 'a' and 'b'"),
        (
            {"a": ["GCG"], "b": ["X1", "X2", "X3", "X4"]},
            r"'b' with 0 genes \(4 not in the vocabulary: X1, X2, X3, ...\)",
        ),
        ({"a": ["GCG"], "b": ["X1"]}, r"'b' with 0 genes \(1 not in the vocabulary: X1\); takes at least 1 gene in"),
    ],
)
def test_classes_that_cannot_be_learned_are_refused(
    ensembl: GeneVocabulary, named: dict[str, list[str]], says: str
) -> None:
    with pytest.raises(InputError, match=f"--gene-classes: got .*{says}"):
        GeneClasses.of(named, ensembl)


def test_a_class_needs_as_many_genes_as_are_asked_for(ensembl: GeneVocabulary) -> None:
    named = {"a": ["GCG", "TTR"], "b": ["ARX", "NOTHING"]}
    assert GeneClasses.of(named, ensembl, fewest=1).unknown == {"b": ["NOTHING"]}
    with pytest.raises(
        InputError, match=r"'b' with 1 gene \(1 not in the vocabulary: NOTHING\); takes at least 2 genes"
    ):
        GeneClasses.of(named, ensembl, fewest=2)


def test_genes_in_too_few_cells_are_left_out_and_listed(ensembl: GeneVocabulary) -> None:
    classes = GeneClasses.of({"a": ["GCG", "TTR"], "b": ["ARX", "ENSG00000000006"]}, ensembl)
    cells = np.zeros(len(ensembl), dtype=np.int64)
    cells[classes.tokens] = [5, 3, 0, 4]
    kept = classes.held_by(cells, min_cells=4)
    assert kept.genes == ["ENSG00000000001", "ENSG00000000006"]
    assert (kept.tokens.tolist(), kept.targets.tolist()) == (classes.tokens[[0, 3]].tolist(), [0, 1])
    assert kept.rare == {"a": ["ENSG00000000002"], "b": ["ENSG00000000003"]}
    assert classes.held_by(cells).genes == [classes.genes[position] for position in (0, 1, 3)]
    with pytest.raises(InputError, match=r"'b' with 0 genes \(2 in too few cells: ENSG00000000003, ENSG00000000006\)"):
        classes.held_by(cells, min_cells=5)


@given(order=st.permutations(range(40)), of_two=st.booleans())
def test_the_order_of_a_file_changes_nothing(vocabulary: GeneVocabulary, order: list[int], of_two: bool) -> None:
    names = [vocabulary.genes[number] for number in order]
    named = {kind: [name for name in names if int(name[-1]) % 3 == number] for number, kind in enumerate("abc")}
    shuffled = GeneClasses.of(dict(reversed(named.items())) if of_two else named, vocabulary)
    sorted_names = {kind: sorted(genes) for kind, genes in named.items()}
    straight = GeneClasses.of(sorted_names, vocabulary)
    assert shuffled.digest == straight.digest
    assert shuffled.genes == vocabulary.genes
    for gene, target in zip(shuffled.genes, shuffled.targets, strict=True):
        assert gene in named[shuffled.labels[target]]


def test_the_digest_tells_classes_apart(vocabulary: GeneVocabulary) -> None:
    named = {"a": ["GENE00", "GENE01"], "b": ["GENE02"]}
    moved = {"a": ["GENE00"], "b": ["GENE01", "GENE02"]}
    renamed = {"a": ["GENE00", "GENE01"], "c": ["GENE02"]}
    digests = {GeneClasses.of(each, vocabulary).digest for each in (named, moved, renamed, {**named, "c": ["GENE03"]})}
    assert len(digests) == 4
