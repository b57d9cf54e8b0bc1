"""The page at ``/``: plain files, read once, that ask this service and no other host."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

from serve.asset import Asset

__all__ = ["page_routes"]

_FOLDER = Path(__file__).with_name("static") / "page"
_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}


def page_routes() -> APIRouter:
    """Make the routes of the page and its files."""
    # All of them are known by name: no path that a caller gave is looked up on disk.
    assets = {path.name: Asset(path.read_bytes(), _KINDS[path.suffix]) for path in sorted(_FOLDER.iterdir())}
    routes = APIRouter(include_in_schema=False)

    @routes.get("/")
    async def page(request: Request) -> Response:
        """Give the page."""
        return assets["index.html"].answer(request)

    @routes.get("/page/{name}")
    async def asset(name: str, request: Request) -> Response:
        """Give a file of the page."""
        if name not in assets:
            raise HTTPException(404)
        return assets[name].answer(request)

    return routes
