"""The flags of ``python -m ray_jobs.embed``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ray_jobs.pool_flags import PoolConfig

__all__ = ["EmbedConfig"]


class EmbedConfig(PoolConfig):
    """Flags of ``python -m ray_jobs.embed``."""

    cells: str = Field(description="table of tokenised cells")
    model: str = Field(description="model directory, hub id, or models:/NAME@ALIAS")
    output: str = Field(description="directory for the tables")
    vocabulary: str | None = Field(None, description="the model's vocabulary, where it does not carry one")
    filter: dict[str, tuple[str, ...]] = Field(
        {}, description="only cells with one of these values", json_schema_extra={"metavar": "COLUMN=A,B"}
    )
    embedding: Literal["mean", "cls", "gene"] = Field(
        "mean", description="mean of a cell's genes, its <cls>, or one embedding a gene"
    )
    layer: Literal[-1, 0] = Field(-1, description="-1: the layer before the last; 0: the last")
    state_column: str | None = Field(None, description="column of cell states: their mean embeddings go to states.json")
    h5ad: str | None = Field(
        None, description="the h5ad file of the cells: a copy with the embeddings in obsm goes to OUTPUT"
    )
    cell_id_prefix: str = Field("", description="what tokenize put before the cell ids of that file")
    precision: Literal["fp32", "bf16", "auto"] = Field("fp32", description="what matrix products are computed in")
