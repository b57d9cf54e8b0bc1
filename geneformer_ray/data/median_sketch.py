"""Non-zero medians of more cells than memory holds: exact while there are few values, then from bins of known width.

The bins are those of DDSketch (Masson, Rim & Lee 2019, doi:10.14778/3352063.3352135), cut where a float64 is cheap to
cut: its exponent and the top 7 bits of its mantissa, so 128 bins of equal width an octave. What is kept is a function
of the values alone, never of their order: it does not matter how cells are split over files, workers and broken runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from geneformer_ray.data import storage
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

__all__ = ["ERROR_BOUND", "EXACT_VALUES", "MedianSketch"]

EXACT_VALUES = 2**24
"""Up to so many values in all (about 200 MB) every one is kept, and medians are exact."""

ERROR_BOUND = 1 / 128
"""Beyond that: |median - true median| / true median stays below this, the width of a bin."""

BINS_BITS = 7
BINS = 2**BINS_BITS  # of an octave
MANTISSA_BITS = 52
EXPONENT_BIAS = 1023
GENES_AT_ONCE = 2_048  # bounds what merging, saving and reading out need beside the counters themselves
GENES_KEY, LIMIT_KEY = b"genes", b"exact_values"


class MedianSketch:
    """Each gene's values, kept whole or as counts in bins.

    Two sketches of the same values give the same medians bit for bit, however the values came: the median is taken from
    all values if there are at most `exact_values` of them in all, else from the bins. A rank's place within its bin
    is interpolated as if the bin's values lay evenly, so the error is below :data:`ERROR_BOUND` for any values, half of
    that where the bin holds one value, and far less where values lie smoothly. The median of an even number of values
    is the mean of the two in the middle, as numpy's.

    Bins are paged: 128 counters, 512 bytes, for each gene and octave met. Memory grows with these, not with the cells.

    Parameters
    ----------
    genes
        How many genes there are; they are numbered from 0.
    exact_values
        Up to how many values, over all genes, all are kept.
    """

    def __init__(self, genes: int, *, exact_values: int = EXACT_VALUES) -> None:
        self.genes, self.exact_values = genes, exact_values
        self._raw: list[tuple[NDArray[np.int32], NDArray[np.float64]]] = []
        self._held = 0
        self._pages: _Pages | None = None

    @property
    def exact(self) -> bool:
        """Whether every value is still there."""
        return self._pages is None

    @property
    def error_bound(self) -> float:
        """How far, relative to it, a median may lie from the true one."""
        return 0.0 if self.exact else ERROR_BOUND

    @property
    def nbytes(self) -> int:
        """Bytes that values or counters take."""
        return sum(a.nbytes + b.nbytes for a, b in self._raw) if self._pages is None else self._pages.nbytes

    def add(self, genes: NDArray[np.integer], values: NDArray[np.floating]) -> None:
        """Take in values.

        Parameters
        ----------
        genes
            The gene of each value, shape (values,).
        values
            Finite and above 0, shape (values,).

        Raises
        ------
        InputError
            If a value is not above 0, or not finite.
        """
        if len(values) == 0:
            return
        if not (values.min() > 0 and values.max() < np.inf):  # also catches NaN, which min hands on
            raise InputError("--input", "a count / total that is not finite, or not above 0", "raw counts and totals")
        if self._pages is None and self._held + len(values) <= self.exact_values:
            self._raw.append((np.array(genes, dtype=np.int32), np.array(values, dtype=np.float64)))
            self._held += len(values)
            return
        self._fold().add(np.asarray(genes), _bins_of(np.asarray(values, dtype=np.float64)))

    def merge(self, other: MedianSketch) -> None:
        """Take in the values of another sketch, which stays as it is."""
        if (other.genes, other.exact_values) != (self.genes, self.exact_values):
            raise ValueError("only sketches of the same genes and the same limit can be merged")
        for genes, values in other._raw:
            self.add(genes, values)
        if other._pages is not None:
            pages = self._fold()
            for genes, bins, counts in other._pages.entries():
                pages.add(genes, bins, counts)

    def medians(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Give the number of each gene's values and their median, NaN where there are none; shape (genes,) each."""
        if self._pages is not None:
            return self._pages.seen.copy(), self._pages.medians()
        genes, values = self._values()
        values = values[np.lexsort((values, genes))]
        seen = np.bincount(genes, minlength=self.genes).astype(np.int64)
        has, start = seen > 0, np.cumsum(seen) - seen
        medians = np.full(self.genes, np.nan)
        low, high = (values[(start + rank)[has]] for rank in _middle(seen))
        medians[has] = (low + high) / 2
        return seen, medians

    def save(self, path: str) -> None:
        """Write the sketch as one Parquet file: gene and value, or gene, bin and count."""
        columns: list[tuple[str, pa.DataType]] = [("gene", pa.int32())]
        columns += [("value", pa.float64())] if self._pages is None else [("bin", pa.int32()), ("count", pa.uint32())]
        own = {GENES_KEY: str(self.genes), LIMIT_KEY: str(self.exact_values)}
        schema = pa.schema(columns, metadata=own)
        rows: Iterator[tuple[NDArray[np.generic], ...]]
        rows = iter([self._values()]) if self._pages is None else self._pages.entries()
        buffer = pa.BufferOutputStream()
        with pq.ParquetWriter(buffer, schema, compression="zstd") as writer:
            for arrays in rows:
                writer.write_table(pa.table([pa.array(array) for array in arrays], schema=schema))
        storage.write_bytes(path, buffer.getvalue().to_pybytes())

    @classmethod
    def load(cls, path: str) -> MedianSketch:
        """Read what :meth:`save` wrote."""
        file = pq.ParquetFile(pa.BufferReader(storage.read_bytes(path)))
        own = file.schema_arrow.metadata
        sketch = cls(int(own[GENES_KEY]), exact_values=int(own[LIMIT_KEY]))
        for number in range(file.num_row_groups):
            columns = [column.to_numpy() for column in file.read_row_group(number).columns]
            if len(columns) == 2:
                sketch.add(*columns)
            else:
                sketch._fold().add(*columns)
        return sketch

    def _values(self) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        genes = [part for part, _ in self._raw] or [np.zeros(0, np.int32)]
        values = [part for _, part in self._raw] or [np.zeros(0)]
        return np.concatenate(genes), np.concatenate(values)

    def _fold(self) -> _Pages:
        """Go over from values to bins, for good."""
        if self._pages is None:
            self._pages = _Pages(self.genes)
            for genes, values in self._raw:
                self._pages.add(genes, _bins_of(values))
            self._raw, self._held = [], 0
        return self._pages


