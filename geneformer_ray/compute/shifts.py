"""What is compared between a cell and its perturbed self, and the number that comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from geneformer_ray.compute.cell_events import cell_events
from geneformer_ray.compute.embedding import check_embedding
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from geneformer_ray.compute.cell_events import EventBatch
    from geneformer_ray.compute.encoder import Encoder
    from geneformer_ray.compute.perturbation import PerturbationPlan
    from geneformer_ray.data.vocabulary import GeneVocabulary

__all__ = ["COMPARISONS", "CellShifts", "Reading", "shift_cell"]

COMPARISONS = ("context", "upstream")
# Padded tokens of one batch of events: enough to fill the matrix units, small enough to stay in a CPU's cache.
TOKENS_PER_BATCH = 8_192


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


@dataclass(frozen=True)
class CellShifts:
    """The numbers of one cell's events, in the order of the plan.

    Parameters
    ----------
    genes
        The perturbed token ids of each event, the anchor first.
    values_ES
        float32: one column a state in the order of the reading's states, or one column of similarities.
    affected
        Token ids of the unperturbed genes of each event, int32; None unless gene shifts were asked for.
    gene_values
        Their cosine similarities before and after, float32, one array an event.
    skipped
        Events of the plan that the cell lacks the genes for.
    empty
        Events that leave no gene to compare.
    """

    genes: list[tuple[int, ...]]
    values_ES: NDArray[np.float32]
    affected: list[NDArray[np.int32]] | None = None
    gene_values: list[NDArray[np.float32]] | None = None
    skipped: int = 0
    empty: int = 0

    def __len__(self) -> int:
        return len(self.genes)


@torch.inference_mode()
def shift_cell(
    encoder: Encoder,
    input_ids: NDArray[np.integer],
    plan: PerturbationPlan,
    reading: Reading,
    vocabulary: GeneVocabulary,
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> CellShifts:
    """Perturb a cell and measure every event.

    Parameters
    ----------
    encoder
        The trunk, which ends at the layer that is read.
    input_ids
        The cell's token ids, shape (length,).
    plan, reading
        What is done, and what is compared. The formulas stand in the architecture's "Two comparisons".

    Returns
    -------
    CellShifts
        One row an event; none for events that leave no gene to compare.
    """
    check_embedding(reading.embedding, vocabulary)
    events = cell_events(input_ids, plan, vocabulary, encoder.max_length)
    originals: dict[tuple[int, ...], _Original] = {}
    values: dict[int, NDArray[np.float32]] = {}
    affected: dict[int, NDArray[np.int32]] = {}
    gene_values: dict[int, NDArray[np.float32]] = {}
    for batch in events.batches(max(1, tokens_per_batch // max(1, len(events.input_ids)))):
        if batch.kept_original_EK.shape[1] == 0:
            continue
        cut = tuple(batch.cut.tolist())
        if cut not in originals:
            stays = ~np.isin(np.arange(len(events.input_ids)), batch.cut)
            originals[cut] = _Original(encoder, events.input_ids[stays], events.is_gene[stays], reading)
        batch_values, similarity_EK = _measure(encoder, batch, originals[cut], reading)
        values |= dict(zip(batch.numbers_E.tolist(), batch_values, strict=True))
        if similarity_EK is not None:
            affected |= dict(zip(batch.numbers_E.tolist(), events.input_ids[batch.kept_original_EK], strict=True))
            gene_values |= dict(zip(batch.numbers_E.tolist(), similarity_EK, strict=True))
    numbers = sorted(values)
    return CellShifts(
        [tuple(events.events[number]) for number in numbers],
        np.array([values[number] for number in numbers], np.float32).reshape(-1, max(1, len(reading.states))),
        [affected[number] for number in numbers] if reading.gene_shifts else None,
        [gene_values[number] for number in numbers] if reading.gene_shifts else None,
        events.skipped,
        len(events) - len(numbers),
    )


def _measure(
    encoder: Encoder, batch: EventBatch, original: _Original, reading: Reading
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Give each event's values, shape (events, states or 1), and the similarities of its genes where asked for."""
    device = encoder.execution.device
    hidden_ELD = encoder.hidden(torch.from_numpy(batch.input_ids_EL))
    kept_EKD = torch.take_along_dim(hidden_ELD, torch.from_numpy(batch.kept_perturbed_EK).to(device)[:, :, None], dim=1)
    similarity_EK = None
    if reading.gene_shifts or (reading.embedding == "mean" and not reading.states):
        kept_original = torch.from_numpy(batch.kept_original_EK).to(device)
        similarity_EK = cosine_similarity(kept_EKD, original.hidden_LD[kept_original], dim=-1)
    values_ES = _values(batch, hidden_ELD, kept_EKD, similarity_EK, original, reading).cpu().numpy()
    if not reading.gene_shifts or similarity_EK is None:
        return values_ES, None
    return values_ES, similarity_EK.cpu().numpy()


class _Original:
    """The unperturbed cell's hidden states, computed once for all its events."""

    def __init__(
        self, encoder: Encoder, input_ids: NDArray[np.int32], is_gene: NDArray[np.bool_], reading: Reading
    ) -> None:
        device = encoder.execution.device
        self.hidden_LD = encoder.hidden(torch.from_numpy(input_ids.astype(np.int64))[None])[0]
        self.is_gene_L = torch.from_numpy(is_gene).to(device)
        self.states_SD = torch.empty(0, self.hidden_LD.shape[1], device=device)
        if reading.states:
            self.states_SD = torch.from_numpy(np.stack(list(reading.states.values()))).to(device)

    def towards_states(self, embedding_ED: torch.Tensor) -> torch.Tensor:
        """Cosine of each event's embedding with each state: shape (events, states)."""
        return cosine_similarity(embedding_ED[:, None], self.states_SD[None], dim=-1)


def _values(
    batch: EventBatch,
    hidden_ELD: torch.Tensor,
    kept_EKD: torch.Tensor,
    similarity_EK: torch.Tensor | None,
    original: _Original,
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
        before_ED = original.hidden_LD[torch.from_numpy(batch.kept_original_EK).to(hidden_ELD.device)].mean(dim=1)
        return original.towards_states(kept_EKD.mean(dim=1)) - original.towards_states(before_ED)
    before_ED = original.hidden_LD[original.is_gene_L].mean(dim=0, keepdim=True)
    genes_EN = torch.from_numpy(batch.genes_perturbed_EN).to(hidden_ELD.device)
    after_ED = torch.take_along_dim(hidden_ELD, genes_EN[:, :, None], dim=1).mean(dim=1)
    return original.towards_states(after_ED) - original.towards_states(before_ED)
