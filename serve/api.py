"""The HTTP application of a service: its routes, its errors, its limits."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI

from serve.errors import BodyLimit, GenericServerError, add_error_answers
from serve.routes_v1 import v1_routes
from serve.schemas import ErrorAnswer
from serve.service import Service

__all__ = ["create_api"]


def create_api(service: Service) -> FastAPI:
    """Make the application of a service.

    Parameters
    ----------
    service
        Holds the model and computes with it.
    """
    api = FastAPI(
        title="geneformer-ray",
        version=_package_version(),
        description="Cell types and in-silico perturbations from a Geneformer classifier.",
        responses={status: {"model": ErrorAnswer} for status in (413, 422, 500, 503)},
    )
    add_error_answers(api)
    # The last one added is the outermost.
    api.add_middleware(BodyLimit, limit=service.settings.max_body_bytes)
    api.add_middleware(GenericServerError)

    @api.get("/v2/health/live")
    async def live() -> dict[str, bool]:
        """Tell whether the process answers."""
        return {"live": True}

    @api.get("/v2/health/ready")
    async def ready() -> dict[str, bool]:
        """Tell whether a model is loaded; no replica takes requests before."""
        return {"ready": True}

    api.include_router(v1_routes(service))
    return api


def _package_version() -> str:
    try:
        return version("geneformer-ray")
    except PackageNotFoundError:
        return "0"  # run from a checkout that was not installed
