"""The cells of a JSON request: checked against the limits, encoded, and named in errors by their place in the body."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from geneformer_ray.errors import InputError
from serve.cell_encoding import CellEncoder, EncodedCell, ListedCounts
from serve.errors import TooLargeError
from serve.schemas import Cell, ListedCell
from serve.settings import ServeSettings

__all__ = ["check_size", "encode_cell", "encode_cells"]


def check_size(field: str, size: int, limit: int, unit: str, takes: str = "") -> None:
    """Refuse what is beyond a limit (413)."""
    if size > limit:
        raise TooLargeError(field, f"{size:,} {unit}", f"up to {limit:,}{takes}")


def encode_cell(encoder: CellEncoder, cell: Cell, settings: ServeSettings) -> EncodedCell:
    """Encode the one cell of a request, its field ``cell``."""
    return _encode(encoder, [cell], None, settings, ["cell"])[0]


def encode_cells(
    encoder: CellEncoder, cells: Sequence[ListedCell], genes: Sequence[str] | None, settings: ServeSettings
) -> list[EncodedCell]:
    """Encode a request's cells, its field ``cells``; every list of genes is looked up once.

    Parameters
    ----------
    encoder
        Of the model that will answer.
    cells
        The cells.
    genes
        What their indices and values refer to.
    settings
        The limits.

    Raises
    ------
    InputError
        With the field, as ``cells[3].indices[7]``.
    """
    check_size("cells", len(cells), settings.max_cells, "cells")
    if genes is not None:
        check_size("genes", len(genes), settings.max_genes, "genes")
    return _encode(encoder, cells, genes, settings, [f"cells[{number}]" for number in range(len(cells))])


def _encode(
    encoder: CellEncoder,
    cells: Sequence[Cell],
    genes: Sequence[str] | None,
    settings: ServeSettings,
    fields: Sequence[str],
) -> list[EncodedCell]:
    encoded: dict[int, EncodedCell] = {}
    # Cells given as objects are rows over all names of the request, so that no name is looked up twice.
    place_of: dict[str, int] = {}
    named: dict[int, ListedCounts] = {}
    listed: dict[int, ListedCounts] = {}
    for number, (cell, field) in enumerate(zip(cells, fields, strict=True)):
        if cell.input_ids is not None:
            field = f"{field}.input_ids"
            check_size(field, len(cell.input_ids), settings.max_genes, "token ids")
            encoded[number] = encoder.accept(cell.input_ids, field=field)
        elif cell.counts is not None:
            field = f"{field}.counts"
            check_size(field, len(cell.counts), settings.max_genes, "genes")
            places = [place_of.setdefault(gene, len(place_of)) for gene in cell.counts]
            named[number] = _counts(cell, places, list(cell.counts.values()), field)
        elif isinstance(cell, ListedCell):
            listed[number] = _listed(cell, genes, settings, field)
    if genes is not None and not listed:
        raise InputError("genes", f"{len(genes):,} genes", "nothing: no cell has values, which would belong to them")
    if named:
        found = encoder.encode(list(place_of), list(named.values()), next(iter(named.values())).field)
        encoded |= dict(zip(named, found, strict=True))
    if listed:
        found = encoder.encode(genes or [], list(listed.values()), "genes", remember=True)
        encoded |= dict(zip(listed, found, strict=True))
    return [
        replace(encoded[number], cell_id=str(number) if cell.cell_id is None else cell.cell_id)
        for number, cell in enumerate(cells)
    ]


def _counts(cell: Cell, places: Sequence[int], values: Sequence[float], field: str) -> ListedCounts:
    columns, counts = np.array(places, dtype=np.int64), np.array(values, dtype=np.float64)
    return ListedCounts(columns, counts, cell.total, not cell.allow_non_integer, field)


def _listed(cell: ListedCell, genes: Sequence[str] | None, settings: ServeSettings, field: str) -> ListedCounts:
    values = cell.values or []
    if genes is None:
        raise InputError("genes", "nothing", f"the list of genes that {field}.values belong to")
    if cell.indices is None:
        if len(values) != len(genes):
            takes = f"{len(genes):,}, one for each of the request's genes, or indices beside them"
            raise InputError(f"{field}.values", f"{len(values):,} values", takes)
        return _counts(cell, range(len(genes)), values, f"{field}.values")
    check_size(f"{field}.indices", len(cell.indices), settings.max_genes, "indices")
    if len(values) != len(cell.indices):
        got = f"{len(values):,} values for {len(cell.indices):,} indices"
        raise InputError(f"{field}.values", got, "one value for each of the indices")
    _check_places(np.array(cell.indices, dtype=np.int64), len(genes), f"{field}.indices")
    return _counts(cell, cell.indices, values, f"{field}.values")


def _check_places(places: NDArray[np.int64], genes: int, field: str) -> None:
    beyond = np.flatnonzero(places >= genes)
    if len(beyond):
        raise InputError(f"{field}[{beyond[0]}]", str(places[beyond[0]]), f"0 to {genes - 1}, a place in genes")
    order = np.argsort(places, kind="stable")
    again = order[1:][places[order][1:] == places[order][:-1]]
    if len(again):
        raise InputError(f"{field}[{again.min()}]", f"{places[again.min()]} again", "each gene of a cell once")
