"""Rows of the `cell_shifts` table as arrays of codes, which is what every statistic over genes works on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from geneformer_ray.compute.event_names import join_genes, merge_codes, name_events
from geneformer_ray.compute.shift_tables import EXACT
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

__all__ = [
    "PARTS",
    "ShiftRows",
    "check_measure",
    "mean_column",
    "read_measured_rows",
    "read_shift_rows",
    "says_what_is_exact",
    "states_of",
]

COLUMNS = ("cell_id", "genes", "measure", "state", "value")
# The full shift towards a state, and the two parts that a decomposed deletion has beside it.
PARTS = ("shift", "shift_gene", "shift_rank")


@dataclass(frozen=True)
class ShiftRows:
    """N rows of one measure, ordered by state, gene and cell.

    Parameters
    ----------
    genes, symbols
        Names of the G genes in sorted order, and their symbols; a set of genes is its keys, sorted, joined
        with "+".
    members
        The sorted keys of each gene's set: one, where a gene is perturbed alone.
    cells
        Ids of the C cells in sorted order.
    states
        Names of the states, as they were asked for.
    gene_N, cell_N, state_N
        Codes into these, int64, shape (N,).
    value_N
        Values, float64, shape (N,).
    exact_N
        Whether each is the exact engine's and no estimate, shape (N,); None for a table that does not say, of which all
        are.
    """

    genes: tuple[str, ...]
    symbols: tuple[str, ...]
    members: tuple[tuple[str, ...], ...]
    cells: tuple[str, ...]
    states: tuple[str, ...]
    gene_N: NDArray[np.int64]
    cell_N: NDArray[np.int64]
    state_N: NDArray[np.int64]
    value_N: NDArray[np.float64]
    exact_N: NDArray[np.bool_] | None = None


def read_shift_rows(
    shifts: pa.Table | ds.Dataset,
    *,
    measure: str,
    states: Sequence[str] = ("",),
    symbols: Mapping[str, str] | None = None,
) -> ShiftRows:
    """Read the rows of a measure and of some states.

    Parameters
    ----------
    shifts
        The `cell_shifts` table; a dataset is read batch by batch, and only its codes are kept (about 40 bytes
        a row).
    measure
        `shift` or `similarity`; of a decomposed screen also `shift_gene` or `shift_rank`.
    states
        Names of the states; rows without states hold the empty string.
    symbols
        Symbol of each vocabulary key. A key without one stands for itself.

    Returns
    -------
    ShiftRows
        In one order whatever the order of the input, so that sums over it are the same to the last bit.

    Raises
    ------
    InputError
        A column is missing, a value is empty or not a finite number, the same cell, genes and state occur twice, or a
        column `exact` holds anything but truth values.
    """
    dataset = ds.dataset(shifts) if isinstance(shifts, pa.Table) else shifts
    missing = [name for name in COLUMNS if name not in dataset.schema.names]
    if missing:
        raise InputError("shifts", f"a table without {', '.join(missing)}", f"the columns {', '.join(COLUMNS)}")
    columns = [*COLUMNS, *([EXACT] if says_what_is_exact(dataset) else [])]
    wanted = (ds.field("measure") == measure) & ds.field("state").isin(list(states))
    state_names = pa.array(list(states), pa.string())
    events, cells, state_codes, values, exact = [], [], [], [], [np.empty(0, dtype=bool)]
    for batch in dataset.to_batches(columns=columns, filter=wanted):
        cell, value = batch.column("cell_id"), batch.column("value")
        event = join_genes(batch.column("genes"))  # null where a list holds a null
        needed = {"cell_id": cell, "genes": event, **{name: batch.column(name) for name in columns[4:]}}
        for name, column in needed.items():
            if column.null_count:
                raise InputError(name, "an empty value", "a value in every row of shifts")
        events.append(event.dictionary_encode())
        cells.append(cell.dictionary_encode())
        state_codes.append(pc.index_in(batch.column("state"), value_set=state_names).to_numpy())
        values.append(value.to_numpy(zero_copy_only=False).astype(np.float64))
        if EXACT in columns:
            exact.append(batch.column(EXACT).to_numpy(zero_copy_only=False).astype(bool))
    if not values:
        values.append(np.empty(0))
        state_codes.append(np.empty(0, dtype=np.int32))

    event_names, event_N = merge_codes(events)
    named = name_events(event_names, symbols or {})
    genes = named.names
    cell_names, cell_N = merge_codes(cells)
    cell_order, cell_ids = pd.factorize(cell_names, sort=True)
    value_N = np.concatenate(values)
    if not np.isfinite(value_N).all():
        raise InputError("value", "a number that is not finite", "finite numbers in shifts")
    state_N = np.concatenate(state_codes).astype(np.int64)
    gene_N, cell_N = named.code_E[event_N], cell_order.astype(np.int64)[cell_N]

    # One integer a row carries state, gene and cell: its order is the rows', equal neighbours occur twice.
    key_N = (state_N * len(genes) + gene_N) * len(cell_ids) + cell_N
    order_N = np.argsort(key_N, kind="stable")
    key_N = key_N[order_N]
    twice = np.flatnonzero(key_N[1:] == key_N[:-1])
    if twice.size:
        row = order_N[twice[0]]
        example = f"cell {cell_ids[cell_N[row]]}, gene {genes[gene_N[row]]}"
        got = f"{twice.size} rows a second time, such as {example}"
        raise InputError("shifts", got, "one screen: one row for each cell, genes and state")
    return ShiftRows(
        genes=genes,
        symbols=named.symbols,
        members=named.members,
        cells=tuple(cell_ids),
        states=tuple(states),
        gene_N=gene_N[order_N],
        cell_N=cell_N[order_N],
        state_N=state_N[order_N],
        value_N=value_N[order_N],
        exact_N=np.concatenate(exact)[order_N] if EXACT in columns else None,
    )


def read_measured_rows(
    shifts: pa.Table | ds.Dataset,
    state: str | None,
    symbols: Mapping[str, str] | None = None,
    field: str = "shifts",
    measure: str = "shift",
) -> ShiftRows:
    """Read the shifts to one state, or the similarities of a screen without states where `state` is None.

    Parameters
    ----------
    shifts, state, symbols
        The `cell_shifts` table, the state, and the symbol of each vocabulary key.
    field
        What the table is called where it is wrong.
    measure
        `shift`, or one of its two parts: `shift_gene`, `shift_rank`. Without a state it is similarities that are read.

    Raises
    ------
    InputError
        As :func:`read_shift_rows`; or there is no such row, with `field` for its name.
    """
    if state is None and measure != "shift":
        raise InputError("measure", measure, "shift: without states a screen holds similarities, which have no parts")
    measure = "similarity" if state is None else measure
    rows = read_shift_rows(shifts, measure=measure, states=["" if state is None else state], symbols=symbols)
    if not rows.value_N.size:
        check_measure(shifts, measure, field)
        states = states_of(shifts, "shift" if state is None else measure)
        found = f"shifts to {', '.join(states)}" if states else "no shifts to states"
        takes = "a table with similarities" if state is None else f"a table with shifts to {state!r}"
        raise InputError(field, f"a table with {found}", takes)
    return rows


def states_of(shifts: pa.Table | ds.Dataset, measure: str = "shift") -> list[str]:
    """List the states that a table has rows of a measure for, sorted."""
    dataset = ds.dataset(shifts) if isinstance(shifts, pa.Table) else shifts
    found: set[str] = set()
    for batch in dataset.to_batches(columns=["state"], filter=ds.field("measure") == measure):
        found.update(state for state in batch.column("state").unique().to_pylist() if state is not None)
    return sorted(found)


def check_measure(shifts: pa.Table | ds.Dataset, measure: str, field: str = "shifts") -> None:
    """Refuse a part of the shift that a table does not have, and say what it has."""
    if measure not in PARTS[1:]:
        return
    dataset = ds.dataset(shifts) if isinstance(shifts, pa.Table) else shifts
    there: set[str] = set()
    for batch in dataset.to_batches(columns=["measure"]):
        there.update(name for name in batch.column("measure").unique().to_pylist() if name is not None)
    if measure in there:
        return
    has = ", ".join(sorted(there)) or "no rows"
    if field == "shifts":
        raise InputError("measure", measure, f"a measure of the screen ({has}): screen --decompose writes the others")
    raise InputError(field, f"a table with {has}", f"one with {measure}, as screen --decompose writes it")


def mean_column(measure: str, state: str) -> str:
    """Name the column of a measure's means: `shift_to_STATE`, `shift_gene_to_STATE`, `shift_rank_to_STATE`."""
    return f"{measure}_to_{state}"


def says_what_is_exact(dataset: ds.Dataset) -> bool:
    """Say whether a table tells which of its values are exact, in a column of truth values."""
    if EXACT not in dataset.schema.names:
        return False
    kind = dataset.schema.field(EXACT).type
    if not pa.types.is_boolean(kind):
        raise InputError(EXACT, f"a column of {kind}", "true or false in every row of shifts")
    return True
