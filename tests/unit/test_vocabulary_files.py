"""Vocabularies in upstream's files: sets of dictionaries in folders, as JSON or pickle, and pickles that mean harm."""

from __future__ import annotations

import builtins
import copyreg
import io
import json
import math
import os
import pickle
import pickletools
import shutil
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig

from geneformer_ray.compute.model_directory import find_model, model_vocabulary
from geneformer_ray.data.pickles import read_pickled_dictionary
from geneformer_ray.data.vocabulary import CLS, EOS, MASK, PAD, GeneVocabulary
from geneformer_ray.errors import InputError, VocabularyMismatch

DICTIONARIES = Path(__file__).resolve().parents[3] / "shared" / "data" / "dictionaries"
V1, V2 = ("v1_gc30M", 25_426), ("v2_gc104M", 20_275)
needs_dictionaries = pytest.mark.skipif(not DICTIONARIES.exists(), reason="needs ../shared/data")


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json.dumps(content).encode() if path.suffix == ".json" else pickle.dumps(content))
    return path


def write_set(folder: Path, suffix: str, genes: int, *, ending: str = "pkl", median: float = 1.0) -> Path:
    """A set of dictionaries of so many genes, numpy scalars and all."""
    names = [f"ENSG{number:011d}" for number in range(genes)]
    tokens = {name: number if ending == "json" else np.int16(number) for number, name in enumerate([PAD, MASK, *names])}
    write(folder / f"token_dictionary{suffix}.{ending}", tokens)
    medians = {name: median if ending == "json" else np.float64(median) for name in names}
    write(folder / f"gene_median_dictionary{suffix}.{ending}", medians)
    write(folder / f"gene_name_id_dict{suffix}.{ending}", {f"G{number}{suffix}": n for number, n in enumerate(names)})
    write(folder / f"ensembl_mapping_dict{suffix}.{ending}", {name: name for name in names})
    return folder


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """Upstream's repository: models of three sizes in folders, and dictionaries for two of them."""
    root = tmp_path / "Geneformer"
    for name, size in {"V1": 7, "V2": 5, "V3": 99, "fine_tuned_models/V1_classifier": 7}.items():
        write(root / name / "config.json", {"model_type": "bert", "vocab_size": size})
        (root / name / "model.safetensors").touch()
    write_set(root / "geneformer", "_gc104M", genes=3)
    write_set(root / "geneformer" / "gene_dictionaries_30m", "_gc30M", genes=5)
    return root


def vocabulary_of_model(directory: Path, given: str | None = None, positions: int = 2048) -> GeneVocabulary:
    size = json.loads((directory / "config.json").read_text())["vocab_size"]
    return model_vocabulary(directory, given, BertConfig(vocab_size=size, max_position_embeddings=positions))


# ---------------------------------------------------------------------- upstream's own files


@needs_dictionaries
@pytest.mark.parametrize(("version", "size"), [V1, V2])
def test_upstreams_pickles_and_json_are_one_vocabulary(version: str, size: int, tmp_path: Path) -> None:
    loaded = {}
    for ending in ("pkl", "json"):
        folder = tmp_path / ending
        folder.mkdir()
        for file in (DICTIONARIES / version).glob(f"*.{ending}"):
            (folder / file.name).symlink_to(file)
        loaded[ending] = GeneVocabulary.load(str(folder))
        assert GeneVocabulary.present_in(str(folder))
    assert loaded["pkl"] == loaded["json"]
    assert loaded["pkl"].encoding_digest == loaded["json"].encoding_digest
    vocabulary = loaded["pkl"]
    assert len(vocabulary) == size
    assert {type(token) for token in vocabulary.tokens.values()} == {int}
    assert {type(median) for median in vocabulary.medians.values()} == {float}
    assert set(vocabulary.genes) <= vocabulary.medians.keys()
    assert vocabulary.max_length == {V1: 2048, V2: 4096}[version, size]
    # Each name of each dictionary that can name a gene of the vocabulary does.
    names = {symbol: gene for gene, symbol in vocabulary.symbols.items()} | vocabulary.aliases | vocabulary.mapping
    expected = [gene if gene in vocabulary.tokens else None for gene in names.values()]
    assert vocabulary.match(list(names)).keys == expected


