"""Requests and answers of version 1, typed: everything that enters is checked here, unknown fields are refused."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from serve.first_error import RequestModel
from serve.task_schemas import EachTask, LabelProbability, TaskChanges, TaskClass, TaskLabels, TaskProbabilities

__all__ = [
    "CELL_ID_LENGTH",
    "MOST_AFFECTED_GENES",
    "AffectedGene",
    "Cell",
    "ClassifiedCell",
    "ClassifyAnswer",
    "ClassifyOptions",
    "ClassifyRequest",
    "EmbedAnswer",
    "EmbedOptions",
    "EmbedRequest",
    "EmbeddedCell",
    "ErrorAnswer",
    "ErrorDetail",
    "Limits",
    "ListedCell",
    "ModelAnswer",
    "ModelReference",
    "PerturbAnswer",
    "PerturbRequest",
    "PerturbedEvent",
    "ReadingOptions",
    "SkippedEvent",
]

MOST_AFFECTED_GENES = 50
CELL_ID_LENGTH = 200
# Long enough for every name in use; the search for the nearest genes costs time by the letter.
GeneName = Annotated[str, Field(min_length=1, max_length=100)]
# A float64 knows every whole number up to here, and sums of such counts stay finite.
Count = Annotated[float, Field(strict=True, ge=0, le=2**53, allow_inf_nan=False)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Place = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Flag = Annotated[bool, Field(strict=True)]
TOP = "how many of the most probable labels to give"
INPUT_IDS = "also give each cell's token ids, as /v1/perturb takes them"


# ---------------------------------------------------------------------- cells


class Cell(RequestModel):
    """One cell: raw counts by gene, or a rank value encoding made with the model's vocabulary."""

    counts: dict[GeneName, Count] | None = Field(
        None, description="gene (Ensembl id or symbol) -> raw count", examples=[{"ENSG00000115263": 812, "TTR": 95}]
    )
    input_ids: list[TokenId] | None = Field(None, description="token ids, highest-ranked gene first")
    total: Annotated[float, Field(strict=True, gt=0, le=2**53, allow_inf_nan=False)] | None = Field(
        None, description="the cell's total over all its genes; by default the sum of the counts given"
    )
    allow_non_integer: Flag = Field(
        False, description="accept corrected counts; normalised or logarithmic values give a wrong order of genes"
    )
    cell_id: Annotated[str, Field(max_length=CELL_ID_LENGTH)] | None = Field(
        None, description="by default the cell's number"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Cell:
        if (self.counts is None) == (self.input_ids is None):
            raise ValueError("either counts or input_ids")
        self._check_options()
        return self

    def _check_options(self) -> None:
        if self.input_ids is not None and (self.total is not None or self.allow_non_integer):
            raise ValueError("total and allow_non_integer only with counts")


class ListedCell(Cell):
    """One cell: as above, or counts that refer to the request's ``genes``, sparse or one for each of them."""

    indices: list[Place] | None = Field(None, description="places in the request's genes that the values belong to")
    values: list[Count] | None = Field(
        None, description="raw counts at these places; without indices one for each of the request's genes"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> ListedCell:
        kinds = [self.counts, self.values, self.input_ids]
        if sum(kind is not None for kind in kinds) != 1:
            raise ValueError("one of counts, values (with or without indices) and input_ids")
        if self.indices is not None and self.values is None:
            raise ValueError("indices only with values")
        self._check_options()
        return self


class _Cells(RequestModel):
    cells: list[ListedCell] = Field(min_length=1)
    genes: list[GeneName] | None = Field(
        None, min_length=1, description="genes (Ensembl ids or symbols) that the values of cells belong to"
    )


class ReadingOptions(RequestModel):
    """How an h5ad file is read: query parameters of an upload."""

    counts: str = Field("X", max_length=200, pattern=r"^(X|raw\.X|layers/.+)$", description="where its raw counts lie")
    gene_column: str | None = Field(
        None,
        min_length=1,
        max_length=200,
        description="var column of gene names, or index (default: ensembl_id, gene_ids, the index)",
    )
    allow_non_integer: bool = Field(False, description="accept counts that are not whole numbers")


# ---------------------------------------------------------------------- requests


class ClassifyRequest(_Cells):
    """Cells to classify."""

    top: Annotated[int, Field(strict=True, ge=1)] = Field(3, description=TOP)
    return_input_ids: Flag = Field(False, description=INPUT_IDS)


class ClassifyOptions(ReadingOptions):
    """Query parameters of an h5ad file to classify."""

    top: int = Field(3, ge=1, description=TOP)
    return_input_ids: bool = Field(False, description=INPUT_IDS)


class EmbedRequest(_Cells):
    """Cells to embed."""

    embedding: Literal["mean", "cls"] = Field("mean", description="mean of the genes' hidden states, or the <cls>'s")


class EmbedOptions(ReadingOptions):
    """Query parameters of an h5ad file to embed."""

    embedding: Literal["mean", "cls"] = Field("mean", description="mean of the genes' hidden states, or the <cls>'s")


class PerturbRequest(RequestModel):
    """Genes to perturb in one cell: one event each, or one joint event."""

    cell: Cell
    perturbation: Literal["delete", "overexpress", "inhibit", "activate"] = "delete"
    genes: list[GeneName] = Field(min_length=1, description="genes by the vocabulary's key, Ensembl id or symbol")
    rank_shift: Annotated[int, Field(strict=True, ge=1, le=3)] | None = Field(
        None, description="quartiles of its ranks by which a gene is inhibited or activated (default: 1)"
    )
    together: Flag = Field(False, description="perturb all genes in one event")
    goal: str | None = Field(
        None, max_length=200, description="a state that the model knows: events are ranked by their shift towards it"
    )
    affected_genes: Annotated[int, Field(strict=True, ge=0, le=MOST_AFFECTED_GENES)] = Field(
        5, description="how many of the most affected other genes to give with each event"
    )


# ---------------------------------------------------------------------- answers


class ModelReference(BaseModel):
    """Which model gave an answer."""

    name: str
    version: int | None = Field(description="its version in the registry; none for a directory")
    digest: str = Field(description="a hash of its weights and configuration")


class _AnsweredCell(BaseModel):
    cell_id: str
    unknown_share: float = Field(
        description="share of the cell's expressed genes that the vocabulary does not know; 0 for token ids"
    )
    reason: str | None = Field(None, description="why a cell of a file has no answer; none where it has one")


class ClassifiedCell(_AnsweredCell):
    """One cell's answer."""

    label: str | None = Field(description="the most probable label; none with a reason")
    probability: float | None
    top: list[LabelProbability] = Field(description="highest first")
    input_ids: list[int] | None = Field(None, description="its token ids, where they were asked for")
    tasks: EachTask[TaskClass] = None


class ClassifyAnswer(BaseModel):
    """Answers in the order of the cells given."""

    cells: list[ClassifiedCell]
    model: ModelReference


class EmbeddedCell(_AnsweredCell):
    """One cell's embedding."""

    embedding: list[float] | None = Field(description="as many numbers as the model is wide; none with a reason")


class EmbedAnswer(BaseModel):
    """Embeddings in the order of the cells given."""

    cells: list[EmbeddedCell]
    embedding: str
    layer: int = Field(description="-1: read from the output of the layer before the last")
    model: ModelReference


class AffectedGene(BaseModel):
    """What an event does to another gene."""

    gene: str
    symbol: str
    similarity: float = Field(description="cosine similarity of its embeddings before and after")


class PerturbedEvent(BaseModel):
    """One event's numbers."""

    genes: list[str] = Field(description="the perturbed genes, as vocabulary keys")
    symbols: list[str]
    similarity: float = Field(
        description="mean cosine similarity of the unperturbed genes' embeddings before and after"
    )
    shifts: dict[str, float] = Field(
        description="state -> how far the unperturbed genes' mean moved towards it, for every state the model knows"
    )
    probability_change: dict[str, float] = Field(description="label -> its probability after, less that before")
    affected_genes: list[AffectedGene] = Field(description="the unperturbed genes that changed most, lowest first")
    tasks: EachTask[TaskChanges] = None


class SkippedEvent(BaseModel):
    """An event without numbers."""

    genes: list[str]
    reason: str


class PerturbAnswer(BaseModel):
    """Events ranked: with a goal by shift to it, highest first; without by similarity, lowest first."""

    cell_id: str
    perturbation: str
    goal: str | None
    probabilities: dict[str, float] = Field(description="label -> its probability before")
    events: list[PerturbedEvent]
    skipped: list[SkippedEvent]
    unknown_share: float
    model: ModelReference
    tasks: EachTask[TaskProbabilities] = None


class Limits(BaseModel):
    """What one request may hold; beyond it the answer is 413."""

    max_cells: int
    max_genes: int
    max_body_bytes: int
    max_upload_bytes: int
    max_upload_cells: int
    max_candidate_genes: int
    max_affected_genes: int


class ModelAnswer(BaseModel):
    """What is being served."""

    name: str
    version: int | None
    digest: str
    pooling: str
    labels: list[str] = Field(description="its classes; of several tasks those of the first")
    vocabulary_digest: str
    encodes_counts: bool = Field(description="whether cells can be given as counts; without medians only as token ids")
    max_length: int = Field(description="tokens of the longest cell, special tokens included")
    states: list[str] = Field(description="states that shifts can be measured towards")
    embeddings: list[str] = Field(description="kinds of cell embedding")
    perturbations: list[str]
    limits: Limits
    tasks: EachTask[TaskLabels] = None


class ErrorDetail(BaseModel):
    """What was wrong: where, what it was, and what would be right."""

    field: str
    got: str
    takes: str


class ErrorAnswer(BaseModel):
    """The body of every error."""

    error: ErrorDetail
