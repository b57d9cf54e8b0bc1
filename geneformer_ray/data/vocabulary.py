"""The gene vocabulary: which token stands for which gene, and each gene's non-zero median over a corpus."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from geneformer_ray.data import storage
from geneformer_ray.data.digests import digest_of
from geneformer_ray.errors import InputError, NotThereYetError, UnknownGeneError, VocabularyMismatch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

__all__ = ["CLS", "EOS", "MASK", "PAD", "GeneVocabulary", "gene_mask"]

PAD, MASK, CLS, EOS = "<pad>", "<mask>", "<cls>", "<eos>"
SPECIAL = (PAD, MASK, CLS, EOS)
FILE_NAME = "vocabulary.json"
FORMAT = "geneformer-ray vocabulary 1"

# A version is stripped only from an Ensembl gene id: symbols such as AC004556.3 keep their dot.
_VERSIONED = re.compile(r"^(ENS[A-Z]*G\d{11})\.\d+$")


@dataclass(frozen=True)
class GeneVocabulary:
    """Genes and special tokens with their ids.

    Parameters
    ----------
    tokens
        Gene or special token -> id. The ids are 0 .. n-1, each once.
    medians
        Gene -> non-zero median of count / total * 10,000 over the corpus; empty where unknown (only encoding needs it).
    symbols
        Gene -> symbol; empty where the genes are symbols themselves.
    mapping
        Any Ensembl id -> the id that the vocabulary uses.
    max_length
        The model's input size in tokens, special tokens included.
    parent_digest
        The digest of the vocabulary that this one extends by a ``<cls>``; cells encoded with the parent are accepted.
    """

    tokens: Mapping[str, int]
    medians: Mapping[str, float] = field(default_factory=dict)
    symbols: Mapping[str, str] = field(default_factory=dict)
    mapping: Mapping[str, str] = field(default_factory=dict)
    max_length: int = 0
    parent_digest: str | None = None

    def __post_init__(self) -> None:
        if sorted(self.tokens.values()) != list(range(len(self.tokens))):
            raise InputError("--vocabulary", "token ids with gaps or repeats", "ids 0 .. n-1, each once")
        for token in (PAD, MASK):
            if token not in self.tokens:
                raise InputError("--vocabulary", f"a token dictionary without {token}", "one with <pad> and <mask>")
        if self.max_length <= 0:
            # What a vocabulary without a stored length has: the input size of the V2 and V1 models.
            object.__setattr__(self, "max_length", 4096 if CLS in self.tokens else 2048)

    def __len__(self) -> int:
        return len(self.tokens)

    # ------------------------------------------------------------------ what it holds

    @cached_property
    def digest(self) -> str:
        """A hash of the token ids: two vocabularies with the same digest give ids the same meaning."""
        canonical = json.dumps(sorted(self.tokens.items(), key=lambda item: item[1]), ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @cached_property
    def encoding_digest(self) -> str:
        """A hash of all that decides how a cell is encoded: tokens, medians, mapping, symbols and length."""
        return digest_of(self.digest, dict(self.medians), dict(self.mapping), dict(self.symbols), self.max_length)

    @cached_property
    def names(self) -> list[str]:
        """Token names by id."""
        return sorted(self.tokens, key=self.tokens.__getitem__)

    @cached_property
    def genes(self) -> list[str]:
        """The genes, without special tokens, in the order of their ids."""
        return [name for name in self.names if name not in SPECIAL]

    @property
    def pad_id(self) -> int:
        """The padding token's id."""
        return self.tokens[PAD]

    @property
    def mask_id(self) -> int:
        """The mask token's id."""
        return self.tokens[MASK]

    @property
    def cls_id(self) -> int | None:
        """The ``<cls>`` token's id, None where the vocabulary has none."""
        return self.tokens.get(CLS)

    @property
    def eos_id(self) -> int | None:
        """The ``<eos>`` token's id, None where the vocabulary has none."""
        return self.tokens.get(EOS)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of all special tokens."""
        return frozenset(self.tokens[name] for name in SPECIAL if name in self.tokens)

    def symbol(self, gene: str) -> str:
        """Give a gene's symbol, or the gene itself where none is known."""
        return self.symbols.get(gene, gene)

    # ------------------------------------------------------------------ finding genes

    @cached_property
    def _by_symbol(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for gene, symbol in self.symbols.items():
            if gene in self.tokens:
                found.setdefault(symbol.upper(), []).append(gene)
        return found

    def find(self, name: str) -> str | None:
        """Find the vocabulary's key for a gene: the key itself, an Ensembl id with or without version, a symbol.

        Returns None where there is none, or where a symbol stands for several genes (never guessed).
        """
        if name in self.tokens and name not in SPECIAL:
            return name
        versioned = _VERSIONED.match(name.upper())
        for candidate in (name.upper(), versioned.group(1) if versioned else ""):
            mapped = self.mapping.get(candidate, candidate)
            if mapped and mapped in self.tokens and mapped not in SPECIAL:
                return mapped
        by_symbol = self._by_symbol.get(name.upper(), [])
        return by_symbol[0] if len(by_symbol) == 1 else None

    def resolve(self, name: str, flag: str = "--genes") -> str:
        """Find the vocabulary's key for a gene, or say what is near.

        Raises
        ------
        UnknownGeneError
            If the vocabulary does not hold the gene.
        """
        key = self.find(name)
        if key is None:
            raise UnknownGeneError.with_matches(flag, name, [*self.genes, *self.symbols.values()])
        return key

    # ------------------------------------------------------------------ making

    @classmethod
    def from_medians(cls, medians: Mapping[str, float], *, max_length: int, **more: Any) -> GeneVocabulary:
        """Make a vocabulary of these genes, in sorted order behind ``<pad>`` and ``<mask>`` as V1's is."""
        tokens = {name: number for number, name in enumerate([PAD, MASK, *sorted(medians)])}
        return cls(tokens, medians=dict(medians), max_length=max_length, **more)

    def with_cls(self) -> GeneVocabulary:
        """Add a ``<cls>`` token behind all others, so that every other id keeps its meaning."""
        if self.cls_id is not None:
            return self
        return replace(self, tokens={**self.tokens, CLS: len(self.tokens)}, parent_digest=self.digest)

    def adapt(self, input_ids: NDArray[np.integer], cells_digest: str | None) -> NDArray[np.int32]:
        """Re-encode a cell for this vocabulary: a parent's cell gets ``<cls>`` in front and is cut to size.

        Cells of this vocabulary itself, or of unknown origin that start with ``<cls>`` already, pass unchanged.

        Raises
        ------
        VocabularyMismatch
            If the vocabulary has a ``<cls>`` and the cell does not begin with it.
        """
        ids = np.asarray(input_ids, dtype=np.int32)
        behind_parent = self.parent_digest is not None and cells_digest in (self.parent_digest, None)
        if behind_parent and (len(ids) == 0 or ids[0] != self.cls_id):
            front = np.array([self.tokens[CLS]], dtype=np.int32)
            ids = np.concatenate([front, ids[: self.max_length - 1]])
        if self.cls_id is not None and (len(ids) == 0 or ids[0] != self.cls_id):
            # Encoded without special tokens: position 0 would be read as if it were the <cls>.
            raise VocabularyMismatch("--cells", "a cell without <cls> in front", "cells encoded with special tokens")
        return ids

    def check_cells(self, cells_digest: str | None, input_ids_max: int | None = None) -> None:
        """Check that cells were encoded with this vocabulary or its parent.

        Raises
        ------
        VocabularyMismatch
            If the digests differ, or an id lies beyond the vocabulary.
        """
        if cells_digest is not None and cells_digest not in (self.digest, self.parent_digest):
            takes = f"cells encoded with vocabulary {self.digest}"
            if self.parent_digest:
                takes += f" or its parent {self.parent_digest}"
            raise VocabularyMismatch("--cells", f"cells encoded with vocabulary {cells_digest}", takes)
        if input_ids_max is not None and input_ids_max >= len(self):
            raise VocabularyMismatch(
                "--cells", f"token id {input_ids_max}", f"ids below {len(self)}, the vocabulary's size"
            )

    # ------------------------------------------------------------------ files

    def save(self, directory: str) -> None:
        """Write ``vocabulary.json`` into a directory."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "digest": self.digest,
            "parent_digest": self.parent_digest,
            "max_length": self.max_length,
            "tokens": dict(self.tokens),
            "medians": dict(self.medians),
            "symbols": dict(self.symbols),
            "mapping": dict(self.mapping),
        }
        storage.write_json(storage.join(directory, FILE_NAME), content)

    @classmethod
    def load(cls, path: str, flag: str = "--vocabulary") -> GeneVocabulary:
        """Load a vocabulary: a directory or file of ours, a JSON token dictionary, or a directory of upstream's JSON.

        Parameters
        ----------
        path
            A directory with ``vocabulary.json``, or with ``token_dictionary*.json`` and where present
            ``gene_median_dictionary*``, ``gene_name_id_dict*``, ``ensembl_mapping_dict*``; or one JSON file.
        flag
            Named in errors.
        """
        if not storage.exists(path):
            raise InputError(flag, path, "a vocabulary directory or file that exists")
        if not storage.is_directory(path):
            if path.endswith((".pkl", ".pickle")):
                raise NotThereYetError.flag(flag, f"the pickle {path}", "JSON dictionaries so far")
            return cls._from_json(storage.read_json(path, flag), path, flag)
        own = storage.join(path, FILE_NAME)
        if storage.exists(own):
            return cls._from_json(storage.read_json(own, flag), own, flag)
        return cls._from_upstream_directory(path, flag)

    @classmethod
    def present_in(cls, path: str) -> bool:
        """Whether a model directory carries a vocabulary."""
        return storage.exists(storage.join(path, FILE_NAME)) or _upstream_file(path, "token_dictionary") is not None

    @classmethod
    def _from_json(cls, content: Any, path: str, flag: str) -> GeneVocabulary:
        if not isinstance(content, dict):
            raise InputError(flag, path, "a JSON object of token -> id")
        if content.get("format") != FORMAT:
            return cls(_checked_tokens(content, path, flag))
        max_length = content.get("max_length", 0)
        if type(max_length) is not int:
            raise InputError(flag, f"the max_length {max_length!r} of {path}", "a whole number of tokens")
        vocabulary = cls(
            _checked_tokens(content.get("tokens"), path, flag),
            medians=_checked_medians(content.get("medians", {}), path, flag),
            symbols=_checked_names(content.get("symbols", {}), path, flag),
            mapping=_checked_names(content.get("mapping", {}), path, flag),
            max_length=max_length,
            parent_digest=content.get("parent_digest"),
        )
        if content.get("digest") not in (None, vocabulary.digest):
            raise InputError(flag, f"{path}, whose tokens do not match its digest", "an unaltered vocabulary file")
        return vocabulary

    @classmethod
    def _from_upstream_directory(cls, path: str, flag: str) -> GeneVocabulary:
        tokens = _upstream_file(path, "token_dictionary")
        if tokens is None:
            if any("token_dictionary" in name for name in storage.list_files(path, ".pkl")):
                raise NotThereYetError.flag(flag, f"the pickles of {path}", "JSON dictionaries so far")
            raise InputError(flag, path, f"a directory with {FILE_NAME} or upstream's token_dictionary*.json")
        medians = _checked_medians(*_upstream_content(path, "gene_median_dictionary", flag), flag)
        names = _checked_names(*_upstream_content(path, "gene_name_id_dict", flag), flag)
        mapping = _checked_names(*_upstream_content(path, "ensembl_mapping_dict", flag), flag)
        # Upstream's file maps symbol -> Ensembl id; several symbols may name one gene: keep the first.
        symbols: dict[str, str] = {}
        for symbol, gene in names.items():
            symbols.setdefault(gene, symbol)
        return cls(
            _checked_tokens(storage.read_json(tokens, flag), tokens, flag),
            medians=medians,
            symbols=symbols,
            mapping=mapping,
        )


def _upstream_file(path: str, stem: str) -> str | None:
    found = [name for name in storage.list_files(path, ".json") if name.rsplit("/", 1)[-1].startswith(stem)]
    return found[0] if found else None


def _upstream_content(path: str, stem: str, flag: str) -> tuple[Any, str]:
    file = _upstream_file(path, stem)
    return (storage.read_json(file, flag), file) if file else ({}, path)


def _checked_tokens(content: Any, path: str, flag: str) -> dict[str, int]:
    valid = isinstance(content, dict) and all(type(value) is int for value in content.values())
    if not valid or not content:
        raise InputError(flag, path, "a JSON object of token -> integer id")
    return dict(content)


def _checked_medians(content: Any, path: str, flag: str) -> dict[str, float]:
    if not isinstance(content, dict) or not all(type(value) in (int, float) for value in content.values()):
        raise InputError(flag, path, "medians as a JSON object of gene -> number")
    medians = {gene: float(value) for gene, value in content.items()}
    bad = [gene for gene, value in medians.items() if not (np.isfinite(value) and value > 0)]
    if bad:
        raise InputError(flag, f"the median {medians[bad[0]]} of {bad[0]} in {path}", "finite medians above 0")
    return medians


def _checked_names(content: Any, path: str, flag: str) -> dict[str, str]:
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise InputError(flag, path, "symbols and ids as JSON objects of name -> name")
    return content


def gene_mask(vocabulary: GeneVocabulary, input_ids: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Mark the positions that hold genes, not special tokens: a boolean array of the shape of `input_ids`."""
    return ~np.isin(input_ids, np.fromiter(vocabulary.special_ids, dtype=np.int64))
