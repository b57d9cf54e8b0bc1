"""Names of perturbations: an event's genes as one string, whatever the order in which a cell lists them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

__all__ = ["EventNames", "join_genes", "merge_codes", "name_events"]

JOINER = "+"
# Between the genes of an event while it is one string: a vocabulary key may hold a "+", but no control
# character.
UNIT_SEPARATOR = "\x1f"


@dataclass(frozen=True)
class EventNames:
    """The G perturbations of a table, and which of them each of its E distinct lists of genes is.

    Parameters
    ----------
    code_E
        Code of each list's perturbation, from 0 to G - 1, shape (E,).
    names, symbols
        Keys and symbols of each perturbation, in the names' order; those of a set are sorted by key and joined with
        "+".
    members
        The sorted keys of each perturbation.
    """

    code_E: NDArray[np.int64]
    names: tuple[str, ...]
    symbols: tuple[str, ...]
    members: tuple[tuple[str, ...], ...]


def join_genes(lists: Any, separator: str = UNIT_SEPARATOR) -> Any:
    """Make one string of each list of genes; null where a list holds a null."""
    # The stubs allow for a scalar here; an array of lists gives an array of strings.
    return pc.binary_join(lists, separator)


def merge_codes(chunks: list[Any]) -> tuple[NDArray[np.object_], NDArray[np.int64]]:
    """Give the names and the codes of dictionaries that each batch has encoded on its own."""
    if not chunks:
        return np.empty(0, dtype=object), np.empty(0, dtype=np.int64)
    encoded: list[Any] = pa.chunked_array(chunks).unify_dictionaries().chunks
    names = encoded[0].dictionary.to_numpy(zero_copy_only=False)
    return names, np.concatenate([chunk.indices.to_numpy() for chunk in encoded]).astype(np.int64)


def name_events(events: NDArray[np.object_], symbols: Mapping[str, str]) -> EventNames:
    """Give each distinct event, as :func:`join_genes` spells it, its perturbation.

    A screen may list an event's genes in each cell's own order; as a set they are one perturbation: sorted.
    """
    lists = pc.split_pattern(pa.array(events, pa.string()), pattern=UNIT_SEPARATOR)
    keys = pd.DataFrame({"event": pc.list_parent_indices(lists), "key": lists.flatten().to_pandas()})
    keys = keys.sort_values(["event", "key"], kind="stable")
    keys["symbol"] = [symbols.get(key, key) for key in keys["key"]]
    key_lists, symbol_lists = (
        pa.ListArray.from_arrays(lists.offsets, pa.array(keys[column].to_numpy(object), pa.string()))
        for column in ("key", "symbol")
    )
    codes, names = pd.factorize(join_genes(key_lists, JOINER).to_numpy(zero_copy_only=False), sort=True)
    first = np.unique(codes, return_index=True)[1]
    return EventNames(
        code_E=codes.astype(np.int64),
        names=tuple(names),
        symbols=tuple(join_genes(symbol_lists, JOINER).take(first).to_pylist()),
        members=tuple(map(tuple, key_lists.take(first).to_pylist())),
    )
