"""The gene vocabulary: files in and out, finding genes, and extending it by ``<cls>``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geneformer_ray.data.gene_names import HOW
from geneformer_ray.data.vocabulary import CLS, EOS, MASK, PAD, GeneVocabulary, gene_mask
from geneformer_ray.errors import InputError, UnknownGeneError, VocabularyMismatch

INSULIN, GLUCAGON, SOMATOSTATIN = "ENSG00000254647", "ENSG00000115263", "ENSG00000157005"
RETIRED = "ENSG00000129965"


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def upstream(tmp_path: Path) -> Path:
    """A directory as upstream publishes it, as JSON."""
    directory = tmp_path / "upstream"
    directory.mkdir()
    tokens = {PAD: 0, MASK: 1, CLS: 2, EOS: 3, INSULIN: 4, GLUCAGON: 5, SOMATOSTATIN: 6}
    write(directory / "token_dictionary_gc104M.json", tokens)
    medians = {INSULIN: 3.5, GLUCAGON: 2.25, SOMATOSTATIN: 1.125}
    write(directory / "gene_median_dictionary_gc104M.json", medians)
    names = {"INS": INSULIN, "GCG": GLUCAGON, "AC004556.3": SOMATOSTATIN}
    write(directory / "gene_name_id_dict_gc104M.json", names)
    mapping = {INSULIN: INSULIN, RETIRED: INSULIN, "INSULIN": INSULIN, "ENSG00000000009": "ENSG00000000010"}
    write(directory / "ensembl_mapping_dict_gc104M.json", mapping)
    return directory


# ---------------------------------------------------------------------- files


@settings(max_examples=15)
@given(
    medians=st.dictionaries(st.text(min_size=1), st.floats(1e-6, 1e6), min_size=1, max_size=8),
    max_length=st.integers(1, 10_000),
    added=st.sampled_from([(False, False), (True, False), (False, True), (True, True)]),
)
def test_saved_and_loaded_are_equal(
    tmp_path_factory: pytest.TempPathFactory, medians: dict[str, float], max_length: int, added: tuple[bool, bool]
) -> None:
    medians = {gene: value for gene, value in medians.items() if gene not in (PAD, MASK, CLS, EOS)}
    symbols = {gene: f"{gene} symbol" for gene in medians}
    vocabulary = GeneVocabulary.from_medians(
        medians,
        max_length=max_length,
        symbols=symbols,
        aliases={f"also {gene}": gene for gene in medians},
        mapping={"OLD": next(iter(medians), "x")},
    ).with_special_tokens(*added)
    directory = tmp_path_factory.mktemp("vocabulary")
    vocabulary.save(str(directory))
    for path in (directory, directory / "vocabulary.json"):
        loaded = GeneVocabulary.load(str(path))
        assert loaded == vocabulary
        assert loaded.digest == vocabulary.digest
        assert (loaded.parent_digest, loaded.added) == (vocabulary.parent_digest, vocabulary.added)
        assert loaded.encoding_digest == vocabulary.encoding_digest
        assert loaded.names == vocabulary.names
    assert GeneVocabulary.present_in(str(directory))


def test_altered_tokens_with_the_old_digest_are_refused(vocabulary: GeneVocabulary, tmp_path: Path) -> None:
    vocabulary.save(str(tmp_path))
    file = tmp_path / "vocabulary.json"
    content = json.loads(file.read_text())
    content["tokens"]["GENE00"], content["tokens"]["GENE01"] = content["tokens"]["GENE01"], content["tokens"]["GENE00"]
    write(file, content)
    with pytest.raises(InputError, match="digest"):
        GeneVocabulary.load(str(tmp_path))


def test_digest_depends_on_ids_alone(vocabulary: GeneVocabulary) -> None:
    items = list(vocabulary.tokens.items())
    assert GeneVocabulary(dict(reversed(items)), max_length=99).digest == vocabulary.digest
    assert GeneVocabulary(dict(items[:-1])).digest != vocabulary.digest


def test_upstream_directory(upstream: Path) -> None:
    vocabulary = GeneVocabulary.load(str(upstream))
    assert vocabulary.medians == {INSULIN: 3.5, GLUCAGON: 2.25, SOMATOSTATIN: 1.125}
    assert vocabulary.genes == [INSULIN, GLUCAGON, SOMATOSTATIN]
    assert (vocabulary.pad_id, vocabulary.mask_id, vocabulary.cls_id, vocabulary.eos_id) == (0, 1, 2, 3)
    assert vocabulary.symbol(INSULIN) == "INS"
    assert vocabulary.max_length == 4096
    assert GeneVocabulary.present_in(str(upstream))


def test_upstream_directory_with_tokens_alone(upstream: Path) -> None:
    whole = GeneVocabulary.load(str(upstream))
    for file in upstream.iterdir():
        if not file.name.startswith("token_dictionary"):
            file.unlink()
    tokens_only = GeneVocabulary.load(str(upstream))
    assert tokens_only.digest == whole.digest
    assert tokens_only.medians == tokens_only.symbols == tokens_only.mapping == {}


def test_a_token_dictionary_alone_is_a_vocabulary(upstream: Path) -> None:
    file = upstream / "token_dictionary_gc104M.json"
    assert GeneVocabulary.load(str(file)).digest == GeneVocabulary.load(str(upstream)).digest


def test_input_size_where_none_is_stored() -> None:
    assert GeneVocabulary({PAD: 0, MASK: 1, "A": 2}).max_length == 2048
    assert GeneVocabulary({PAD: 0, MASK: 1, CLS: 2, "A": 3}).max_length == 4096
    assert GeneVocabulary({PAD: 0, MASK: 1, "A": 2}, max_length=7).max_length == 7


@pytest.mark.parametrize(
    "tokens",
    [{PAD: 0, MASK: 1, "A": 3}, {PAD: 0, MASK: 1, "A": 1}, {PAD: 1, MASK: 2, "A": 3}, {PAD: 0, MASK: 1, "A": -1}],
)
def test_ids_with_gaps_or_repeats_are_refused(tokens: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"0 \.\. n-1"):
        GeneVocabulary(tokens)


@pytest.mark.parametrize("missing", [PAD, MASK])
def test_padding_and_mask_are_needed(missing: str) -> None:
    kept = [token for token in (PAD, MASK, "A", "B") if token != missing]
    with pytest.raises(InputError, match=missing):
        GeneVocabulary({token: number for number, token in enumerate(kept)})


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"<pad>": "0"}', '{"<pad>": 0, "<mask>": true}', "{", "\xff"],
    ids=["list", "empty", "text ids", "boolean ids", "cut short", "not UTF-8"],
)
def test_a_broken_token_dictionary_is_one_line(tmp_path: Path, content: str) -> None:
    file = tmp_path / "tokens.json"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"tokens\.json") as raised:
        GeneVocabulary.load(str(file))
    assert raised.value.field == "--vocabulary"
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("stem", "content"),
    [
        ("gene_median_dictionary", {INSULIN: 0}),
        ("gene_median_dictionary", {INSULIN: -1.5}),
        ("gene_median_dictionary", {INSULIN: float("nan")}),
        ("gene_median_dictionary", {INSULIN: "much"}),
        ("gene_median_dictionary", [1.5]),
        ("gene_name_id_dict", ["INS"]),
        ("gene_name_id_dict", {"INS": 4}),
        ("ensembl_mapping_dict", {RETIRED: None}),
    ],
)
def test_broken_dictionaries_beside_the_tokens_are_refused(upstream: Path, stem: str, content: Any) -> None:
    write(upstream / f"{stem}_gc104M.json", content)
    with pytest.raises(InputError, match=stem):
        GeneVocabulary.load(str(upstream))


@pytest.mark.parametrize("max_length", ["long", None, 3.5])
def test_a_broken_input_size_is_refused(vocabulary: GeneVocabulary, tmp_path: Path, max_length: Any) -> None:
    vocabulary.save(str(tmp_path))
    file = tmp_path / "vocabulary.json"
    write(file, json.loads(file.read_text()) | {"max_length": max_length})
    with pytest.raises(InputError, match="max_length"):
        GeneVocabulary.load(str(tmp_path))


def test_a_missing_path_and_an_empty_directory_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        GeneVocabulary.load(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="token_dictionary"):
        GeneVocabulary.load(str(tmp_path), "--model")
    assert not GeneVocabulary.present_in(str(tmp_path))


# ---------------------------------------------------------------------- finding genes


@pytest.mark.parametrize(
    ("name", "found"),
    [
        (INSULIN, INSULIN),
        (INSULIN.lower(), INSULIN),
        (f"{INSULIN}.7", INSULIN),
        (RETIRED, INSULIN),
        (f"{RETIRED}.12", INSULIN),
        ("INS", INSULIN),
        ("ins", INSULIN),
        ("insulin", INSULIN),
        ("AC004556.3", SOMATOSTATIN),
        ("AC004556", None),
        ("AC004556.3.1", None),
        ("GCG.1", None),
        (f"{INSULIN}.", None),
        ("ENSG00000000009", None),
        (PAD, None),
        (CLS, None),
        ("", None),
    ],
)
def test_find(upstream: Path, name: str, found: str | None) -> None:
    assert GeneVocabulary.load(str(upstream)).find(name) == found


def test_other_species_ids_lose_their_version_too() -> None:
    vocabulary = GeneVocabulary({PAD: 0, MASK: 1, "ENSMUSG00000000001": 2, "ENST00000000001": 3})
    assert vocabulary.find("ENSMUSG00000000001.5") == "ENSMUSG00000000001"
    assert vocabulary.find("ENST00000000001.5") is None


def test_the_key_itself_comes_first() -> None:
    """Any string may be a key, also one that looks like a versioned id or is another gene's symbol."""
    vocabulary = GeneVocabulary(
        {PAD: 0, MASK: 1, INSULIN: 2, f"{INSULIN}.7": 3, "INS": 4}, symbols={INSULIN: "INS", "INS": "other"}
    )
    assert vocabulary.find(f"{INSULIN}.7") == f"{INSULIN}.7"
    assert vocabulary.find(f"{INSULIN}.8") == INSULIN
    assert vocabulary.find("INS") == "INS"


