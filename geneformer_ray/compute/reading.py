"""What is compared between a cell and its perturbed self, and the number that comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from geneformer_ray.compute.cell_events import EventBatch

__all__ = ["COMPARISONS", "Original", "Reading", "read_shifts"]

COMPARISONS = ("context", "upstream")


@dataclass(frozen=True)
class Reading:
    """What is read from hidden states.

    Parameters
    ----------
    embedding
        ``mean`` reads genes, ``cls`` position 0.
    comparison
        ``context``: the perturbed genes are left out on both sides. ``upstream``: with states, the mean is over all
        genes of each side, so that a deleted gene still counts in the original. Without states, and for ``cls``, the
        two are the same.
    states
        State -> its embedding, float32 of shape (width,). Without states an event's number is a similarity.
    gene_shifts
        Whether to give the similarity of every unperturbed gene before and after as well.
    """

    embedding: str = "mean"
    comparison: str = "context"
    states: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    gene_shifts: bool = False

    def __post_init__(self) -> None:
        if self.comparison not in COMPARISONS:
            raise InputError("--comparison", self.comparison, f"one of {', '.join(COMPARISONS)}")

    @property
    def first_only(self) -> bool:
        """Whether position 0 is all that is read."""
        return self.embedding == "cls" and not self.gene_shifts


class Original:
    """The unperturbed cell's hidden states, computed once for all its events.

    Parameters
    ----------
    hidden_LD
        On the device, float32, shape (length, width); position 0 alone where that is all that is read.
    is_gene
        Which of the cell's positions hold genes, shape (length,).
    reading
        What is read.
    """

    def __init__(self, hidden_LD: torch.Tensor, is_gene: NDArray[np.bool_], reading: Reading) -> None:
        self.hidden_LD = hidden_LD
        self.genes = torch.from_numpy(np.flatnonzero(is_gene)).to(hidden_LD.device)
        self.states_SD = hidden_LD.new_empty(0, hidden_LD.shape[1])
        if reading.states:
            self.states_SD = torch.from_numpy(np.stack(list(reading.states.values()))).to(hidden_LD.device)

    def towards_states(self, embedding_ED: torch.Tensor) -> torch.Tensor:
        """Cosine of each event's embedding with each state: shape (events, states)."""
        return cosine_similarity(embedding_ED[:, None], self.states_SD[None], dim=-1)

    def mean_of(self, positions_EK: NDArray[np.int64]) -> torch.Tensor:
        """Average the states at each event's positions: shape (events, width)."""
        events, kept = positions_EK.shape
        # As a product with what each event counts, so that no event has a copy of the cell.
        counted_EL = np.zeros((events, len(self.hidden_LD)), dtype=np.float32)
        np.put_along_axis(counted_EL, positions_EK, 1, axis=1)
        mean_ED: torch.Tensor = torch.from_numpy(counted_EL / kept).to(self.hidden_LD.device) @ self.hidden_LD
        return mean_ED


def read_shifts(
    batch: EventBatch, hidden_ELD: torch.Tensor, original: Original, reading: Reading
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Take the numbers of some events of one cell from their hidden states.

    Parameters
    ----------
    batch
        The events, with at least one gene to compare.
    hidden_ELD
        Of the perturbed sequences, float32, shape (events, length or 1, width).
    original
        The cell as it was.
    reading
        What is compared.

    Returns
    -------
    values, similarities
        Each event's values, shape (events, states or 1), and where asked for the cosines of its unperturbed genes
        before and after, shape (events, kept).
    """
    similarity_EK = None
    if reading.gene_shifts or (reading.embedding == "mean" and not reading.states):
        similarity_EK = _similarity_of_genes(batch, hidden_ELD, original)
    values_ES = _values(batch, hidden_ELD, similarity_EK, original, reading).cpu().numpy()
    if not reading.gene_shifts or similarity_EK is None:
        return values_ES, None
    return values_ES, similarity_EK.cpu().numpy()


def _similarity_of_genes(batch: EventBatch, hidden_ELD: torch.Tensor, original: Original) -> torch.Tensor:
    """Cosine of each unperturbed gene before and after: shape (events, kept)."""
    after_EKD = _at(hidden_ELD, batch.kept_perturbed_EK)
    kept_EK = torch.from_numpy(batch.kept_original_EK).to(hidden_ELD.device)
    if hidden_ELD.is_cuda:
        return cosine_similarity(after_EKD, original.hidden_LD[kept_EK], dim=-1)
    # Event by event, what is multiplied stays in the cache.
    pairs = zip(after_EKD, kept_EK, strict=True)
    return torch.stack([cosine_similarity(after_KD, original.hidden_LD[kept_K], dim=-1) for after_KD, kept_K in pairs])


def _values(
    batch: EventBatch,
    hidden_ELD: torch.Tensor,
    similarity_EK: torch.Tensor | None,
    original: Original,
    reading: Reading,
) -> torch.Tensor:
    """One number an event and state: shape (events, states or 1)."""
    if reading.embedding == "cls":
        before_1D, after_ED = original.hidden_LD[:1], hidden_ELD[:, 0]
        if not reading.states:
            return cosine_similarity(after_ED, before_1D, dim=-1)[:, None]
        return original.towards_states(after_ED) - original.towards_states(before_1D)
    if similarity_EK is not None and not reading.states:
        return similarity_EK.mean(dim=1, keepdim=True)
    if reading.comparison == "context":
        before_ED = original.mean_of(batch.kept_original_EK)
        after_ED = _at(hidden_ELD, batch.kept_perturbed_EK).mean(dim=1)
        return original.towards_states(after_ED) - original.towards_states(before_ED)
    before_ED = original.hidden_LD[original.genes].mean(dim=0, keepdim=True)
    after_ED = _at(hidden_ELD, batch.genes_perturbed_EN).mean(dim=1)
    return original.towards_states(after_ED) - original.towards_states(before_ED)


def _at(hidden_ELD: torch.Tensor, positions_EK: NDArray[np.int64]) -> torch.Tensor:
    """Give each event's states at its positions: a view where all have the same stretch, as deletions do."""
    first, kept = int(positions_EK[0, 0]), positions_EK.shape[1]
    if (positions_EK == np.arange(first, first + kept)).all():
        return hidden_ELD[:, first : first + kept]
    positions = torch.from_numpy(positions_EK).to(hidden_ELD.device)
    return torch.take_along_dim(hidden_ELD, positions[:, :, None], dim=1)
