"""What became of the cells and genes that were encoded: nothing is dropped without being said."""

from __future__ import annotations

import csv
import io
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.dataset as ds

from geneformer_ray.data import storage

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from geneformer_ray.data.rank_value import RankValueEncoder

__all__ = ["EncodingReport", "GeneReport", "length_histogram"]

EXAMPLES = 5
LISTS_SAID = 10
OTHER_SPECIES = "most symbols match only when their case is ignored: are these cells of another species?"
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class GeneReport:
    """How the gene names of some files were understood.

    Parameters
    ----------
    files
        The files that hold these names.
    names
        The names, as the files have them.
    encoder
        The encoder made for them.
    other_features
        Names and types of features that are no genes (antibodies, peaks, guides): not read at all.
    """

    files: Sequence[str]
    names: Sequence[str]
    encoder: RankValueEncoder
    other_features: Sequence[tuple[str, str]] = ()

    def as_dict(self) -> dict[str, Any]:
        """Give numbers and examples, in plain values."""
        how = Counter(how for how, key in self._understood() if key is not None)
        left_out: dict[str, list[str]] = {}
        for name, (kind, key) in zip(self.names, self._understood(), strict=True):
            if key is None:
                left_out.setdefault(kind, []).append(name)
        return {
            "files": len(self.files),
            "first_file": self.files[0],
            "genes": len(self.names),
            "matched": self.encoder.matched,
            "matched_by": dict(how),
            "unmatched": len(self.encoder.unmatched),
            "unmatched_because": {kind: len(names) for kind, names in left_out.items()},
            "unmatched_examples": {kind: names[:EXAMPLES] for kind, names in left_out.items()},
            "genes_of_several_columns": len(self.encoder.duplicates),
            "genes_of_several_columns_examples": self.encoder.duplicates[:EXAMPLES],
            "other_features": dict(Counter(kind for _, kind in self.other_features)),
            "warnings": [OTHER_SPECIES] if how["symbol in other case"] > self.encoder.matched / 2 else [],
        }

    def lines(self) -> Iterator[str]:
        """Say it to a person."""
        found = self.as_dict()
        others = len(self.files) - 1
        more = f" and {others:,} more file{'s' if others > 1 else ''}" if others else ""
        by = ", ".join(f"{number:,} by {kind}" for kind, number in found["matched_by"].items())
        yield f"{self.files[0]}{more}: {found['matched']:,} of {found['genes']:,} genes matched ({by})"
        for kind, names in found["unmatched_examples"].items():
            number = found["unmatched_because"][kind]
            yield f"  {number:,} not encoded, {kind}: {_examples(names, number)}"
        if self.encoder.duplicates:
            twice = self.encoder.duplicates
            yield f"  {len(twice):,} genes have several columns, which are summed: {_examples(twice, len(twice))}"
        for kind, number in found["other_features"].items():
            names = [name for name, its in self.other_features if its == kind]
            yield f"  {number:,} features are no genes but {kind}, and are not read: {_examples(names, number)}"
        for warning in found["warnings"]:
            yield f"  {warning}"

    def rows(self) -> Iterator[tuple[str, str, str, str]]:
        """Give every name: the first file, the name, the gene it stands for, and why."""
        for name, (kind, key) in zip(self.names, self._understood(), strict=True):
            yield self.files[0], name, key or "", kind
        for name, kind in self.other_features:
            yield self.files[0], name, "", kind

    def _understood(self) -> Iterator[tuple[str, str | None]]:
        medians = self.encoder.vocabulary.medians
        for key, how in zip(self.encoder.matches.keys, self.encoder.matches.how, strict=True):
            yield ("no median in the vocabulary", None) if key is not None and key not in medians else (how, key)


@dataclass
class EncodingReport:
    """The report of a whole run.

    Parameters
    ----------
    genes
        One for each distinct list of genes.
    max_length
        Tokens a cell at most.
    """

    genes: Sequence[GeneReport]
    max_length: int
    totals: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)

    def count(self, counts: dict[str, Any]) -> None:
        """Add what one block came to."""
        self.totals.update({name: counts[name] for name in ("cells_in", "cells", "truncated", "tokens")})
        self.rejected.update(counts["rejected"])

    def lines(self) -> Iterator[str]:
        """Say to a person what the genes of the first files were taken for."""
        for report in self.genes[:LISTS_SAID]:
            yield from report.lines()
        if len(self.genes) > LISTS_SAID:
            yield f"{len(self.genes) - LISTS_SAID:,} more lists of genes: see _report.json"

    def left_out(self) -> Iterator[str]:
        """Say to a person which cells were left out, and why."""
        for reason, cells in self.rejected.items():
            yield f"{cells:,} of {self.totals['cells_in']:,} cells left out: {reason}"

    def distinct_genes(self) -> dict[str, int]:
        """Count genes over all lists: names as the files have them, and what was matched, each once."""
        names = {name for report in self.genes for name in report.names}
        known = {name for report in self.genes for name in report.names} - {
            name for report in self.genes for name in report.encoder.unmatched
        }
        return {"names": len(names), "matched": len(known), "unmatched": len(names) - len(known)}

    def as_dict(self, lengths: NDArray[np.int64]) -> dict[str, Any]:
        """Give the report in plain values.

        Parameters
        ----------
        lengths
            How many cells have 0, 1, 2, ... tokens.
        """
        cells = self.totals["cells"]
        return {
            "cells_in": self.totals["cells_in"],
            "cells": cells,
            "rejected": sum(self.rejected.values()),
            "rejected_because": dict(self.rejected),
            "truncated": self.totals["truncated"],
            "share_truncated": round(self.totals["truncated"] / cells, 6) if cells else 0.0,
            "max_length": self.max_length,
            "tokens": self.totals["tokens"],
            "tokens_per_cell": {
                "mean": round(self.totals["tokens"] / cells, 1) if cells else 0.0,
                **{f"q{round(100 * q):02d}": quantile(lengths, q) for q in QUANTILES},
            },
            "genes": [report.as_dict() for report in self.genes],
        }

    def write_genes(self, path: str) -> None:
        """Write a CSV file that says of every gene name what it was taken for."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["file", "name", "gene", "how"])
        for report in self.genes:
            writer.writerows(report.rows())
        storage.write_bytes(path, text.getvalue().encode())


def _examples(names: Sequence[str], number: int) -> str:
    shown = [name or "''" for name in names[:EXAMPLES]]
    return ", ".join(shown) + (", ..." if number > len(shown) else "")


def quantile(histogram: NDArray[np.int64], share: float) -> int:
    """Give the smallest value that at least this share of what a histogram counted does not exceed."""
    total = int(histogram.sum())
    if total == 0:
        return 0
    return int(np.searchsorted(np.cumsum(histogram), max(1, np.ceil(share * total))))


def length_histogram(files: Sequence[str], max_length: int) -> NDArray[np.int64]:
    """Count the cells of 0, 1, ..., `max_length` tokens in Parquet files of tokenised cells, a few rows at a time."""
    histogram = np.zeros(max_length + 1, dtype=np.int64)
    if not files:
        return histogram
    filesystem, _ = storage.locate(files[0])
    inside = [storage.locate(file)[1] for file in files]
    for batch in ds.dataset(inside, filesystem=filesystem, format="parquet").to_batches(columns=["length"]):
        histogram += np.bincount(batch["length"].to_numpy(), minlength=max_length + 1)
    return histogram
