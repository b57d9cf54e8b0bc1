"""The formats of count files: which there are, what tells them, and what their readers have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from pyarrow import fs

from geneformer_ray.data import storage
from geneformer_ray.data.formats.anndata_files import AnnDataFile
from geneformer_ray.data.formats.array_files import is_zarr
from geneformer_ray.data.formats.loom_files import LoomFile
from geneformer_ray.data.formats.matrix_directories import MatrixDirectory, is_matrix_directory
from geneformer_ray.data.formats.tenx_files import TenxFile
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from scipy import sparse

    from geneformer_ray.data.formats.obs_columns import StoredColumn
    from geneformer_ray.data.sorted_counts import Entries

__all__ = ["COUNT_SUFFIXES", "CountSource", "count_files_in", "passed_over", "reader_of"]

COUNT_SUFFIXES = (".h5ad", ".h5", ".loom", ".zarr")


class CountSource(Protocol):
    """What the readers of the formats have in common.

    They raise whatever the bytes make h5py, zarr or pyarrow raise; :class:`CountFile` turns it into one line.
    """

    genes: list[str]
    features_left_out: list[tuple[str, str]]
    n_cells: int
    obs_names: list[str]
    needs_sorting: bool
    one_part: bool
    n_entries: int

    def gene_columns(self) -> dict[str, list[str]]:
        """Read the first names of every column that could name the genes."""
        ...

    def column(self, name: str) -> StoredColumn:
        """Give an obs column."""
        ...

    def cell_ids(self, start: int, stop: int) -> list[str]:
        """Read the ids of the cells start .. stop-1."""
        ...

    def rows(self, start: int, stop: int) -> sparse.csr_array:
        """Read the counts of the cells start .. stop-1."""
        ...

    def entries(self, first: int, last: int) -> Iterator[Entries]:
        """Read stored entries of a matrix that needs sorting, in pieces."""
        ...

    def places(self) -> list[str]:
        """List the matrices that the file holds."""
        ...

    def sample(self, place: str) -> NDArray[Any]:
        """Read some values of a matrix."""
        ...

    def check_whole(self) -> None:
        """Check what takes longer than opening."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


def count_files_in(directory: str) -> list[str]:
    """List what can be read directly inside a directory, in name order.

    Files by their suffix, zarr stores, and 10x matrix directories; hidden ones are passed over.
    """
    return _listed(directory)[0]


def passed_over(directory: str) -> list[str]:
    """List what :func:`count_files_in` leaves out of a directory: base names, in order.

    Names that begin with a dot or an underscore are left out of this list, too: they are nobody's data.
    """
    return [name for name in _listed(directory)[1] if not name.startswith((".", "_"))]


def _listed(directory: str) -> tuple[list[str], list[str]]:
    """Give the paths that can be read, and the names of the rest."""
    filesystem, inside = storage.locate(directory)
    found, rest = [], []
    for item in filesystem.get_file_info(fs.FileSelector(inside, allow_not_found=True)):
        path = storage.join(directory, item.base_name)
        if item.base_name.startswith("."):
            continue
        counted = item.is_file and item.base_name.endswith(COUNT_SUFFIXES)
        if counted or (item.type == fs.FileType.Directory and (is_zarr(path) or is_matrix_directory(path))):
            found.append(path)
        else:
            rest.append(item.base_name)
    return sorted(found), sorted(rest)


def reader_of(path: str) -> Any:
    """Choose the reader of a file or directory.

    Raises
    ------
    InputError
        If nothing is there, or nothing that holds counts.
    """
    if not storage.exists(path):
        raise InputError("--input", path, "a file that exists")
    if is_matrix_directory(path):
        return MatrixDirectory
    if is_zarr(path):
        return AnnDataFile
    for suffix, reader in ((".h5ad", AnnDataFile), (".loom", LoomFile), (".h5", TenxFile)):
        if path.endswith(suffix) and not storage.is_directory(path):
            return reader
    takes = f"files of counts ({', '.join(COUNT_SUFFIXES)}), or a 10x directory, which holds matrix.mtx"
    raise InputError("--input", path, takes)