@needs_dictionaries
@pytest.mark.parametrize(("version", "size"), [V1, V2])
def test_one_of_upstreams_token_pickles_alone(version: str, size: int, tmp_path: Path) -> None:
    (file,) = (DICTIONARIES / version).glob("token_dictionary*.pkl")
    alone = GeneVocabulary.load(shutil.copy(file, tmp_path))
    assert len(alone) == size
    assert not alone.medians
    assert alone.digest == GeneVocabulary.load(str(file)).digest


@needs_dictionaries
def test_upstreams_symbols(tmp_path: Path) -> None:
    vocabulary = GeneVocabulary.load(str(DICTIONARIES / "v2_gc104M"))
    insulin = "ENSG00000254647"
    assert [vocabulary.find(name) for name in ("INS", "ins", f"{insulin}.7", insulin.lower())] == [insulin] * 4
    how = vocabulary.match(["C1orf112", "C1ORF112", "5S_RRNA", "A1BG", "SCYL3", "GAB"]).how
    assert set(how) <= {"symbol", "symbol in other case", "unknown"}
    assert vocabulary.find("ABG") == vocabulary.find("A1BG") is not None


# ---------------------------------------------------------------------- sets of files


def test_json_is_preferred_file_by_file(tmp_path: Path) -> None:
    write_set(tmp_path, "_gc30M", genes=3, ending="pkl", median=1.0)
    write(tmp_path / "gene_median_dictionary_gc30M.json", {"ENSG00000000000": 2.5})
    vocabulary = GeneVocabulary.load(str(tmp_path))
    assert vocabulary.medians == {"ENSG00000000000": 2.5}
    assert vocabulary.symbol("ENSG00000000001") == "G1_gc30M"


def test_two_corpora_in_one_folder_are_told_apart(tmp_path: Path) -> None:
    for suffix, median in (("_gc95M", 0.95), ("_gc104M", 1.04)):
        write_set(tmp_path, suffix, genes=3, median=median)
    for size in (None, 5):
        with pytest.raises(InputError, match=r"2 token dictionaries.*token_dictionary_gc104M\.pkl") as raised:
            GeneVocabulary.load(str(tmp_path), size=size)
        assert "token_dictionary_gc95M.pkl" in str(raised.value)
        assert "\n" not in str(raised.value)
    # The file names its corpus, and its companions come with it.
    for suffix, median in (("_gc95M", 0.95), ("_gc104M", 1.04)):
        vocabulary = GeneVocabulary.load(str(tmp_path / f"token_dictionary{suffix}.pkl"))
        assert set(vocabulary.medians.values()) == {median}
        assert vocabulary.find(f"G1{suffix}") == "ENSG00000000001"


def test_the_models_size_decides_between_corpora(tmp_path: Path) -> None:
    write_set(tmp_path, "_gc30M", genes=5)
    write_set(tmp_path, "_gc104M", genes=3)
    assert len(GeneVocabulary.load(str(tmp_path), size=7)) == 7
    assert len(GeneVocabulary.load(str(tmp_path), size=5)) == 5
    with pytest.raises(VocabularyMismatch, match=r"7 tokens in .*gc30M.*one of 6 tokens, the model's size"):
        GeneVocabulary.load(str(tmp_path), size=6)


def test_plain_names_are_a_set_of_their_own(tmp_path: Path) -> None:
    write_set(tmp_path, "", genes=3, median=0.5)
    assert set(GeneVocabulary.load(str(tmp_path)).medians.values()) == {0.5}
    (tmp_path / "token_dictionary.pkl").rename(tmp_path / "token_dictionary_gc30M.pkl")
    assert set(GeneVocabulary.load(str(tmp_path)).medians.values()) == {0.5}


def test_dictionaries_of_another_corpus_are_left_out(tmp_path: Path) -> None:
    write_set(tmp_path, "_gc30M", genes=3)
    (tmp_path / "gene_median_dictionary_gc30M.pkl").rename(tmp_path / "gene_median_dictionary_gc104M.pkl")
    vocabulary = GeneVocabulary.load(str(tmp_path))
    assert not vocabulary.medians
    assert vocabulary.symbols


