"""The many names of a gene: the vocabulary's own key, Ensembl ids of any version and age, symbols in any case."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

__all__ = ["HOW", "GeneMatches", "GeneNames", "ensembl_id"]

# How a name was matched, in the order in which it is tried; the last three give no gene.
HOW = (
    "key",
    "ensembl id",
    "version stripped",
    "retired id",
    "symbol",
    "symbol in other case",
    "ambiguous symbol",
    "unknown",
    "special token",
)

# A version is stripped only from an Ensembl gene id: symbols such as AC004556.3 keep their dot.
_ENSEMBL = re.compile(r"(ENS[A-Z]*G[0-9]{11})(\.[0-9]+)?")


@dataclass(frozen=True)
class GeneMatches:
    """What a vocabulary makes of a list of names.

    Parameters
    ----------
    names
        As given.
    keys
        The vocabulary's key of each, None where it has none.
    how
        How each was matched: one of `HOW`. ``ensembl id`` is one in another case than the key; ``retired id`` went
        through the Ensembl mapping.
    """

    names: list[str]
    keys: list[str | None]
    how: list[str]

    @cached_property
    def counts(self) -> dict[str, int]:
        """Names by how they were matched, in the order of `HOW`; only those that occur."""
        counted = Counter(self.how)
        return {how: counted[how] for how in HOW if how in counted}

    @property
    def matched(self) -> int:
        """Names that have a key."""
        return sum(key is not None for key in self.keys)

    @property
    def unmatched(self) -> list[str]:
        """The names that have none."""
        return [name for name, key in zip(self.names, self.keys, strict=True) if key is None]

    def examples(self, how: str, limit: int = 3) -> list[str]:
        """Give the first distinct names that were matched this way."""
        return list(dict.fromkeys(name for name, way in zip(self.names, self.how, strict=True) if way == how))[:limit]


class GeneNames:
    """An index of every name by which a vocabulary's genes go.

    Parameters
    ----------
    genes
        The vocabulary's keys, without special tokens.
    special
        Special tokens, which are never genes.
    symbols
        Gene -> symbol.
    aliases
        Further symbol -> gene.
    mapping
        Retired Ensembl id -> id. Upstream's holds symbols and aliases too, which count as symbols here.
    """

    def __init__(
        self,
        genes: Collection[str],
        special: Collection[str],
        *,
        symbols: Mapping[str, str],
        aliases: Mapping[str, str],
        mapping: Mapping[str, str],
    ) -> None:
        self._genes = frozenset(genes)
        self._special = frozenset(special)
        self._ids = {gene.upper(): gene for gene in genes if _is_ensembl(gene)}
        self._retired = {
            other.upper(): gene
            for other, gene in mapping.items()
            if gene in self._genes and other != gene and _is_ensembl(other)
        }
        self._exact, self._any_case = _Symbols(), _Symbols()
        for name, gene in self._symbols_of(symbols, aliases, mapping):
            self._exact.add(name, gene)
            self._any_case.add(name.upper(), gene)

    def _symbols_of(
        self, symbols: Mapping[str, str], aliases: Mapping[str, str], mapping: Mapping[str, str]
    ) -> Iterator[tuple[str, str]]:
        """Give every symbol with its key, a pair as often as it is known."""
        genes = self._genes
        # Keys that are no Ensembl ids are symbols: of themselves.
        yield from ((gene, gene) for gene in genes if gene.upper() not in self._ids)
        named = chain(((symbol, gene) for gene, symbol in symbols.items()), aliases.items())
        for symbol, gene in named:
            key = gene if gene in genes else mapping.get(gene)
            if key in genes:
                yield symbol, key
        for other, gene in mapping.items():
            if gene in genes and other != gene and not _is_ensembl(other):
                yield other, gene

    def locate(self, name: str) -> tuple[str | None, str]:
        """Give the key of a name, or None, and how it was found."""
        if name in self._genes:
            return name, "key"
        if name in self._special:
            return None, "special token"
        if ensembl := _ENSEMBL.fullmatch(name.upper()):
            for candidate, how in ((ensembl[0], "ensembl id"), (ensembl[1], "version stripped")):
                if candidate in self._ids:
                    return self._ids[candidate], how
                if candidate in self._retired:
                    return self._retired[candidate], "retired id"
        # The same letters in another case may be another gene: the exact spelling decides where it can.
        for symbols, symbol, how in (
            (self._exact, name, "symbol"),
            (self._any_case, name.upper(), "symbol in other case"),
        ):
            if symbol in symbols.gene_of:
                return (None, "ambiguous symbol") if symbol in symbols.ambiguous else (symbols.gene_of[symbol], how)
        return None, "unknown"

    def candidates(self, symbol: str) -> tuple[str, ...]:
        """Give all genes that an ambiguous symbol may stand for."""
        return self._exact.ambiguous.get(symbol) or self._any_case.ambiguous.get(symbol.upper(), ())

    def match(self, names: Sequence[str]) -> GeneMatches:
        """Match many names at once."""
        located = [self.locate(name) for name in names]
        return GeneMatches(list(names), [key for key, _ in located], [how for _, how in located])


class _Symbols:
    """Symbol -> gene, and of the few that stand for several, all of them."""

    def __init__(self) -> None:
        self.gene_of: dict[str, str] = {}
        self.ambiguous: dict[str, tuple[str, ...]] = {}

    def add(self, symbol: str, gene: str) -> None:
        first = self.gene_of.setdefault(symbol, gene)
        if first != gene:
            known = self.ambiguous.get(symbol, (first,))
            self.ambiguous[symbol] = known if gene in known else (*known, gene)


def ensembl_id(name: str) -> str | None:
    """Give an Ensembl gene id in capitals and without its version; None for any other name."""
    matched = _ENSEMBL.fullmatch(name.upper())
    return matched[1] if matched else None


def _is_ensembl(name: str) -> bool:
    # Most names are told apart by their first letters: there are 200,000 of them in upstream's dictionaries.
    return name[:3].upper() == "ENS" and _ENSEMBL.fullmatch(name.upper()) is not None
