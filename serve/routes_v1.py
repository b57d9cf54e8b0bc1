"""The routes of version 1: from a typed request to a typed answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Query, Request
from numpy.typing import NDArray

from geneformer_ray.compute.perturbation import PERTURBATIONS
from geneformer_ray.errors import InputError
from serve.answers import classified_cells, embedded_cells, model_reference, perturb_answer
from serve.cell_encoding import EncodedCell
from serve.errors import TooLargeError
from serve.model import LAYER, CellVector, ServedModel
from serve.perturbing import CellPerturbation, perturb
from serve.request_cells import encode_cell, encode_cells
from serve.schemas import (
    MOST_AFFECTED_GENES,
    ClassifyAnswer,
    ClassifyOptions,
    ClassifyRequest,
    EmbedAnswer,
    EmbedOptions,
    EmbedRequest,
    Limits,
    ModelAnswer,
    PerturbAnswer,
    PerturbRequest,
)
from serve.screen_command import screen_command
from serve.service import Service
from serve.settings import ServeSettings
from serve.strict_json import StrictJsonRoute
from serve.task_schemas import TaskLabels
from serve.uploads import UPLOAD_BODY, UploadRoute, Uploads

__all__ = ["v1_routes"]


def v1_routes(service: Service) -> APIRouter:
    """Make the routes below ``/v1``."""
    api = APIRouter(prefix="/v1", route_class=StrictJsonRoute)
    settings, uploads = service.settings, Uploads(service.settings)

    @api.get("/model")
    async def model() -> ModelAnswer:
        """Say what is being served, and what one request may hold."""
        return _model_answer(service.model, settings)

    async def classified(
        served: ServedModel, cells: Sequence[EncodedCell], options: ClassifyRequest | ClassifyOptions
    ) -> ClassifyAnswer:
        odds = served.probabilities(await _vectors(service, served, cells, "logits"))
        answered = classified_cells(cells, odds, served, options.top, options.return_input_ids)
        return ClassifyAnswer(cells=answered, model=model_reference(served))

    async def classify_file(request: Request, options: Annotated[ClassifyOptions, Query()]) -> ClassifyAnswer:
        served = service.model
        return await classified(served, await uploads.cells(request, served, options), options)

    # Before the route that takes JSON at the same path, which describes both.
    api.add_api_route(
        "/classify", classify_file, methods=["POST"], include_in_schema=False, route_class_override=UploadRoute
    )

    @api.post("/classify", openapi_extra=UPLOAD_BODY)
    async def classify(
        body: ClassifyRequest, request: Request, _: Annotated[ClassifyOptions, Query()]
    ) -> ClassifyAnswer:
        """Classify cells: JSON, or the bytes of an h5ad file, whose options are the query parameters."""
        _no_query(request)
        served = service.model
        cells = await asyncio.to_thread(encode_cells, served.cells, body.cells, body.genes, settings)
        return await classified(served, cells, body)

    async def embedded(
        served: ServedModel, cells: Sequence[EncodedCell], options: EmbedRequest | EmbedOptions
    ) -> EmbedAnswer:
        vectors = await _vectors(service, served, cells, options.embedding)
        answered = embedded_cells(cells, vectors)
        return EmbedAnswer(cells=answered, embedding=options.embedding, layer=LAYER, model=model_reference(served))

    async def embed_file(request: Request, options: Annotated[EmbedOptions, Query()]) -> EmbedAnswer:
        served = service.model
        _check_embedding(options.embedding, served)
        return await embedded(served, await uploads.cells(request, served, options), options)

    api.add_api_route("/embed", embed_file, methods=["POST"], include_in_schema=False, route_class_override=UploadRoute)

    @api.post("/embed", openapi_extra=UPLOAD_BODY)
    async def embed(body: EmbedRequest, request: Request, _: Annotated[EmbedOptions, Query()]) -> EmbedAnswer:
        """Embed cells: JSON, or the bytes of an h5ad file, whose options are the query parameters."""
        _no_query(request)
        served = service.model
        _check_embedding(body.embedding, served)
        cells = await asyncio.to_thread(encode_cells, served.cells, body.cells, body.genes, settings)
        return await embedded(served, cells, body)

    @api.post("/perturb")
    async def perturb_genes(body: PerturbRequest) -> PerturbAnswer:
        """Perturb genes of one cell: how far its other genes' embeddings move, and its class probabilities."""
        served = service.model
        _check_perturbation(body, served, settings)
        cell = await asyncio.to_thread(encode_cell, served.cells, body.cell, settings)
        work = await asyncio.to_thread(
            CellPerturbation,
            served,
            cell.input_ids,
            body.genes,
            perturbation=body.perturbation,
            rank_shift=body.rank_shift or 1,
            together=body.together,
        )
        return perturb_answer(body, cell, await perturb(service, work), served)

    return api


def _no_query(request: Request) -> None:
    """Refuse query parameters beside JSON: they would change nothing."""
    for name, value in request.query_params.items():
        raise InputError(f"query.{name}", repr(value), "nothing with JSON, whose options are fields of the body")


def _check_embedding(embedding: str, served: ServedModel) -> None:
    there = served.embeddings
    if embedding not in there:
        takes = f"one of {', '.join(there)}" if there else "nothing: this model has one layer, and embeddings need two"
        raise InputError("embedding", embedding, takes)


def _check_perturbation(body: PerturbRequest, served: ServedModel, settings: ServeSettings) -> None:
    if body.rank_shift is not None and body.perturbation not in ("inhibit", "activate"):
        raise InputError("rank_shift", f"{body.rank_shift} to {body.perturbation}", "inhibit or activate")
    if body.goal is not None and body.goal not in served.states:
        known = ", ".join(served.states)
        takes = f"one of {known}" if known else "nothing: this model knows no states (it carries no states.json)"
        raise InputError("goal", repr(body.goal), takes)
    if len(body.genes) > settings.max_candidate_genes:
        takes = f"up to {settings.max_candidate_genes}; for more: {screen_command(body, served, settings)}"
        raise TooLargeError("genes", f"{len(body.genes)} genes", takes)


async def _vectors(
    service: Service, served: ServedModel, cells: Sequence[EncodedCell], what: CellVector
) -> NDArray[np.float32]:
    """Compute a vector for every cell that could be encoded, shape (such cells, ...)."""
    sequences = [cell.input_ids for cell in cells if cell.reason is None]
    if not sequences:
        return np.zeros((0, served.classes), dtype=np.float32)
    return await service.vectors(served, sequences, what)


def _model_answer(served: ServedModel, settings: ServeSettings) -> ModelAnswer:
    return ModelAnswer(
        **model_reference(served).model_dump(),
        pooling=served.pooling,
        labels=served.labels,
        vocabulary_digest=served.vocabulary.digest,
        encodes_counts=bool(served.vocabulary.medians),
        max_length=served.max_length,
        states=list(served.states),
        embeddings=served.embeddings,
        # Events are compared in what embeddings are read from.
        perturbations=list(PERTURBATIONS) if served.embeddings else [],
        tasks={task: TaskLabels(labels=labels) for task, labels in served.tasks.items()} or None,
        limits=Limits(max_affected_genes=MOST_AFFECTED_GENES, **settings.model_dump(include=_LIMITS)),
    )


_LIMITS = set(Limits.model_fields) - {"max_affected_genes"}