def test_an_ambiguous_symbol_is_never_guessed() -> None:
    tokens = {PAD: 0, MASK: 1, "A": 2, "B": 3, "C": 4}
    vocabulary = GeneVocabulary(tokens, symbols={"A": "TWIN", "B": "Twin", "C": "SINGLE", "GONE": "SINGLE"})
    assert vocabulary.find("twin") is None
    assert vocabulary.find("SINGLE") == "C"
    with pytest.raises(UnknownGeneError, match=r"'twin', a symbol of 2 genes; takes one of A, B"):
        vocabulary.resolve("twin")


def test_the_exact_spelling_decides_between_twins() -> None:
    tokens = {PAD: 0, MASK: 1, "A": 2, "B": 3, "C": 4}
    vocabulary = GeneVocabulary(tokens, symbols={"A": "TWIN", "B": "Twin"}, aliases={"TRIPLE": "A", "Triple": "C"})
    assert (vocabulary.find("TWIN"), vocabulary.find("Twin"), vocabulary.find("tWIN")) == ("A", "B", None)
    assert (vocabulary.find("TRIPLE"), vocabulary.find("Triple"), vocabulary.find("triple")) == ("A", "C", None)
    # Two genes of the very same symbol, by whichever dictionary.
    torn = GeneVocabulary(tokens, symbols={"A": "X1", "B": "X2"}, aliases={"X1": "B"}, mapping={"X2": "C", "X3": "C"})
    assert [torn.find(name) for name in ("X1", "X2", "X3", "x3")] == [None, None, "C", "C"]
    assert torn.match(["X1"]).how == ["ambiguous symbol"]


