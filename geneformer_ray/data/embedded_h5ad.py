"""A copy of an h5ad file that holds embeddings of its cells as well, in ``obsm``.

The file is copied byte by byte, and only the new elements are written into the copy: the matrix, which may be larger
than the machine's memory, is never read.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from geneformer_ray.data import storage
from geneformer_ray.data.formats.array_files import UNREADABLE, ArrayFile, group_in
from geneformer_ray.data.formats.obs_columns import AnnotationTable
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

__all__ = ["OBSM_KEY", "H5adCells"]

OBSM_KEY = "X_geneformer"
FLAG = "--h5ad"
COPIED_AT_ONCE = 1 << 24
# So many ids are searched for the prefix that another file's cells may have been given.
IDS_SEARCHED = 20


@dataclass(frozen=True)
class H5adCells:
    """Where cells lie in an h5ad file.

    Parameters
    ----------
    path
        The file.
    cells
        How many it holds.
    row_N
        Of each cell that was looked for, its row in the file; -1 where the file does not hold it. int64, shape (N,).
    """

    path: str
    cells: int
    row_N: NDArray[np.int64]

    @classmethod
    def find(cls, path: str, cell_ids: NDArray[Any], *, prefix: str = "") -> H5adCells:
        """Look cells up by their ids: the prefix, then the name in the file's obs index, as `tokenize` forms them.

        Raises
        ------
        InputError
            If the file cannot be read, its names are not unique, or it holds none of the cells.
        """
        if not storage.exists(path) or storage.is_directory(path):
            raise InputError(FLAG, path, "an h5ad file that exists")
        try:
            names = _obs_names(path)
        except UNREADABLE as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise InputError(FLAG, path, f"a readable h5ad file ({why[:300]})") from error
        if names.null_count or len(pc.unique(names)) < len(names):
            raise InputError(FLAG, f"{path} with cells that share a name", "a file with unique names in obs")
        wanted = pa.array(cell_ids, pa.string())
        row_N = pc.index_in(wanted, pc.binary_join_element_wise(prefix, names, "")).fill_null(-1)
        if pc.max(row_N).as_py() in (None, -1):
            raise _none_found(path, wanted, names, prefix)
        return cls(path, len(names), row_N.to_numpy().astype(np.int64))

    @property
    def counts(self) -> dict[str, int]:
        """Cells of the file, how many of them were looked for and how many not, and how many lie in no row of it."""
        found = int((self.row_N >= 0).sum())
        return {
            "cells": self.cells,
            "embedded": found,
            "not_embedded": self.cells - found,
            "elsewhere": len(self.row_N) - found,
        }

    def write_copy(
        self, target: str, blocks: Iterable[tuple[slice, NDArray[np.float32]]], about: Mapping[str, Any]
    ) -> None:
        """Copy the file, with ``obsm["X_geneformer"]`` and ``uns["X_geneformer"]`` in place of any that it has.

        Parameters
        ----------
        target
            The copy: a local path, or a URI.
        blocks
            Which of the cells that were looked for, and their embeddings, float32 of shape (cells, width); one or more.
            Cells of the file that are in no block have NaN.
        about
            What ``uns`` says of the embeddings: texts and numbers.
        """
        with tempfile.TemporaryDirectory() as scratch:
            # HDF5 writes here and there in a file, which object stores do not offer.
            local = str(Path(scratch, "copy.h5ad")) if storage.is_uri(target) else target
            _copy(self.path, local)
            # No lock: nobody else knows this file yet, and file servers often have none.
            with h5py.File(local, "r+", locking=False) as file:
                self._add(file, blocks, about)
            if local != target:
                _copy(local, target)

    def _add(
        self, file: h5py.File, blocks: Iterable[tuple[slice, NDArray[np.float32]]], about: Mapping[str, Any]
    ) -> None:
        # Imported here: AnnData costs seconds, and only this needs it.
        from anndata.io import write_elem

        for name in ("obsm", "uns"):
            if name not in file:
                write_elem(file, name, {})
        write_elem(file["uns"], OBSM_KEY, dict(about))
        obsm, values_NW = file["obsm"], None
        if OBSM_KEY in obsm:
            del obsm[OBSM_KEY]
        for part, embeddings in blocks:
            if values_NW is None:
                shape = (self.cells, embeddings.shape[1])
                values_NW = obsm.create_dataset(OBSM_KEY, shape, np.float32, fillvalue=np.nan)
                values_NW.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
            _write_rows(values_NW, self.row_N[part], embeddings)


def _write_rows(values_NW: h5py.Dataset, rows: NDArray[np.int64], embeddings: NDArray[np.float32]) -> None:
    """Write embeddings to rows in any order, each run of neighbouring rows at once; row -1 is none."""
    order = np.argsort(rows, kind="stable")
    order = order[rows[order] >= 0]
    for run in np.split(order, np.flatnonzero(np.diff(rows[order]) != 1) + 1):
        if len(run):
            values_NW[rows[run[0]] : rows[run[-1]] + 1] = embeddings[run]


def _obs_names(path: str) -> pa.Array:
    file = ArrayFile(path)
    try:
        for name in ("obsm", "uns"):
            if name in file.root:
                group_in(file.root, name)  # now, rather than when the copy is to be written
        obs = AnnotationTable(file.root, "obs")
        return obs.column(obs.index).read(0, len(obs)).cast(pa.string())
    finally:
        file.close()


def _none_found(path: str, wanted: pa.Array, names: pa.Array, prefix: str) -> InputError:
    """Say how the ids differ; where they end like the file's names, which prefix would do."""
    ours = wanted.slice(0, IDS_SEARCHED).to_pylist()
    got = f"{path}, which holds none of the embedded cells" + (f" with the prefix {prefix}" if prefix else "")
    for cell_id in ours:
        ends = pa.array([cell_id[start:] for start in range(len(cell_id))], pa.string())
        found = np.flatnonzero(pc.is_in(ends, names).to_numpy(zero_copy_only=False))
        if len(found):
            return InputError(FLAG, got, f"--cell-id-prefix '{cell_id[: found[0]]}' beside it, as tokenize had")
    theirs = names[0].as_py() if len(names) else "none"
    return InputError(FLAG, got, f"the file that was tokenised: its ids are like {theirs}, the cells' like {ours[0]}")


def _copy(source: str, target: str) -> None:
    from_filesystem, inside = storage.locate(source)
    to_filesystem, there = storage.locate(target)
    with from_filesystem.open_input_stream(inside) as reader, to_filesystem.open_output_stream(there) as writer:
        shutil.copyfileobj(reader, writer, COPIED_AT_ONCE)
