"""10x Genomics' HDF5 files (``filtered_feature_bc_matrix.h5``), of Cell Ranger 2 and of 3 and later.

Only features of the type Gene Expression are genes. Antibody tags, guides and peaks are counted beside them, on other
scales: in a cell's total they would shift every gene's rank value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from geneformer_ray.data.formats.array_files import ArrayFile, array_in, group_in, is_array
from geneformer_ray.data.formats.obs_columns import NAMES_SHOWN, StoredColumn, strings
from geneformer_ray.data.formats.stored_matrix import CompressedMatrix
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from geneformer_ray.data.sorted_counts import Entries

__all__ = ["GENE_EXPRESSION", "TenxFeatures", "TenxFile"]

GENE_EXPRESSION = "Gene Expression"
# The names under which scanpy, CELLxGENE and 10x know the two columns; the first of each is ours.
ID_NAMES = ("gene_ids", "ensembl_id", "id")
SYMBOL_NAMES = ("gene_symbols", "symbol", "name", "gene_name", "feature_name")


def _features_named(columns: Mapping[str, Sequence[str]], gene_column: str | None, path: str) -> list[str]:
    """Give the features' names: ids by default, else ``gene_symbols``, or any other column there is.

    Parameters
    ----------
    columns
        By name; among them ``id`` and ``name``.
    gene_column
        What was asked for.
    path
        For the error.
    """
    asked = gene_column or ID_NAMES[0]
    name = "id" if asked in ID_NAMES else "name" if asked in SYMBOL_NAMES else asked
    if name not in columns:
        others = sorted(set(columns) - {"id", "name"})
        takes = f"a column of the features of {path}: {', '.join([ID_NAMES[0], SYMBOL_NAMES[0], *others])}"
        raise InputError("--gene-column", gene_column, takes)
    return list(columns[name])


def _gene_features(types: Sequence[str] | None, n_features: int, path: str) -> NDArray[np.int64]:
    """Give the numbers of the features that are genes: all where the file names no types."""
    if types is None:
        return np.arange(n_features)
    genes = np.flatnonzero(np.asarray(types, dtype=object) == GENE_EXPRESSION)
    if not len(genes):
        there = ", ".join(sorted(set(types))) or "none"
        raise InputError("--input", f"{path} with features of the types {there}", f"some of the type {GENE_EXPRESSION}")
    return genes


class TenxFeatures:
    """The features of a 10x matrix: which are genes, and what they are called.

    Parameters
    ----------
    columns
        By name; among them ``id``, and perhaps ``name`` and ``feature_type``.
    gene_column
        What was asked for.
    path
        For errors.

    Attributes
    ----------
    places
        The numbers of the features that are genes.
    genes
        Their names.
    left_out
        Name and type of each other feature.
    """

    def __init__(self, columns: Mapping[str, Sequence[str]], gene_column: str | None, path: str) -> None:
        types = columns.get("feature_type")
        columns = {name: values for name, values in columns.items() if name != "feature_type"}
        self.places = _gene_features(types, len(columns["id"]), path)
        named = _features_named(columns, gene_column, path)
        self.genes = [named[number] for number in self.places]
        genes = set(self.places.tolist())
        self.left_out = [(named[i], kind) for i, kind in enumerate(types or ()) if i not in genes]
        ours = {"id": ID_NAMES[0], "name": SYMBOL_NAMES[0]}
        self._first = {
            ours.get(name, name): [str(values[number]) for number in self.places[:NAMES_SHOWN]]
            for name, values in columns.items()
        }

    def first_names(self) -> dict[str, list[str]]:
        """Give the first genes' names in each column, by what ``gene_column`` calls it."""
        return {name: list(values) for name, values in self._first.items()}