# ---------------------------------------------------------------------- snapshots of upstream's repository


@pytest.mark.parametrize(
    ("model", "corpus"), [("V1", "_gc30M"), ("V2", "_gc104M"), ("fine_tuned_models/V1_classifier", "_gc30M")]
)
def test_a_model_of_a_snapshot_finds_its_dictionaries_by_size(snapshot: Path, model: str, corpus: str) -> None:
    directory = find_model(str(snapshot / model))
    vocabulary = vocabulary_of_model(directory, positions=64)
    assert vocabulary.find(f"G1{corpus}") == "ENSG00000000001"
    assert vocabulary.medians
    assert vocabulary.max_length == 64
    assert vocabulary_of_model(directory, str(snapshot)).digest == vocabulary.digest
    assert vocabulary_of_model(directory, str(snapshot / "geneformer")).digest == vocabulary.digest


def test_a_model_that_no_dictionary_fits_is_one_line(snapshot: Path) -> None:
    for path in (None, str(snapshot)):
        with pytest.raises(VocabularyMismatch, match=r"--vocabulary: .* one of 99 tokens, the model's size") as raised:
            vocabulary_of_model(snapshot / "V3", path)
        assert "7 tokens in" in str(raised.value)
        assert "token_dictionary_gc104M.pkl" in str(raised.value)
        assert "\n" not in str(raised.value)


def test_one_dictionary_that_does_not_fit_is_not_taken_either(snapshot: Path) -> None:
    shutil.rmtree(snapshot / "geneformer" / "gene_dictionaries_30m")
    with pytest.raises(VocabularyMismatch, match=r"5 tokens in .*token_dictionary_gc104M\.pkl; takes one of 7 tokens"):
        vocabulary_of_model(snapshot / "V1")


def test_two_dictionaries_of_the_models_size_are_ambiguous(snapshot: Path) -> None:
    other = write_set(snapshot / "geneformer" / "gene_dictionaries_95m", "_gc95M", genes=3, median=2.0)
    for path in (None, str(snapshot)):
        with pytest.raises(InputError, match=r"--vocabulary: .*2 token dictionaries of 5 tokens") as raised:
            vocabulary_of_model(snapshot / "V2", path)
        assert str(other) in str(raised.value)
        assert f"{snapshot}/geneformer" in str(raised.value)
    assert set(vocabulary_of_model(snapshot / "V2", str(other)).medians.values()) == {2.0}
    # Named, the folder that holds one of that size itself is meant.
    assert set(vocabulary_of_model(snapshot / "V2", f"{snapshot}/geneformer").medians.values()) == {1.0}
    assert len(vocabulary_of_model(snapshot / "V1")) == 7


def test_a_snapshots_root_without_a_model_names_the_folders(snapshot: Path) -> None:
    with pytest.raises(InputError, match="2 token dictionaries") as raised:
        GeneVocabulary.load(str(snapshot))
    choices = f"takes one of {snapshot}/geneformer, {snapshot}/geneformer/gene_dictionaries_30m"
    assert str(raised.value).endswith(choices)
    assert len(GeneVocabulary.load(str(snapshot / "geneformer"))) == 5
    assert len(GeneVocabulary.load(str(snapshot / "geneformer" / "gene_dictionaries_30m"))) == 7
    shutil.rmtree(snapshot / "geneformer" / "gene_dictionaries_30m")
    assert len(GeneVocabulary.load(str(snapshot))) == 5


def test_a_models_own_vocabulary_comes_first(snapshot: Path) -> None:
    own = GeneVocabulary({PAD: 0, MASK: 1, "A": 2, "B": 3, "C": 4})
    own.save(str(snapshot / "V2"))
    assert vocabulary_of_model(snapshot / "V2").digest == own.digest
    with pytest.raises(VocabularyMismatch, match=own.digest):
        vocabulary_of_model(snapshot / "V2", str(snapshot))


def test_dictionaries_are_looked_for_in_geneformer_alone(snapshot: Path) -> None:
    (snapshot / "geneformer").rename(snapshot / "others")
    with pytest.raises(InputError, match="does not carry one"):
        vocabulary_of_model(snapshot / "V2")


