"""From what was computed to the typed answers of version 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from serve.cell_encoding import EncodedCell
from serve.model import ServedModel
from serve.perturbing import EventNumbers, PerturbedCell
from serve.schemas import (
    AffectedGene,
    ClassifiedCell,
    EmbeddedCell,
    ModelReference,
    PerturbAnswer,
    PerturbedEvent,
    PerturbRequest,
    SkippedEvent,
)
from serve.task_schemas import LabelProbability, TaskChanges, TaskClass, TaskProbabilities

__all__ = ["classified_cells", "embedded_cells", "model_reference", "perturb_answer"]

NO_CLASS = TaskClass(label=None, probability=None, top=[])


def model_reference(served: ServedModel) -> ModelReference:
    """Say which model gave an answer."""
    return ModelReference(name=served.name, version=served.version, digest=served.digest)


def classified_cells(
    cells: Sequence[EncodedCell], odds_NC: NDArray[np.float32], served: ServedModel, top: int, with_ids: bool
) -> list[ClassifiedCell]:
    """Give each cell its most probable labels; `odds_NC` has a row for every cell without a reason."""
    labels, tasks, by_task = served.labels, served.tasks, served.by_task(odds_NC)
    first_NC = odds_NC[:, : len(labels)]
    row, answers = 0, []
    for cell in cells:
        there = cell.reason is None
        best = _best(first_NC[row], labels, top) if there else NO_CLASS
        each = {task: _best(by_task[task][row], tasks[task], top) if there else NO_CLASS for task in tasks}
        answers.append(
            ClassifiedCell(
                cell_id=cell.cell_id,
                label=best.label,
                probability=best.probability,
                top=best.top,
                unknown_share=cell.unknown_share,
                input_ids=cell.input_ids.tolist() if with_ids else None,
                reason=cell.reason,
                tasks=each or None,
            )
        )
        row += there
    return answers


def _best(odds_C: NDArray[np.floating], labels: Sequence[str], top: int) -> TaskClass:
    order = np.argsort(-odds_C, kind="stable")[:top]
    best = [LabelProbability(label=labels[i], probability=float(odds_C[i])) for i in order]
    return TaskClass(label=best[0].label, probability=best[0].probability, top=best)


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
    before_C, before = perturbed.before, _by_task(perturbed.before, served)
    skipped = [SkippedEvent(genes=[gene], reason="not expressed in the cell") for gene in perturbed.absent]
    if perturbed.absent and request.together:
        why = "not expressed in the cell, so there is no joint event"
        skipped = [SkippedEvent(genes=perturbed.absent, reason=why)]
    skipped += [SkippedEvent(genes=genes, reason="leaves no gene to compare") for genes in perturbed.without_comparison]
    return PerturbAnswer(
        cell_id=cell.cell_id,
        perturbation=request.perturbation,
        goal=request.goal,
        probabilities=_named(served.labels, before_C),
        events=[
            _event(perturbed.events[number], perturbed.changes_EC[number], request.affected_genes, served)
            for number in perturbed.ranking(request.goal)
        ],
        skipped=skipped,
        unknown_share=cell.unknown_share,
        model=model_reference(served),
        tasks={task: TaskProbabilities(probabilities=odds) for task, odds in before.items()} or None,
    )


def _named(labels: Sequence[str], values_C: NDArray[np.floating]) -> dict[str, float]:
    """Name values of these labels; those of further tasks may stand behind them."""
    return dict(zip(labels, map(float, values_C[: len(labels)]), strict=True))


def _by_task(values_C: NDArray[np.float32], served: ServedModel) -> Mapping[str, dict[str, float]]:
    apart = served.by_task(values_C[None])
    return {task: _named(labels, apart[task][0]) for task, labels in served.tasks.items()}


def _event(event: EventNumbers, change_C: NDArray[np.float32], affected: int, served: ServedModel) -> PerturbedEvent:
    vocabulary = served.vocabulary
    changes = _by_task(change_C, served)
    most = [(vocabulary.names[event.affected[i]], event.gene_similarity[i]) for i in event.most_affected(affected)]
    return PerturbedEvent(
        genes=event.genes,
        symbols=[vocabulary.symbol(gene) for gene in event.genes],
        similarity=event.similarity,
        shifts=event.shifts,
        probability_change=_named(served.labels, change_C),
        affected_genes=[
            AffectedGene(gene=gene, symbol=vocabulary.symbol(gene), similarity=float(value)) for gene, value in most
        ],
        tasks={task: TaskChanges(probability_change=change) for task, change in changes.items()} or None,
    )
