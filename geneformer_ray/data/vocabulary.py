"""The gene vocabulary: which token stands for which gene, and each gene's non-zero median over a corpus."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from geneformer_ray.data.digests import digest_of
from geneformer_ray.data.gene_names import GeneNames
from geneformer_ray.data.vocabulary_files import (
    carries_vocabulary,
    read_beside_model,
    read_vocabulary,
    write_vocabulary,
)
from geneformer_ray.errors import InputError, UnknownGeneError, VocabularyMismatch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from geneformer_ray.data.gene_names import GeneMatches

__all__ = ["CLS", "EOS", "MASK", "PAD", "GeneVocabulary", "gene_mask"]

PAD, MASK, CLS, EOS = "<pad>", "<mask>", "<cls>", "<eos>"
SPECIAL = (PAD, MASK, CLS, EOS)


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
        Gene -> the symbol that is shown; empty where the genes are symbols themselves.
    mapping
        Any Ensembl id -> the id that the vocabulary uses. Upstream's holds symbols and aliases too, in capitals.
    max_length
        The model's input size in tokens, special tokens included.
    parent_digest
        The digest of the vocabulary that this one extends; cells encoded with the parent are accepted.
    added
        The special tokens that the parent lacks.
    aliases
        Further symbol -> gene.
    """

    tokens: Mapping[str, int]
    medians: Mapping[str, float] = field(default_factory=dict)
    symbols: Mapping[str, str] = field(default_factory=dict)
    mapping: Mapping[str, str] = field(default_factory=dict)
    max_length: int = 0
    parent_digest: str | None = None
    added: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)

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
        """A hash of all that decides how a cell is encoded: tokens, medians, mapping, all symbols and length."""
        names = (dict(self.mapping), dict(self.symbols), dict(self.aliases))
        return digest_of(self.digest, dict(self.medians), *names, self.max_length)

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
    def _gene_names(self) -> GeneNames:
        return GeneNames(self.genes, SPECIAL, symbols=self.symbols, aliases=self.aliases, mapping=self.mapping)

    def find(self, name: str) -> str | None:
        """Find the vocabulary's key for a gene: the key itself, an Ensembl id with or without version, a symbol.

        Returns None where there is none, or where a symbol stands for several genes (never guessed).
        """
        return self._gene_names.locate(name)[0]

    def match(self, names: Sequence[str]) -> GeneMatches:
        """Find the keys of many names, and say how each was found; agrees with `find`."""
        return self._gene_names.match(names)

    def resolve(self, name: str, flag: str = "--genes") -> str:
        """Find the vocabulary's key for a gene, or say what is near.

        Raises
        ------
        UnknownGeneError
            If the vocabulary does not hold the gene, or the symbol stands for several of its genes.
        """
        key, how = self._gene_names.locate(name)
        if how == "ambiguous symbol":
            genes = self._gene_names.candidates(name)
            raise UnknownGeneError(flag, f"{name!r}, a symbol of {len(genes)} genes", f"one of {', '.join(genes)}")
        if key is None:
            raise UnknownGeneError.with_matches(flag, name, [*self.genes, *map(self.symbol, self.genes)])
        return key

    # ------------------------------------------------------------------ making

    @classmethod
    def from_medians(cls, medians: Mapping[str, float], *, max_length: int, **more: Any) -> GeneVocabulary:
        """Make a vocabulary of these genes, in sorted order behind ``<pad>`` and ``<mask>`` as V1's is."""
        tokens = {name: number for number, name in enumerate([PAD, MASK, *sorted(medians)])}
        return cls(tokens, medians=dict(medians), max_length=max_length, **more)

    def with_cls(self) -> GeneVocabulary:
        """Add a ``<cls>`` token behind all others, so that every other id keeps its meaning."""
        return self.with_special_tokens()

    def with_special_tokens(self, cls: bool = True, eos: bool = False) -> GeneVocabulary:
        """Add ``<cls>`` and ``<eos>`` behind all other tokens where asked for and not there yet.

        Every other id keeps its meaning; cells of this vocabulary are re-encoded by `adapt`.
        """
        added = tuple(token for token, wanted in ((CLS, cls), (EOS, eos)) if wanted and token not in self.tokens)
        if not added:
            return self
        tokens = {**self.tokens, **{token: len(self.tokens) + number for number, token in enumerate(added)}}
        return replace(self, tokens=tokens, parent_digest=self.digest, added=added)

    def adapt(self, input_ids: NDArray[np.integer], cells_digest: str | None) -> NDArray[np.int32]:
        """Re-encode a cell for this vocabulary: a parent's cell gets the added special tokens and is cut to size.

        Cells of this vocabulary itself, or of unknown origin that have the tokens already, pass unchanged.

        Raises
        ------
        VocabularyMismatch
            If the vocabulary has a ``<cls>`` and the cell does not begin with it.
        """
        ids = np.asarray(input_ids, dtype=np.int32)
        starts = self.cls_id is not None and len(ids) > 0 and ids[0] == self.cls_id
        ends = self.eos_id is not None and len(ids) > 0 and ids[-1] == self.eos_id
        if self.parent_digest is not None and cells_digest in (self.parent_digest, None):
            needs_cls, needs_eos = CLS in self.added and not starts, EOS in self.added and not ends
            if needs_cls or needs_eos:
                front = [self.tokens[CLS]] if needs_cls else []
                behind = [self.tokens[EOS]] if needs_eos or ends else []
                room = self.max_length - len(front) - len(behind)
                body = ids[:-1] if ends else ids
                ids = np.concatenate([front, body[: max(room, 0)], behind]).astype(np.int32)
                starts = starts or needs_cls
        if self.cls_id is not None and not starts:
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
        fields: dict[str, Any] = {
            "digest": self.digest,
            "parent_digest": self.parent_digest,
            "added": list(self.added),
            "max_length": self.max_length,
            "tokens": dict(self.tokens),
            "medians": dict(self.medians),
            "symbols": dict(self.symbols),
            "aliases": dict(self.aliases),
            "mapping": dict(self.mapping),
        }
        write_vocabulary(directory, fields)

    @classmethod
    def load(cls, path: str, flag: str = "--vocabulary", *, size: int | None = None) -> GeneVocabulary:
        """Load a vocabulary: ours, or upstream's dictionaries as JSON or pickle, from this machine, a URI or the hub.

        Parameters
        ----------
        path
            A directory with ``vocabulary.json``; one with ``token_dictionary*`` and where present
            ``gene_median_dictionary*``, ``gene_name_id_dict*``, ``ensembl_mapping_dict*`` under the same suffix; the
            root of upstream's repository; one file, ``vocabulary.json`` or a token dictionary (whose companions are
            read as well); or a hub id ``ORG/REPO[/SUBFOLDER][@REVISION]`` of any of these.
        flag
            Named in errors.
        size
            The model's number of tokens, which decides where there are several token dictionaries.
        """
        fields = read_vocabulary(path, flag, size)
        digest = fields.pop("digest", None)
        vocabulary = cls(**fields)
        if digest not in (None, vocabulary.digest):
            raise InputError(flag, f"{path}, whose tokens do not match its digest", "an unaltered vocabulary file")
        return vocabulary

    @classmethod
    def load_beside(cls, directory: Path, size: int) -> GeneVocabulary | None:
        """Load the dictionaries of the snapshot of upstream's repository that a model lies in; None if it has none.

        Raises
        ------
        InputError
            If none of them, or more than one, has the model's number of tokens.
        """
        fields = read_beside_model(directory, size)
        return None if fields is None else cls(**fields)

    @classmethod
    def present_in(cls, path: str) -> bool:
        """Whether a model directory carries a vocabulary."""
        return carries_vocabulary(path)


def gene_mask(vocabulary: GeneVocabulary, input_ids: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Mark the positions that hold genes, not special tokens: a boolean array of the shape of `input_ids`."""
    return ~np.isin(input_ids, np.fromiter(vocabulary.special_ids, dtype=np.int64))
