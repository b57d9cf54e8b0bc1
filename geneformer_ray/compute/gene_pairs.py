"""Gene shifts by pair of perturbed and affected gene, from single rows or from what a screen has summed up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds

from geneformer_ray.compute.event_names import join_genes, name_events
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

__all__ = ["gene_shift_table"]

ROWS = ("genes", "affected", "value")
SUMMARY = ("genes", "affected", "count", "mean", "deviation")
# Rows of sums that are held before they are summed up again: 128 MiB.
ROWS_HELD = 2**22
# More than any vocabulary holds: event and affected gene share one integer.
GENES_AT_MOST = 2**31


def gene_shift_table(shifts: pa.Table | ds.Dataset, *, symbols: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Average the similarity of every affected gene before and after every perturbation.

    Parameters
    ----------
    shifts
        A screen's `gene_shifts` table (one row a cell and pair) or its `gene_shifts_summary` (one row a pair), read
        batch by batch. Both give the same numbers to about 1e-12.
    symbols
        Symbol of each vocabulary key. A key without one stands for itself.

    Returns
    -------
    One row a pair. Columns: `perturbed`, `perturbed_symbol`, `affected`, `affected_symbol`, `mean`, `deviation` (of all
    cells, not of a sample), `cells`. Lowest mean first, as upstream orders them; then by perturbed and affected gene.

    Raises
    ------
    InputError
        A column is missing, a value is empty or not a finite number, or there are no rows.

    Notes
    -----
    What is summed is 1 - similarity: similarities lie so near 1 that the deviation would drown in their squares.
    """
    dataset = ds.dataset(shifts) if isinstance(shifts, pa.Table) else shifts
    columns = SUMMARY if "mean" in dataset.schema.names else ROWS
    missing = [name for name in columns if name not in dataset.schema.names]
    if missing:
        raise InputError("shifts", f"a table without {', '.join(missing)}", f"the columns {', '.join(columns)}")
    events, genes = _Codes(), _Codes()
    held: list[_Sums] = []
    fresh = 0
    for sums in _batch_sums(dataset, columns, events, genes):
        held.append(sums)
        fresh += sums.pair_P.size
        # Where the pairs themselves are many, only as many new rows again are worth another pass over them.
        if fresh > max(ROWS_HELD, held[0].pair_P.size):
            held, fresh = [_added(held)], 0
    if not held:
        raise InputError("shifts", "no gene shifts", "a screen with --gene-shifts or --gene-shifts-summary")
    return _named_table(_added(held), events.names, genes.names, symbols or {})


@dataclass(frozen=True)
class _Sums:
    """Codes of pairs (event * GENES_AT_MOST + affected gene), and count, sum and sum of squares of their losses."""

    pair_P: NDArray[np.int64]
    count_P: NDArray[np.float64]
    loss_P: NDArray[np.float64]
    square_P: NDArray[np.float64]


class _Codes:
    """Codes of names, given out in the order in which names are first met."""

    def __init__(self) -> None:
        self._codes: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        return list(self._codes)

    def of(self, column: Any) -> NDArray[np.int64]:
        encoded = column.dictionary_encode()
        known = [self._codes.setdefault(name, len(self._codes)) for name in encoded.dictionary.to_pylist()]
        return np.asarray(np.array(known, dtype=np.int64)[encoded.indices.to_numpy()])


def _batch_sums(dataset: ds.Dataset, columns: tuple[str, ...], events: _Codes, genes: _Codes) -> Iterator[_Sums]:
    for batch in dataset.to_batches(columns=list(columns)):
        if not batch.num_rows:
            continue
        event = join_genes(batch.column("genes"))
        for name, column in (("genes", event), *((name, batch.column(name)) for name in columns[1:])):
            if column.null_count:
                raise InputError(name, "an empty value", "a value in every row of shifts")
        first, *others = (
            batch.column(name).to_numpy(zero_copy_only=False).astype(np.float64)
            for name in (("value",) if columns is ROWS else ("mean", "deviation", "count"))
        )
        loss = 1 - first
        deviation, count = others if others else (np.zeros(loss.size), np.ones(loss.size))
        square = deviation**2 + loss**2
        if not np.isfinite(square).all():
            raise InputError("value", "a number that is not finite", "finite numbers in shifts")
        pair = events.of(event) * GENES_AT_MOST + genes.of(batch.column("affected"))
        yield _added([_Sums(pair, count, count * loss, count * square)])


def _added(parts: list[_Sums]) -> _Sums:
    pair, code = np.unique(np.concatenate([part.pair_P for part in parts]), return_inverse=True)
    count, loss, square = (
        np.asarray(np.bincount(code, weights=np.concatenate(column), minlength=pair.size), dtype=np.float64)
        for column in zip(*((part.count_P, part.loss_P, part.square_P) for part in parts), strict=True)
    )
    return _Sums(pair, count, loss, square)


def _named_table(sums: _Sums, events: list[str], genes: list[str], symbols: Mapping[str, str]) -> pd.DataFrame:
    named = name_events(np.array(events, dtype=object), symbols)
    event, affected = np.divmod(sums.pair_P, GENES_AT_MOST)
    place, affected_names = pd.factorize(np.array(genes, dtype=object), sort=True)
    # By name from here on; and cells may list the genes of a set in orders of their own: their pairs are one.
    pair = named.code_E[event] * GENES_AT_MOST + place[affected]
    sums = _added([_Sums(pair, sums.count_P, sums.loss_P, sums.square_P)])
    mean_loss = sums.loss_P / sums.count_P
    deviation = np.sqrt(np.maximum(0.0, sums.square_P / sums.count_P - mean_loss**2))
    order = np.argsort(-mean_loss, kind="stable")  # equal means stay in the order of their names
    gene, other = np.divmod(sums.pair_P[order], GENES_AT_MOST)
    return pd.DataFrame(
        {
            "perturbed": _categories(gene, named.names),
            "perturbed_symbol": _categories(gene, named.symbols),
            "affected": _categories(other, affected_names),
            "affected_symbol": _categories(other, [symbols.get(key, key) for key in affected_names]),
            "mean": 1 - mean_loss[order],
            "deviation": deviation[order],
            "cells": sums.count_P[order].astype(np.int64),
        }
    )


def _categories(codes: Any, names: Any) -> Any:
    """Name codes, each name held once; two genes may share a symbol."""
    code_of_name, distinct = pd.factorize(np.array(names, dtype=object))
    return pd.Categorical.from_codes(code_of_name[codes], pd.Index(distinct.tolist()))