class TenxFile:
    """A 10x HDF5 file.

    Parameters
    ----------
    path
        Where it lies.
    counts
        ``X`` only.
    gene_column
        ``gene_ids`` (default), ``gene_symbols``, or another array of the features.
    """

    needs_sorting = False
    one_part = False
    n_entries = 0

    def __init__(self, path: str, counts: str, gene_column: str | None) -> None:
        if counts != "X":
            raise InputError("--counts", counts, f"X, the one matrix that {path} holds")
        self._file = ArrayFile(path)
        try:
            group, features, names = _layout(self._file.root, path)
            n_features, self.n_cells = (int(size) for size in array_in(group, "shape")[:])
            # Compressed by barcode, as features x barcodes: by cell, seen from here.
            self._matrix = CompressedMatrix(group, (self.n_cells, n_features), by_cell=True)
            self._barcodes = StoredColumn(array_in(group, "barcodes"))
            if len(self._barcodes) != self.n_cells:
                got = f"{path} with {self.n_cells} columns and {len(self._barcodes)} barcodes"
                raise InputError("--input", got, "equal numbers")
            columns = {
                name: strings(array_in(features, stored)[:]).to_pylist()
                for name, stored in names.items()
                if array_in(features, stored).shape == (n_features,)
            }
            if len(columns.get("id", ())) != n_features:
                raise InputError("--input", f"{path} whose features are not {n_features}", "one for each row")
            self._features = TenxFeatures(columns, gene_column, path)
            self.genes, self.features_left_out = self._features.genes, self._features.left_out
        except BaseException:
            self.close()
            raise
        self.obs_names: list[str] = []

    @staticmethod
    def kind(path: str) -> str:
        """Say what it is."""
        return "10x HDF5 file"

    def gene_columns(self) -> dict[str, list[str]]:
        """Give the first names of the features' columns."""
        return self._features.first_names()

    def column(self, name: str) -> StoredColumn:
        """Give an obs column: there is none."""
        raise KeyError(name)

    def cell_ids(self, start: int, stop: int) -> list[str]:
        """Read the barcodes of the cells start .. stop-1."""
        return [str(name) for name in self._barcodes.read(start, stop).to_pylist()]

    def rows(self, start: int, stop: int) -> sparse.csr_array:
        """Read the genes of the cells start .. stop-1."""
        return _columns(self._matrix.rows(start, stop), self._features.places)

    def entries(self, first: int, last: int) -> Iterator[Entries]:
        """Give nothing: these files are by cell."""
        return iter(())

    def places(self) -> list[str]:
        """List the matrices that the file holds."""
        return ["X"]

    def sample(self, place: str) -> NDArray[Any]:
        """Read some values."""
        return self._matrix.sample()

    def check_whole(self) -> None:
        """Check nothing more than opening did."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _layout(root: Any, path: str) -> tuple[Any, Any, dict[str, str]]:
    """Give the matrix's group, the features' group, and the features' columns: our name -> the file's."""
    if "matrix" in root and not is_array(root["matrix"]):
        group = root["matrix"]
        features = group_in(group, "features")
        return group, features, {name: name for name in features if is_array(features[name]) and name[0] != "_"}
    genomes = [name for name in root if not is_array(root[name]) and "barcodes" in root[name]]
    if len(genomes) > 1:
        got = f"{path} with counts of the genomes {', '.join(genomes)}"
        raise InputError("--input", got, "a file of one genome: a model knows the genes of one species")
    if not genomes:
        raise ValueError("it has neither a group matrix nor one named after a genome, with barcodes")
    group = root[genomes[0]]
    return group, group, {"id": "genes", "name": "gene_names"}


def _columns(matrix: sparse.csr_array, columns: NDArray[np.int64]) -> sparse.csr_array:
    """Leave out the other columns; entries stay as they are stored, which scipy's indexing does not promise."""
    if len(columns) == matrix.shape[1]:
        return matrix
    place = np.full(matrix.shape[1], -1, np.int32)
    place[columns] = np.arange(len(columns), dtype=np.int32)
    there = place[matrix.indices]
    kept = there >= 0
    pointers = np.concatenate([[0], np.cumsum(kept)])[matrix.indptr].astype(matrix.indptr.dtype)
    return sparse.csr_array((matrix.data[kept], there[kept], pointers), shape=(matrix.shape[0], len(columns)))
