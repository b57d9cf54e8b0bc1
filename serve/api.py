"""The HTTP application of a service: its routes, its errors, its doors."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI

from serve.body_limit import BodyLimit
from serve.deadline import Deadline
from serve.docs_page import add_docs
from serve.errors import GenericServerError, add_error_answers
from serve.examples import examples_routes
from serve.genes import genes_routes
from serve.headers import SecurityHeaders
from serve.keys import ApiKeys, RequireKey
from serve.metrics import Metrics, NoMetrics
from serve.page import page_routes
from serve.request_log import RequestLog
from serve.routes_v1 import v1_routes
from serve.routes_v2 import v2_routes
from serve.schemas import ErrorAnswer
from serve.screen_results import screen_routes
from serve.service import Service

__all__ = ["create_api"]

# What any route may answer beside its own answer.
ERRORS = {
    401: "no API key, or one that is not known",
    408: "the body did not arrive in time",
    413: "more than a limit of this service",
    415: "a body of another kind",
    422: "a wrong value",
    500: "a fault of the service",
    503: "too many wait already",
    504: "not computed in time",
}


def create_api(
    service: Service,
    *,
    keys: ApiKeys | None = None,
    metrics: Metrics | None = None,
    behind_proxy: bool = False,
) -> FastAPI:
    """Make the application of a service.

    Parameters
    ----------
    service
        Holds the model and computes with it.
    keys
        What callers must show one of, as :func:`serve.keys.check_keys` gives them; None lets everyone in.
    metrics
        Told of what happens; by default nobody is.
    behind_proxy
        Whether Serve's proxy stands in front, which puts the request's id on answers itself.
    """
    settings = service.settings
    api = FastAPI(
        title="geneformer-ray",
        version=_package_version(),
        description="Cell types and in-silico perturbations from a Geneformer classifier.",
        responses={status: {"model": ErrorAnswer, "description": text} for status, text in ERRORS.items()},
        docs_url=None,  # FastAPI's own pages load from other hosts
        redoc_url=None,
    )
    add_error_answers(api)
    add_docs(api, keys_needed=keys is not None)
    # The last one added is the outermost.
    api.add_middleware(BodyLimit, limit=settings.max_body_bytes, seconds=settings.body_seconds)
    api.add_middleware(Deadline, seconds=settings.deadline_s)
    api.add_middleware(RequireKey, keys=keys)
    api.add_middleware(GenericServerError)
    api.add_middleware(SecurityHeaders)
    api.add_middleware(RequestLog, metrics=metrics or NoMetrics(), behind_proxy=behind_proxy)

    api.include_router(v1_routes(service))
    api.include_router(examples_routes(service))
    api.include_router(genes_routes(service))
    api.include_router(screen_routes(service))
    api.include_router(v2_routes(service, _package_version()))
    api.include_router(page_routes())
    return api


def _package_version() -> str:
    try:
        return version("geneformer-ray")
    except PackageNotFoundError:
        return "0"  # run from a checkout that was not installed
