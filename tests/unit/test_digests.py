"""Digests tell apart what differs, and only that."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from geneformer_ray.data.digests import digest_of
from geneformer_ray.data.vocabulary import GeneVocabulary


@given(st.lists(st.integers(0, 5), max_size=4), st.lists(st.integers(0, 5), max_size=4))
def test_arrays_have_one_digest_exactly_when_they_are_equal(one: list[int], two: list[int]) -> None:
    same = digest_of(np.array(one, dtype=np.int64)) == digest_of(np.array(two, dtype=np.int64))
    assert same == (one == two)


def test_the_boundary_between_values_counts() -> None:
    assert digest_of(np.array([1, 2]), np.array([3])) != digest_of(np.array([1]), np.array([2, 3]))


def test_other_medians_encode_otherwise(vocabulary: GeneVocabulary) -> None:
    other = GeneVocabulary(vocabulary.tokens, medians={**vocabulary.medians, "GENE00": 9.0}, max_length=16)
    assert other.digest == vocabulary.digest
    assert other.encoding_digest != vocabulary.encoding_digest
