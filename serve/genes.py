"""The genes of the served model: what token ids stand for, and under which symbols a person knows them."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from pydantic import BaseModel, Field

from serve.model import ServedModel
from serve.service import Service

__all__ = ["GenesAnswer", "genes_routes"]


class GenesAnswer(BaseModel):
    """The vocabulary of the served model, by token id."""

    vocabulary_digest: str
    names: list[str] = Field(description="token id -> gene as vocabulary key, or special token")
    symbols: list[str] = Field(description="token id -> its symbol; the key itself where none is known")


def genes_routes(service: Service) -> APIRouter:
    """Make ``GET /v1/genes``."""
    api = APIRouter(prefix="/v1")

    @api.get("/genes")
    async def genes() -> GenesAnswer:
        """Give the genes that the model knows."""
        return await asyncio.to_thread(_genes, service.model)

    return api


def _genes(served: ServedModel) -> GenesAnswer:
    names = served.vocabulary.names
    symbols = [served.vocabulary.symbol(name) for name in names]
    return GenesAnswer(vocabulary_digest=served.vocabulary.digest, names=names, symbols=symbols)