class _Pages:
    """Counters of bins, a page for each gene and octave met."""

    def __init__(self, genes: int) -> None:
        self.seen = np.zeros(genes, dtype=np.int64)
        self._first_octave = 0
        self._page_of = np.full((genes, 0), -1, dtype=np.int32)  # genes x octaves met
        self._counters = np.zeros((0, BINS), dtype=np.uint32)
        self._used = 0

    @property
    def nbytes(self) -> int:
        return self.seen.nbytes + self._page_of.nbytes + self._counters.nbytes

    def add(
        self, genes: NDArray[np.integer], bins: NDArray[np.integer], counts: NDArray[np.uint32] | None = None
    ) -> None:
        """Count values: one in each bin named, or as many as said."""
        self.seen += np.bincount(genes, weights=counts, minlength=len(self.seen)).astype(np.int64)
        if self.seen.max(initial=0) > np.iinfo(np.uint32).max:
            raise OverflowError("a gene with more than 4,294,967,295 values")  # then no single counter can overflow
        octaves = bins >> BINS_BITS
        self._cover(int(octaves.min()), int(octaves.max()))
        page_of = self._page_of.reshape(-1)
        where = genes.astype(np.int64) * self._page_of.shape[1] + (octaves - self._first_octave)
        page = page_of[where]
        if page.min() < 0:
            new = np.unique(where[page < 0])
            page_of[new] = self._allocate(len(new))
            page = page_of[where]
        counter = page.astype(np.int64) * BINS + (bins & (BINS - 1))
        np.add.at(self._counters.reshape(-1), counter, np.uint32(1) if counts is None else counts)

    def entries(self) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.uint32]]]:
        """Give the bins that hold values, some genes at a time, by gene and bin: gene, bin, count."""
        for start in range(0, len(self.seen), GENES_AT_ONCE):
            page_of = self._page_of[start : start + GENES_AT_ONCE]
            gene, octave = np.nonzero(page_of >= 0)
            counters = self._counters[page_of[gene, octave]]
            row, within = np.nonzero(counters)
            bins = (octave[row] + self._first_octave) * BINS + within
            if len(row):
                yield (gene[row] + start).astype(np.int32), bins.astype(np.int32), counters[row, within]

    def medians(self) -> NDArray[np.float64]:
        """Interpolate each gene's median."""
        medians = np.full(len(self.seen), np.nan)
        for genes, bins, counts in self.entries():
            upto = np.cumsum(counts, dtype=np.int64)
            here = np.unique(genes)
            seen = self.seen[here]
            start = np.cumsum(seen) - seen
            ends = []
            for rank in _middle(seen):
                entry = np.searchsorted(upto, start + rank, side="right")
                held = counts[entry].astype(np.int64)
                before = start + rank - (upto[entry] - held)
                ends.append(_value_at(bins[entry], (before + 0.5) / held))
            medians[here] = (ends[0] + ends[1]) / 2
        return medians

    def _cover(self, lowest: int, highest: int) -> None:
        """Widen the page table to these octaves."""
        genes, octaves = self._page_of.shape
        if octaves:
            lowest = min(lowest, self._first_octave)
            highest = max(highest, self._first_octave + octaves - 1)
        if highest - lowest + 1 > octaves:
            wider = np.full((genes, highest - lowest + 1), -1, dtype=np.int32)
            at = self._first_octave - lowest if octaves else 0
            wider[:, at : at + octaves] = self._page_of
            self._page_of, self._first_octave = wider, lowest

    def _allocate(self, pages: int) -> NDArray[np.int32]:
        first, self._used = self._used, self._used + pages
        if self._used > len(self._counters):
            larger = np.zeros((max(self._used, len(self._counters) * 3 // 2), BINS), dtype=np.uint32)
            larger[:first] = self._counters[:first]
            self._counters = larger
        return np.arange(first, self._used, dtype=np.int32)


def _bins_of(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Give each value's bin: the exponent and the top bits of the mantissa, which rise with the value."""
    smallest = np.int64(1) << MANTISSA_BITS  # below it (2e-308) lie no octaves, but numbers of ever fewer digits
    bins: NDArray[np.int64] = np.maximum(values.view(np.int64), smallest) >> (MANTISSA_BITS - BINS_BITS)
    return bins


def _value_at(bins: NDArray[np.integer], fraction: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give the value that lies so far, between 0 and 1, into its bin."""
    exponent = (bins >> BINS_BITS).astype(np.int32) - EXPONENT_BIAS
    value: NDArray[np.float64] = np.ldexp(1 + ((bins & (BINS - 1)) + fraction) / BINS, exponent)
    return value


def _middle(seen: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Give the ranks, from 0, of the two values in the middle: the same one twice where their number is odd."""
    return (seen - 1) // 2, seen // 2
