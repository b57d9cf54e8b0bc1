"""Counts of an AnnData as bodies of requests: sparse, with a list of genes, within the service's limits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from anndata import AnnData

__all__ = ["CountRows"]

GENE_COLUMNS = ("ensembl_id", "gene_ids")


@dataclass(frozen=True)
class CountRows:
    """Cells of an AnnData, by their counts.

    Parameters
    ----------
    matrix
        Cells x genes: an array, a sparse matrix, or what a backed AnnData has.
    genes
        A name for each column.
    names
        A name for each row.
    whole
        Whether the counts must be whole numbers.
    """

    matrix: Any
    genes: list[str]
    names: list[str]
    whole: bool

    @classmethod
    def of(cls, adata: AnnData, counts: str, gene_column: str | None, *, whole: bool) -> CountRows:
        """Find the counts and their genes.

        Raises
        ------
        InputError
            If they are not there.
        """
        matrix, var = _matrix(adata, counts)
        return cls(matrix, _genes(var, gene_column), [str(name) for name in adata.obs_names], whole)

    @property
    def number(self) -> int:
        """How many cells."""
        return len(self.names)

    def named(self, name: str) -> dict[str, Any]:
        """Give one cell as a request of its own holds it: gene -> count."""
        if self.names.count(name) != 1:
            got = f"{name!r}, the name of {self.names.count(name)} cells"
            raise InputError("cell", got, "the name of one cell of the AnnData")
        row = self.names.index(name)
        counts = self._block(row, row + 1)
        values = _plain(counts.data)
        genes = [self.genes[column] for column in counts.indices]
        if len(set(genes)) < len(genes):
            twice = next(gene for gene in genes if genes.count(gene) > 1)
            raise InputError("gene_column", f"{twice} twice", "names that are each gene's own")
        return {"counts": dict(zip(genes, values, strict=True)), "cell_id": name, **self._options()}

    def bodies(self, options: Mapping[str, Any], limits: Mapping[str, int]) -> Iterator[tuple[list[int], bytes]]:
        """Give the bodies of requests for all cells that express something, with the rows of their cells.

        Parameters
        ----------
        options
            Further fields of each body.
        limits
            ``max_cells``, ``max_genes`` and ``max_body_bytes`` of a request.
        """
        for start in range(0, self.number, limits["max_cells"]):
            block = self._block(start, min(start + limits["max_cells"], self.number))
            places = [row for row in range(block.shape[0]) if block.indptr[row + 1] > block.indptr[row]]
            yield from self._within(block, start, places, options, limits)

    def _within(
        self, block: Any, start: int, places: list[int], options: Mapping[str, Any], limits: Mapping[str, int]
    ) -> Iterator[tuple[list[int], bytes]]:
        """Send cells together while they fit, else in halves."""
        if not places:
            return
        body, genes = self._body(block, start, places, options)
        if genes <= limits["max_genes"] and len(body) <= limits["max_body_bytes"]:
            yield [start + place for place in places], body
            return
        if len(places) == 1:
            got = f"{self.names[start + places[0]]}: {genes:,} genes in {len(body):,} bytes"
            takes = f"cells of up to {limits['max_genes']:,} genes in {limits['max_body_bytes']:,} bytes"
            raise InputError("adata", got, takes)
        half = len(places) // 2
        yield from self._within(block, start, places[:half], options, limits)
        yield from self._within(block, start, places[half:], options, limits)

    def _body(self, block: Any, start: int, places: list[int], options: Mapping[str, Any]) -> tuple[bytes, int]:
        import numpy as np

        rows = block[places]
        # Only the genes that these cells express: a name costs more than a count.
        columns, indices = np.unique(rows.indices, return_inverse=True)
        values = _plain(rows.data)
        edges = rows.indptr.tolist()
        cells = [
            {
                "cell_id": self.names[start + place][:200],
                "indices": indices[low:high].tolist(),
                "values": values[low:high],
                **self._options(),
            }
            for place, low, high in zip(places, edges[:-1], edges[1:], strict=True)
        ]
        body = {"genes": [self.genes[column] for column in columns], "cells": cells, **options}
        return json.dumps(body, separators=(",", ":")).encode(), len(columns)

    def _options(self) -> dict[str, Any]:
        return {} if self.whole else {"allow_non_integer": True}

    def _block(self, start: int, stop: int) -> Any:
        """Read some rows as CSR, every place once and no zeros among them."""
        import numpy as np
        from scipy import sparse

        rows = self.matrix[start:stop]
        block = sparse.csr_matrix(rows, dtype=np.float64, copy=True)
        block.sum_duplicates()
        block.eliminate_zeros()
        wrong = ~np.isfinite(block.data) | (block.data < 0)
        if wrong.any():
            raise InputError("counts", f"{block.data[wrong][0]}", "raw counts: finite, not negative")
        return block


def _plain(values: Any) -> list[int] | list[float]:
    """Whole counts as whole numbers: shorter, and what they are."""
    import numpy as np

    whole: list[int] | list[float] = (
        values.astype(np.int64).tolist()
        if (np.floor(values) == values).all() and (values < 2**53).all()
        else values.tolist()
    )
    return whole


def _matrix(adata: AnnData, counts: str) -> tuple[Any, Any]:
    takes = "X, raw.X or layers/NAME, whichever holds raw counts"
    if counts == "X" and adata.X is not None:
        return adata.X, adata.var
    if counts == "raw.X" and adata.raw is not None:
        return adata.raw.X, adata.raw.var
    if counts.startswith("layers/") and counts.removeprefix("layers/") in adata.layers:
        return adata.layers[counts.removeprefix("layers/")], adata.var
    there = [*(f"layers/{name}" for name in adata.layers), *(["raw.X"] if adata.raw is not None else [])]
    raise InputError(
        "counts", f"{counts}, which is not there", f"{takes} (beside X there is {', '.join(there) or 'none'})"
    )


def _genes(var: Any, gene_column: str | None) -> list[str]:
    column = gene_column
    if column is None:
        column = next((name for name in GENE_COLUMNS if name in var.columns), "index")
    if column in var.columns:
        return [str(name) for name in var[column]]
    if column in ("index", var.index.name):
        return [str(name) for name in var.index]
    raise InputError("gene_column", column, f"a column of var ({', '.join(var.columns) or 'it has none'}), or index")
