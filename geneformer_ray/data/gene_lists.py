"""Lists of genes in files: one gene a line, or sets of genes in GMT form."""

from __future__ import annotations

from geneformer_ray.data import storage
from geneformer_ray.errors import InputError

__all__ = ["read_gene_list", "read_gene_sets"]


def read_gene_list(path: str, flag: str = "--genes") -> list[str]:
    """Read a text file with one gene a line; empty lines and lines that begin with # are passed over."""
    names = [line.strip() for line in _lines(path, flag)]
    return [name for name in names if name and not name.startswith("#")]


def read_gene_sets(path: str, flag: str = "--gene-sets") -> dict[str, list[str]]:
    """Read sets of genes in GMT form: name, description and genes of a set, between tabs, one set a line.

    Raises
    ------
    InputError
        If a line is not of that form, or two sets share a name.
    """
    sets: dict[str, list[str]] = {}
    for number, line in enumerate(_lines(path, flag), start=1):
        if not line.strip():
            continue
        name, *rest = line.rstrip().split("\t")
        genes = [gene.strip() for gene in rest[1:] if gene.strip()]
        if not name or not genes:
            raise InputError(flag, f"line {number} of {path}", "a set's name, description and genes between tabs")
        if name in sets:
            raise InputError(flag, f"the set {name} twice in {path}", "sets of different names")
        sets[name] = genes
    if not sets:
        raise InputError(flag, f"{path} without sets", "one set a line")
    return sets


def _lines(path: str, flag: str) -> list[str]:
    try:
        return storage.read_bytes(path).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(flag, path, f"a readable text file ({error})") from error
