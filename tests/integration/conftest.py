"""One Ray cluster and one small data set for the tests that start the real thing."""

from __future__ import annotations

from collections.abc import Iterator

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import geneformer_ray.distribute  # noqa: F401  (sets what Ray reads when it is imported)
from geneformer_ray.data.expression import non_zero_medians
from geneformer_ray.data.vocabulary import GeneVocabulary
from tests.integration.small_data import GROUPS, SmallData


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A local cluster of two CPUs, for one module."""
    from geneformer_ray.distribute.cluster import connected

    with connected(cpus=2):
        yield


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> SmallData:
    """Ninety cells of two types and three donors: each type has ten genes of its own, forty are shared."""
    rng = np.random.default_rng(7)
    types = np.tile(["alpha", "beta"], 45)
    donors = np.repeat(list(GROUPS.values()), 30)
    rate = np.full((90, 60), 0.8)
    rate[types == "alpha", :10] = 6
    rate[types == "beta", 10:20] = 6
    counts = rng.poisson(rate).astype(np.float32)
    genes = [f"GENE{number:02d}" for number in range(60)]
    obs = pd.DataFrame({"cell_type": types, "donor": donors}, index=[f"cell{number:03d}" for number in range(90)])
    folder = tmp_path_factory.mktemp("small")
    anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=genes)).write_h5ad(folder / "cells.h5ad")
    training = counts[donors == GROUPS["train"]]
    medians = non_zero_medians(sparse.csr_array(training), training.sum(axis=1), genes)
    GeneVocabulary.from_medians(medians, max_length=32).save(str(folder / "vocabulary"))
    return SmallData(str(folder / "cells.h5ad"), str(folder / "vocabulary"), 90)
