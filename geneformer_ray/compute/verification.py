"""How far a first-order screen is to be trusted: its values against exact ones, and the genes to measure exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import pearsonr, spearmanr

from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

__all__ = [
    "LEAST_SPEARMAN",
    "Agreement",
    "ControlCells",
    "Verification",
    "agreement",
    "control_genes_statement",
    "gene_agreement",
    "genes_to_verify",
    "warning_of",
]

# Below this the order of genes is not the exact engine's any more.
LEAST_SPEARMAN = 0.9


@dataclass(frozen=True)
class Verification:
    """How much is measured exactly, once all is estimated.

    Parameters
    ----------
    top
        How many genes with the largest mean over their cells, of either sign.
    controls
        How many of the others, at random.
    control_cells
        Of how many random cells every gene.
    seed
        Draws genes and cells.
    """

    top: int = 50
    controls: int = 50
    control_cells: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--top", self.top, 1),
            ("--controls", self.controls, 0),
            ("--control-cells", self.control_cells, 1),
        ):
            if value < least:
                raise InputError(flag, value, f"at least {least}")


@dataclass(frozen=True)
class Agreement:
    """How well estimates agree with exact values of the same events.

    Parameters
    ----------
    spearman, pearson
        Correlations; not a number where either side does not vary.
    recall
        Which share of the `top` events with the largest exact values, of either sign, is among as many of the largest
        estimates.
    top
        How many these are: fewer than asked for where there are fewer events.
    events
        How many values were compared.
    """

    spearman: float
    pearson: float
    recall: float
    top: int
    events: int

    @property
    def trusted(self) -> bool:
        """Whether the estimates' order can be taken for that of the exact values; not where nobody knows."""
        return self.spearman >= LEAST_SPEARMAN


def agreement(exact_X: NDArray[np.floating], estimate_X: NDArray[np.floating], *, top: int) -> Agreement:
    """Compare estimates with exact values of the same events.

    Raises
    ------
    InputError
        If there are not as many of both, or one is not a finite number.
    """
    exact_X, estimate_X = exact_X.astype(np.float64), estimate_X.astype(np.float64)
    if exact_X.shape != estimate_X.shape or exact_X.ndim != 1:
        raise InputError("estimate", f"shapes {exact_X.shape} and {estimate_X.shape}", "one value for each exact one")
    if not (np.isfinite(exact_X).all() and np.isfinite(estimate_X).all()):
        raise InputError("estimate", "a number that is not finite", "finite numbers on both sides")
    if top < 1:
        raise InputError("--top", top, "at least 1")
    events, top = len(exact_X), min(top, len(exact_X))
    varies = events > 1 and np.ptp(exact_X) > 0 and np.ptp(estimate_X) > 0
    found = np.intersect1d(_largest(exact_X, top), _largest(estimate_X, top))
    return Agreement(
        spearman=float(spearmanr(exact_X, estimate_X)[0]) if varies else math.nan,
        pearson=float(pearsonr(exact_X, estimate_X)[0]) if varies else math.nan,
        recall=len(found) / top if top else math.nan,
        top=top,
        events=events,
    )


def gene_agreement(
    gene_N: NDArray[np.integer], exact_N: NDArray[np.floating], estimate_N: NDArray[np.floating], *, top: int
) -> Agreement:
    """Compare genes' means over their cells, in the cells for which both values are known.

    Parameters
    ----------
    gene_N
        Code of each value's gene, shape (values,).
    exact_N, estimate_N
        The values.
    top
        How many genes are recalled.
    """
    _, code_N = np.unique(np.asarray(gene_N), return_inverse=True)
    cells_G = np.bincount(code_N)
    exact_G, estimate_G = (np.bincount(code_N, weights=value_N) / cells_G for value_N in (exact_N, estimate_N))
    return agreement(exact_G, estimate_G, top=top)


