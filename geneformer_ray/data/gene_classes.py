"""Classes of genes: which genes are, say, dosage-sensitive and which are not, as a model is to tell them apart."""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from geneformer_ray.data import storage
from geneformer_ray.data.digests import digest_of
from geneformer_ray.data.gene_lists import read_gene_sets
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = ["GeneClasses", "read_gene_classes"]

FLAG = "--gene-classes"
TAKES = (
    "a JSON object of class -> list of genes, a CSV or TSV table with the columns gene and class, or sets in GMT form"
)
# Upstream's users have a pickle. It is a program: they run it, on a file that they trust, and we read what it gave.
CONVERTED = (
    "JSON, never a pickle; of one that you trust: "
    "python -c 'import json, pickle, sys; d = pickle.load(sys.stdin.buffer); "
    "print(json.dumps({c: list(g) for c, g in d.items()}))' < classes.pkl > classes.json"
)
DELIMITERS = {".csv": ",", ".tsv": "\t"}
NAMES_SHOWN = 3


def read_gene_classes(path: str, flag: str = FLAG) -> dict[str, list[str]]:
    """Read classes of genes, under the names that the file has; its ending says what it is.

    Parameters
    ----------
    path
        ``.json``: an object of class -> list of genes. ``.csv``, ``.tsv``: a table with the columns ``gene`` and
        ``class``; others are passed over. ``.gmt``: a class a line.
    flag
        Named in errors.

    Returns
    -------
    Class -> names of its genes; two classes or more, each with a gene.
    """
    ending = posixpath.splitext(path.lower())[1]
    if ending == ".gmt":
        classes = read_gene_sets(path, flag)
    elif ending in (".pkl", ".pickle"):
        raise InputError(flag, path, CONVERTED)
    elif ending == ".json":
        classes = _from_json(_text(path, flag), path, flag)
    elif ending in DELIMITERS:
        classes = _from_table(_text(path, flag), DELIMITERS[ending], path, flag)
    else:
        raise InputError(flag, path, TAKES)
    for name, genes in classes.items():
        if not name.strip() or not genes:
            what = f"the class {name!r} without genes" if name.strip() else "a class without a name"
            raise InputError(flag, f"{path} with {what}", TAKES)
    if len(classes) < 2:
        raise InputError(flag, f"{path} with {_number(len(classes), 'class', 'classes')}", "two or more classes")
    return classes


def _text(path: str, flag: str) -> str:
    try:
        content = storage.read_bytes(path)
        if content.startswith(b"\x80"):  # a pickle under another name
            raise InputError(flag, f"{path}, a pickle", CONVERTED)
        return content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(flag, path, f"a readable text file ({error})") from error


def _from_json(text: str, path: str, flag: str) -> dict[str, list[str]]:
    def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counted = Counter(key for key, _ in pairs)
        for key in counted:
            if counted[key] > 1:
                # json would keep the last one and say nothing.
                raise InputError(flag, f"{path} with the class {key!r} {counted[key]} times", "each class once")
        return dict(pairs)

    try:
        content = json.loads(text, object_pairs_hook=each_once)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(flag, path, f"a readable JSON file ({error})") from error
    if not isinstance(content, dict):
        raise InputError(flag, f"{path} with a {type(content).__name__} in place of classes", TAKES)
    classes: dict[str, list[str]] = {}
    for name, genes in content.items():
        if not isinstance(genes, list) or not all(isinstance(gene, str) and gene.strip() for gene in genes):
            raise InputError(flag, f"{path}, where the class {name!r} is no list of names of genes", TAKES)
        classes[name] = [gene.strip() for gene in genes]
    return classes


def _from_table(text: str, delimiter: str, path: str, flag: str) -> dict[str, list[str]]:
    classes: dict[str, list[str]] = {}
    try:
        table = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        columns = [column.strip() for column in table.fieldnames or ()]
        table.fieldnames = columns
        if "gene" not in columns or "class" not in columns:
            raise InputError(flag, f"{path} with the columns {', '.join(columns) or '(none)'}", TAKES)
        for row in table:
            gene, name = ((row[column] or "").strip() for column in ("gene", "class"))
            if not gene or not name:
                raise InputError(flag, f"line {table.line_num} of {path}", "a gene and its class in every line")
            classes.setdefault(name, []).append(gene)
    except csv.Error as error:
        raise InputError(flag, path, f"a readable table ({error})") from error
    return classes


