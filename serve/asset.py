"""A file of a page, read once and answered from memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from fastapi import Request, Response

__all__ = ["Asset"]


@dataclass(frozen=True)
class Asset:
    """A file's content and what it is.

    Parameters
    ----------
    content
        Its bytes.
    kind
        Its media type.
    """

    content: bytes
    kind: str

    @property
    def tag(self) -> str:
        """What a browser compares its own copy by."""
        return f'"{hashlib.sha256(self.content).hexdigest()[:16]}"'

    def answer(self, request: Request) -> Response:
        """Give the file, or nothing where the browser has it: after an update no old part is used with a new one."""
        headers = {"ETag": self.tag, "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == self.tag:
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type=self.kind, headers=headers)
