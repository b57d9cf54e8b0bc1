"""How a perturbed gene's values spread over cells, donor by donor: the picture that shows whether all donors agree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from geneformer_ray.manage.figure_style import CYCLE, GREY, INK, NOTE, TICK, dress, new_figure, require, shortened

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

__all__ = ["GENES", "violin_by_group"]

# An outline estimated from fewer values would say more about the estimate than about the cells.
CELLS_OF_A_VIOLIN = 20
# More points than this change nothing in the outline, and its time grows with them.
CELLS_OF_AN_OUTLINE = 5_000
GENES, GROUPS, COLUMNS = 6, 8, 3


def violin_by_group(
    values: pd.DataFrame,
    genes: Sequence[str],
    label: str,
    *,
    symbols: Mapping[str, str] | None = None,
    group: str = "group",
) -> Figure:
    """Draw the values of some genes over cells: a panel a gene and a violin a group, or a violin a gene without groups.

    Each panel has its own scale, for the question is whether groups agree. A group of few cells is drawn as its cells.
    A line is the median, the number below a group is its cells.

    Parameters
    ----------
    values
        `gene`, `value` (one row a cell and gene) and, where cells have groups, `group`. Rows without a value or a group
        are left out.
    genes
        Which genes, the most important first: the first six that have values are drawn.
    label
        What a value is.
    symbols
        Gene -> the name that is shown.
    group
        What a group is: "donor". The eight with most cells are drawn.

    Raises
    ------
    InputError
        A column is missing, or none of the genes has a value.
    """
    columns = [column for column in ("gene", "group", "value") if column in values.columns or column != "group"]
    require(values, *columns)
    values = values[values["gene"].isin(list(genes))].dropna(subset=columns)
    require(values, *columns)
    there = set(values["gene"])
    shown = [gene for gene in dict.fromkeys(genes) if gene in there][:GENES]
    names = {gene: shortened((symbols or {}).get(gene, gene), 14) for gene in shown}
    of_gene = {gene: values[values["gene"] == gene] for gene in shown}
    if "group" not in columns:
        figure, (axes,) = new_figure(8.2, 4.6)
        _violins(axes, {names[gene]: of_gene[gene]["value"].to_numpy(dtype=float) for gene in shown})
        dress(axes, "Values over cells", "perturbed gene (cells)", label)
        return figure
    sizes = values.loc[values["gene"].isin(shown), "group"].astype(str).value_counts()
    groups = sorted(sorted(sizes.index, key=lambda name: (-sizes[name], name))[:GROUPS])
    columns_of_panels = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns_of_panels)
    figure, panels = new_figure(max(6.0, 3.05 * columns_of_panels), 3.2 * rows + 0.4, rows, columns_of_panels)
    for axes in panels[len(shown) :]:
        axes.remove()
    for number, (axes, gene) in enumerate(zip(panels, shown, strict=False)):
        rows_of_gene = of_gene[gene]
        group_N = rows_of_gene["group"].astype(str).to_numpy()
        value_N = rows_of_gene["value"].to_numpy(dtype=float)
        _violins(axes, {shortened(name, 14): value_N[group_N == name] for name in groups})
        dress(axes, names[gene], f"{group} (cells)", label if number % columns_of_panels == 0 else "")
    return figure


def _violins(axes: Axes, samples: Mapping[str, NDArray[np.float64]]) -> None:
    """Draw one sample beside the other, each as a violin or, where it is small or all alike, as points."""
    rng = np.random.default_rng(0)
    for place, values in enumerate(samples.values()):
        colour = CYCLE[place % len(CYCLE)]
        if not values.size:
            continue
        if values.size < CELLS_OF_A_VIOLIN or np.ptp(values) == 0:
            x = place + (rng.uniform(-0.16, 0.16, values.size) if values.size > 1 else 0)
            axes.scatter(np.broadcast_to(x, values.shape), values, s=13, color=colour, linewidths=0, alpha=0.8)
        else:
            some = rng.permutation(values)[:CELLS_OF_AN_OUTLINE]
            parts: dict[str, Any] = axes.violinplot([some], [place], widths=0.82, showextrema=False)
            for body in parts["bodies"]:
                body.set(facecolor=colour, edgecolor=colour, alpha=0.45, linewidth=0.8)
        axes.hlines(float(np.median(values)), place - 0.24, place + 0.24, color=INK, linewidth=1.6, zorder=3)
    axes.axhline(0, color=GREY, linewidth=0.8, linestyle="--", zorder=0)
    long = max(map(len, samples)) * len(samples) > 30
    between = " " if long else "\n"
    labels = [f"{name}{between}({values.size:,})" for name, values in samples.items()]
    turned: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if long else {}
    axes.set_xticks(range(len(samples)), labels, parse_math=False, **turned)
    axes.set_xlim(-0.6, len(samples) - 0.4)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    axes.yaxis.get_offset_text().set_fontsize(NOTE)
    axes.tick_params(axis="x", length=0, labelsize=TICK if not long else NOTE)
