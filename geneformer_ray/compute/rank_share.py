"""Is a hit the gene or its rank: the two parts of a deletion's shift, gene by gene.

A deletion takes a gene away and moves every gene behind it up by one rank (``decomposition``). Where that second effect
makes the shift, another gene at the same rank would have made much the same: the hit says little about the gene.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from geneformer_ray.compute.paired_rows import codes_in
from geneformer_ray.compute.rank_tests import benjamini_hochberg, mean_per_gene, rank_sum_against_pool
from geneformer_ray.compute.shift_rows import mean_column, read_shift_rows
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    import pyarrow.dataset as ds
    from numpy.typing import NDArray

    from geneformer_ray.compute.shift_rows import ShiftRows

    FloatArray = NDArray[np.float64]

__all__ = ["HITS", "TOP", "rank_of_top", "rank_parts", "rank_sentence"]

# What a hit is: of the gene, of both, of its rank; what the rank hides; no hit.
HITS = ("gene", "both", "rank", "hidden", "none")
TOP = 20


def rank_parts(
    shifts: pa.Table | ds.Dataset, full: ShiftRows, goal: str, significant_G: NDArray[np.bool_], fdr_level: float
) -> dict[str, object]:
    """Give the columns that say whether each gene's shift to the goal is the gene or its rank.

    Parameters
    ----------
    shifts
        The `cell_shifts` table.
    full
        Its `shift` rows; those of the goal have the state's code 0.
    goal
        The state.
    significant_G
        Which genes' full shifts are significant, shape (genes,).
    fdr_level
        Below which false discovery rate a gene's effect with ranks held is significant.

    Returns
    -------
    Nothing where the table has no `shift_gene` rows for the goal. Otherwise columns of shape (genes,):
    `shift_gene_to_GOAL` and `shift_rank_to_GOAL`, the means of the gene's effect and of the rank shift, which add up to
    `shift_to_GOAL`; `rank_share`, |rank| / (|gene| + |rank|) of these, NaN where both are 0; `gene_p` and `gene_fdr`,
    the test of `p_GOAL` for the gene effects, whose pool is that of all genes' gene effects; and `hit`:

    - ``gene``: a hit that is significant with ranks held too, in the same direction, and at least half the gene's;
    - ``both``: the same, but more than half of it is rank;
    - ``rank``: a hit that is not significant with ranks held, or moves cells the other way;
    - ``hidden``: no hit, but significant with ranks held: the rank shift hides it;
    - ``none``: neither.

    Raises
    ------
    InputError
        The gene effects are those of other cells or genes than the full shifts.
    """
    part = read_shift_rows(shifts, measure="shift_gene", states=[goal])
    if not part.value_N.size:
        return {}
    n_genes = len(full.genes)
    of_goal = full.state_N == 0
    value, gene, cell = full.value_N[of_goal], full.gene_N[of_goal], full.cell_N[of_goal]
    # Both are in the order of names, so that rows of the same events lie side by side.
    same_gene = np.array_equal(codes_in(part.genes, full.genes)[part.gene_N], gene)
    if not same_gene or not np.array_equal(codes_in(part.cells, full.cells)[part.cell_N], cell):
        got = f"{part.value_N.size} rows of shift_gene beside {value.size} of shift to {goal!r}, of other events"
        raise InputError("shifts", got, "both of every event, as screen --decompose writes them")
    mean_G = mean_per_gene(value, gene, n_genes)
    gene_G = mean_per_gene(part.value_N, gene, n_genes)
    rank_G = mean_G - gene_G
    with np.errstate(invalid="ignore"):
        share_G = np.abs(rank_G) / (np.abs(gene_G) + np.abs(rank_G))
    p_G = rank_sum_against_pool(part.value_N, gene, n_genes)
    fdr_G = benjamini_hochberg(p_G)
    own_G = fdr_G < fdr_level  # a NaN compares as False
    alike_G = own_G & (np.sign(gene_G) == np.sign(mean_G))
    hit_G = np.select(
        [significant_G & alike_G & (share_G <= 0.5), significant_G & alike_G, significant_G, own_G],
        HITS[:4],
        default=HITS[4],
    )
    return {
        mean_column("shift_gene", goal): gene_G,
        mean_column("shift_rank", goal): rank_G,
        "rank_share": share_G,
        "gene_p": p_G,
        "gene_fdr": fdr_G,
        "hit": hit_G.astype(object),
    }


def rank_of_top(table: pd.DataFrame, goal: str, top: int = TOP) -> dict[str, Any]:
    """Say how much of the strongest hits is rank.

    Parameters
    ----------
    table
        What :func:`geneformer_ray.compute.statistics.goal_shift_table` makes of a decomposed screen.
    goal
        The state.
    top
        How many hits: significant genes by the size of their shift. Where no gene is significant, all count.

    Returns
    -------
    `genes`: how many those are; `hits`: whether they are significant; `rank_share`: the median of theirs, for one gene
    may shift cells ten times as far as the next; None without any shift; `mostly_rank`: in how many the rank shift is
    the larger part;
    `keep`: how many of them stay significant with ranks held, in the same direction; `of_all`: how many genes of the
    whole table are of each kind of hit.
    """
    mean = table[mean_column("shift", goal)]
    hits = bool(table["significant"].any())
    chosen = table[table["significant"]] if hits else table
    chosen = chosen.loc[mean[chosen.index].abs().sort_values(ascending=False, kind="stable").index[:top]]
    shares = chosen["rank_share"].dropna()
    counts = table["hit"].value_counts()
    return {
        "genes": len(chosen),
        "hits": hits,
        "rank_share": float(shares.median()) if len(shares) else None,
        "mostly_rank": int((chosen["rank_share"] > 0.5).sum()),
        "keep": int(chosen["hit"].isin(["gene", "both"]).sum()),
        "of_all": {kind: int(counts.get(kind, 0)) for kind in HITS},
    }


def rank_sentence(about: dict[str, Any]) -> str:
    """Put what :func:`rank_of_top` found into one sentence."""
    if about["rank_share"] is None:
        return "No gene shifts cells, neither by itself nor by its rank."
    several = about["genes"] > 1
    kind = "hit" if about["hits"] else "gene"
    which = f"{about['genes']} strongest {kind}s" if several else f"strongest {kind}"
    told = f"Of the shift of the {which}, {about['rank_share']:.0%} is rank shift"
    if several:
        told += f" (median); it is the larger part in {about['mostly_rank']} of them"
    if not about["hits"]:
        return f"{told}. No gene is significant."
    if not several:
        return f"{told}, and it {'stays' if about['keep'] else 'is not'} significant with ranks held."
    kept = f"{about['keep']} stay" if about["keep"] != 1 else "1 stays"
    return f"{told}, and {kept} significant, in the same direction, with ranks held."
