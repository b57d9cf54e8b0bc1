"""Headers of every answer that tell a browser what it may do with it."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["CONTENT_SECURITY_POLICY", "SecurityHeaders"]

# Nothing is loaded from, sent to or framed by another host, and no script or style stands in a page itself. Swagger UI
# draws its arrows from data: URLs.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "font-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
_ALWAYS = (
    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-embedder-policy", b"require-corp"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
)
# What is answered about cells is kept nowhere; files of the pages say otherwise themselves.
_CACHE = (b"cache-control", b"no-store")
_TRANSPORT_SECURITY = (b"strict-transport-security", b"max-age=31536000")
_FORWARDED_SCHEME = b"x-forwarded-proto"


class SecurityHeaders:
    """Put the headers on every answer, errors included.

    Parameters
    ----------
    app
        The application behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = list(message.get("headers", []))
                names = {name.lower() for name, _ in given}
                message = {**message, "headers": given + [pair for pair in _of(scope) if pair[0] not in names]}
            await send(message)

        await self.app(scope, receive, with_headers)


def _of(scope: Scope) -> list[tuple[bytes, bytes]]:
    # TLS ends before this service, which is told so. A caller that claims it wrongly does so to itself.
    forwarded = [value for name, value in scope["headers"] if name == _FORWARDED_SCHEME]
    secure = scope.get("scheme") == "https" or forwarded == [b"https"]
    return [*_ALWAYS, _CACHE, *([_TRANSPORT_SECURITY] if secure else [])]
