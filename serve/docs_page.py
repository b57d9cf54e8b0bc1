"""``/docs``: Swagger UI from files that are here. No other host is asked for anything."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from starlette.exceptions import HTTPException

from serve.asset import Asset
from serve.keys import is_open_path

__all__ = ["add_docs"]

_FOLDER = Path(__file__).with_name("static") / "docs"
_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}
# Swagger UI itself (Apache-2.0), as the package fastapi-offline (MIT) ships it.
_SWAGGER = ("swagger-ui-bundle.js", "swagger-ui.css")
SCHEME = "key"


def add_docs(api: FastAPI, *, keys_needed: bool) -> None:
    """Add the page to an application, and to its OpenAPI document what a caller must show.

    Parameters
    ----------
    api
        Made without FastAPI's own pages.
    keys_needed
        Whether requests need an API key.
    """
    api.include_router(_docs_routes())
    if not keys_needed:
        return
    document = api.openapi

    def with_keys() -> dict[str, Any]:
        found = document()
        schemes = found.setdefault("components", {}).setdefault("securitySchemes", {})
        schemes[SCHEME] = {"type": "http", "scheme": "bearer", "description": "one of this service's API keys"}
        for path, methods in found["paths"].items():
            for operation in methods.values():
                operation["security"] = [] if is_open_path(path) else [{SCHEME: []}]
        return found

    api.openapi = with_keys  # type: ignore[method-assign]  # as FastAPI's documentation says to extend it


def _docs_routes() -> APIRouter:
    # All of them are known by name: no path that a caller gave is looked up on disk.
    assets = {path.name: Asset(path.read_bytes(), _KINDS[path.suffix]) for path in sorted(_FOLDER.iterdir())}
    shipped = files("fastapi_offline") / "static"
    assets |= {name: Asset((shipped / name).read_bytes(), _KINDS[Path(name).suffix]) for name in _SWAGGER}
    routes = APIRouter(include_in_schema=False)

    @routes.get("/docs")
    async def docs(request: Request) -> Response:
        """Give the page."""
        return assets["index.html"].answer(request)

    @routes.get("/docs/{name}")
    async def asset(name: str, request: Request) -> Response:
        """Give a file of the page."""
        if name not in assets:
            raise HTTPException(404)
        return assets[name].answer(request)

    return routes
