"""The count matrices of a job: listed, checked before any work is done, sorted by cell where need be, and cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from geneformer_ray.data import storage
from geneformer_ray.data.cell_ids import repeated_ids
from geneformer_ray.data.counts import (
    CELLS_PER_BLOCK,
    CountFile,
    count_files_in,
    is_matrix_directory,
    is_zarr,
    passed_over,
)
from geneformer_ray.data.digests import digest_of
from geneformer_ray.data.shards import finished_items, mark_finished
from geneformer_ray.distribute.fan_out import Pool, fan_out
from geneformer_ray.errors import InputError
from geneformer_ray.progress import Progress, say

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["CountInputs", "CountReading", "Stretch", "find_inputs"]

SORTED = "_sorted"
OTHERS_SAID = 5
TOKENISED_COLUMNS = ("cell_id", "input_ids", "length")


@dataclass(frozen=True)
class CountReading:
    """How count files are read: the options of :class:`CountFile`."""

    counts: str = "X"
    gene_column: str | None = None
    allow_non_integer: bool = False

    def open(self, path: str, sorted_in: str | None = None) -> CountFile:
        """Open a file so."""
        return CountFile(
            path,
            counts=self.counts,
            gene_column=self.gene_column,
            allow_non_integer=self.allow_non_integer,
            sorted_in=sorted_in,
        )


@dataclass(frozen=True)
class Stretch:
    """Some neighbouring cells of one file: an item of work, in plain values."""

    item: int
    path: str
    start: int
    stop: int
    prefix: str
    sorted_in: str | None


def find_inputs(inputs: Sequence[str]) -> list[str]:
    """List the count files: files, zarr stores and 10x directories as given, other directories by what lies in them."""
    found: list[str] = []
    for path in inputs:
        if storage.is_directory(path) and not (is_zarr(path) or is_matrix_directory(path)):
            inside = count_files_in(path)
            if not inside:
                takes = "a directory that holds some itself: those below it are not searched"
                raise InputError("--input", f"{path} without count matrices", takes)
            if others := passed_over(path):
                more = ", ..." if len(others) > OTHERS_SAID else ""
                say(f"{path}: {len(inside):,} count files; passed over: {', '.join(others[:OTHERS_SAID])}{more}")
            found += inside
        else:
            found.append(path)
    for path in found:
        if found.count(path) > 1:
            raise InputError("--input", f"{path} twice", "each file once")
    return found


class CountInputs:
    """Count files that were all opened and checked.

    Parameters
    ----------
    paths
        The files.
    reading
        How they are read.
    prefixes
        One for the cell ids of each file, or none at all.
    obs_columns
        Columns that every file must have.
    unique_ids
        Whether cells must be told apart by their ids.

    Raises
    ------
    InputError
        If a file cannot be read, holds no counts, lacks a column, or two cells share an id.
    """

    def __init__(
        self,
        paths: Sequence[str],
        reading: CountReading,
        *,
        prefixes: Sequence[str] = (),
        obs_columns: Sequence[str] = (),
        unique_ids: bool = True,
    ) -> None:
        if prefixes and len(prefixes) != len(paths):
            raise InputError("--cell-id-prefix", f"{len(prefixes)} of them", f"{len(paths)}, one a file")
        self.paths, self.reading = list(paths), reading
        self.prefixes = list(prefixes) or [""] * len(paths)
        self.cells: dict[str, int] = {}
        self.gene_lists: dict[str, tuple[list[str], list[str]]] = {}
        self.features_left_out: dict[str, list[tuple[str, str]]] = {}
        self._to_sort: list[str] = []
        types: dict[str, tuple[pa.DataType, str]] = {}
        with Progress("check", len(paths), "files", brief=True) as progress:
            for path in paths:
                with reading.open(path) as file:
                    file.check_columns(obs_columns)
                    file.check_sample()
                    self.cells[path] = len(file)
                    self.gene_lists.setdefault(digest_of(file.genes), (file.genes, []))[1].append(path)
                    if file.features_left_out:
                        self.features_left_out[path] = file.features_left_out
                    if file.needs_sorting:
                        self._to_sort.append(path)
                    for name, kind in file.column_types(obs_columns).items():
                        types[name] = _common_type(name, (kind, path), types.get(name, (kind, path)))
                progress.advance(1)
        self.column_types = {name: kind for name, (kind, _) in types.items()}
        if unique_ids:
            self._check_ids()

    def __len__(self) -> int:
        return sum(self.cells.values())

    def _check_ids(self) -> None:
        repeated = repeated_ids(list(zip(self.paths, self.prefixes, strict=True)), self.reading.open)
        if repeated is None:
            return
        cell_id, first, second = repeated
        if first == second:
            raise InputError("--input", f"{first} with the cell id {cell_id} twice", "files with unique cell ids")
        got = f"the cell id {cell_id} in {first} and in {second}"
        raise InputError("--cell-id-prefix", got, "one prefix a file, to tell them apart")

    def stamps(self) -> list[str]:
        """Say how large and how old each file is, so that a resumed run notices another content."""
        return [storage.stamp(path) for path in self.paths]

    def sort(self, output: str) -> None:
        """Sort by cell, below `output`, those matrices that lie gene by gene; what an earlier run did is kept."""
        if not self._to_sort:
            return
        directory = storage.join(output, SORTED)
        items: list[dict[str, Any]] = []
        for path in self._to_sort:
            with self.reading.open(path) as file:
                parts = file.parts()
            items += [{"item": len(items) + i, "path": path, "part": part} for i, part in enumerate(parts)]
        done = finished_items(directory)
        options = {"reading": self.reading, "places": self._sorted_places(output), "directory": directory}
        with Progress("sort by cell", len(items), "pieces") as progress:
            progress.advance(len(done))
            todo = [item for item in items if item["item"] not in done]
            for _ in fan_out(SortWorker, options, todo, Pool.of_cluster(model=False)):
                progress.advance(1)

    def discard_sorted(self, output: str) -> None:
        """Delete what :meth:`sort` wrote; not before the output is finished, for a rerun would sort again."""
        if self._to_sort:
            storage.remove(storage.join(output, SORTED))

    def stretches(self, output: str, cells: int = CELLS_PER_BLOCK) -> list[Stretch]:
        """Cut the files into stretches of so many cells."""
        places = self._sorted_places(output)
        found: list[Stretch] = []
        for path, prefix in zip(self.paths, self.prefixes, strict=True):
            for start in range(0, self.cells[path], cells):
                stop = min(start + cells, self.cells[path])
                found.append(Stretch(len(found), path, start, stop, prefix, places.get(path)))
        return found

    def _sorted_places(self, output: str) -> dict[str, str]:
        return {path: storage.join(output, SORTED, f"{number:05d}") for number, path in enumerate(self._to_sort)}


class SortWorker:
    """Sorts pieces of matrices by cell.

    Parameters
    ----------
    reading
        How the files are read.
    places
        Path -> the directory of its sorted pieces.
    directory
        Where finished pieces are vouched for.
    """

    def __init__(self, reading: CountReading, places: dict[str, str], directory: str) -> None:
        self.reading, self.places, self.directory = reading, places, directory

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Sort one piece."""
        with self.reading.open(item["path"]) as file:
            file.write_sorted(item["part"], self.places[item["path"]])
        return mark_finished(self.directory, item["item"], {})


def _common_type(name: str, one: tuple[pa.DataType, str], other: tuple[pa.DataType, str]) -> tuple[pa.DataType, str]:
    """Find the type that holds a column of two files."""
    if name in TOKENISED_COLUMNS:
        raise InputError("--obs-columns", name, "a column of another name: that one is the tokenised cells' own")
    schemas = [pa.schema([pa.field(name, kind)]) for kind, _ in (one, other)]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field(name).type, one[1]
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        got = f"{name}, which is {other[0]} in {other[1]} and {one[0]} in {one[1]}"
        raise InputError("--obs-columns", got, "a column of one kind in all files") from error
