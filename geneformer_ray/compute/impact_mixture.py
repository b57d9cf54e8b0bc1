"""Genes with and without an impact: a mixture of two normal distributions of their means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from sklearn.mixture import GaussianMixture

from geneformer_ray.compute.rank_tests import mean_per_gene
from geneformer_ray.compute.shift_rows import mean_column, read_measured_rows
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pyarrow as pa
    import pyarrow.dataset as ds
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]

__all__ = ["ImpactMixture", "mixture_table"]

# Starts of the fit, of which the likeliest is kept: a single one may end in a local optimum.
STARTS = 5
ROUNDS = 1_000


@dataclass(frozen=True)
class ImpactMixture:
    """Two normal components of an impact; the component with the higher mean is the one of genes with impact.

    Parameters
    ----------
    mean, deviation, weight
        Of the component without and of the one with impact, in this order.
    """

    mean: tuple[float, float]
    deviation: tuple[float, float]
    weight: tuple[float, float]

    @classmethod
    def fit(cls, impact_G: FloatArray, seed: int = 0) -> ImpactMixture:
        """Fit to one value a gene, at least two of which differ."""
        origin, scale = float(impact_G.mean()), float(impact_G.std())
        # In units of their deviation: similarities vary by 1e-4, far less than what scikit-learn adds to a variance.
        scaled = ((impact_G - origin) / scale)[:, None]
        model = GaussianMixture(2, n_init=STARTS, max_iter=ROUNDS, random_state=seed).fit(scaled)
        order = np.argsort(model.means_[:, 0])
        mean, variance, weight = model.means_[order, 0], model.covariances_[order, 0, 0], model.weights_[order]
        deviation = np.sqrt(variance) * scale
        return cls(
            (float(origin + scale * mean[0]), float(origin + scale * mean[1])),
            (float(deviation[0]), float(deviation[1])),
            (float(weight[0]), float(weight[1])),
        )

    def probability(self, impact_N: FloatArray) -> FloatArray:
        """Give the posterior probability of the component with impact, shape (N,).

        It is 1 above that component's mean and 0 below the other's: a wide component would otherwise claim the far
        tail of the narrow one, on the side where no impact lies.
        """
        log_0, log_1 = (
            np.log(self.weight[i] / self.deviation[i]) - (impact_N - self.mean[i]) ** 2 / (2 * self.deviation[i] ** 2)
            for i in (0, 1)
        )
        posterior = 1 / (1 + np.exp(np.clip(log_0 - log_1, -700, 700)))
        return np.where(impact_N > self.mean[1], 1.0, np.where(impact_N < self.mean[0], 0.0, posterior))


def mixture_table(
    shifts: pa.Table | ds.Dataset,
    *,
    state: str | None = None,
    symbols: Mapping[str, str] | None = None,
    seed: int = 0,
    measure: str = "shift",
) -> tuple[pd.DataFrame, ImpactMixture]:
    """Part the genes into those with and without an impact on cells.

    Impact is 1 - the mean similarity. Of a screen with states it is the size of the mean shift to `state`, without its
    sign: two components of signed shifts would lie inside one another, for most genes shift nothing and the others
    shift either way.

    Parameters
    ----------
    shifts
        The `cell_shifts` table.
    state
        The state whose shifts are read; None for the similarities of a screen without states.
    symbols
        Symbol of each vocabulary key. A key without one stands for itself.
    seed
        Seed of the fit.
    measure
        What is read of a screen with states: `shift`, or of a decomposed one `shift_gene` or `shift_rank`.

    Returns
    -------
    table
        One row a gene. Columns: `gene`, `symbol`, `similarity` or `shift_to_STATE` (mean; `shift_gene_to_STATE`, ...),
        `impact_component` (whether its probability is above one half), `impact_probability`, `impact_share` (share of
        the gene's cells whose own impact lies in that component), `cells`. Genes with impact come first, then by
        impact, largest first.
    mixture
        The components.

    Raises
    ------
    InputError
        The table is broken, has no such rows, or fewer than two genes of different impact.

    Notes
    -----
    Upstream's ``mixture_model`` fits the same two components, but takes the first one that scikit-learn happens to
    name for the one with impact: where that is the higher similarity, half of the affected genes are lost.
    """
    rows = read_measured_rows(shifts, state, symbols, measure=measure)
    n_genes = len(rows.genes)
    mean_G = mean_per_gene(rows.value_N, rows.gene_N, n_genes)
    impact_G, impact_N = (1 - mean_G, 1 - rows.value_N) if state is None else (np.abs(mean_G), np.abs(rows.value_N))
    if n_genes < 2 or np.ptp(impact_G) == 0:
        raise InputError("shifts", f"{n_genes} genes of one impact", "at least two genes of different impact")
    mixture = ImpactMixture.fit(impact_G, seed)
    probability_G = mixture.probability(impact_G)
    within_N = (mixture.probability(impact_N) > 0.5).astype(np.float64)
    table = pd.DataFrame({"gene": list(rows.genes), "symbol": list(rows.symbols)})
    table["similarity" if state is None else mean_column(measure, state)] = mean_G
    table["impact_component"] = probability_G > 0.5
    table["impact_probability"] = probability_G
    table["impact_share"] = mean_per_gene(within_N, rows.gene_N, n_genes)
    table["cells"] = np.bincount(rows.gene_N, minlength=n_genes)
    order = np.lexsort((table["gene"], -impact_G, ~table["impact_component"]))
    return table.iloc[order].reset_index(drop=True), mixture
