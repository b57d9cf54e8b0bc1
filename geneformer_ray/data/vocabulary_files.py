"""Files that hold a vocabulary: ours, and upstream's sets of dictionaries as JSON or pickle, wherever they lie.

Upstream's repository holds models as subfolders, its dictionaries in ``geneformer/`` and those of other corpora in
``geneformer/gene_dictionaries_*/``. The files of one set share a suffix, the corpus: ``_gc30M``, ``_gc95M``,
``_gc104M``.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from pyarrow import fs

from geneformer_ray.data import storage
from geneformer_ray.data.hub import HubId, named
from geneformer_ray.data.pickles import read_pickled_dictionary
from geneformer_ray.errors import InputError, VocabularyMismatch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = [
    "bring_dictionaries",
    "carries_vocabulary",
    "dictionary_patterns",
    "pinned_vocabulary",
    "read_beside_model",
    "read_vocabulary",
    "write_vocabulary",
]

_log = logging.getLogger(__name__)

FILE_NAME = "vocabulary.json"
FORMAT = "geneformer-ray vocabulary 1"
TOKENS, MEDIANS, NAMES, MAPPING = (
    "token_dictionary",
    "gene_median_dictionary",
    "gene_name_id_dict",
    "ensembl_mapping_dict",
)
# JSON is preferred where one set lies there in several forms.
ENDINGS = ("json", "pkl", "pickle")
_DICTIONARY = re.compile(rf"({TOKENS}|{MEDIANS}|{NAMES}|{MAPPING})(.*)\.({'|'.join(ENDINGS)})")
# Upstream's models lie one or two folders below its root.
LEVELS_UP = 3


@dataclass(frozen=True)
class _Set:
    """The dictionaries of one corpus: a token dictionary and what lies beside it under the same suffix."""

    folder: str
    suffix: str
    flag: str

    @property
    def file(self) -> str:
        return str(_dictionary_files(self.folder)[TOKENS, self.suffix])

    @cached_property
    def tokens(self) -> dict[str, int]:
        return _checked_tokens(_content(self.file, self.flag), self.file, self.flag)

    def companion(self, stem: str) -> tuple[Any, str]:
        """Read the set's dictionary of another kind; empty where there is none."""
        files = _dictionary_files(self.folder)
        file = files.get((stem, self.suffix))
        others = [suffix for kind, suffix in files if kind == stem]
        if file is None and len(others) == 1 and "" in (others[0], self.suffix):
            file = files[stem, others[0]]  # names from before upstream had corpora to tell apart
        elif file is None and others:
            _log.warning("%s is left out: not of the corpus of %s", files[stem, others[0]], self.file)
        return (_content(file, self.flag), file) if file else ({}, self.folder)

    def fields(self, tokens: dict[str, int] | None = None) -> dict[str, Any]:
        """Give the vocabulary's fields, with these tokens where they were read already."""
        # Symbol -> Ensembl id; several symbols may name one gene: the first is shown, all of them are found.
        names = _checked_names(*self.companion(NAMES), self.flag)
        symbols: dict[str, str] = {}
        for symbol, gene in names.items():
            symbols.setdefault(gene, symbol)
        return {
            "tokens": tokens or self.tokens,
            "medians": _checked_medians(*self.companion(MEDIANS), self.flag),
            "symbols": symbols,
            "aliases": {symbol: gene for symbol, gene in names.items() if symbols[gene] != symbol},
            "mapping": _checked_names(*self.companion(MAPPING), self.flag),
        }


# ---------------------------------------------------------------------- reading


def read_vocabulary(path: str, flag: str, size: int | None = None) -> dict[str, Any]:
    """Read the fields of a `GeneVocabulary` from any form that one comes in.

    Parameters
    ----------
    path
        A directory or file of ours; a token dictionary; a directory of upstream's dictionaries, or its repository's
        root; or a hub id ``ORG/REPO[/SUBFOLDER][@REVISION]`` of any of these.
    flag
        Named in errors.
    size
        The model's number of tokens, which decides between several token dictionaries.
    """
    place = _fetched(path, flag)
    if not storage.exists(place):
        raise InputError(flag, place, "a vocabulary directory or file that exists, or a hub id")
    if not storage.is_directory(place):
        return _read_file(place, flag)
    own = storage.join(place, FILE_NAME)
    if storage.exists(own):
        return _read_file(own, flag)
    chosen = _choose(_sets_in(place, flag), _sets_below(place, flag), named(place), flag, size)
    if chosen is None:
        raise InputError(flag, named(place), f"a directory with {FILE_NAME} or upstream's {TOKENS}* (JSON or pickle)")
    return chosen.fields()