def test_resolve_names_the_nearest_and_the_flag(upstream: Path) -> None:
    vocabulary = GeneVocabulary.load(str(upstream))
    assert vocabulary.resolve("gcg") == GLUCAGON
    with pytest.raises(UnknownGeneError, match=r"--anchor.*'GCC'.*nearest: GCG"):
        vocabulary.resolve("GCC", "--anchor")
    with pytest.raises(UnknownGeneError, match="nothing in it is spelt alike"):
        vocabulary.resolve("ÆØÅ")


def test_every_symbol_of_a_gene_is_found_and_the_first_is_shown(upstream: Path) -> None:
    file = upstream / "gene_name_id_dict_gc104M.json"
    write(file, {"INS": INSULIN, "IDDM2": INSULIN, "Proinsulin": INSULIN, "GCG": GLUCAGON})
    vocabulary = GeneVocabulary.load(str(upstream))
    assert [vocabulary.find(name) for name in ("INS", "IDDM2", "Proinsulin", "PROINSULIN")] == [INSULIN] * 4
    assert vocabulary.symbol(INSULIN) == "INS"
    without = GeneVocabulary(
        vocabulary.tokens, medians=vocabulary.medians, symbols=vocabulary.symbols, mapping=vocabulary.mapping
    )
    assert without.digest == vocabulary.digest
    assert without.encoding_digest != vocabulary.encoding_digest


