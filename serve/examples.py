"""Example cells that lie with the served model: something to try it on."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from geneformer_ray.data.vocabulary import gene_mask
from serve.model import ServedModel
from serve.service import Service

__all__ = ["ExampleCell", "ExamplesAnswer", "examples_routes", "read_examples"]

EXAMPLES_FILE = "examples.json"


class _StoredCell(BaseModel):
    """One entry of the file."""

    model_config = ConfigDict(strict=True)

    cell_id: str
    label: str
    input_ids: list[int] = Field(min_length=1)


_STORED = TypeAdapter(list[_StoredCell])


class ExampleCell(BaseModel):
    """A cell that the model was tested on."""

    cell_id: str
    label: str = Field(description="its annotated type, not a prediction; of several tasks its class in the first")
    input_ids: list[int] = Field(description="token ids, as every request takes them")
    genes: list[str] = Field(description="its genes as vocabulary keys, highest-ranked first")
    symbols: list[str] = Field(description="their symbols, in the same order")


class ExamplesAnswer(BaseModel):
    """The example cells of the served model, none where it carries none."""

    cells: list[ExampleCell]


def examples_routes(service: Service) -> APIRouter:
    """Make ``GET /v1/examples``."""
    api = APIRouter(prefix="/v1")

    @api.get("/examples")
    async def examples() -> ExamplesAnswer:
        """Give the example cells that lie with the model."""
        served = service.model
        return ExamplesAnswer(cells=await asyncio.to_thread(_examples, served))

    return api


def _examples(served: ServedModel) -> list[ExampleCell]:
    cells = []
    for number, stored in enumerate(read_examples(served.directory)):
        # As a request with this cell would be checked: an example that is then refused helps nobody.
        ids = served.accept(stored.input_ids, field=f"{EXAMPLES_FILE}[{number}].input_ids").input_ids
        genes = [served.vocabulary.names[token] for token in ids[gene_mask(served.vocabulary, ids)]]
        symbols = [served.vocabulary.symbol(gene) for gene in genes]
        cells.append(
            ExampleCell(
                cell_id=stored.cell_id, label=stored.label, input_ids=ids.tolist(), genes=genes, symbols=symbols
            )
        )
    return cells


def read_examples(directory: Path) -> Sequence[_StoredCell]:
    """Read a model directory's example cells; none where it holds no such file.

    Raises
    ------
    RuntimeError
        If the file is broken: a fault of the model, not of who asks for it.
    """
    path = directory / EXAMPLES_FILE
    if not path.exists():
        return []
    try:
        return _STORED.validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise RuntimeError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
