"""A limit on the time that a request may take: nobody waits for ever, and what nobody waits for is not computed."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import send_error

__all__ = ["Deadline"]

HEADER = b"x-deadline-seconds"


class Deadline:
    """Give a request up after some time (504).

    What it waits for is cancelled: pieces that wait for the model are passed over, and work that is done in pieces
    stops between two of them. A client that goes away has the same effect, for then Serve cancels the request.

    Parameters
    ----------
    app
        The application behind it.
    seconds
        The limit; a request may shorten it by the header ``X-Deadline-Seconds``.
    """

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self.app = app
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on, for so long."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(HEADER)
        seconds = self.seconds
        if given is not None:
            try:
                seconds = min(seconds, float(given))
            except ValueError:
                seconds = 0.0
            if not seconds > 0:
                await send_error(send, 422, "X-Deadline-Seconds", repr(given.decode("latin-1")), "seconds above 0")
                return
        started = False

        async def note_start(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            async with asyncio.timeout(seconds):
                await self.app(scope, receive, note_start)
        except TimeoutError:
            if started:
                raise
            takes = f"an answer within {seconds:g} s: fewer cells or genes, or later, when fewer others ask"
            await send_error(send, 504, "request", "no answer yet", takes)
