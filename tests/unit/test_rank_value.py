"""Rank value encoding, held to a slow and obvious reference, cell by cell."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy import sparse

from geneformer_ray.data import rank_value
from geneformer_ray.data.rank_value import RankValueEncoder
from geneformer_ray.data.vocabulary import CLS, EOS, MASK, PAD, GeneVocabulary
from geneformer_ray.errors import InputError

GENES = [f"G{number}" for number in range(9)]
# Two genes share a median, so that ties happen; powers of two keep them exact.
MEDIANS = dict(zip(GENES, [1.0, 1.0, 2.0, 2.0, 4.0, 0.5, 3.0, 0.7, 1.9], strict=True))
SPECIALS = ([], [CLS], [EOS], [CLS, EOS])

# Counts of some cells over the nine genes and two that no vocabulary knows; small, so that ties and zeros are common.
COLUMNS = [*GENES, "unknown1", "unknown2"]
count_matrices = hnp.arrays(np.int64, st.tuples(st.integers(1, 6), st.just(len(COLUMNS))), elements=st.integers(0, 5))


def vocabulary_of(specials: list[str], max_length: int = 100) -> GeneVocabulary:
    names = [PAD, MASK, *specials, *reversed(GENES)]  # tokens do not follow the order of the names
    return GeneVocabulary({name: i for i, name in enumerate(names)}, medians=MEDIANS, max_length=max_length)


def reference(counts: NDArray[np.integer], total: float, names: list[str], vocabulary: GeneVocabulary) -> list[int]:
    """Encode one cell as the definition reads."""
    expression: dict[str, int] = {}
    for name, count in zip(names, counts, strict=True):
        if name in vocabulary.medians and count > 0:
            expression[name] = expression.get(name, 0) + int(count)
    value = {gene: count / total * 10_000 / vocabulary.medians[gene] for gene, count in expression.items()}
    genes = sorted(value, key=lambda gene: (-value[gene], vocabulary.tokens[gene]))
    front = [CLS] if CLS in vocabulary.tokens else []
    behind = [EOS] if EOS in vocabulary.tokens else []
    room = vocabulary.max_length - len(front) - len(behind)
    return [vocabulary.tokens[name] for name in [*front, *genes[:room], *behind]]


def encode(
    vocabulary: GeneVocabulary, counts: object, totals: NDArray[np.floating], names: list[str] = COLUMNS
) -> list[list[int]]:
    encoded = RankValueEncoder(vocabulary, names).encode(counts, totals)  # type: ignore[arg-type]
    assert len(encoded) == len(totals)
    cells = [encoded.cell(number).tolist() for number in range(len(encoded))]
    assert encoded.lengths.tolist() == [len(cell) for cell in cells]
    assert encoded.ids.dtype == np.int32
    return cells


@settings(max_examples=60)
@given(counts=count_matrices, specials=st.sampled_from(SPECIALS), max_length=st.integers(3, 12))
def test_equals_the_reference(counts: NDArray[np.int64], specials: list[str], max_length: int) -> None:
    vocabulary = vocabulary_of(specials, max_length)
    totals = counts.sum(axis=1).astype(float)
    expected = [reference(cell, total, COLUMNS, vocabulary) for cell, total in zip(counts, totals, strict=True)]
    assert encode(vocabulary, sparse.csr_array(counts), totals) == expected
    assert encode(vocabulary, counts.astype(np.float32), totals) == expected


@settings(max_examples=40)
@given(counts=count_matrices, exponent=st.integers(-6, 6), order=st.permutations(range(len(COLUMNS))))
def test_scaling_a_cell_and_shuffling_the_genes_change_nothing(
    counts: NDArray[np.int64], exponent: int, order: list[int]
) -> None:
    vocabulary = vocabulary_of([CLS, EOS])
    totals = counts.sum(axis=1).astype(float)
    plain = encode(vocabulary, sparse.csr_array(counts), totals)
    factor = 2.0**exponent
    assert encode(vocabulary, sparse.csr_array(counts * factor), totals * factor) == plain
    shuffled = [COLUMNS[column] for column in order]
    assert encode(vocabulary, sparse.csr_array(counts[:, order]), totals, shuffled) == plain


@settings(max_examples=40)
@given(counts=count_matrices)
def test_neighbours_change_nothing(counts: NDArray[np.int64]) -> None:
    vocabulary = vocabulary_of([])
    totals = counts.sum(axis=1).astype(float)
    together = encode(vocabulary, sparse.csr_array(counts), totals)
    alone = [encode(vocabulary, sparse.csr_array(counts[i : i + 1]), totals[i : i + 1])[0] for i in range(len(counts))]
    assert together == alone


@settings(max_examples=40)
@given(counts=count_matrices)
def test_an_explicit_zero_is_no_expression(counts: NDArray[np.int64]) -> None:
    vocabulary = vocabulary_of([])
    rows, columns = np.indices(counts.shape)
    stored = sparse.csr_array((counts.ravel().astype(float), (rows.ravel(), columns.ravel())), shape=counts.shape)
    assert stored.nnz == counts.size
    totals = counts.sum(axis=1).astype(float)
    assert encode(vocabulary, stored, totals) == encode(vocabulary, sparse.csr_array(counts), totals)


def test_ties_go_by_token() -> None:
    vocabulary = vocabulary_of([])
    cell = np.array([[2, 2, 4, 4, 8, 1, 6, 0, 0, 0, 0]])  # count / median is 2 for all seven
    ids = encode(vocabulary, cell, np.array([27.0]))[0]
    assert ids == sorted(vocabulary.tokens[gene] for gene in GENES[:7])


@settings(max_examples=40)
@given(counts=count_matrices, other=count_matrices)
def test_columns_of_one_gene_are_summed(counts: NDArray[np.int64], other: NDArray[np.int64]) -> None:
    """Also where one of them goes by its symbol or an older id."""
    cells = min(len(counts), len(other))
    first, second = counts[:cells], other[:cells]
    vocabulary = vocabulary_of([])
    by_other_names = GeneVocabulary(
        vocabulary.tokens,
        medians=MEDIANS,
        symbols={gene: f"symbol of {gene}" for gene in GENES},
        mapping={f"OLD {gene}": gene for gene in GENES},
        max_length=100,
    )
    names = [*COLUMNS, *(f"symbol of {gene}" for gene in GENES[:5]), *(f"old {gene}" for gene in GENES[5:]), "x", "y"]
    totals = (first + second).sum(axis=1).astype(float)
    encoder = RankValueEncoder(by_other_names, names)
    assert sorted(encoder.duplicates) == GENES
    assert encoder.unmatched == ["unknown1", "unknown2", "x", "y"]
    side_by_side = encode(by_other_names, sparse.csr_array(np.hstack([first, second])), totals, names)
    assert side_by_side == encode(vocabulary, sparse.csr_array(first + second), totals)


def test_the_total_counts_unknown_genes_only_as_a_scale() -> None:
    vocabulary = vocabulary_of([])
    counts = np.array([[1, 2, 3, 0, 0, 0, 0, 0, 0, 50, 50], [1, 2, 3, 0, 0, 0, 0, 0, 0, 0, 0]])
    with_unknown, without = encode(vocabulary, counts, counts.sum(axis=1).astype(float))
    assert with_unknown == without


@pytest.mark.parametrize("specials", SPECIALS, ids=str)
@pytest.mark.parametrize("max_length", [3, 9, 50])
def test_special_tokens_survive_the_cut(specials: list[str], max_length: int) -> None:
    vocabulary = vocabulary_of(specials, max_length)
    counts = np.array([[9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0], [0] * 11])
    encoder = RankValueEncoder(vocabulary, COLUMNS)
    encoded = encoder.encode(counts, np.array([45.0, 1.0]))
    assert encoded.genes_before_cut.tolist() == [9, 0]
    full, empty = encoded.cell(0), encoded.cell(1)
    assert len(full) == min(max_length, 9 + len(specials))
    assert len(empty) == len(specials)
    for cell in (full, empty):
        assert (cell == vocabulary.cls_id).sum() == (CLS in specials)
        assert (cell == vocabulary.eos_id).sum() == (EOS in specials)
        assert CLS not in specials or cell[0] == vocabulary.cls_id
        assert EOS not in specials or cell[-1] == vocabulary.eos_id


def test_values_alike_in_their_leading_bits_are_told_apart() -> None:
    """Sorting looks at leading bits first: the last bits must still decide, and only within a cell."""
    just_above = np.nextafter(1.0, 2.0)
    medians = dict(zip(GENES, [1.0, just_above, 1.0, just_above, 1.0, 2.0, just_above, 2.0, 2.0], strict=True))
    vocabulary = GeneVocabulary(vocabulary_of([]).tokens, medians=medians, max_length=100)
    counts = np.array([[3, 3, 3, 3, 3, 6, 3, 0, 0], [3, 3, 3, 3, 3, 6, 3, 0, 0], [0, 0, 0, 0, 0, 6, 3, 6, 6]])
    totals = np.array([10_000.0, 10_000.0, 10_000.0])
    expected = [reference(cell, total, GENES, vocabulary) for cell, total in zip(counts, totals, strict=True)]
    assert encode(vocabulary, sparse.csr_array(counts), totals, GENES) == expected
    assert len({count / medians[gene] for gene, count in zip(GENES, counts[0], strict=True) if count}) == 2


def test_many_cells_are_encoded_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = np.random.default_rng(0).poisson(0.6, (40, len(COLUMNS)))
    counts[[0, 7, 39]] = 0
    totals = np.maximum(1.0, counts.sum(axis=1))
    vocabulary = vocabulary_of([CLS, EOS], 6)
    at_once = encode(vocabulary, sparse.csr_array(counts), totals)
    for entries in (1, 3, 20):
        monkeypatch.setattr(rank_value, "ENTRIES_AT_ONCE", entries)
        assert encode(vocabulary, sparse.csr_array(counts), totals) == at_once


def test_an_entry_stored_in_pieces_is_one_count() -> None:
    vocabulary = vocabulary_of([])
    pieces = sparse.csr_array((np.array([1.0, 2.0, 3.0]), np.array([4, 0, 4]), np.array([0, 3])), shape=(1, 11))
    whole = sparse.csr_array((np.array([2.0, 4.0]), np.array([0, 4]), np.array([0, 2])), shape=(1, 11))
    total = np.array([6.0])
    assert encode(vocabulary, pieces, total) == encode(vocabulary, whole, total)
    assert pieces.nnz == 3  # what was given is left as it is


@pytest.mark.parametrize(("count", "total"), [(-1.0, 5.0), (np.nan, 5.0), (np.inf, 5.0), (1.0, 0.0), (1.0, np.nan)])
@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning")
def test_what_has_no_rank_is_refused(count: float, total: float) -> None:
    counts = np.zeros((1, len(COLUMNS)))
    counts[0, :3] = [2.0, count, 1.0]
    with pytest.raises(InputError, match="raw counts and totals above 0"):
        encode(vocabulary_of([]), counts, np.array([total]))


def test_a_gene_without_a_median_is_not_encoded() -> None:
    tokens = vocabulary_of([]).tokens
    vocabulary = GeneVocabulary(tokens, medians={gene: MEDIANS[gene] for gene in GENES[:4]})
    encoder = RankValueEncoder(vocabulary, GENES)
    assert encoder.matched == 4
    encoded = encoder.encode(np.ones((1, 9)), np.array([9.0]))
    assert {vocabulary.names[token] for token in encoded.cell(0)} == set(GENES[:4])


def test_what_cannot_be_encoded_is_refused() -> None:
    with pytest.raises(InputError, match=r"--gene-column.*x, y"):
        RankValueEncoder(vocabulary_of([]), ["x", "y"])
    with pytest.raises(InputError, match="without medians"):
        RankValueEncoder(GeneVocabulary(vocabulary_of([]).tokens), GENES)


def test_pieces_of_a_small_integer_matrix_do_not_overflow() -> None:
    vocabulary = vocabulary_of([])
    pieces = sparse.csr_array((np.array([128, 128, 5], np.uint8), np.array([0, 0, 1]), np.array([0, 3])), shape=(1, 11))
    whole = np.array([[256, 5, *[0] * 9]])
    assert encode(vocabulary, pieces, np.array([261.0])) == encode(vocabulary, whole, np.array([261.0]))
