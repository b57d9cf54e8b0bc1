"""The routes of version 1: from a typed request to a typed answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray

from geneformer_ray.errors import InputError
from serve.errors import TooLargeError
from serve.model import EncodedCell, PerturbedCell, ServedModel, probabilities
from serve.schemas import (
    Cell,
    ClassifiedCell,
    ClassifyAnswer,
    ClassifyRequest,
    LabelProbability,
    ModelAnswer,
    ModelReference,
    PerturbAnswer,
    PerturbedEvent,
    PerturbRequest,
    SkippedEvent,
)
from serve.service import Service
from serve.settings import ServeSettings

__all__ = ["v1_routes"]


def v1_routes(service: Service) -> APIRouter:
    """Make the routes below ``/v1``."""
    api = APIRouter(prefix="/v1")

    @api.get("/model")
    async def model() -> ModelAnswer:
        """Say what is being served."""
        served = service.model
        return ModelAnswer(
            **_reference(served).model_dump(),
            pooling=served.pooling,
            labels=served.labels,
            vocabulary_digest=served.vocabulary.digest,
            encodes_counts=bool(served.vocabulary.medians),
            max_length=served.max_length,
            states=list(served.states),
        )

    @api.post("/classify")
    async def classify(request: ClassifyRequest) -> ClassifyAnswer:
        """Classify cells."""
        _check_size("cells", len(request.cells), service.settings.max_cells, "cells")
        served = service.model
        encoded = await asyncio.to_thread(_encode_all, served, request.cells, service.settings)
        logits = await service.vectors(served, [cell.input_ids for cell in encoded], "logits")
        cells = [
            _classified(number, *parts, served.labels, request.top)
            for number, parts in enumerate(zip(request.cells, encoded, probabilities(logits), strict=True))
        ]
        return ClassifyAnswer(cells=cells, model=_reference(served))

    @api.post("/perturb")
    async def perturb(request: PerturbRequest) -> PerturbAnswer:
        """Perturb genes of one cell: how far its other genes' embeddings move, and its class probabilities."""
        settings, served = service.settings, service.model
        if request.rank_shift is not None and request.perturbation not in ("inhibit", "activate"):
            raise InputError("rank_shift", f"{request.rank_shift} to {request.perturbation}", "inhibit or activate")
        more = (
            f"up to {settings.max_candidate_genes}; for more: python -m ray_jobs.screen --cells DIR --genes G1,G2,... "
        )
        more += f"--model {settings.model} --output DIR"
        if len(request.genes) > settings.max_candidate_genes:
            raise TooLargeError("genes", f"{len(request.genes)} genes", more)
        states = _states(request, served)
        cell = await asyncio.to_thread(_encode, served, request.cell, settings, "cell")
        result = await service.run(
            lambda: served.perturb(
                cell.input_ids,
                request.genes,
                perturbation=request.perturbation,
                rank_shift=request.rank_shift or 1,
                together=request.together,
                states=states,
            )
        )
        return _perturbed(request, cell, result, states, served)

    return api


# ---------------------------------------------------------------------- requests


def _check_size(field: str, size: int, limit: int, unit: str) -> None:
    if size > limit:
        raise TooLargeError(field, f"{size:,} {unit}", f"up to {limit:,}")


def _encode_all(served: ServedModel, cells: Sequence[Cell], settings: ServeSettings) -> list[EncodedCell]:
    return [_encode(served, cell, settings, f"cells[{number}]") for number, cell in enumerate(cells)]


def _encode(served: ServedModel, cell: Cell, settings: ServeSettings, field: str) -> EncodedCell:
    if cell.input_ids is not None:
        field = f"{field}.input_ids"
        _check_size(field, len(cell.input_ids), settings.max_genes, "token ids")
        return served.accept(cell.input_ids, field=field)
    counts, field = cell.counts or {}, f"{field}.counts"
    _check_size(field, len(counts), settings.max_genes, "genes")
    return served.encode(counts, total=cell.total, whole=not cell.allow_non_integer, field=field)


def _states(request: PerturbRequest, served: ServedModel) -> list[str]:
    asked = {"goal": request.goal, "start": request.start}
    for field, state in asked.items():
        if state is not None and state not in served.states:
            known = ", ".join(served.states)
            takes = f"one of {known}" if known else "nothing: this model knows no states (it carries no states.json)"
            raise InputError(field, repr(state), takes)
    return list(dict.fromkeys(state for state in asked.values() if state is not None))


# ---------------------------------------------------------------------- answers


def _reference(served: ServedModel) -> ModelReference:
    return ModelReference(name=served.name, version=served.version, digest=served.digest)


def _cell_id(cell: Cell, number: int) -> str:
    return str(number) if cell.cell_id is None else cell.cell_id


def _classified(
    number: int, cell: Cell, encoded: EncodedCell, odds: NDArray[np.float32], labels: list[str], top: int
) -> ClassifiedCell:
    order = np.argsort(-odds, kind="stable")[:top]
    best = [LabelProbability(label=labels[i], probability=float(odds[i])) for i in order]
    return ClassifiedCell(
        cell_id=_cell_id(cell, number),
        label=best[0].label,
        probability=best[0].probability,
        top=best,
        unknown_share=encoded.unknown_share,
    )


def _perturbed(
    request: PerturbRequest, cell: EncodedCell, result: PerturbedCell, states: Sequence[str], served: ServedModel
) -> PerturbAnswer:
    labels = served.labels
    events = [
        PerturbedEvent(
            genes=genes,
            symbols=[served.vocabulary.symbol(gene) for gene in genes],
            similarity=None if states else float(values[0]),
            shifts={state: float(value) for state, value in zip(states, values, strict=True)} if states else None,
            probability_change=dict(zip(labels, map(float, changes), strict=True)),
        )
        for genes, values, changes in zip(result.genes, result.values_ES, result.changes_EC, strict=True)
    ]
    skipped = [SkippedEvent(genes=[gene], reason="not expressed in the cell") for gene in result.absent]
    if result.absent and request.together:
        skipped = [SkippedEvent(genes=result.absent, reason="not expressed in the cell, so there is no joint event")]
    skipped += [SkippedEvent(genes=genes, reason="leaves no gene to compare") for genes in result.without_comparison]
    return PerturbAnswer(
        cell_id=_cell_id(request.cell, 0),
        perturbation=request.perturbation,
        probabilities=dict(zip(labels, map(float, result.probabilities), strict=True)),
        events=events,
        skipped=skipped,
        unknown_share=cell.unknown_share,
        model=_reference(served),
    )