def test_a_symbol_of_a_retired_id_names_its_successor(upstream: Path) -> None:
    write(upstream / "gene_name_id_dict_gc104M.json", {"INSOLD": RETIRED, "LOST": "ENSG00000000009"})
    vocabulary = GeneVocabulary.load(str(upstream))
    assert vocabulary.find("INSOLD") == INSULIN
    assert vocabulary.find("LOST") is None


@pytest.mark.parametrize(
    ("name", "how"),
    [
        (INSULIN, "key"),
        (INSULIN.lower(), "ensembl id"),
        (f"{INSULIN}.7", "version stripped"),
        (f"{INSULIN.lower()}.7", "version stripped"),
        (RETIRED, "retired id"),
        (RETIRED.lower(), "retired id"),
        (f"{RETIRED}.12", "retired id"),
        ("INS", "symbol"),
        ("INSULIN", "symbol"),
        ("AC004556.3", "symbol"),
        ("insulin", "symbol in other case"),
        ("ac004556.3", "symbol in other case"),
        ("AC004556", "unknown"),
        (f"{INSULIN}.7\n", "unknown"),
        (f"{INSULIN}.\N{ARABIC-INDIC DIGIT SEVEN}", "unknown"),
        (f"{INSULIN}_PAR_Y", "unknown"),
        (PAD, "special token"),
        (EOS, "special token"),
    ],
)
def test_how_a_name_was_matched(upstream: Path, name: str, how: str) -> None:
    assert GeneVocabulary.load(str(upstream)).match([name]).how == [how]


def test_matches_are_counted_with_examples(upstream: Path) -> None:
    matches = GeneVocabulary.load(str(upstream)).match(["gcg", "one", INSULIN, "two", "one", "three", "four", "INS"])
    assert matches.counts == {"key": 1, "symbol": 1, "symbol in other case": 1, "unknown": 5}
    assert list(matches.counts) == [how for how in HOW if how in matches.counts]
    assert (matches.matched, matches.unmatched) == (3, ["one", "two", "one", "three", "four"])
    assert matches.examples("unknown") == ["one", "two", "three"]
    assert matches.examples("unknown", limit=1) == ["one"]
    assert matches.examples("retired id") == []


NAMES = st.sampled_from([INSULIN, GLUCAGON, RETIRED, "A", "a", "B", "Ab", "AB", "ab", "C.1", PAD, f"{INSULIN}.2"])


