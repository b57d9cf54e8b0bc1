"""What may come in: bodies of a kind that is read here, of a size that fits, within a time that ties up nobody."""

from __future__ import annotations

import asyncio
import math

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import send_error

__all__ = ["UPLOAD_PATHS", "UPLOAD_TYPES", "BodyLimit"]

# Files are streamed to disk by who takes them, under a limit of their own.
UPLOAD_PATHS = frozenset({"/v1/classify", "/v1/embed"})
UPLOAD_TYPES = frozenset({b"application/x-hdf5", b"application/octet-stream"})
JSON = b"application/json"


class BodyLimit:
    """Refuse bodies before anything parses them, whether or not they announce their length.

    Parameters
    ----------
    app
        The application behind it.
    limit
        Bytes.
    seconds
        How long a body may take to arrive.
    """

    def __init__(self, app: ASGIApp, limit: int, seconds: float = math.inf) -> None:
        self.app = app
        self.limit = limit
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body up to the limit, then hand the request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        encoding = headers.get(b"content-encoding", b"identity").strip().lower()
        if encoding != b"identity":
            # A compressed body of a few kilobytes can unfold to gigabytes.
            await send_error(send, 415, "Content-Encoding", _text(encoding), "no compression")
            return
        given = headers.get(b"content-type")
        kind = (given or b"").partition(b";")[0].strip().lower()
        path = str(scope["path"]).removeprefix(scope.get("root_path", "").rstrip("/"))
        if kind in UPLOAD_TYPES and scope["method"] == "POST" and path in UPLOAD_PATHS:
            await self.app(scope, receive, send)
            return
        if given is not None and kind != JSON and scope["method"] == "POST":
            await self._refuse_kind(send, _text(kind) or "nothing")
            return
        announced = headers.get(b"content-length", b"")
        if announced.isdigit() and int(announced[:20]) > self.limit:
            await self._refuse_size(send, f"{int(announced[:20]):,} bytes")
            return
        messages: list[Message] = []
        received = 0
        try:
            async with asyncio.timeout(None if math.isinf(self.seconds) else self.seconds):
                while not messages or messages[-1].get("more_body", False):
                    messages.append(await receive())
                    received += len(messages[-1].get("body", b""))
                    if received > self.limit:
                        await self._refuse_size(send, f"over {self.limit:,} bytes")
                        return
        except TimeoutError:
            got = f"{received:,} bytes and no end after {self.seconds:g} s"
            await send_error(send, 408, "body", got, f"a body within {self.seconds:g} s", [(b"connection", b"close")])
            return
        if messages[-1]["type"] == "http.disconnect":
            return
        if received and given is None and scope["method"] == "POST":
            await self._refuse_kind(send, "nothing")
            return
        await self.app(scope, _replay(messages, receive), send)

    async def _refuse_size(self, send: Send, got: str) -> None:
        await send_error(send, 413, "body", got, f"up to {self.limit:,} bytes")

    async def _refuse_kind(self, send: Send, got: str) -> None:
        uploads = " or ".join(sorted(map(_text, UPLOAD_TYPES)))
        takes = f"{_text(JSON)}; POST {' and '.join(sorted(UPLOAD_PATHS))} also take {uploads}"
        await send_error(send, 415, "Content-Type", got, takes)


def _replay(messages: list[Message], receive: Receive) -> Receive:
    replay = iter(messages)

    async def received_before() -> Message:
        message = next(replay, None)
        return message if message is not None else await receive()

    return received_before


def _text(value: bytes) -> str:
    return value.decode("latin-1")
