"""The Open Inference Protocol, version 2 (REST): health, metadata and inference on token ids.

The protocol: github.com/kserve/open-inference-protocol, specification/protocol/inference_rest.md.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from starlette.exceptions import HTTPException

from geneformer_ray.errors import InputError
from serve.cell_encoding import EncodedCell
from serve.inference_schemas import (
    InferAnswer,
    InferRequest,
    InputTensor,
    ModelMetadata,
    ModelReady,
    OutputTensor,
    ServerLive,
    ServerMetadata,
    ServerReady,
    TensorMetadata,
)
from serve.model import ServedModel
from serve.request_cells import check_size
from serve.schemas import ErrorAnswer
from serve.service import Service
from serve.settings import ServeSettings
from serve.strict_json import StrictJsonRoute

__all__ = ["v2_routes"]

PLATFORM = "pytorch_safetensors"
INPUT, PROBABILITIES, LABEL = "input_ids", "probabilities", "label"
# The protocol's names for types; text is bytes.
INT64, FP32, BYTES = "INT64", "FP32", "BYTES"
NOT_SERVED: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorAnswer, "description": "a model or version that is not served"}
}


def v2_routes(service: Service, version: str) -> APIRouter:
    """Make the routes below ``/v2``.

    Parameters
    ----------
    service
        Computes.
    version
        Of this package.
    """
    api = APIRouter(prefix="/v2", route_class=StrictJsonRoute)

    @api.get("/health/live")
    async def live() -> ServerLive:
        """Tell whether the process answers."""
        return ServerLive(live=True)

    @api.get("/health/ready")
    async def ready() -> ServerReady:
        """Tell whether a model is loaded; no replica takes requests before."""
        return ServerReady(ready=True)

    @api.get("")
    async def server() -> ServerMetadata:
        """Say what this server is."""
        return ServerMetadata(name="geneformer-ray", version=version, extensions=[])

    @api.get("/models/{name}/versions/{number}", response_model_exclude_none=True, responses=NOT_SERVED)
    async def metadata_of_version(name: str, number: str) -> ModelMetadata:
        """Say what a version of the model takes and gives."""
        return _metadata(_named(service.model, name, number))

    @api.get("/models/{name}", response_model_exclude_none=True, responses=NOT_SERVED)
    async def metadata(name: str) -> ModelMetadata:
        """Say what the model takes and gives."""
        return _metadata(_named(service.model, name))

    @api.get("/models/{name}/versions/{number}/ready", responses=NOT_SERVED)
    async def version_ready(name: str, number: str) -> ModelReady:
        """Tell whether a version of the model takes requests."""
        return ModelReady(name=_named(service.model, name, number).name, ready=True)

    @api.get("/models/{name}/ready", responses=NOT_SERVED)
    async def model_ready(name: str) -> ModelReady:
        """Tell whether the model takes requests."""
        return ModelReady(name=_named(service.model, name).name, ready=True)

    @api.post("/models/{name}/versions/{number}/infer", response_model_exclude_none=True, responses=NOT_SERVED)
    async def infer_by_version(name: str, number: str, body: InferRequest) -> InferAnswer:
        """Classify cells by a version of the model."""
        return await _infer(service, _named(service.model, name, number), body)

    @api.post("/models/{name}/infer", response_model_exclude_none=True, responses=NOT_SERVED)
    async def infer(name: str, body: InferRequest) -> InferAnswer:
        """Classify cells by the model."""
        return await _infer(service, _named(service.model, name), body)

    return api


def _named(served: ServedModel, name: str, number: str | None = None) -> ServedModel:
    """Give the served model if that is its name, and its version where one is asked for."""
    if name != served.name:
        raise HTTPException(404, f"{served.name}, the one model that is served")
    if number is not None and number != str(served.version):
        there = "no version, for this model is not registered" if served.version is None else str(served.version)
        raise HTTPException(404, f"{there}, which is what is served of {name}")
    return served


def _metadata(served: ServedModel) -> ModelMetadata:
    return ModelMetadata(
        name=served.name,
        versions=None if served.version is None else [str(served.version)],
        platform=PLATFORM,
        inputs=[TensorMetadata(name=INPUT, datatype=INT64, shape=[-1, -1])],
        outputs=[
            tensor
            for end, labels in _endings(served).items()
            for tensor in (
                TensorMetadata(name=PROBABILITIES + end, datatype=FP32, shape=[-1, len(labels)]),
                TensorMetadata(name=LABEL + end, datatype=BYTES, shape=[-1]),
            )
        ],
    )


def _endings(served: ServedModel) -> dict[str, list[str]]:
    """Give how the names of outputs end, and the labels that each is about: the first task has names without ending."""
    return {"": served.labels, **{f"_{task}": labels for task, labels in served.tasks.items()}}


async def _infer(service: Service, served: ServedModel, body: InferRequest) -> InferAnswer:
    asked = _asked(body, served)
    if len(body.inputs) > 1:
        raise InputError("inputs", f"{len(body.inputs)} tensors", f"one, {INPUT}")
    cells = await asyncio.to_thread(_cells, served, body.inputs[0], service.settings)
    odds_NC = served.probabilities(await service.vectors(served, [cell.input_ids for cell in cells], "logits"))
    parts = [odds_NC[:, : len(served.labels)], *served.by_task(odds_NC).values()]
    outputs = []
    for (end, labels), odds in zip(_endings(served).items(), parts, strict=True):
        best = [labels[number] for number in odds.argmax(axis=1)]
        outputs += [
            OutputTensor(name=PROBABILITIES + end, datatype=FP32, shape=list(odds.shape), data=odds.ravel().tolist()),
            OutputTensor(name=LABEL + end, datatype=BYTES, shape=[len(best)], data=best),
        ]
    return InferAnswer(
        model_name=served.name,
        model_version=None if served.version is None else str(served.version),
        id=body.id,
        parameters={"digest": served.digest},
        outputs=[output for output in outputs if output.name in asked],
    )


def _asked(body: InferRequest, served: ServedModel) -> set[str]:
    there = [output.name for output in _metadata(served).outputs]
    for number, output in enumerate(body.outputs or []):
        if output.name not in there:
            takes = f"{', '.join(there[:-1])} or {there[-1]}"
            raise InputError(f"outputs[{number}].name", repr(output.name), takes)
    return {output.name for output in body.outputs or []} or set(there)


def _cells(served: ServedModel, tensor: InputTensor, settings: ServeSettings) -> list[EncodedCell]:
    """Take the cells out of a tensor: its rows without their padding."""
    for field, got, takes in (("name", tensor.name, INPUT), ("datatype", tensor.datatype, INT64)):
        if got != takes:
            raise InputError(f"inputs[0].{field}", repr(got), takes)
    if len(tensor.shape) != 2:
        raise InputError("inputs[0].shape", str(tensor.shape), "two sizes: cells, and tokens of the longest cell")
    cells, length = tensor.shape
    check_size("inputs[0].shape", cells, settings.max_cells, "cells")
    check_size("inputs[0].shape", length, settings.max_genes, "tokens a cell")
    if cells * length != len(tensor.data):
        raise InputError("inputs[0].data", f"{len(tensor.data):,} values", f"{cells * length:,}, as shape says")
    rows: NDArray[np.int64] = np.array(tensor.data, dtype=np.int64).reshape(cells, length)
    pad = served.vocabulary.pad_id
    found = []
    for number, row in enumerate(rows):
        filled = np.flatnonzero(row != pad)
        tokens = row[: filled[-1] + 1] if len(filled) else row[:0]
        found.append(served.accept(tokens.tolist(), field=f"inputs[0].data[{number}]"))
    return found
