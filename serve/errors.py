"""From exceptions to answers: every error has the same body, and none shows a stack trace."""

from __future__ import annotations

import json
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from geneformer_ray.errors import InputError
from serve.request_log import write_failure

__all__ = ["GenericServerError", "TooLargeError", "add_error_answers", "send_error"]

# A wrong value is echoed so that it can be found; a whole cell would flood the answer.
ECHO_LENGTH = 200


class TooLargeError(InputError):
    """A request is beyond a limit of this service (413)."""


def _body(field: str, got: str, takes: str) -> dict[str, dict[str, str]]:
    return {"error": {"field": _shown(field), "got": _shown(got), "takes": takes}}


def _shown(text: str) -> str:
    short = text if len(text) <= ECHO_LENGTH else text[: ECHO_LENGTH - 3] + "..."
    # JSON can escape half a character; it must not break the answer that quotes it.
    return short.encode(errors="backslashreplace").decode()


def _answer(status: int, field: str, got: str, takes: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(_body(field, got, takes), status_code=status, headers=headers)


def _field(location: Sequence[str | int]) -> str:
    """Write a place in the body as a person would: ``cells[0].counts.INS``."""
    parts = [part for part in location if part not in ("body", "[key]")] if location != ("body",) else ["body"]
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return text.removeprefix(".") or "body"


def _invalid_request(error: RequestValidationError) -> JSONResponse:
    first: dict[str, Any] = error.errors()[0]
    field, got, takes = _field(first["loc"]), repr(first.get("input")), str(first["msg"])
    if first["type"] == "json_invalid":
        field, got, takes = "body", f"no JSON ({first['ctx']['error']})", "a JSON object"
    elif first["type"] == "extra_forbidden":
        takes = "no such field"
    elif first["type"] == "missing":
        # Its input is the whole object around the field.
        got, takes = "nothing", "a value: it is required"
    return _answer(422, field, got, takes.removeprefix("Value error, ").removeprefix("Input should be "))


def add_error_answers(api: FastAPI) -> None:
    """Give an application one body for all its errors."""

    @api.exception_handler(RequestValidationError)
    async def _(_: Request, error: RequestValidationError) -> JSONResponse:
        return _invalid_request(error)

    @api.exception_handler(InputError)
    async def _(_: Request, error: InputError) -> JSONResponse:
        status = 413 if isinstance(error, TooLargeError) else 422
        return _answer(status, error.field, str(error.got), error.takes)

    @api.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> JSONResponse:
        takes = {404: "a path of /docs", 405: "another method, see /docs"}.get(error.status_code, str(error.detail))
        field = "path" if error.status_code == 404 else "method" if error.status_code == 405 else "body"
        got = f"{request.method} {request.url.path}"
        headers = dict(error.headers) if error.headers else None
        return _answer(error.status_code, field, got, takes, headers)


async def send_error(
    send: Send, status: int, field: str, got: str, takes: str, headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    """Send an error's answer from where there is no route yet."""
    content = json.dumps(_body(field, got, takes)).encode()
    kind = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*kind, *headers]})
    await send({"type": "http.response.body", "body": content})


class GenericServerError:
    """Answer what nobody expected with a plain 500: the log has the place, the caller does not.

    Parameters
    ----------
    app
        The application behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on."""
        started = False

        async def note_start(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, note_start)
        except Exception as error:
            write_failure(scope, error)
            if started or scope["type"] != "http":
                raise  # what has been sent cannot be taken back: the connection ends instead of looking whole
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            await send_error(send, status, "server", status.phrase, "nothing else: the fault is here, see its log")