@settings(max_examples=60)
@given(
    genes=st.lists(NAMES.filter(lambda name: name != PAD), unique=True),
    symbols=st.dictionaries(NAMES, NAMES),
    aliases=st.dictionaries(NAMES, NAMES),
    mapping=st.dictionaries(NAMES, NAMES),
    names=st.lists(NAMES | st.text(max_size=3)),
)
def test_find_match_and_resolve_agree(
    genes: list[str], symbols: dict[str, str], aliases: dict[str, str], mapping: dict[str, str], names: list[str]
) -> None:
    tokens = {name: number for number, name in enumerate([PAD, MASK, *genes])}
    vocabulary = GeneVocabulary(tokens, symbols=symbols, aliases=aliases, mapping=mapping)
    matches = vocabulary.match(names)
    assert matches.keys == [vocabulary.find(name) for name in names]
    assert sum(matches.counts.values()) == len(names)
    for name, key, how in zip(names, matches.keys, matches.how, strict=True):
        assert how in HOW
        assert (key is None) == (how in HOW[-3:])
        assert key is None or key in genes
        assert name not in genes or key == name
        if key is None:
            with pytest.raises(UnknownGeneError):
                vocabulary.resolve(name)
        else:
            assert vocabulary.resolve(name) == key


def test_a_whole_annotation_is_matched_at_once() -> None:
    """60,000 names take a quarter of a second of one core, the index included; ten times that is a mistake."""
    ids = [f"ENSG{number:011d}" for number in range(20_000)]
    vocabulary = GeneVocabulary(
        {name: number for number, name in enumerate([PAD, MASK, *ids])},
        symbols={gene: f"Symbol{number}" for number, gene in enumerate(ids)},
        mapping={f"OLD{number}": ids[number % 20_000] for number in range(100_000)},
    )
    names = [f"{ids[0]}.1", *(f"symbol{number}" for number in range(59_999))]
    start = time.process_time()
    matches = vocabulary.match(names)
    assert time.process_time() - start < 2.5
    assert matches.matched == 20_001


# ---------------------------------------------------------------------- <cls> and other cells


def test_with_cls_keeps_every_other_id_and_names_its_parent(vocabulary: GeneVocabulary) -> None:
    extended = vocabulary.with_cls()
    assert {**vocabulary.tokens, CLS: len(vocabulary)} == extended.tokens
    assert extended.parent_digest == vocabulary.digest != extended.digest
    assert extended.max_length == vocabulary.max_length
    assert extended.genes == vocabulary.genes
    assert extended.with_cls() is extended


@settings(max_examples=50)
@given(length=st.integers(0, 40))
def test_adapt_puts_cls_in_front_and_cuts_to_size(length: int) -> None:
    parent = GeneVocabulary.from_medians({f"G{number:02d}": 1.0 for number in range(40)}, max_length=16)
    extended = parent.with_cls()
    cell = np.arange(2, 2 + length, dtype=np.int64)
    adapted = extended.adapt(cell, parent.digest)
    assert adapted[0] == extended.cls_id
    assert len(adapted) <= extended.max_length
    np.testing.assert_array_equal(adapted[1:], cell[:15])
    assert adapted.dtype == np.int32
    np.testing.assert_array_equal(extended.adapt(cell, None), adapted)
    for digest in (extended.digest, None):
        np.testing.assert_array_equal(extended.adapt(adapted, digest), adapted)
    np.testing.assert_array_equal(parent.adapt(cell, parent.digest), cell)


@pytest.mark.parametrize(
    ("cls", "eos", "added"),
    [(True, False, (CLS,)), (False, True, (EOS,)), (True, True, (CLS, EOS)), (False, False, ())],
)
def test_special_tokens_are_added_behind_all_others(
    vocabulary: GeneVocabulary, cls: bool, eos: bool, added: tuple[str, ...]
) -> None:
    extended = vocabulary.with_special_tokens(cls=cls, eos=eos)
    assert extended.names == [*vocabulary.names, *added]
    assert extended.added == added
    assert extended.parent_digest == (vocabulary.digest if added else None)
    assert extended.with_special_tokens(cls=cls, eos=eos) is extended
    assert extended.max_length == vocabulary.max_length