def test_a_model_at_a_uri_brings_its_snapshots_dictionaries(snapshot: Path) -> None:
    for model, size in (("V1", 7), ("fine_tuned_models/V1_classifier", 7), ("V2", 5)):
        directory = find_model(f"file://{snapshot}/{model}")
        assert not directory.is_relative_to(snapshot)
        assert len(vocabulary_of_model(directory)) == size
        shutil.rmtree(directory)
    assert len(GeneVocabulary.load(f"file://{snapshot}/geneformer")) == 5
    assert len(GeneVocabulary.load(f"file://{snapshot}", size=7)) == 7


# ---------------------------------------------------------------------- pickles

PLAIN = st.text(max_size=5) | st.integers() | st.floats()
NUMPY = st.one_of(
    st.sampled_from(["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"]).flatmap(
        lambda kind: st.integers(*(int(b) for b in (np.iinfo(kind).min, np.iinfo(kind).max))).map(np.dtype(kind).type)
    ),
    st.floats(width=32).map(np.float32),
    st.floats().map(np.float64),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=4).map(np.str_),
)


def load_pickled(tmp_path: Path, content: bytes) -> dict[str, Any]:
    file = tmp_path / "token_dictionary.pkl"
    file.write_bytes(content)
    return read_pickled_dictionary(str(file), "--vocabulary")


@settings(max_examples=80)
@given(content=st.dictionaries(st.text(max_size=5), PLAIN | NUMPY), protocol=st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_plain_values_come_back_in_every_protocol(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any], protocol: int
) -> None:
    loaded = load_pickled(tmp_path_factory.mktemp("pickle"), pickle.dumps(content, protocol=protocol))
    assert list(loaded) == list(content)
    for value, original in zip(loaded.values(), content.values(), strict=True):
        plain = original.item() if isinstance(original, np.generic) else original
        assert type(value) is type(plain)
        assert value == plain or (math.isnan(value) and math.isnan(plain))


def test_big_endian_scalars_and_the_old_name_of_numpys_core(tmp_path: Path) -> None:
    # numpy turns its scalars to the machine's order; another machine's pickle comes with the other.
    big = pickle.dumps({"A": np.int16(258)}, protocol=4).replace(b"\x8c\x01<", b"\x8c\x01>")
    assert load_pickled(tmp_path, big.replace(b"C\x02\x02\x01", b"C\x02\x01\x02")) == {"A": 258}
    assert load_pickled(tmp_path, big) == {"A": 513}
    renamed = pickle.dumps({"A": np.int16(7)}, protocol=0).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert load_pickled(tmp_path, renamed) == {"A": 7}


