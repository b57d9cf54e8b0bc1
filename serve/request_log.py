"""One line of JSON a request, without anything of its content."""

from __future__ import annotations

import contextvars
import json
import logging
import re
import sys
import time
import traceback
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPMethod

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.metrics import Metrics

__all__ = ["RequestLog", "current_request_id", "note", "write_failure", "write_requests_to_stderr"]

logger = logging.getLogger("geneformer.requests")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
# Nobody was there to be answered: what nginx calls it.
CLIENT_GONE = 499


@dataclass
class _Notes:
    """What is known of a request by those who answer it. Only these fields: a line can hold nothing of a cell."""

    request_id: str
    cells: int = 0
    tokens: int = 0
    events: int = 0
    model: str | None = None
    version: int | None = None
    key: str | None = None
    started: float = field(default_factory=time.perf_counter)


_NOTES: contextvars.ContextVar[_Notes | None] = contextvars.ContextVar("notes", default=None)


def note(
    *,
    cells: int = 0,
    tokens: int = 0,
    events: int = 0,
    model: str | None = None,
    version: int | None = None,
    key: str | None = None,
) -> None:
    """Add to the line of the present request; outside of one it does nothing.

    Parameters
    ----------
    cells, tokens, events
        How many more were computed.
    model, version
        The name and version of the model that answers.
    key
        The name of the caller's API key.
    """
    notes = _NOTES.get()
    if notes is None:
        return
    notes.cells += cells
    notes.tokens += tokens
    notes.events += events
    if model is not None:
        notes.model, notes.version = model, version
    notes.key = key or notes.key


def current_request_id() -> str | None:
    """Give the id of the present request; None outside of one."""
    notes = _NOTES.get()
    return None if notes is None else notes.request_id


class RequestLog:
    """Give each request an id, and write a line about it when it is answered.

    Parameters
    ----------
    app
        The application behind it.
    metrics
        Told of every request.
    behind_proxy
        Whether a proxy in front puts the id that it sends along on the answer itself, as Ray Serve's do.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, behind_proxy: bool = False) -> None:
        self.app = app
        self.metrics = metrics
        self.behind_proxy = behind_proxy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on, and tell of it afterwards, however it ended."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        is_sound = _REQUEST_ID.fullmatch(given) is not None
        notes = _Notes(given.decode() if is_sound else uuid.uuid4().hex)
        status, bytes_in, bytes_out = CLIENT_GONE, 0, 0

        async def counted() -> Message:
            nonlocal bytes_in
            message = await receive()
            bytes_in += len(message.get("body", b""))
            return message

        async def answered(message: Message) -> None:
            nonlocal status, bytes_out
            if message["type"] == "http.response.start":
                status = message["status"]
                if not (self.behind_proxy and is_sound):
                    headers = [*message.get("headers", []), (b"x-request-id", notes.request_id.encode())]
                    message = {**message, "headers": headers}
            bytes_out += len(message.get("body", b""))
            await send(message)

        token = _NOTES.set(notes)
        try:
            await self.app(scope, counted, answered)
        finally:
            _NOTES.reset(token)
            seconds = time.perf_counter() - notes.started
            route = _route(scope)
            self.metrics.request(route or "none", status, seconds)
            if notes.events:
                self.metrics.events(notes.events)
            line = {
                "method": _method(scope),
                "route": route,
                "status": status,
                "seconds": round(seconds, 6),
                "cells": notes.cells,
                "tokens": notes.tokens,
                "events": notes.events,
                "model": notes.model,
                "version": notes.version,
                "key": notes.key,
                "bytes_in": bytes_in,
                "bytes_out": bytes_out,
            }
            logger.info(_line("request", notes.request_id, line))


def write_failure(scope: Scope, error: BaseException) -> None:
    """Write a line about a defect: its kind and where it was, but not its message, which may quote the request."""
    frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    line = {"method": _method(scope), "route": _route(scope), "exception": type(error).__name__, "frames": frames}
    logger.error(_line("failure", current_request_id(), line))


def write_requests_to_stderr() -> None:
    """Write the lines to this process's standard error, which Ray keeps a file of; called once by a replica.

    Serve's own log would wrap each line in another, and leave it out at the level that keeps Serve quiet.
    """
    handler = logging.StreamHandler(sys.__stderr__)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _line(event: str, request_id: str | None, values: Mapping[str, object]) -> str:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": now, "event": event, "request_id": request_id, **values})


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in HTTPMethod.__members__ else "other"


def _route(scope: Scope) -> str | None:
    """Give the route's template: a path itself may hold anything."""
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) else None
