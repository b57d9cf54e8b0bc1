"""Requests and answers of the Open Inference Protocol (version 2, REST): tensors with names, types and shapes."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field, model_validator

from serve.first_error import RequestModel

__all__ = [
    "InferAnswer",
    "InferRequest",
    "InputTensor",
    "ModelMetadata",
    "ModelReady",
    "OutputTensor",
    "RequestedOutput",
    "ServerLive",
    "ServerMetadata",
    "ServerReady",
    "TensorMetadata",
]

Parameters = Annotated[
    dict[str, Any] | None, Field(description="of extensions, of which this server has none: they change nothing")
]
Size = Annotated[int, Field(strict=True, ge=1, lt=2**31)]
Integer64 = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]


class InputTensor(RequestModel):
    """An input: ``input_ids``, token ids, one row a cell, padded with the pad token behind."""

    name: str = Field(max_length=200)
    datatype: str = Field(max_length=20, examples=["INT64"])
    shape: list[Size] = Field(min_length=1, max_length=8)
    data: list[Integer64] = Field(min_length=1, description="row after row; a list of rows is taken as well")
    parameters: Parameters = None

    @model_validator(mode="before")
    @classmethod
    def _flatten(cls, given: Any) -> Any:
        """Put rows one behind the other, if they are as the shape says."""
        data = given.get("data") if isinstance(given, dict) else None
        if not isinstance(data, list) or not data or not all(isinstance(row, list) for row in data):
            return given
        if given.get("shape") != [len(data), len(data[0])] or any(len(row) != len(data[0]) for row in data):
            raise ValueError("rows of data as many and as long as shape says")
        return {**given, "data": [value for row in data for value in row]}


class RequestedOutput(RequestModel):
    """An output that is asked for."""

    name: str = Field(max_length=200)
    parameters: Parameters = None


class InferRequest(RequestModel):
    """Cells to classify, as tensors."""

    id: str | None = Field(None, max_length=200, description="given back with the answer")
    parameters: Parameters = None
    inputs: list[InputTensor] = Field(min_length=1, max_length=8)
    outputs: list[RequestedOutput] | None = Field(None, max_length=256, description="by default all")


class OutputTensor(BaseModel):
    """An output, row after row."""

    name: str
    datatype: str
    shape: list[int]
    data: list[float] | list[str]


class InferAnswer(BaseModel):
    """The outputs, and which model gave them."""

    model_name: str
    model_version: str | None = Field(None, description="its version in the registry; none for a directory")
    id: str | None = None
    parameters: dict[str, str] = Field(description="digest: a hash of the model's weights and configuration")
    outputs: list[OutputTensor]


class TensorMetadata(BaseModel):
    """What a tensor is called, and its type and shape; -1 stands for any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """What a model takes and gives."""

    name: str
    versions: list[str] | None = Field(None, description="that may be asked for")
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ModelReady(BaseModel):
    """Whether a model takes requests."""

    name: str
    ready: bool


class ServerMetadata(BaseModel):
    """What this server is."""

    name: str
    version: str
    extensions: list[str]


class ServerLive(BaseModel):
    """Whether the process answers."""

    live: bool


class ServerReady(BaseModel):
    """Whether a model is loaded."""

    ready: bool
