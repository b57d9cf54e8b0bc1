"""Tables of tokenised cells: Parquet files, or a Hugging Face ``save_to_disk`` directory."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from geneformer_ray.data.cell_files import CellFiles
from geneformer_ray.data.cell_ids import hash_ids
from geneformer_ray.data.digests import digest_of
from geneformer_ray.data.shards import VOCABULARY_KEY
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from geneformer_ray.data.vocabulary import GeneVocabulary

logger = logging.getLogger(__name__)

__all__ = ["CellTable", "Cells"]


@dataclass(frozen=True)
class Cells:
    """Some cells in memory.

    Parameters
    ----------
    cell_ids
        One a cell.
    input_ids
        One int32 array of token ids a cell.
    columns
        The obs columns asked for, one array of shape (cells,) each.
    """

    cell_ids: list[str]
    input_ids: list[NDArray[np.int32]]
    columns: dict[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(self.cell_ids)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens a cell."""
        return np.array([len(ids) for ids in self.input_ids], dtype=np.int64)


class CellTable:
    """A directory of Parquet files, one Parquet file, or a Hugging Face dataset, addressed by row number.

    Rows are counted over the files in name order. A missing ``cell_id`` is the row number; ``length`` is optional.
    """

    def __init__(self, path: str, *, flag: str = "--cells") -> None:
        self.path = path
        self._flag = flag
        self._files = CellFiles(path, flag)
        self.schema: pa.Schema = self._files.schema
        if "input_ids" not in self.schema.names:
            raise InputError(flag, f"{path} with columns {', '.join(self.schema.names)}", "tokenised cells (input_ids)")

    def __len__(self) -> int:
        return len(self._files)

    @property
    def files(self) -> list[str]:
        """The Parquet files, in the order of their rows; none of a Hugging Face dataset."""
        return self._files.files

    @property
    def vocabulary_digest(self) -> str | None:
        """The digest of the vocabulary that encoded the cells, None where the files do not say."""
        value = (self.schema.metadata or {}).get(VOCABULARY_KEY)
        return value.decode() if value else None

    @cached_property
    def digest(self) -> str:
        """A hash of the cells: ids and tokens in order."""
        lengths, tokens = hashlib.sha256(), hashlib.sha256()
        for lists in self._token_lists():
            lengths.update(_lengths(lists).tobytes())
            tokens.update(lists.flatten().to_numpy(zero_copy_only=False).astype(np.int32).tobytes())
        return digest_of(self._hashed_ids, lengths.hexdigest(), tokens.hexdigest())

    def _token_lists(self) -> Iterator[Any]:
        """Give every cell's tokens, some thousands of cells at a time."""
        for batch in self._files.batches(["input_ids"]):
            yield batch["input_ids"].combine_chunks()

    @cached_property
    def _hashed_ids(self) -> NDArray[np.uint64]:
        """Every id's hash, shape (cells,): 8 bytes a cell, where the ids themselves take a hundred.

        Raises
        ------
        InputError
            If an id stands twice.
        """
        if "cell_id" not in self.schema.names:
            return np.arange(len(self), dtype=np.uint64)
        parts = [hash_ids(self._ids(batch)) for batch in self._files.batches(["cell_id"])]
        hashes = np.concatenate([np.empty(0, dtype=np.uint64), *parts])
        ordered = np.sort(hashes)
        suspects = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
        # Equal hashes are a suspicion only: the ids themselves decide.
        ids, counts = np.unique(self.ids_of(np.flatnonzero(np.isin(hashes, suspects))), return_counts=True)
        if counts.max(initial=1) > 1:
            got = f"{self.path} with the cell id {ids[counts > 1][0]} {counts.max()} times"
            raise InputError(self._flag, got, "a table with unique cell ids")
        return hashes

    # ------------------------------------------------------------------ reading

    def column(self, name: str, flag: str) -> NDArray[Any]:
        """Read one obs column of every cell, shape (cells,)."""
        return np.asarray(self._column(name, flag).to_numpy(zero_copy_only=False))

    def categories(self, name: str, flag: str) -> tuple[NDArray[np.str_], NDArray[np.int32]]:
        """Read one obs column of every cell as text: its values, shape (values,), and each cell's, shape (cells,)."""
        encoded = self._column(name, flag).dictionary_encode(null_encoding="encode")
        values = np.asarray(encoded.dictionary.to_numpy(zero_copy_only=False)).astype(str)
        return values, np.asarray(encoded.indices.to_numpy(zero_copy_only=False), dtype=np.int32)

    def _column(self, name: str, flag: str) -> pa.Array:
        if name not in self.schema.names or name == "input_ids":
            there = [column for column in self.schema.names if column not in ("input_ids", "length")]
            raise InputError(flag, name, f"a column of {self.path}: {', '.join(there)}")
        column = self._files.whole([name])[name].combine_chunks()
        return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column

    @cached_property
    def cell_ids(self) -> NDArray[Any]:
        """Every cell's id, or its row number as a string where the table has none; shape (cells,)."""
        if "cell_id" not in self.schema.names:
            return np.arange(len(self)).astype(str)
        if len(self._hashed_ids) == 0:
            return np.empty(0, dtype=str)
        return self._ids(self._files.whole(["cell_id"])).astype(str)

    def ids_of(self, rows: NDArray[Any]) -> list[str]:
        """Give the ids of some cells, in the order given; :attr:`cell_ids` would hold those of all."""
        rows = np.asarray(rows, dtype=np.int64)
        if "cell_id" not in self.schema.names:
            return [str(row) for row in rows]
        order = np.argsort(rows, kind="stable")
        ids: list[str] = self._ids(self._files.take_sorted(rows[order], ["cell_id"]))[np.argsort(order)].tolist()
        return ids

    def _ids(self, table: pa.Table) -> NDArray[np.object_]:
        column = table["cell_id"]
        if column.null_count:
            got = f"{self.path} with a cell without cell_id"
            raise InputError(self._flag, got, "a table where every cell has one, or without that column")
        # By Arrow: through numpy, an id that is a number would read otherwise where another file has a fraction.
        return np.asarray(column.cast(pa.string()).to_numpy(), dtype=object)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every cell, shape (cells,)."""
        if "length" in self.schema.names:
            return self.column("length", self._flag).astype(np.int64)
        return np.concatenate([np.empty(0, dtype=np.int64), *map(_lengths, self._token_lists())])

    def select(self, filters: Mapping[str, Sequence[str]], flag: str = "--filter") -> NDArray[np.int64]:
        """Give the row numbers of the cells that hold one of the given values in every given column."""
        keep = np.ones(len(self), dtype=bool)
        for name, values in filters.items():
            there, codes_N = self.categories(name, flag)
            keep &= np.isin(there, list(values))[codes_N]
        if not keep.any():
            given = "; ".join(f"{name}={','.join(values)}" for name, values in filters.items()) or "no filter"
            raise InputError(flag, given, "values that at least one cell has")
        return np.flatnonzero(keep)

    def in_state(
        self, rows: NDArray[np.int64], column: str, start: str, towards: Mapping[str, Sequence[str]]
    ) -> NDArray[np.int64]:
        """Keep the rows in state `start`, and check that some cell of the table is in every state of `towards`.

        Parameters
        ----------
        rows
            Chosen row numbers.
        column
            The column of states.
        start
            The state to keep.
        towards
            Flag -> states, each of which some cell must have for its embedding to be computed.
        """
        states, codes_N = self.categories(column, "--state-column")
        for flag, wanted in {"--start": [start], **towards}.items():
            among = states[np.unique(codes_N[rows] if flag == "--start" else codes_N)]
            for state in wanted:
                if state not in among:
                    raise InputError(
                        flag, f"{state!r}, which no cell has in {column}", f"one of {', '.join(np.unique(among))}"
                    )
        return np.asarray(rows[(states == start)[codes_N[rows]]])

    def read(self, rows: NDArray[Any], columns: Sequence[str] = ()) -> Cells:
        """Read the cells of the given row numbers, in the order given: the row groups that hold them, and no others."""
        rows = np.asarray(rows, dtype=np.int64)
        order = np.argsort(rows, kind="stable")
        has_ids = "cell_id" in self.schema.names
        names = dict.fromkeys([*(["cell_id"] if has_ids else []), "input_ids", *columns])
        table = self._files.take_sorted(rows[order], list(names))
        back = np.argsort(order)
        lists = table["input_ids"].combine_chunks()
        flat = lists.flatten().to_numpy(zero_copy_only=False).astype(np.int32)
        offsets = np.concatenate([[0], np.cumsum(_lengths(lists))])
        sequences = [flat[offsets[i] : offsets[i + 1]] for i in back]
        values = {name: np.asarray(table[name].to_numpy())[back] for name in columns}
        ids = self._ids(table)[back].tolist() if has_ids else [str(row) for row in rows]
        return Cells(ids, sequences, values)

    def check(self, vocabulary: GeneVocabulary) -> None:
        """Check that the cells belong to a vocabulary: digests where both have one, ids by their range otherwise."""
        highest = None
        if self.vocabulary_digest is None:
            extremes = [pc.min_max(lists.flatten()).as_py() for lists in self._token_lists() if len(lists.flatten())]
            if any(extreme["min"] < 0 for extreme in extremes):
                raise InputError(self._flag, f"{self.path} with negative token ids", "token ids from 0 on")
            highest = max((extreme["max"] for extreme in extremes), default=None)
            logger.warning(
                "%s does not say which vocabulary encoded it: only the range of its ids is checked", self.path
            )
        vocabulary.check_cells(self.vocabulary_digest, highest)


def _lengths(lists: pa.Array) -> NDArray[np.int64]:
    return np.asarray(pc.list_value_length(lists).to_numpy(zero_copy_only=False), dtype=np.int64)
