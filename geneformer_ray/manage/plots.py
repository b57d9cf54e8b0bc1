"""Pictures of a run: each function draws one `matplotlib.figure.Figure` and nothing else.

Figures are built without pyplot, so nothing is kept between calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from geneformer_ray.errors import InputError
from geneformer_ray.manage.figure_style import (
    BLUE,
    CYCLE,
    GREY,
    INK,
    LABEL,
    LIGHT,
    MARKERS,
    NOTE,
    PALE,
    TICK,
    dress,
    legend_above,
    legend_beside,
    new_figure,
    require,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

__all__ = [
    "confusion_matrix",
    "embedding_umap",
    "pooling_comparison",
]

BASELINE = "baseline"


def pooling_comparison(table: pd.DataFrame) -> Figure:
    """Draw macro F1 and accuracy of each pooling as bars, beside the baseline.

    Parameters
    ----------
    table
        Columns `pooling`, `macro_f1`, `accuracy` (0 to 1). Several rows of a pooling are its seeds: the bar
        is their mean, and each is a dot. A pooling named `baseline` is drawn last, in grey, with a line at
        its macro F1.

    Raises
    ------
    InputError
        A column is missing, or the table is empty.
    """
    require(table, "pooling", "macro_f1", "accuracy")
    names = list(dict.fromkeys(table["pooling"].astype(str)))
    names.sort(key=lambda name: name == BASELINE)
    figure, (axes,) = new_figure(max(6.0, 2.2 + 1.5 * len(names)), 4.4)
    width = 0.38
    for offset, metric, colours in ((-0.5, "macro_f1", (BLUE, GREY)), (0.5, "accuracy", (PALE[BLUE], LIGHT))):
        for place, name in enumerate(names):
            values = table.loc[table["pooling"] == name, metric].to_numpy(dtype=float)
            x = place + offset * width
            bar = axes.bar(x, values.mean(), width * 0.94, color=colours[name == BASELINE])
            # In the middle of the bar, where neither the baseline's line nor a seed's dot crosses it.
            ink = "white" if metric == "macro_f1" else INK
            axes.bar_label(bar, fmt="%.3f", fontsize=TICK, label_type="center", color=ink)
            if values.size > 1:
                axes.scatter(np.full(values.size, x), values, s=14, color="white", edgecolor=INK, zorder=3)
    if BASELINE in names:
        line = table.loc[table["pooling"] == BASELINE, "macro_f1"].mean()
        axes.axhline(line, color=GREY, linestyle="--", linewidth=1.2, zorder=0)
    axes.set_xticks(range(len(names)), names, parse_math=False)
    axes.set_ylim(0, 1.02)
    axes.set_yticks(np.linspace(0, 1, 6))
    handles: list[Any] = [Patch(color=BLUE, label="macro F1"), Patch(color=PALE[BLUE], label="accuracy")]
    if BASELINE in names:
        handles.append(Line2D([], [], color=GREY, linestyle="--", label="macro F1 of the baseline"))
    dress(axes, "Pooling comparison", "", "score on held-out cells")
    axes.grid(visible=False, axis="x")
    axes.tick_params(axis="x", length=0, labelsize=LABEL)
    legend_above(axes, handles)
    return figure


def confusion_matrix(
    matrix: ArrayLike, labels: Sequence[str], title: str = "Confusion matrix", unit: str = "cells"
) -> Figure:
    """Draw a confusion matrix: colours are shares of the true type (row), numbers are cells; zeros are blank.

    Parameters
    ----------
    matrix
        Counts, shape (K, K), rows the true types, columns the predicted ones.
    labels
        Names of the K types.
    title
        Heading.
    unit
        What is counted.

    Raises
    ------
    InputError
        The matrix is not K x K for the K labels.
    """
    count_KK = np.asarray(matrix)
    n = len(labels)
    if n == 0 or count_KK.shape != (n, n):
        raise InputError("matrix", f"shape {count_KK.shape} for {n} labels", "one row and one column a label")
    total_K = count_KK.sum(axis=1)
    share_KK = count_KK / np.maximum(total_K, 1)[:, None]
    side = 2.6 + 0.5 * n
    figure, (axes,) = new_figure(max(5.4, side + 1.0), max(4.2, side))
    image = axes.imshow(share_KK, cmap="Blues", vmin=0, vmax=1)
    size = NOTE if n > 10 else TICK
    for row, column in zip(*np.nonzero(count_KK), strict=True):
        colour = "white" if share_KK[row, column] > 0.55 else INK
        text = f"{count_KK[row, column]:,}"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=size)
    dress(axes, title, "predicted", f"true ({unit})")
    axes.grid(visible=False)
    rows = [f"{label} ({total:,})" for label, total in zip(labels, total_K, strict=True)]
    axes.set_xticks(range(n), labels, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(range(n), rows, parse_math=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.7, pad=0.03)
    bar.outline.set_visible(False)
    bar.set_label("share of the true type", fontsize=LABEL, color=INK)
    bar.ax.tick_params(labelsize=TICK, colors=INK, length=0)
    return figure


def embedding_umap(
    xy: ArrayLike, labels: Sequence[str], title: str, extra: tuple[str, Sequence[str]] | None = None
) -> Figure:
    """Draw a map of cells, coloured by label.

    Parameters
    ----------
    xy
        Coordinates, shape (N, 2), as `compute_umap` gives them.
    labels
        Label of each cell, length N.
    title
        Heading of the map.
    extra
        Heading and labels of a second map of the same cells: their library, or the predicted type.

    Raises
    ------
    InputError
        The lengths do not agree.
    """
    xy_N2 = np.asarray(xy, dtype=float)
    panels = [(title, labels), *([extra] if extra else [])]
    for _, values in panels:
        if xy_N2.ndim != 2 or xy_N2.shape[1] != 2 or len(values) != len(xy_N2):
            raise InputError("xy", f"shape {xy_N2.shape} for {len(values)} labels", "two coordinates for each label")
    # One above the other: side by side, the legends would be too small to read on a page.
    figure, all_axes = new_figure(8.2, 5.4 * len(panels), rows=len(panels))
    size = float(np.clip(6000 / max(len(xy_N2), 1), 5, 28))
    for axes, (heading, values) in zip(all_axes, panels, strict=True):
        names = np.asarray([str(value) for value in values], dtype=object)
        handles = []
        colour_N, size_N, marker_N = (np.empty(len(names), dtype=kind) for kind in (object, float, object))
        for index, (name, count) in enumerate(_by_size(names)):
            colour = CYCLE[index % len(CYCLE)]
            marker = MARKERS[index // len(CYCLE) % len(MARKERS)]
            of_name = names == name
            colour_N[of_name], marker_N[of_name] = colour, marker
            # Rare types get larger marks: a dozen small dots would be lost among thousands.
            size_N[of_name] = size * np.clip(np.sqrt(200 / count), 1, 3)
            label = f"{name} ({count:,})"
            handles.append(Line2D([], [], linestyle="", marker=marker, color=colour, markersize=6, label=label))
        for marker in MARKERS:
            # In one shuffled order, since the category drawn last would hide the others where they mix.
            rows = np.random.default_rng(0).permutation(np.flatnonzero(marker_N == marker))
            if rows.size:
                colours, sizes = colour_N[rows].tolist(), size_N[rows]
                axes.scatter(xy_N2[rows, 0], xy_N2[rows, 1], sizes, colours, marker=marker, linewidths=0, alpha=0.75)
        dress(axes, heading, "UMAP 1", "UMAP 2")
        axes.set(xticks=[], yticks=[])
        legend_beside(axes, handles)
    return figure


def _by_size(names: np.ndarray[Any, Any]) -> list[tuple[str, int]]:
    """Categories and their counts, the largest first, equal ones by name."""
    found, counts = np.unique(names, return_counts=True)
    return sorted(zip(found.tolist(), counts.tolist(), strict=True), key=lambda item: (-item[1], item[0]))
