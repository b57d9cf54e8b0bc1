"""What every test may use: upstream's golden numbers where they are at hand, and small models and cells."""

from __future__ import annotations

import os

# One thread a process: test workers share the machine, and oversubscribed torch threads are 100 times slower.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

from geneformer_ray.compute.pretraining import new_model
from geneformer_ray.data.vocabulary import GeneVocabulary

# A busy machine is no failure.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
MEDIANS = {f"GENE{number:02d}": 1.0 + number / 7 for number in range(40)}


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of upstream's own numbers."""
    if not GOLDEN.is_dir():
        pytest.skip(f"upstream's golden numbers are not at {GOLDEN}")
    return GOLDEN


@pytest.fixture(scope="session")
def vocabulary() -> GeneVocabulary:
    """Forty genes without special tokens beyond pad and mask, sixteen positions."""
    return GeneVocabulary.from_medians(MEDIANS, max_length=16)


@pytest.fixture(scope="session")
def special_vocabulary() -> GeneVocabulary:
    """The same genes behind ``<cls>`` and ``<eos>`` as V2's are, eighteen positions."""
    names = ["<pad>", "<mask>", "<cls>", "<eos>", *sorted(MEDIANS)]
    return GeneVocabulary({name: number for number, name in enumerate(names)}, medians=MEDIANS, max_length=18)


@pytest.fixture(scope="session")
def model_directory(vocabulary: GeneVocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny masked-gene model with large random weights, so that mistakes show."""
    return _random_model(vocabulary, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def special_model_directory(special_vocabulary: GeneVocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with ``<cls>`` and ``<eos>``."""
    return _random_model(special_vocabulary, tmp_path_factory.mktemp("special_model"))


def _random_model(vocabulary: GeneVocabulary, directory: Path) -> Path:
    from geneformer_ray.compute.model_directory import save_model

    torch.manual_seed(0)
    model = new_model(vocabulary, layers=3, width=16, heads=2, feed_forward=24)
    randomise(model, 0.4)
    save_model(model, vocabulary, directory)
    return directory


def randomise(model: torch.nn.Module, deviation: float) -> None:
    """Give every parameter a random value; fresh biases are 0 and LayerNorms 1, which hides what is done with them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=deviation)
            else:
                parameter.normal_(float(name.endswith("LayerNorm.weight")), 0.3)


@pytest.fixture
def rng() -> np.random.Generator:
    """A seeded random generator."""
    return np.random.default_rng(0)


def random_cells(vocabulary: GeneVocabulary, rng: np.random.Generator, lengths: list[int]) -> list[np.ndarray]:
    """Make cells of distinct random genes, with ``<cls>`` and ``<eos>`` where the vocabulary has them."""
    genes = np.array([vocabulary.tokens[gene] for gene in vocabulary.genes], dtype=np.int32)
    front = [] if vocabulary.cls_id is None else [vocabulary.cls_id]
    behind = [] if vocabulary.eos_id is None else [vocabulary.eos_id]
    return [np.array([*front, *rng.permutation(genes)[:length], *behind], dtype=np.int32) for length in lengths]
