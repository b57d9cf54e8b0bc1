"""From what was computed to the typed answers of version 1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from serve.cell_encoding import EncodedCell
from serve.model import ServedModel
from serve.perturbing import EventNumbers, PerturbedCell
from serve.schemas import (
    AffectedGene,
    ClassifiedCell,
    EmbeddedCell,
    LabelProbability,
    ModelReference,
    PerturbAnswer,
    PerturbedEvent,
    PerturbRequest,
    SkippedEvent,
)

__all__ = ["classified_cells", "embedded_cells", "model_reference", "perturb_answer"]


def model_reference(served: ServedModel) -> ModelReference:
    """Say which model gave an answer."""
    return ModelReference(name=served.name, version=served.version, digest=served.digest)


def classified_cells(
    cells: Sequence[EncodedCell], odds: NDArray[np.float32], labels: Sequence[str], top: int, with_ids: bool
) -> list[ClassifiedCell]:
    """Give each cell its most probable labels; `odds` has a row for every cell without a reason."""
    rows = iter(odds)
    answers = []
    for cell in cells:
        best = [] if cell.reason is not None else _best(next(rows), labels, top)
        answers.append(
            ClassifiedCell(
                cell_id=cell.cell_id,
                label=best[0].label if best else None,
                probability=best[0].probability if best else None,
                top=best,
                unknown_share=cell.unknown_share,
                input_ids=cell.input_ids.tolist() if with_ids else None,
                reason=cell.reason,
            )
        )
    return answers


def _best(odds_C: NDArray[np.float32], labels: Sequence[str], top: int) -> list[LabelProbability]:
    order = np.argsort(-odds_C, kind="stable")[:top]
    return [LabelProbability(label=labels[i], probability=float(odds_C[i])) for i in order]


def embedded_cells(cells: Sequence[EncodedCell], vectors: NDArray[np.float32]) -> list[EmbeddedCell]:
    """Give each cell its embedding; `vectors` has a row for every cell without a reason."""
    rows = iter(vectors)
    return [
        EmbeddedCell(
            cell_id=cell.cell_id,
            embedding=next(rows).tolist() if cell.reason is None else None,
            unknown_share=cell.unknown_share,
            reason=cell.reason,
        )
        for cell in cells
    ]


def perturb_answer(
    request: PerturbRequest, cell: EncodedCell, perturbed: PerturbedCell, served: ServedModel
) -> PerturbAnswer:
    """Rank a cell's events, and say which genes gave none."""
    labels = served.labels
    skipped = [SkippedEvent(genes=[gene], reason="not expressed in the cell") for gene in perturbed.absent]
    if perturbed.absent and request.together:
        why = "not expressed in the cell, so there is no joint event"
        skipped = [SkippedEvent(genes=perturbed.absent, reason=why)]
    skipped += [SkippedEvent(genes=genes, reason="leaves no gene to compare") for genes in perturbed.without_comparison]
    return PerturbAnswer(
        cell_id=cell.cell_id,
        perturbation=request.perturbation,
        goal=request.goal,
        probabilities=dict(zip(labels, map(float, perturbed.before), strict=True)),
        events=[
            _event(perturbed.events[number], perturbed.changes_EC[number], request.affected_genes, served)
            for number in perturbed.ranking(request.goal)
        ],
        skipped=skipped,
        unknown_share=cell.unknown_share,
        model=model_reference(served),
    )


def _event(event: EventNumbers, change_C: NDArray[np.float32], affected: int, served: ServedModel) -> PerturbedEvent:
    vocabulary = served.vocabulary
    most = [(vocabulary.names[event.affected[i]], event.gene_similarity[i]) for i in event.most_affected(affected)]
    return PerturbedEvent(
        genes=event.genes,
        symbols=[vocabulary.symbol(gene) for gene in event.genes],
        similarity=event.similarity,
        shifts=event.shifts,
        probability_change=dict(zip(served.labels, map(float, change_C), strict=True)),
        affected_genes=[
            AffectedGene(gene=gene, symbol=vocabulary.symbol(gene), similarity=float(value)) for gene, value in most
        ],
    )
