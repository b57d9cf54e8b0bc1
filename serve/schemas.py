"""Requests and answers, typed: everything that enters is checked here, unknown fields are refused."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "Cell",
    "ClassifiedCell",
    "ClassifyAnswer",
    "ClassifyRequest",
    "ErrorAnswer",
    "ErrorDetail",
    "LabelProbability",
    "ModelAnswer",
    "ModelReference",
    "PerturbAnswer",
    "PerturbRequest",
    "PerturbedEvent",
    "SkippedEvent",
]

# Long enough for every name in use; the search for the nearest genes costs time by the letter.
GeneName = Annotated[str, Field(min_length=1, max_length=100)]
Count = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Cell(_Request):
    """One cell: raw counts by gene, or a rank value encoding made with the model's vocabulary."""

    counts: dict[GeneName, Count] | None = Field(
        None, description="gene (Ensembl id or symbol) -> raw count", examples=[{"ENSG00000115263": 812, "TTR": 95}]
    )
    total: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)] | None = Field(
        None, description="the cell's total over all its genes; by default the sum of the counts given"
    )
    allow_non_integer: Annotated[bool, Field(strict=True)] = Field(
        False, description="accept corrected counts; normalised or logarithmic values give a wrong order of genes"
    )
    input_ids: list[TokenId] | None = Field(None, description="token ids, highest-ranked gene first")
    cell_id: Annotated[str, Field(max_length=200)] | None = Field(None, description="by default the cell's number")

    @model_validator(mode="after")
    def _one_kind(self) -> Cell:
        if (self.counts is None) == (self.input_ids is None):
            raise ValueError("either counts or input_ids")
        if self.counts is None and (self.total is not None or self.allow_non_integer):
            raise ValueError("total and allow_non_integer only with counts")
        return self


class ClassifyRequest(_Request):
    """Cells to classify."""

    cells: list[Cell] = Field(min_length=1)
    top: Annotated[int, Field(strict=True, ge=1)] = Field(3, description="how many of the most probable labels to give")


class PerturbRequest(_Request):
    """Genes to perturb in one cell: one event each, or one joint event."""

    cell: Cell
    perturbation: Literal["delete", "overexpress", "inhibit", "activate"] = "delete"
    genes: list[GeneName] = Field(min_length=1, description="genes by the vocabulary's key, Ensembl id or symbol")
    rank_shift: Annotated[int, Field(strict=True, ge=1, le=3)] | None = Field(
        None, description="quartiles of its ranks by which a gene is inhibited or activated (default: 1)"
    )
    together: Annotated[bool, Field(strict=True)] = Field(False, description="perturb all genes in one event")
    goal: str | None = Field(
        None, max_length=200, description="a state that the model knows, to measure shifts towards"
    )
    start: str | None = Field(None, max_length=200, description="another such state")


class ModelReference(BaseModel):
    """Which model gave an answer."""

    name: str
    version: int | None = Field(description="its version in the registry; none for a directory")
    digest: str = Field(description="a hash of its weights and configuration")


class LabelProbability(BaseModel):
    """A class and its probability."""

    label: str
    probability: float


class ClassifiedCell(BaseModel):
    """One cell's answer."""

    cell_id: str
    label: str
    probability: float
    top: list[LabelProbability]
    unknown_share: float = Field(
        description="share of the cell's expressed genes that the vocabulary does not know; 0 for token ids"
    )


class ClassifyAnswer(BaseModel):
    """Answers in the order of the request's cells."""

    cells: list[ClassifiedCell]
    model: ModelReference


class PerturbedEvent(BaseModel):
    """One event's numbers."""

    genes: list[str] = Field(description="the perturbed genes, as vocabulary keys")
    symbols: list[str]
    similarity: float | None = Field(
        description="mean cosine similarity of the unperturbed genes' embeddings before and after; none with states"
    )
    shifts: dict[str, float] | None = Field(description="state -> how far the unperturbed genes' mean moved towards it")
    probability_change: dict[str, float] = Field(description="label -> its probability after, less that before")


class SkippedEvent(BaseModel):
    """An event without numbers."""

    genes: list[str]
    reason: str


class PerturbAnswer(BaseModel):
    """Events in the order of the request's genes."""

    cell_id: str
    perturbation: str
    probabilities: dict[str, float] = Field(description="label -> its probability before")
    events: list[PerturbedEvent]
    skipped: list[SkippedEvent]
    unknown_share: float
    model: ModelReference


class ModelAnswer(BaseModel):
    """What is being served."""

    name: str
    version: int | None
    digest: str
    pooling: str
    labels: list[str]
    vocabulary_digest: str
    encodes_counts: bool = Field(description="whether cells can be given as counts; without medians only as token ids")
    max_length: int = Field(description="tokens of the longest cell, special tokens included")
    states: list[str] = Field(description="states that shifts can be measured towards")


class ErrorDetail(BaseModel):
    """What was wrong: where, what it was, and what would be right."""

    field: str
    got: str
    takes: str


class ErrorAnswer(BaseModel):
    """The body of every error."""

    error: ErrorDetail
