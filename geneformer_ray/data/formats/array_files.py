"""Files that are trees of arrays and attributes: HDF5 and zarr, local or by URI, behind one way of asking.

Both libraries give groups (``group["obs/type"]``, ``name in group``, ``.attrs``) and arrays (``.shape``, ``.dtype``,
``array[a:b]``), so that everything above this file reads an h5ad file and a zarr store with the same lines.
"""

from __future__ import annotations

import struct
import zlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import h5py
from pyarrow import fs

from geneformer_ray.data import storage
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["UNREADABLE", "ArrayFile", "array_in", "attribute", "group_in", "is_array", "is_zarr", "reading"]

# Blocks follow each other and share at most a chunk at their edges; HDF5's cache would copy every byte once more
# (170,000 cells/s with it, 260,000 without, at 2,000 genes a cell).
NO_CHUNK_CACHE = {"rdcc_nbytes": 0}
ZARR_MARKS = ("zarr.json", ".zgroup", ".zmetadata")
# What h5py, zarr, their codecs and pyarrow raise where bytes make no sense. Damaged files reach all of them.
UNREADABLE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


class ArrayFile:
    """An open HDF5 file or zarr store, to be closed.

    Parameters
    ----------
    path
        A local path or a pyarrow filesystem URI.
    """

    def __init__(self, path: str) -> None:
        filesystem, inside = storage.locate(path)
        self._open: list[Any] = []
        if is_zarr(path):
            self.root: Any = _open_zarr(filesystem, inside)
        elif isinstance(filesystem, fs.LocalFileSystem):
            # No lock: file servers often have none, and reading must never stand in the way of the file's owner.
            self.root = self._keep(h5py.File(inside, "r", locking=False, **NO_CHUNK_CACHE))
        else:
            self.root = self._keep(h5py.File(self._keep(filesystem.open_input_file(inside)), "r", **NO_CHUNK_CACHE))

    def _keep(self, handle: Any) -> Any:
        self._open.append(handle)
        return handle

    def close(self) -> None:
        """Close the file; reading from it is over."""
        while self._open:
            self._open.pop().close()


@contextmanager
def reading(path: str, kind: str) -> Iterator[None]:
    """Turn whatever a damaged file makes its reader raise into one line that names the file."""
    try:
        yield
    except InputError:
        raise
    except UNREADABLE as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise InputError("--input", path, f"a readable {kind} ({why[:300]})") from error


def is_zarr(path: str) -> bool:
    """Whether `path` is a zarr store: a directory that says so, by what lies in it or by its name."""
    if not storage.is_directory(path):
        return False
    return path.rstrip("/").endswith(".zarr") or any(storage.exists(storage.join(path, mark)) for mark in ZARR_MARKS)


def is_array(element: Any) -> bool:
    """Whether this is an array rather than a group."""
    return hasattr(element, "shape")


def array_in(group: Any, name: str) -> Any:
    """Give the array of this name.

    Raises
    ------
    ValueError
        If there is none.
    """
    element: Any = group[name] if name in group else None
    if not is_array(element) or element.shape is None:
        raise ValueError(f"there is no array {name} in it")
    return element


def group_in(group: Any, name: str) -> Any:
    """Give the group of this name.

    Raises
    ------
    ValueError
        If there is none.
    """
    element: Any = group[name] if name in group else None
    if element is None or is_array(element):
        raise ValueError(f"there is no group {name} in it")
    return element


def attribute(element: Any, name: str) -> str:
    """Give an attribute as text, empty where there is none."""
    value = element.attrs.get(name, "")
    return value.decode() if isinstance(value, bytes) else str(value)


def _open_zarr(filesystem: fs.FileSystem, inside: str) -> Any:
    # Imported here: HDF5 users should not pay for its half second in every worker.
    import zarr

    if isinstance(filesystem, fs.LocalFileSystem):
        return zarr.open_group(inside, mode="r")
    from fsspec.implementations.arrow import ArrowFSWrapper  # type: ignore[import-untyped]
    from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper  # type: ignore[import-untyped]
    from zarr.storage import FsspecStore

    class PyarrowFiles(ArrowFSWrapper):  # type: ignore[misc]
        fsid = "pyarrow"  # the parent's asks for an HDFS host, which other filesystems do not have

    # Not from fsspec's cache of instances: its keys hold an address, which another filesystem may have later.
    files = AsyncFileSystemWrapper(PyarrowFiles(filesystem, skip_instance_cache=True), asynchronous=True)
    return zarr.open_group(FsspecStore(files, read_only=True, path=inside), mode="r")