class Touch:
    """Makes a file when it is unpickled by anything that allows it."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


class Nested:
    pass


class Persistent(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        return "someone else's" if isinstance(value, Nested) else None


def persistent(protocol: int) -> bytes:
    stream = io.BytesIO()
    Persistent(stream, protocol=protocol).dump({"A": Nested()})
    return stream.getvalue()


def deep_key() -> bytes:
    """A key nested so deeply that hashing it would crash the process."""
    return b"\x80\x02})" + b"\x85" * 100_000 + b"K\x01s."


MARKER = "was here"
HARMFUL: dict[str, tuple[Any, str]] = {
    "os.system": ({"A": Touch(os.system, f"touch '{MARKER}'")}, "posix.system"),
    "os.system by its public name": (f"cos\nsystem\n(S\"touch '{MARKER}'\"\ntR.".encode(), "os.system"),
    "os.system as an old instance": (f"(S\"touch '{MARKER}'\"\nios\nsystem\n.".encode(), "os.system"),
    "eval": ({"A": Touch(builtins.eval, f"open('{MARKER}', 'w').close()")}, "builtins.eval"),
    "getattr": (b"c__builtin__\ngetattr\n.", "__builtin__.getattr"),
    "numpy's own loader": (b"cnumpy\nload\n.", "numpy.load"),
    "dotted name": (b"\x80\x04\x8c\x05numpy\x8c\x0ddtype.__new__\x93.", "numpy.dtype.__new__"),
    "name over two lines": (b"\x80\x04\x8c\x03a\nb\x8c\x03c\x1bd\x93.", r"a\nb.c\x1bd"),
    "array of objects": (np.array([Nested()], dtype=object), "multiarray._reconstruct"),
    "array": ({"A": np.arange(3)}, "numpy"),
    "object scalar": (b"\x80\x02}K\x01cnumpy\ndtype\n(X\x02\x00\x00\x00O8K\x00K\x01tRs.", "numpy.dtype('O8')"),
    "complex": ({"A": np.complex128(1)}, "numpy.dtype('c16')"),
    "date": ({"A": np.datetime64("2020-01-01")}, "numpy.dtype('M8')"),
    "boolean": ({"A": True}, "a value of type bool"),
    "numpy boolean": ({"A": np.bool_(True)}, "a value of type bool"),
    "none": ({"A": None}, "a value of type NoneType"),
    "instance": ({"A": Nested()}, "test_vocabulary_files.Nested"),
    "ordered dictionary": (OrderedDict(A=1), "collections.OrderedDict"),
    "list": (["A"], "a list"),
    "list as value": ({"A": [1]}, "a list"),
    "set": ({"A": {1}}, "a set"),
    "frozenset": ({"A": frozenset([1])}, "a frozenset"),
    "tuple": (("A", 1), "tuple"),
    "tuple as value": ({"A": (1,)}, "a value of type tuple"),
    "dictionary as value": ({"A": {"B": 1}}, "a value of type dict"),
    "text": ("A", "str"),
    "bytes": ({"A": b"1"}, "a value of type bytes"),
    "bytearray": ({"A": bytearray(b"1")}, "builtins.bytearray"),
    "bytearray of protocol 5": (pickle.dumps({"A": bytearray(b"1")}, protocol=5), "a bytearray"),
    "bytes as key": ({b"A": 1}, "a key of type bytes"),
    "number as key": ({1: 1}, "a key of type int"),
    "deeply nested key": (deep_key(), "a key of type tuple"),
    "dictionary in itself": (b"\x80\x02}q\x00X\x01\x00\x00\x00Ah\x00s.", "a value of type dict"),
    "persistent id": (persistent(0), "a persistent id"),
    "binary persistent id": (persistent(4), "a persistent id"),
    "extension code": (b"\x80\x02}X\x01\x00\x00\x00A\x82\xf0s.", "the extension code 240"),
    "wide extension code": (b"\x80\x02\x84\xf1\x00\x00\x00.", "the extension code 241"),
    "new object": (b"\x80\x02cnumpy\ndtype\n)\x81.", "the pickle instruction NEWOBJ"),
    "call of text": (b"\x80\x02X\x01\x00\x00\x00A)R.", "a call of str"),
    "state of a function": (b"\x80\x02c_codecs\nencode\n}b.", "a state of function"),
    "state of a class": (b"\x80\x02cnumpy\ndtype\nN}X\x04\x00\x00\x00codeX\x01\x00\x00\x00xs\x86b.", "a state of type"),
    "other encoding": (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00AX\x05\x00\x00\x00rot13\x86R.", "_codecs.encode"),
    "entries of text": (b"\x80\x02X\x01\x00\x00\x00AX\x01\x00\x00\x00BK\x01s.", "entries of str"),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMFUL)
def test_anything_else_is_refused_by_its_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # A real extension, used once: the C unpickler would give it out without asking.
    copyreg.add_extension("os", "system", 240)
    try:
        pickle.loads(b"\x80\x02\x82\xf0.")
        content, met = HARMFUL[name]
        raw = content if isinstance(content, bytes) else pickle.dumps(content)
        with pytest.raises(InputError) as raised:
            load_pickled(tmp_path, raw)
    finally:
        copyreg.remove_extension("os", "system", 240)
        copyreg.clear_extension_cache()
    message = str(raised.value)
    assert "\n" not in message
    assert message.isprintable()
    assert "token_dictionary.pkl, a pickle that holds " in message
    assert met in message
    assert [file.name for file in tmp_path.iterdir()] == ["token_dictionary.pkl"]


def test_the_harm_is_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused above does happen to those who trust it."""
    monkeypatch.chdir(tmp_path)
    for name in ("os.system by its public name", "eval"):
        content, _ = HARMFUL[name]
        pickle.loads(content if isinstance(content, bytes) else pickle.dumps(content))
        (tmp_path / MARKER).unlink()


