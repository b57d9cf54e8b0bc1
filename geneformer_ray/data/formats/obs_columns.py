"""Annotation columns (obs and var) of count files, read in slices and typed by the file's metadata.

The encodings are those of AnnData's on-disk specification, and what its versions before 0.8 wrote.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from geneformer_ray.data.formats.array_files import array_in, attribute, group_in, is_array

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

__all__ = [
    "INDEX",
    "NAMES_SHOWN",
    "AnnotationTable",
    "StoredColumn",
    "UnsupportedColumnError",
    "first_names",
    "strings",
]

INDEX = "index"  # what a table's index is called, whatever its name in the file
NAMES_SHOWN = 200
NULLABLE = ("nullable-integer", "nullable-boolean", "nullable-string-array")


class UnsupportedColumnError(ValueError):
    """A column of a kind that no table of cells can carry."""


class StoredColumn:
    """One column of a file.

    Parameters
    ----------
    element
        The array, or the group of a categorical or nullable column.
    legacy_categories
        Where AnnData before 0.8 kept the categories of a column that is stored as bare codes.
    """

    def __init__(self, element: Any, legacy_categories: Any = None) -> None:
        self._mask: Any = None
        self._categories: pa.Array | None = None
        categories = legacy_categories
        if is_array(element):
            self._values = element
        elif attribute(element, "encoding-type") == "categorical" or "codes" in element:
            self._values, categories = array_in(element, "codes"), element["categories"]
        elif attribute(element, "encoding-type") in NULLABLE:
            self._values, self._mask = array_in(element, "values"), array_in(element, "mask")
        else:
            raise UnsupportedColumnError(f"a {attribute(element, 'encoding-type') or 'group'}")
        if self._values.shape is None or len(self._values.shape) != 1:
            raise UnsupportedColumnError("an array that is not one-dimensional")
        self.type = _arrow_type(self._values.dtype)
        if categories is not None:
            if not pa.types.is_integer(self.type):
                raise ValueError("the codes of a categorical column are not integers")
            names = StoredColumn(categories)
            self._categories, self.type = names.read(0, len(names)), names.type
            if not len(names):
                # Nothing in it has a value, so the type that the empty list happens to have says nothing: Arrow's null
                # goes together with whatever the column is in other files.
                self._categories, self.type = pa.nulls(0), pa.null()

    def __len__(self) -> int:
        return int(self._values.shape[0])

    def read(self, start: int, stop: int) -> pa.Array:
        """Read the values start .. stop-1; missing ones (NaN among them) are null."""
        values = self._values[start:stop]
        if len(values) != stop - start:
            raise ValueError(f"a column has {len(self)} values, fewer than there are rows")
        if self._categories is not None:
            codes = values.astype(np.int64)
            if not len(self._categories):
                if (codes >= 0).any():
                    raise ValueError("a categorical column has codes and no categories")
                return pa.nulls(len(codes))
            # Arrow refuses a code without a category.
            return self._categories.take(pa.array(codes, mask=codes < 0))
        mask = None if self._mask is None else np.asarray(self._mask[start:stop], dtype=bool)
        if self.type == pa.string():
            found = strings(values)
            return found if mask is None else pc.if_else(pa.array(mask), pa.scalar(None, pa.string()), found)
        native = values.astype(self.type.to_pandas_dtype(), copy=False)
        return pa.array(native, self.type, mask=mask, from_pandas=True)


class AnnotationTable:
    """The obs or var of an AnnData file.

    Parameters
    ----------
    parent
        The group that holds it.
    name
        Its name there.
    """

    def __init__(self, parent: Any, name: str) -> None:
        if name in parent and is_array(parent[name]) and parent[name].shape is not None:
            raise ValueError(f"its {name} is a table of AnnData before 0.7: read and save it with a current anndata")
        self._group = group_in(parent, name)
        self._columns: dict[str, StoredColumn] = {}
        self.index = attribute(self._group, "_index") or "_index"
        order = self._group.attrs.get("column-order", None)
        there = set(self._group.keys()) - {self.index, "__categories"}
        ordered = [_text(column) for column in np.asarray(order).tolist()] if order is not None else []
        self.names = [column for column in ordered if column in there] + sorted(there - set(ordered))

    def __len__(self) -> int:
        return len(self.column(self.index))

    def column(self, name: str) -> StoredColumn:
        """Give a column, or the index by its name.

        Raises
        ------
        UnsupportedColumnError
            If it is of a kind that no table of cells can carry.
        """
        if name not in self._columns:
            element = self._group[name]
            # The array named like the column, rather than the reference that the column carries: zarr has none.
            legacy = f"__categories/{name}"
            known = self._group[legacy] if is_array(element) and legacy in self._group else None
            self._columns[name] = StoredColumn(element, known)
        return self._columns[name]


def first_names(names: Mapping[str, str], column: Callable[[str], StoredColumn]) -> dict[str, list[str]]:
    """Read the beginning of those columns that hold text.

    Parameters
    ----------
    names
        What a column is to be called -> its name. Of two called alike, the last is read.
    column
        Gives a column by its name.
    """
    found: dict[str, list[str]] = {}
    for name, stored in names.items():
        try:
            values = column(stored)
        except UnsupportedColumnError:
            continue
        if values.type == pa.string():
            shown = values.read(0, min(NAMES_SHOWN, len(values))).to_pylist()
            found[name] = ["" if text is None else text for text in shown]
    return found


def strings(values: NDArray[Any]) -> pa.Array:
    """Give stored text as Arrow strings: bytes are UTF-8, in HDF5 of fixed or variable length."""
    items = values.tolist()
    if any(isinstance(item, bytes) for item in items):
        return pa.array(items, pa.binary()).cast(pa.string())
    return pa.array(items, pa.string())


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _arrow_type(dtype: Any) -> pa.DataType:
    if dtype.kind in "SUT" or h5py.check_string_dtype(dtype) is not None:
        return pa.string()
    if dtype.kind == "b":
        return pa.bool_()
    if dtype.kind in "iu" or (dtype.kind == "f" and dtype.itemsize in (4, 8)):
        return pa.from_numpy_dtype(dtype.newbyteorder("="))
    if dtype.kind == "f" and dtype.itemsize == 2:
        return pa.float32()  # Arrow's half floats are read by few
    raise UnsupportedColumnError(f"an array of {dtype}")
