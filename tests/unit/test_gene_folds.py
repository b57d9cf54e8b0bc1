"""Cross-validation over genes: no gene on two sides, every class everywhere, cells counted one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geneformer_ray.data.cell_schema import cells_schema
from geneformer_ray.data.cells import CellTable
from geneformer_ray.data.gene_classes import GeneClasses
from geneformer_ray.data.gene_folds import GeneFolds, GeneSplit, cell_blocks
from geneformer_ray.data.splits import ROLES
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError
from tests.conftest import random_cells

Sizes = st.lists(st.integers(3, 13), min_size=2, max_size=3)


def classes_of(vocabulary: GeneVocabulary, sizes: list[int]) -> GeneClasses:
    """Classes of these sizes; the genes of each are spread over the vocabulary."""
    genes = iter(np.random.default_rng(0).permutation(vocabulary.genes).tolist())
    return GeneClasses.of({f"class{n}": [next(genes) for _ in range(size)] for n, size in enumerate(sizes)}, vocabulary)


def splits_of(
    vocabulary: GeneVocabulary, sizes: list[int], folds: int, cells: list[np.ndarray], seed: int = 0
) -> tuple[GeneFolds, list[GeneSplit], np.ndarray]:
    dealt = GeneFolds.deal(classes_of(vocabulary, sizes), folds, seed)
    rows = np.arange(len(cells)) * 2 + 5
    held = dealt.count_held([cells[:7], cells[7:]], len(vocabulary))
    return dealt, dealt.splits(rows, held), rows


def some_cells(vocabulary: GeneVocabulary, number: int = 30) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return random_cells(vocabulary, rng, rng.integers(1, 15, number).tolist())


@given(sizes=Sizes, folds=st.integers(3, 5), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_every_gene_reports_once_and_every_class_is_everywhere(
    vocabulary: GeneVocabulary, sizes: list[int], folds: int, seed: int
) -> None:
    sizes = [max(size, folds) for size in sizes]
    dealt = GeneFolds.deal(classes_of(vocabulary, sizes), folds, seed)
    classes = dealt.classes
    counts = np.zeros((len(sizes), folds), dtype=int)
    np.add.at(counts, (classes.targets, dealt.fold_of), 1)
    assert counts.sum() == len(classes.genes)
    assert np.ptp(counts, axis=1).max() <= 1  # stratified
    assert np.ptp(counts.sum(axis=0)) <= 1  # and even over all classes
    for split in dealt.splits(np.arange(1), np.ones((1, folds), dtype=np.int32)):
        everyone = [gene for role in ROLES for gene in split.genes[role]]
        assert sorted(everyone) == sorted(classes.genes)  # each gene in exactly one role
        for role in ROLES:
            assert set(split.targets[role]) == set(range(len(sizes)))
            for gene, token, target in zip(split.genes[role], split.tokens[role], split.targets[role], strict=True):
                position = classes.genes.index(gene)
                assert (token, target) == (classes.tokens[position], classes.targets[position])
        assert sorted(split.genes["report"]) == sorted(
            gene for gene, fold in zip(classes.genes, dealt.fold_of, strict=True) if fold == split.fold
        )


def test_a_gene_chooses_in_the_fold_before_it_reports(vocabulary: GeneVocabulary) -> None:
    _, splits, _ = splits_of(vocabulary, [8, 9], 4, some_cells(vocabulary))
    for fold, split in enumerate(splits):
        assert split.genes["choose"] == splits[(fold + 1) % 4].genes["report"]
        assert len(split.genes["train"]) == 17 - len(split.genes["choose"]) - len(split.genes["report"])


def test_the_seed_decides_and_nothing_else(vocabulary: GeneVocabulary) -> None:
    classes = classes_of(vocabulary, [12, 15])
    one, again, other = (GeneFolds.deal(classes, 5, seed).fold_of.tolist() for seed in (0, 0, 1))
    assert one == again
    assert one != other
    # Written down, so that another version of anything that deals otherwise is noticed.
    small = GeneClasses.of(
        {"a": ["GENE00", "GENE01", "GENE02", "GENE03"], "b": ["GENE10", "GENE11", "GENE12"]}, vocabulary
    )
    assert GeneFolds.deal(small, 3, 0).fold_of.tolist() == [0, 1, 0, 2, 2, 0, 1]


def test_another_class_does_not_reorder_a_class(vocabulary: GeneVocabulary) -> None:
    """Which genes of a class share a fold depends on the class alone."""
    genes = vocabulary.genes
    two = GeneClasses.of({"a": genes[:9], "b": genes[9:18]}, vocabulary)
    three = GeneClasses.of({"a": genes[:9], "b": genes[9:18], "aa": genes[20:31]}, vocabulary)
    parts = []
    for classes in (two, three):
        fold_of = GeneFolds.deal(classes, 3, 4).fold_of
        its = [fold for gene, fold in zip(classes.genes, fold_of, strict=True) if gene in genes[9:18]]
        parts.append({frozenset(np.flatnonzero(np.array(its) == fold).tolist()) for fold in range(3)})
    assert parts[0] == parts[1]


@given(sizes=Sizes, seed=st.integers(0, 50))
@settings(max_examples=30)
def test_cells_are_counted_as_one_by_one(special_vocabulary: GeneVocabulary, sizes: list[int], seed: int) -> None:
    vocabulary = special_vocabulary
    rng = np.random.default_rng(seed)
    # Long cells, so that every role has one; short ones, so that some hold no target gene; and one without any gene.
    lengths = [*rng.integers(1, 4, 12).tolist(), 16, 16, 16, 16, 16, 16, 0]
    cells = random_cells(vocabulary, rng, lengths)
    dealt, splits, rows = splits_of(vocabulary, sizes, 3, cells, seed)
    targets = set(dealt.classes.tokens.tolist())
    without = sum(not targets & set(cell.tolist()) for cell in cells)
    assert without >= 1
    for split in splits:
        assert split.without == without
        for role in ROLES:
            wanted = set(split.tokens[role].tolist())
            expected = [(row, sum(token in wanted for token in cell)) for row, cell in zip(rows, cells, strict=True)]
            expected = [(row, count) for row, count in expected if count]
            assert list(zip(split.rows[role].tolist(), split.held[role].tolist(), strict=True)) == expected
        manifest = split.manifest()
        assert manifest["cells"] == {role: len(split.rows[role]) for role in ROLES}
        assert manifest["tokens"] == {role: split.held[role].sum() for role in ROLES}
        assert manifest["cells_without_target_gene"] == without


def test_the_manifest_names_every_gene_under_its_class(vocabulary: GeneVocabulary) -> None:
    dealt, splits, _ = splits_of(vocabulary, [6, 7], 3, some_cells(vocabulary))
    for split in splits:
        genes = split.manifest()["genes"]
        back = {gene: label for role in ROLES for label, its in genes[role].items() for gene in its}
        classes = dealt.classes
        assert back == {
            gene: classes.labels[target] for gene, target in zip(classes.genes, classes.targets, strict=True)
        }


def test_digests_tell_folds_genes_and_cells_apart(vocabulary: GeneVocabulary) -> None:
    cells = some_cells(vocabulary)
    digests = [
        split.digest
        for cells_and_seed in ((cells, 0), (cells[:-3], 0), (cells, 1))
        for split in splits_of(vocabulary, [9, 9], 3, cells_and_seed[0], cells_and_seed[1])[1]
    ]
    assert len(set(digests)) == 9
    assert digests[:3] == [split.digest for split in splits_of(vocabulary, [9, 9], 3, cells)[1]]


def test_the_reporting_digest_tells_what_is_reported_on_alone(vocabulary: GeneVocabulary) -> None:
    cells = some_cells(vocabulary)
    first, others = splits_of(vocabulary, [9, 9], 3, cells)[1], splits_of(vocabulary, [9, 9], 3, cells[:-3])[1]
    assert len({split.reporting_digest for split in [*first, *others]}) == 6
    swapped = {role: first[0].tokens[other] for role, other in zip(ROLES, ("choose", "train", "report"), strict=True)}
    assert ROLES == ("train", "choose", "report")
    trained_otherwise = replace(first[0], tokens=swapped)
    assert trained_otherwise.reporting_digest == first[0].reporting_digest
    assert trained_otherwise.digest != first[0].digest
    assert first[0].manifest()["reporting_digest"] == first[0].reporting_digest


@pytest.mark.parametrize(
    ("sizes", "folds", "says"),
    [
        ([5, 5], 2, "--folds: got 2; takes 3 or more"),
        ([5, 4], 5, "'class1' with 4 genes; takes at least 5 genes in every class"),
    ],
)
def test_too_few_folds_or_genes_are_refused(
    vocabulary: GeneVocabulary, sizes: list[int], folds: int, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        GeneFolds.deal(classes_of(vocabulary, sizes), folds, 0)


def test_a_role_without_cells_is_refused(vocabulary: GeneVocabulary) -> None:
    dealt = GeneFolds.deal(classes_of(vocabulary, [3, 3]), 3, 0)
    held = np.ones((4, 3), dtype=np.int32)
    held[:, 2] = 0
    with pytest.raises(InputError, match="no cell with a gene to train in fold 0"):
        dealt.splits(np.arange(4), held)


def test_blocks_are_the_cells_as_the_model_takes_them(vocabulary: GeneVocabulary, tmp_path: Path) -> None:
    cells = some_cells(vocabulary, 11)
    pq.write_table(pa.table({"input_ids": cells}), tmp_path / "cells.parquet")
    table, rows = CellTable(str(tmp_path)), np.array([1, 2, 5, 7, 10])
    blocks = list(cell_blocks(table, rows, vocabulary, at_once=2))
    assert [len(block) for block in blocks] == [2, 2, 1]
    read = [ids.tolist() for block in blocks for ids in block]
    assert read == [cells[row].tolist() for row in rows]
    # Of a model with a <cls> of its own: as in training, cells have to say that its parent encoded them.
    extended = vocabulary.with_cls()
    with pytest.raises(InputError, match="without <cls> in front"):
        next(cell_blocks(table, rows, extended))
    columns = {"cell_id": list("abcdefghijk"), "input_ids": cells, "length": [len(ids) for ids in cells]}
    pq.write_table(pa.table(columns, schema=cells_schema(vocabulary.digest)), tmp_path / "cells.parquet")
    table = CellTable(str(tmp_path))
    adapted = [ids.tolist() for block in cell_blocks(table, rows, extended) for ids in block]
    assert adapted == [[extended.cls_id, *ids][: extended.max_length] for ids in read]