@dataclass(frozen=True)
class GeneClasses:
    """Genes of a vocabulary, each with its class.

    Parameters
    ----------
    labels
        The class names, sorted: the same in every process.
    genes
        The vocabulary's keys, in the order of their tokens.
    tokens, targets
        Token id and class number of each, shape (genes,).
    unknown
        Class -> names that the vocabulary does not know, or that stand for several genes.
    rare
        Class -> genes left out because too few cells hold them.
    matched_as
        Genes by how their names were matched (:data:`geneformer_ray.data.gene_names.HOW`).
    """

    labels: list[str]
    genes: list[str]
    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    unknown: dict[str, list[str]] = field(default_factory=dict)
    rare: dict[str, list[str]] = field(default_factory=dict)
    matched_as: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls, named: dict[str, list[str]], vocabulary: GeneVocabulary, *, fewest: int = 1, flag: str = FLAG
    ) -> GeneClasses:
        """Find the genes of classes in a vocabulary.

        Parameters
        ----------
        named
            Class -> names of genes: keys of the vocabulary, Ensembl ids with or without version, symbols.
        vocabulary
            The model's.
        fewest
            How many known genes a class needs.
        flag
            Named in errors.

        Raises
        ------
        InputError
            If a gene is in two classes, under whatever names, or a class keeps fewer than it needs.
        """
        labels = sorted(named)
        class_of: dict[str, tuple[str, str]] = {}
        unknown: dict[str, list[str]] = {}
        for label in labels:
            matches = vocabulary.match(named[label])
            if matches.unmatched:
                unknown[label] = list(dict.fromkeys(matches.unmatched))
            for name, key in zip(matches.names, matches.keys, strict=True):
                if key is None:
                    continue
                other, known_as = class_of.setdefault(key, (label, name))
                if other != label:
                    which = repr(name) if name == known_as else f"{name!r} and {known_as!r}, names of one gene,"
                    raise InputError(flag, f"{which} in the classes {other!r} and {label!r}", "each gene in one class")
        genes = sorted(class_of, key=vocabulary.tokens.__getitem__)
        number = {label: position for position, label in enumerate(labels)}
        found = cls(
            labels,
            genes,
            np.array([vocabulary.tokens[gene] for gene in genes], dtype=np.int64),
            np.array([number[class_of[gene][0]] for gene in genes], dtype=np.int64),
            unknown,
            matched_as=vocabulary.match([class_of[gene][1] for gene in genes]).counts,
        )
        found.check(fewest, flag)
        return found

    def held_by(self, cells_V: NDArray[np.integer], *, min_cells: int = 1, fewest: int = 1) -> GeneClasses:
        """Keep the genes that enough cells hold: nothing is learned of a gene that no cell has, and nothing predicted.

        Parameters
        ----------
        cells_V
            How many cells hold each token, shape (vocabulary,).
        min_cells
            Genes that fewer hold are left out, and listed.
        fewest
            How many genes a class needs.
        """
        kept = np.asarray(cells_V)[self.tokens] >= min_cells
        rare: dict[str, list[str]] = {}
        for position in np.flatnonzero(~kept):
            rare.setdefault(self.labels[self.targets[position]], []).append(self.genes[position])
        found = GeneClasses(
            self.labels,
            [self.genes[position] for position in np.flatnonzero(kept)],
            self.tokens[kept],
            self.targets[kept],
            self.unknown,
            rare,
            self.matched_as,
        )
        found.check(fewest, FLAG)
        return found

    def check(self, fewest: int, flag: str = FLAG) -> None:
        """Refuse a class with fewer genes than it needs."""
        for number, label in enumerate(self.labels):
            have = int((self.targets == number).sum())
            if have < fewest:
                reasons = [
                    f"{len(names)} {why}: {', '.join(names[:NAMES_SHOWN])}{', ...' * (len(names) > NAMES_SHOWN)}"
                    for why, names in (
                        ("not in the vocabulary", self.unknown.get(label, [])),
                        ("in too few cells", self.rare.get(label, [])),
                    )
                    if names
                ]
                lost = f" ({'; '.join(reasons)})" if reasons else ""
                got = f"the class {label!r} with {_number(have, 'gene', 'genes')}{lost}"
                raise InputError(flag, got, f"at least {_number(fewest, 'gene', 'genes')} in every class")

    @property
    def digest(self) -> str:
        """A hash of which gene is of which class."""
        return digest_of(self.labels, self.genes, self.tokens, self.targets)

    def report(self) -> dict[str, Any]:
        """Say how many genes each class has, what their names were taken for, and which are left out."""
        counts = np.bincount(self.targets, minlength=len(self.labels)).tolist()
        return {
            "genes_per_class": dict(zip(self.labels, counts, strict=True)),
            "matched_as": self.matched_as,
            "unknown_genes": self.unknown,
            "genes_in_too_few_cells": self.rare,
        }


def _number(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"
