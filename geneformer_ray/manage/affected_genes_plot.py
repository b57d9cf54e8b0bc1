"""Which genes of a cell change when another one is perturbed, as a heat map."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import PowerNorm

from geneformer_ray.manage.figure_style import INK, LABEL, LIGHT, NOTE, TICK, dress, new_figure, require, shortened

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["CELLS_OF_A_PAIR", "PERTURBED", "affected_heat_map"]

PERTURBED, AFFECTED = 25, 24
# A mean of fewer says more about those cells than about the genes.
CELLS_OF_A_PAIR = 5
# Where most pairs change less than this share of the largest change, the colours are those of its square root.
SKEWED = 0.2


def affected_heat_map(
    pairs: pd.DataFrame, perturbed: Sequence[str] = (), *, symbols: Mapping[str, str] | None = None
) -> Figure:
    """Draw how far each perturbed gene (row) changes the genes that are affected most (columns).

    The colour is 1 - the mean cosine similarity of the affected gene before and after; a pair that fewer than five
    cells hold is grey, unless no pair is held by as many.

    Parameters
    ----------
    pairs
        `perturbed`, `affected`, `mean` (cosine similarity over cells), `count` (cells); one row a pair at most. Rows
        without a mean are left out.
    perturbed
        The perturbed genes, the most important first: 25 at most are drawn. By default those whose affected genes
        change most.
    symbols
        Gene -> the name that is shown.

    Raises
    ------
    InputError
        A column is missing, or no pair is left.
    """
    require(pairs, "perturbed", "affected", "mean", "count")
    pairs = pairs[pairs["mean"].notna()]
    pairs = pairs[pairs["count"] >= min(CELLS_OF_A_PAIR, pairs["count"].max())]
    loss = (1 - pairs["mean"].astype(float)).clip(lower=0)  # rounding leaves similarities a little above 1
    pairs = pairs.assign(loss=loss)
    there = set(pairs["perturbed"])
    # By what all its affected genes change in sum, so that one pair of a single cell decides nothing.
    order = [gene for gene in dict.fromkeys(perturbed) if gene in there] or _largest(pairs, "perturbed", len(there))
    rows = order[:PERTURBED]
    pairs = pairs[pairs["perturbed"].isin(rows)]
    require(pairs, "perturbed")
    columns = _largest(pairs, "affected", AFFECTED)
    grid = pairs.pivot_table(index="perturbed", columns="affected", values="loss", aggfunc="mean", observed=True)
    loss_PA = grid.reindex(index=rows, columns=columns).to_numpy(dtype=float)

    figure, (axes,) = new_figure(max(6.4, 3.2 + 0.25 * len(columns)), max(3.6, 2.6 + 0.25 * len(rows)))
    axes.set_facecolor(LIGHT)
    highest = float(np.nanmax(loss_PA)) or 1.0
    norm = PowerNorm(0.5 if float(np.nanmedian(loss_PA)) < SKEWED * highest else 1, 0, highest)
    image = axes.imshow(loss_PA, cmap="YlGnBu", norm=norm, aspect="auto", interpolation="none")
    dress(axes, "Genes that change most", "affected gene", "perturbed gene")
    axes.grid(visible=False)
    names = symbols or {}
    short = [[shortened(names.get(gene, gene), 22) for gene in genes] for genes in (rows, columns)]
    axes.set_yticks(range(len(rows)), short[0], parse_math=False)
    axes.set_xticks(range(len(columns)), short[1], rotation=60, ha="right", rotation_mode="anchor", parse_math=False)
    axes.tick_params(length=0, labelsize=NOTE)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("1 \N{MINUS SIGN} mean cosine similarity", fontsize=LABEL, color=INK)
    bar.ax.tick_params(labelsize=TICK, colors=INK, length=0)
    return figure


def _largest(pairs: pd.DataFrame, column: str, count: int) -> list[str]:
    """Give the genes of a column whose losses add up to most; equal ones by name."""
    sums = pairs.groupby(column, sort=True, observed=True)["loss"].sum().sort_values(ascending=False, kind="stable")
    return [str(gene) for gene in sums.index[:count]]