def test_only_what_is_missing_is_added(special_vocabulary: GeneVocabulary, vocabulary: GeneVocabulary) -> None:
    assert special_vocabulary.with_special_tokens(cls=True, eos=True) is special_vocabulary
    assert vocabulary.with_cls().with_special_tokens(cls=True, eos=True).added == (EOS,)


@settings(max_examples=80)
@given(
    length=st.integers(0, 40),
    had=st.sampled_from([(), (CLS,), (EOS,), (CLS, EOS)]),
    cls=st.booleans(),
    eos=st.booleans(),
)
def test_adapted_cells_are_as_if_encoded_with_the_extended_vocabulary(
    length: int, had: tuple[str, ...], cls: bool, eos: bool
) -> None:
    size = 16
    genes = [f"G{number:02d}" for number in range(40)]
    parent = GeneVocabulary({name: number for number, name in enumerate([PAD, MASK, *had, *genes])}, max_length=size)
    extended = parent.with_special_tokens(cls=cls, eos=eos)

    def encoded(vocabulary: GeneVocabulary) -> list[int]:
        front = [] if vocabulary.cls_id is None else [vocabulary.cls_id]
        behind = [] if vocabulary.eos_id is None else [vocabulary.eos_id]
        room = size - len(front) - len(behind)
        return [*front, *(vocabulary.tokens[gene] for gene in genes[: min(length, room)]), *behind]

    cell = np.array(encoded(parent), dtype=np.int64)
    for digest in (parent.digest, None):
        adapted = extended.adapt(cell, digest)
        assert adapted.dtype == np.int32
        assert adapted.tolist() == encoded(extended)
        assert extended.adapt(adapted, extended.digest).tolist() == adapted.tolist()
        assert extended.adapt(adapted, None).tolist() == adapted.tolist()


def test_a_file_from_before_eos_could_be_added_means_cls(vocabulary: GeneVocabulary, tmp_path: Path) -> None:
    extended = vocabulary.with_cls()
    extended.save(str(tmp_path))
    file = tmp_path / "vocabulary.json"
    content = json.loads(file.read_text())
    del content["added"], content["aliases"]
    write(file, content)
    assert GeneVocabulary.load(str(tmp_path)) == extended
    vocabulary.save(str(tmp_path))
    content = json.loads(file.read_text())
    del content["added"]
    write(file, content)
    assert GeneVocabulary.load(str(tmp_path)).added == ()


@pytest.mark.parametrize("added", ["<cls>", ["<eos>"], ["G1"], [1], [[]], None])
def test_a_broken_list_of_added_tokens_is_refused(vocabulary: GeneVocabulary, tmp_path: Path, added: Any) -> None:
    vocabulary.with_cls().save(str(tmp_path))
    file = tmp_path / "vocabulary.json"
    write(file, json.loads(file.read_text()) | {"added": added})
    with pytest.raises(InputError, match="added"):
        GeneVocabulary.load(str(tmp_path))


def test_check_cells(vocabulary: GeneVocabulary) -> None:
    extended = vocabulary.with_cls()
    extended.check_cells(extended.digest)
    extended.check_cells(vocabulary.digest)
    extended.check_cells(None, len(extended) - 1)
    with pytest.raises(VocabularyMismatch, match=extended.digest):
        vocabulary.check_cells(extended.digest)
    with pytest.raises(VocabularyMismatch, match="someone else's"):
        extended.check_cells("someone else's")
    with pytest.raises(VocabularyMismatch, match=f"token id {len(extended)}"):
        extended.check_cells(None, len(extended))


def test_gene_mask_marks_genes_alone(special_vocabulary: GeneVocabulary) -> None:
    ids = np.array([[2, 4, 5, 3], [2, 43, 3, 0]])
    np.testing.assert_array_equal(
        gene_mask(special_vocabulary, ids), [[False, True, True, False], [False, True, False, False]]
    )


def test_a_cell_without_cls_is_not_read_as_if_it_had_one(special_vocabulary: GeneVocabulary) -> None:
    with pytest.raises(VocabularyMismatch, match="<cls>"):
        special_vocabulary.adapt(np.array([7, 8], dtype=np.int32), None)