def _fetched(path: str, flag: str) -> str:
    hub_id = HubId.parse(path)
    if hub_id is None:
        return path
    # The place may be a file itself.
    own = [hub_id.folder, f"{hub_id.folder}/{FILE_NAME}"] if hub_id.folder else [FILE_NAME]
    return str(hub_id.fetch([*own, *dictionary_patterns(hub_id.folder)], flag))


def pinned_vocabulary(path: str, flag: str) -> str:
    """Fetch a hub id and pin it to the commit that was found, so that every worker reads the same files.

    Any other path stays as it is.
    """
    return named(_fetched(path, flag)) if HubId.parse(path) else path


def read_beside_model(directory: Path, size: int) -> dict[str, Any] | None:
    """Read the dictionaries of the snapshot that a model lies in, chosen by its number of tokens; None if it has none.

    Looked for in ``geneformer/`` of the model's directory and of the folders above it, the nearest that holds any.
    """
    for root in [directory, *directory.parents][: 1 + LEVELS_UP]:
        subject = f"nothing, with {named(root)}"
        chosen = _choose([], _sets_below(str(root), "--vocabulary"), subject, "--vocabulary", size, exactly=True)
        if chosen is not None:
            _log.info("vocabulary: %s, whose %d tokens are the model's size", named(chosen.file), size)
            return chosen.fields()
    return None


def carries_vocabulary(path: str) -> bool:
    """Whether a vocabulary lies directly in a directory."""
    return storage.exists(storage.join(path, FILE_NAME)) or bool(_sets_in(path, ""))


def dictionary_patterns(folder: str = "") -> list[str]:
    """Give the patterns by which the hub finds upstream's dictionaries in a folder and where they lie below it."""
    below = f"{folder}/" if folder else ""
    places = (below, f"{below}gene_dictionaries_*/", f"{below}geneformer/", f"{below}geneformer/gene_dictionaries_*/")
    stems = (TOKENS, MEDIANS, NAMES, MAPPING)
    return [f"{place}{stem}*.{ending}" for place in places for stem in stems for ending in ENDINGS]


def bring_dictionaries(model: str, directory: Path) -> None:
    """Copy the dictionaries of the snapshot that a model at a URI lies in to the model's local copy."""
    root = model.rstrip("/")
    for _ in range(LEVELS_UP):
        root = root.rpartition("/")[0]
        if not root or root.endswith("/") or not storage.is_uri(root):
            return
        folders = [folder for folder in _folders_below(root) if _dictionary_files(folder)]
        for folder in folders:
            for file in _dictionary_files(folder).values():
                storage.write_bytes(str(directory / file.removeprefix(f"{root}/")), storage.read_bytes(file))
        if folders:
            return


# ---------------------------------------------------------------------- finding


def _dictionary_files(folder: str) -> dict[tuple[str, str], str]:
    """Give the dictionaries directly in a folder by stem and suffix."""
    found: dict[tuple[str, str], tuple[int, str]] = {}
    for file in storage.list_files(folder):
        if match := _DICTIONARY.fullmatch(file.rsplit("/", 1)[-1]):
            candidate = (ENDINGS.index(match[3]), file)
            found[match[1], match[2]] = min(candidate, found.get((match[1], match[2]), candidate))
    return {key: file for key, (_, file) in found.items()}


def _sets_in(folder: str, flag: str) -> list[_Set]:
    return [_Set(folder, suffix, flag) for stem, suffix in _dictionary_files(folder) if stem == TOKENS]


def _sets_below(root: str, flag: str) -> list[_Set]:
    return [found for folder in _folders_below(root) for found in _sets_in(folder, flag)]


def _folders_below(root: str) -> list[str]:
    package = storage.join(root, "geneformer")
    return [*_corpus_folders(root), package, *_corpus_folders(package)]


def _corpus_folders(root: str) -> list[str]:
    filesystem, inside = storage.locate(root)
    found = filesystem.get_file_info(fs.FileSelector(inside, allow_not_found=True))
    names = (item.base_name for item in found if item.type == fs.FileType.Directory)
    return sorted(storage.join(root, name) for name in names if name.startswith("gene_dictionaries_"))


