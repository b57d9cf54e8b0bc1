"""The files of a table of tokenised cells, by row number: Parquet, or a Hugging Face ``save_to_disk`` directory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from geneformer_ray.data import storage
from geneformer_ray.data.shards import VOCABULARY_KEY
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

__all__ = ["CellFiles"]

ROWS_AT_ONCE = 4_096


class CellFiles:
    """A directory of Parquet files, one file, or a Hugging Face dataset; rows are counted in the name order of files.

    Parameters
    ----------
    path
        Where they lie.
    flag
        Named in errors.
    """

    def __init__(self, path: str, flag: str) -> None:
        self.path, self._flag = path, flag
        if not storage.exists(path):
            raise InputError(flag, path, "a directory of Parquet files, one file, or a saved Hugging Face dataset")
        self._dataset: Any = None
        saved = ("dataset_info.json", "dataset_dict.json")
        if storage.is_directory(path) and any(storage.exists(storage.join(path, name)) for name in saved):
            self._open_hugging_face()
        else:
            self._open_parquet()

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

    def batches(self, columns: list[str]) -> Iterator[pa.Table]:
        """Read some columns of all rows, some thousands of rows at a time."""
        if self._dataset is not None:
            dataset = self._dataset.select_columns(columns)
            for start in range(0, len(self), ROWS_AT_ONCE):
                yield dataset[start : min(start + ROWS_AT_ONCE, len(self))]
            return
        for file in self.files:
            for batch in self._parquet(file).iter_batches(ROWS_AT_ONCE, columns=columns):
                yield pa.Table.from_batches([batch])

    def whole(self, columns: list[str]) -> pa.Table:
        """Read some columns of all rows."""
        if self._dataset is not None:
            return self._dataset.select_columns(columns)[:]
        return _concat([self._parquet(file).read(columns=columns) for file in self.files])

    def take_sorted(self, rows: NDArray[np.int64], columns: list[str]) -> pa.Table:
        """Read some columns of sorted rows: of the row groups that hold them, and no others."""
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


def _concat(tables: list[pa.Table]) -> pa.Table:
    # Permissive: a column that is empty in one file has no type there, and widths of integers may differ.
    return pa.concat_tables(tables, promote_options="permissive")
