"""Tables of tokenised cells: Parquet files, or a Hugging Face ``save_to_disk`` directory."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from geneformer_ray.data import storage
from geneformer_ray.data.digests import digest_of
from geneformer_ray.data.shards import VOCABULARY_KEY
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from geneformer_ray.data.vocabulary import GeneVocabulary

logger = logging.getLogger(__name__)

__all__ = ["CellTable", "Cells"]

ROWS_AT_ONCE = 4_096


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
        if not storage.exists(path):
            raise InputError(flag, path, "a directory of Parquet files, one file, or a saved Hugging Face dataset")
        self._dataset: Any = None
        saved = ("dataset_info.json", "dataset_dict.json")
        if storage.is_directory(path) and any(storage.exists(storage.join(path, name)) for name in saved):
            self._open_hugging_face()
        else:
            self._open_parquet()
        if "input_ids" not in self.schema.names:
            raise InputError(flag, f"{path} with columns {', '.join(self.schema.names)}", "tokenised cells (input_ids)")

    def _open_parquet(self) -> None:
        self.files = storage.list_files(self.path, ".parquet") if storage.is_directory(self.path) else [self.path]
        if not self.files:
            raise InputError(self._flag, f"{self.path} without Parquet files", "a directory that holds tokenised cells")
        try:
            opened = [self._parquet(file) for file in self.files]
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(self._flag, self.path, f"readable Parquet files ({error})") from error
        self.schema: pa.Schema = opened[0].schema_arrow
        for file, other in zip(self.files, opened, strict=True):
            if other.schema_arrow.names != self.schema.names:
                raise InputError(self._flag, f"{file} with other columns than {self.files[0]}", "files of one table")
        digests = {(other.schema_arrow.metadata or {}).get(VOCABULARY_KEY) for other in opened}
        if len(digests) > 1:
            raise InputError(self._flag, f"{self.path} with files of several vocabularies", "files of one table")
        self._file_starts = np.concatenate([[0], np.cumsum([other.metadata.num_rows for other in opened])])

    def _open_hugging_face(self) -> None:
        import datasets  # heavy, and only needed for such a directory

        dataset = datasets.load_from_disk(os.fspath(storage.local_copy(self.path)))
        if isinstance(dataset, datasets.DatasetDict):
            raise InputError(self._flag, f"{self.path} with splits {', '.join(dataset)}", "one split's directory")
        self._dataset = dataset.with_format("arrow")
        self.files = []
        self.schema = dataset.features.arrow_schema
        self._file_starts = np.array([0, len(dataset)])

    def _parquet(self, file: str) -> pq.ParquetFile:
        filesystem, inside = storage.locate(file)
        return pq.ParquetFile(inside, filesystem=filesystem)

    def __len__(self) -> int:
        return int(self._file_starts[-1])

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
        return digest_of(self.cell_ids.tolist(), lengths.hexdigest(), tokens.hexdigest())

    def _token_lists(self) -> Iterator[Any]:
        """Give every cell's tokens, some thousands of cells at a time."""
        if self._dataset is not None:
            for start in range(0, len(self), ROWS_AT_ONCE):
                stop = min(start + ROWS_AT_ONCE, len(self))
                yield from self._dataset.select_columns(["input_ids"])[start:stop]["input_ids"].chunks
            return
        for file in self.files:
            for batch in self._parquet(file).iter_batches(ROWS_AT_ONCE, columns=["input_ids"]):
                yield batch.column(0)

    # ------------------------------------------------------------------ reading

    def column(self, name: str, flag: str) -> NDArray[Any]:
        """Read one obs column of every cell, shape (cells,)."""
        if name not in self.schema.names or name == "input_ids":
            there = [column for column in self.schema.names if column not in ("input_ids", "length")]
            raise InputError(flag, name, f"a column of {self.path}: {', '.join(there)}")
        return np.asarray(self._whole([name])[name].combine_chunks().to_numpy(zero_copy_only=False))

    @cached_property
    def cell_ids(self) -> NDArray[Any]:
        """Every cell's id, or its row number as a string where the table has none; shape (cells,)."""
        if "cell_id" not in self.schema.names:
            return np.arange(len(self)).astype(str)
        ids = self._ids(self._whole(["cell_id"])).astype(str)
        names, counts = np.unique(ids, return_counts=True)
        if len(names) < len(ids):
            got = f"{self.path} with the cell id {names[counts > 1][0]} {counts.max()} times"
            raise InputError(self._flag, got, "a table with unique cell ids")
        return ids

    def ids_of(self, rows: NDArray[Any]) -> list[str]:
        """Give the ids of some cells, in the order given; :attr:`cell_ids` would hold those of all."""
        rows = np.asarray(rows, dtype=np.int64)
        if "cell_id" not in self.schema.names:
            return [str(row) for row in rows]
        order = np.argsort(rows, kind="stable")
        ids: list[str] = self._ids(self._take_sorted(rows[order], ["cell_id"]))[np.argsort(order)].tolist()
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
            keep &= np.isin(self.column(name, flag).astype(str), list(values))
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
        states = self.column(column, "--state-column").astype(str)
        for flag, wanted in {"--start": [start], **towards}.items():
            among = states[rows] if flag == "--start" else states
            for state in wanted:
                if state not in among:
                    there = ", ".join(np.unique(among))
                    raise InputError(flag, f"{state!r}, which no cell has in {column}", f"one of {there}")
        return np.asarray(rows[states[rows] == start])

    def read(self, rows: NDArray[Any], columns: Sequence[str] = ()) -> Cells:
        """Read the cells of the given row numbers, in the order given: the row groups that hold them, and no others."""
        rows = np.asarray(rows, dtype=np.int64)
        order = np.argsort(rows, kind="stable")
        has_ids = "cell_id" in self.schema.names
        names = dict.fromkeys([*(["cell_id"] if has_ids else []), "input_ids", *columns])
        table = self._take_sorted(rows[order], list(names))
        back = np.argsort(order)
        lists = table["input_ids"].combine_chunks()
        flat = lists.flatten().to_numpy(zero_copy_only=False).astype(np.int32)
        offsets = np.concatenate([[0], np.cumsum(_lengths(lists))])
        sequences = [flat[offsets[i] : offsets[i + 1]] for i in back]
        values = {name: np.asarray(table[name].to_numpy())[back] for name in columns}
        ids = self._ids(table)[back].tolist() if has_ids else [str(row) for row in rows]
        return Cells(ids, sequences, values)

    def _whole(self, columns: list[str]) -> pa.Table:
        if self._dataset is not None:
            return self._dataset.select_columns(columns)[:]
        return _concat([self._parquet(file).read(columns=columns) for file in self.files])

    def _take_sorted(self, rows: NDArray[np.int64], columns: list[str]) -> pa.Table:
        if self._dataset is not None:
            return self._dataset.select_columns(columns)[rows]
        parts = []
        for file, start, stop in zip(self.files, self._file_starts[:-1], self._file_starts[1:], strict=True):
            inside = rows[(rows >= start) & (rows < stop)] - start
            if len(inside):
                parts.append(self._take_from_file(self._parquet(file), inside, columns))
        if not parts:
            return self.schema.empty_table().select(columns)
        return _concat(parts)

    @staticmethod
    def _take_from_file(file: pq.ParquetFile, rows: NDArray[np.int64], columns: list[str]) -> pa.Table:
        """Take sorted rows of one file, reading only the row groups that hold them."""
        sizes = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        group = np.searchsorted(starts, rows, side="right") - 1
        needed = np.unique(group)
        # Where a needed group begins once only the needed groups are read, one behind the other.
        read_starts = np.concatenate([[0], np.cumsum(np.asarray(sizes)[needed])])
        where = rows - starts[group] + read_starts[np.searchsorted(needed, group)]
        return file.read_row_groups(needed.tolist(), columns=columns).take(where)

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


def _concat(tables: list[pa.Table]) -> pa.Table:
    # Permissive: a column that is empty in one file has no type there, and widths of integers may differ.
    return pa.concat_tables(tables, promote_options="permissive")


def _lengths(lists: pa.Array) -> NDArray[np.int64]:
    return np.asarray(pc.list_value_length(lists).to_numpy(zero_copy_only=False), dtype=np.int64)