def _choose(
    here: Sequence[_Set], below: Sequence[_Set], subject: str, flag: str, size: int | None, *, exactly: bool = False
) -> _Set | None:
    """Choose a set: the only one, or the only one of the model's size; None where there are none at all."""
    found = [*here, *below] if size is not None else here or below
    if len(found) <= 1 and not (exactly and found):
        return found[0] if found else None
    fitting = [one for one in found if size is None or len(one.tokens) == size]
    if len(fitting) > 1 and size is not None:
        fitting = [one for one in here if one in fitting] or fitting
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        held = ", ".join(f"{len(one.tokens)} tokens in {named(one.file)}" for one in found)
        raise VocabularyMismatch(flag, f"{subject}: {held}", f"one of {size} tokens, the model's size")
    # A folder names its set where it holds but one; else the token dictionary does.
    alone = [sum(other.folder == one.folder for other in found) == 1 and one not in here for one in fitting]
    choices = [named(one.folder if single else one.file) for one, single in zip(fitting, alone, strict=True)]
    which = f"{len(fitting)} token dictionaries" + (f" of {size} tokens, the model's size" if size else "")
    raise InputError(flag, f"{subject}: {which}", f"one of {', '.join(choices)}")


# ---------------------------------------------------------------------- content


def _content(path: str, flag: str) -> Any:
    is_pickle = path.endswith((".pkl", ".pickle"))
    return read_pickled_dictionary(path, flag) if is_pickle else storage.read_json(path, flag)


def _read_file(path: str, flag: str) -> dict[str, Any]:
    content = _content(path, flag)
    if isinstance(content, dict) and content.get("format") == FORMAT:
        return _own_fields(content, path, flag)
    folder, _, name = path.rpartition("/")
    match = _DICTIONARY.fullmatch(name)
    tokens = _checked_tokens(content, path, flag)
    if match is None or match[1] != TOKENS:
        return {"tokens": tokens}
    return _Set(folder, match[2], flag).fields(tokens)


def _own_fields(content: dict[str, Any], path: str, flag: str) -> dict[str, Any]:
    max_length, parent = content.get("max_length", 0), content.get("parent_digest")
    if type(max_length) is not int:
        raise InputError(flag, f"the max_length {max_length!r} of {path}", "a whole number of tokens")
    tokens = _checked_tokens(content.get("tokens"), path, flag)
    # Files from before <eos> could be added do not say what was: only <cls> could.
    added = content.get("added", ["<cls>"] if parent else [])
    if not isinstance(added, list) or not all(token in ("<cls>", "<eos>") and token in tokens for token in added):
        raise InputError(flag, f"added {added!r} in {path}", "a list of <cls> and <eos>, as the tokens hold them")
    return {
        "tokens": tokens,
        "medians": _checked_medians(content.get("medians", {}), path, flag),
        "symbols": _checked_names(content.get("symbols", {}), path, flag),
        "aliases": _checked_names(content.get("aliases", {}), path, flag),
        "mapping": _checked_names(content.get("mapping", {}), path, flag),
        "max_length": max_length,
        "parent_digest": parent,
        "added": tuple(added),
        "digest": content.get("digest"),
    }


def write_vocabulary(directory: str, fields: dict[str, Any]) -> None:
    """Write ``vocabulary.json`` into a directory."""
    storage.write_json(storage.join(directory, FILE_NAME), {"format": FORMAT, **fields})


def _checked_tokens(content: Any, path: str, flag: str) -> dict[str, int]:
    valid = isinstance(content, dict) and all(type(value) is int for value in content.values())
    if not valid or not content:
        raise InputError(flag, path, "a dictionary of token -> integer id")
    return dict(content)


def _checked_medians(content: Any, path: str, flag: str) -> dict[str, float]:
    if not isinstance(content, dict) or not all(type(value) in (int, float) for value in content.values()):
        raise InputError(flag, path, "medians as a dictionary of gene -> number")
    medians = {gene: float(value) for gene, value in content.items()}
    bad = [gene for gene, value in medians.items() if not (np.isfinite(value) and value > 0)]
    if bad:
        raise InputError(flag, f"the median {medians[bad[0]]} of {bad[0]} in {path}", "finite medians above 0")
    return medians


def _checked_names(content: Any, path: str, flag: str) -> dict[str, str]:
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise InputError(flag, path, "symbols and ids as a dictionary of name -> name")
    return content
