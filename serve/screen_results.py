"""The ranked table of the latest screen, a page at a time: what ``python -m ray_jobs.statistics`` wrote."""

from __future__ import annotations

import asyncio
import math
import threading
from dataclasses import dataclass
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from geneformer_ray.data import storage
from geneformer_ray.errors import InputError
from serve.schemas import ErrorAnswer, ErrorDetail
from serve.service import Service

__all__ = ["NoScreenError", "ScreenAnswer", "ScreenQuery", "ScreenResults", "ScreenTable", "screen_routes"]

TABLE = "statistics"
ROWS_AT_MOST = 500
# What a caller is told of the two plans: no paths, and no genes, which may be a file's name there.
SHOWN_OF_STATISTICS = ("test", "state", "group", "bootstrap")
SHOWN_OF_SCREEN = (
    "perturbation", "rank_shift", "together", "combine", "anchor", "embedding", "layer", "comparison", "precision",
    "state_column", "start", "goal", "alternatives", "filter", "min_cells", "max_cells", "model", "cells", "vocabulary",
)  # fmt: skip


class NoScreenError(Exception):
    """There is no finished ranking to show.

    Parameters
    ----------
    got
        What lies there instead.
    """

    def __init__(self, got: str) -> None:
        super().__init__(got)
        self.got = got


class ScreenQuery(BaseModel):
    """Which rows, in which order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    offset: int = Field(0, ge=0, lt=2**31, description="rows to leave out at the front")
    limit: int = Field(50, ge=1, le=ROWS_AT_MOST, description="rows to give")
    sort: str | None = Field(None, max_length=200, description="a column (default: the order of the ranking)")
    descending: bool = Field(False, description="largest first")
    search: str = Field("", max_length=100, description="part of a gene's id or symbol, in any case")


class ScreenAnswer(BaseModel):
    """Rows of the ranked table."""

    columns: list[str]
    total: int = Field(description="rows that the search leaves, on all pages")
    offset: int
    rows: list[dict[str, str | bool | int | float | None]] = Field(
        description="column -> value; null where a number could not be computed"
    )
    screen: dict[str, Any] = Field(description="what the screen and its test were; model, cells, vocabulary: digests")


@dataclass(frozen=True)
class ScreenTable:
    """A ranking, as it was read.

    Parameters
    ----------
    rows
        In the order of the ranking.
    screen
        What the screen and its test were.
    """

    rows: pa.Table
    screen: dict[str, Any]

    def page(self, query: ScreenQuery) -> ScreenAnswer:
        """Give some of the rows.

        Equal rows stay in the order of the ranking, missing values come last.

        Raises
        ------
        InputError
            If it is to be sorted by a column that there is not.
        """
        rows, names = self.rows, self.rows.schema.names
        if query.sort is not None and query.sort not in names:
            raise InputError("query.sort", repr(query.sort), f"one of {', '.join(names)}")
        if search := query.search.strip():
            rows = rows.filter(self._matches(search))
        if query.sort is not None:
            rows = rows.take(_order(rows[query.sort], query.descending))
        shown = [
            {name: _shown(value) for name, value in row.items()}
            for row in rows.slice(query.offset, query.limit).to_pylist()
        ]
        return ScreenAnswer(columns=names, total=len(rows), offset=query.offset, rows=shown, screen=self.screen)

    def _matches(self, text: str) -> Any:
        # The only text in a ranking is of genes: their keys and symbols, one or several.
        found = [
            pc.match_substring(self.rows[field.name], text, ignore_case=True)
            for field in self.rows.schema
            if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
        ]
        any_of = pa.chunked_array([pa.repeat(False, len(self.rows))])
        for one in found:
            any_of = pc.or_(any_of, pc.fill_null(one, False))
        return any_of


class ScreenResults:
    """The ranking in a directory, read again when a newer one is written there.

    Parameters
    ----------
    directory
        The output of ``python -m ray_jobs.statistics``, a path or URI; None where none is shown.
    """

    def __init__(self, directory: str | None) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._read: tuple[str, ScreenTable] | None = None

    def table(self) -> ScreenTable:
        """Give the ranking.

        Raises
        ------
        NoScreenError
            If there is none, or it is not finished.
        """
        if self._directory is None:
            raise NoScreenError("no ranking: this service was started without screen_results")
        manifest = storage.join(self._directory, storage.MANIFEST)
        with self._lock:
            if not storage.exists(manifest):
                raise NoScreenError("no ranking yet")
            # The manifest is written last: while it is the same, so is the table.
            stamp = storage.stamp(manifest)
            if self._read is None or self._read[0] != stamp:
                self._read = None
                self._read = stamp, _read_table(self._directory, storage.read_json(manifest))
            return self._read[1]


def _read_table(directory: str, manifest: dict[str, Any]) -> ScreenTable:
    plan = manifest.get("plan", {})
    if plan.get("job") != "statistics":
        raise NoScreenError("no ranking: the output of another job")
    if not manifest.get("finished"):
        raise NoScreenError("a ranking that is being computed")
    filesystem, inside = storage.locate(storage.join(directory, TABLE))
    rows = pq.read_table(inside, filesystem=filesystem)
    # Dictionaries would be compared by code, and are no text to search in.
    plain = [f.with_type(f.type.value_type) if pa.types.is_dictionary(f.type) else f for f in rows.schema]
    return ScreenTable(rows.cast(pa.schema(plain)), _screen(plan))


def _screen(plan: dict[str, Any]) -> dict[str, Any]:
    screens = {"screen": plan.get("screen"), "other_screen": plan.get("other_screen")}
    about = {name: plan[name] for name in SHOWN_OF_STATISTICS if plan.get(name) is not None}
    for name, screen in screens.items():
        if screen:
            about[name] = {key: screen[key] for key in SHOWN_OF_SCREEN if screen.get(key) not in (None, {}, [])}
    return about


def _order(column: pa.ChunkedArray, descending: bool) -> Any:
    order = [("column", "descending" if descending else "ascending")]
    return pc.sort_indices(pa.table({"column": column}), sort_keys=order)


def _shown(value: Any) -> Any:
    """JSON has no NaN; a list of genes reads as the ranking writes them elsewhere."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return "+".join(map(str, value)) if isinstance(value, list) else value


def screen_routes(service: Service) -> APIRouter:
    """Make ``GET /v1/screen``."""
    api = APIRouter(prefix="/v1")
    results = ScreenResults(service.settings.screen_results)

    @api.get("/screen", response_model=ScreenAnswer, responses={404: {"model": ErrorAnswer}})
    async def screen(query: Annotated[ScreenQuery, Query()]) -> ScreenAnswer | JSONResponse:
        """Give rows of the latest screen's ranking."""
        try:
            return await asyncio.to_thread(lambda: results.table().page(query))
        except NoScreenError as error:
            takes = "a service with screen_results, the finished output of python -m ray_jobs.statistics"
            detail = ErrorDetail(field="screen_results", got=error.got, takes=takes)
            return JSONResponse(ErrorAnswer(error=detail).model_dump(), status_code=404)

    return api