@dataclass(frozen=True)
class ControlCells:
    """Cells of which every gene was estimated and measured exactly, values of one measure towards one state.

    Parameters
    ----------
    cell_N, gene_N
        Codes of each value's cell and gene, shape (values,).
    exact_N, estimate_N
        The values.
    """

    cell_N: NDArray[np.integer]
    gene_N: NDArray[np.integer]
    exact_N: NDArray[np.floating]
    estimate_N: NDArray[np.floating]

    def of_cells(self, top: int) -> list[Agreement]:
        """Compare cell by cell."""
        cells = [np.flatnonzero(self.cell_N == cell) for cell in np.unique(self.cell_N)]
        return [agreement(self.exact_N[rows], self.estimate_N[rows], top=top) for rows in cells]

    def of_genes(self, top: int) -> Agreement:
        """Compare the genes' means over these cells."""
        return gene_agreement(self.gene_N, self.exact_N, self.estimate_N, top=top)

    def trusted(self, top: int) -> bool:
        """Whether the order of genes is the exact engine's, in most of the cells and over all of them."""
        cells = self.of_cells(top)
        return self.of_genes(top).trusted and 2 * sum(one.trusted for one in cells) > len(cells)

    def statement(self, top: int) -> dict[str, dict[str, float | int | None]]:
        """Give ``per_cell``, median and minimum over the cells, and ``aggregated``, over the genes' means."""
        cells, genes = self.of_cells(top), self.of_genes(top)
        per_cell: dict[str, float | int | None] = {"cells": len(cells)}
        for name in ("spearman", "pearson", "recall"):
            # One that is unknown makes them unknown: it may be the worst.
            found = [getattr(one, name) for one in cells]
            per_cell |= {f"{name}_median": _known(np.median(found)), f"{name}_min": _known(np.min(found))}
        aggregated = {name: _known(getattr(genes, name)) for name in ("spearman", "pearson", "recall")}
        return {"per_cell": per_cell, "aggregated": {"genes": genes.events, "top": genes.top, **aggregated}}


def control_genes_statement(parts: Iterable[Mapping[str, Sequence[float]]]) -> dict[str, float | int | None]:
    """Say how far genes that were drawn at random agree, over all cells.

    Parameters
    ----------
    parts
        Of some cells each: gene -> how many values it has, the sum of the estimates, the sum of the exact values.

    Returns
    -------
    dict
        ``genes``, and the correlations of their means, ``spearman`` and ``pearson``.
    """
    sums: dict[str, list[Sequence[float]]] = {}
    for part in parts:
        for gene, of_gene in part.items():
            sums.setdefault(gene, []).append(of_gene)
    total_G3 = np.array([[math.fsum(column) for column in zip(*sums[gene], strict=True)] for gene in sorted(sums)])
    rows_G, estimate_G, exact_G = total_G3.reshape(-1, 3).T
    found = agreement(exact_G / rows_G, estimate_G / rows_G, top=1)
    return {"genes": found.events, "spearman": _known(found.spearman), "pearson": _known(found.pearson)}


def warning_of(measures: Mapping[str, ControlCells], top: int) -> str | None:
    """Say where first order is not to be trusted; None where it is."""
    bad = [f"{name} ({_how_far(cells, top)})" for name, cells in measures.items() if not cells.trusted(top)]
    if not bad:
        return None
    return (
        f"first order is not to be trusted for this model: Spearman below {LEAST_SPEARMAN:g} on the control cells for "
        f"{', '.join(bad)}. Only rows marked exact can be relied on; the others want --method exact"
    )


def _how_far(cells: ControlCells, top: int) -> str:
    found = cells.statement(top)
    values = found["aggregated"]["spearman"], found["per_cell"]["spearman_median"]
    over, median = ("unknown" if value is None else f"{value:.2f}" for value in values)
    return f"{over} over the cells, median of a cell {median}"


def _known(value: float | np.floating) -> float | None:
    """Give a number as summaries take it: JSON has none for what is not known."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def genes_to_verify(
    gene_N: NDArray[np.integer], estimate_N: NDArray[np.floating], *, top: int, controls: int, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose the genes that are measured exactly once all are estimated.

    Parameters
    ----------
    gene_N
        Token id of each value's gene, shape (values,).
    estimate_N
        Estimated values towards one state, over all cells.
    top
        How many genes with the largest mean over their cells, of either sign.
    controls
        How many of the others, at random: what is chosen for its estimate says nothing of how good estimates are.
    seed
        Draws them.

    Returns
    -------
    top, controls
        Token ids, sorted; shapes (top,) and (controls,), or fewer where there are fewer genes.
    """
    if top < 0 or controls < 0:
        raise InputError("--top", min(top, controls), "no negative number")
    genes, code_N = np.unique(np.asarray(gene_N, dtype=np.int64), return_inverse=True)
    mean_G = np.bincount(code_N, weights=estimate_N, minlength=len(genes)) / np.maximum(1, np.bincount(code_N))
    chosen = _largest(mean_G, min(top, len(genes)))
    others = np.setdiff1d(np.arange(len(genes)), chosen)
    drawn = np.random.default_rng(seed).choice(others, min(controls, len(others)), replace=False)
    return np.sort(genes[chosen]), np.sort(genes[drawn])


def _largest(value_X: NDArray[np.floating], number: int) -> NDArray[np.int64]:
    """Give the places of the largest values of either sign; of equal ones the first."""
    return np.argsort(-np.abs(value_X), kind="stable")[:number]