def whole() -> bytes:
    return pickle.dumps({f"ENSG{number:011d}": np.int16(number) for number in range(3)}, protocol=4)


def test_a_truncated_pickle_is_one_line(tmp_path: Path) -> None:
    content = whole()
    assert len(load_pickled(tmp_path, content)) == 3
    for length in range(len(content)):
        with pytest.raises(InputError, match="pickle") as raised:
            load_pickled(tmp_path, content[:length])
        assert str(raised.value).isprintable()


@settings(max_examples=150)
@given(position=st.integers(0, len(whole()) - 1), byte=st.integers(0, 255))
def test_a_damaged_pickle_gives_plain_values_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, position: int, byte: int
) -> None:
    content = bytearray(whole())
    content[position] = byte
    try:
        loaded = load_pickled(tmp_path_factory.getbasetemp(), bytes(content))
    except InputError as error:
        assert str(error).isprintable()
    else:
        assert {type(value) for value in loaded.values()} <= {int, float, str}
        assert {type(key) for key in loaded} <= {str}


CODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]


@settings(max_examples=150)
@given(st.lists(st.sampled_from(CODES) | st.binary(max_size=3), max_size=30))
def test_no_instructions_do_harm(tmp_path_factory: pytest.TempPathFactory, instructions: list[bytes]) -> None:
    try:
        loaded = load_pickled(tmp_path_factory.getbasetemp(), b"".join([*instructions, b"."]))
    except InputError as error:
        assert str(error).isprintable()
    else:
        assert type(loaded) is dict


def test_a_pickle_that_names_a_huge_size_takes_no_memory(tmp_path: Path) -> None:
    huge = struct.pack("<Q", 2**62)
    for instruction in (b"\x8d", b"\x8e", b"\x96"):
        with pytest.raises(InputError):
            load_pickled(tmp_path, b"\x80\x05}" + instruction + huge + b".")
    assert load_pickled(tmp_path, b"\x80\x02}r\xff\xff\xff\x7f.") == {}
    assert load_pickled(tmp_path, b"\x80\x04}\x95" + huge + b".") == {}


def test_a_vocabulary_with_a_harmful_companion_is_refused_whole(tmp_path: Path) -> None:
    write_set(tmp_path, "_gc30M", genes=3)
    write(tmp_path / "ensembl_mapping_dict_gc30M.pkl", {"A": Touch(os.system, "false")})
    with pytest.raises(
        InputError, match=r"--model: .*ensembl_mapping_dict_gc30M.pkl, a pickle that holds posix.system"
    ):
        GeneVocabulary.load(str(tmp_path), "--model")


@pytest.mark.parametrize(
    ("stem", "content", "reason"),
    [
        ("token_dictionary", {PAD: 0, MASK: 1.0}, "integer id"),
        ("token_dictionary", {PAD: 0, MASK: 1, "A": np.int16(3)}, "0 .. n-1"),
        ("gene_median_dictionary", {"A": np.float64("nan")}, "finite medians"),
        ("gene_median_dictionary", {"A": np.float32("inf")}, "finite medians"),
        ("gene_median_dictionary", {"A": "much"}, "gene -> number"),
        ("gene_name_id_dict", {"A": np.float64("nan")}, "name -> name"),
    ],
)
def test_pickles_are_checked_as_json_is(tmp_path: Path, stem: str, content: Any, reason: str) -> None:
    write_set(tmp_path, "", genes=3)
    write(tmp_path / f"{stem}.pkl", content)
    with pytest.raises(InputError, match=reason):
        GeneVocabulary.load(str(tmp_path))


def test_special_tokens_set_the_input_size(tmp_path: Path) -> None:
    write(tmp_path / "token_dictionary.pkl", {PAD: 0, MASK: 1, CLS: 2, EOS: 3, "A": 4})
    assert GeneVocabulary.load(str(tmp_path)).max_length == 4096
