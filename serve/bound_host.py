"""What the service listens on, asked of Ray Serve from inside a replica."""

from __future__ import annotations

import logging

import ray
from ray.exceptions import RayError
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

__all__ = ["bound_host"]

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 10.0


def bound_host() -> str | None:
    """Ask Serve's controller which host its proxies listen on.

    Ray has no public way to ask; the controller is found as ``ray.serve`` itself finds it. With HAProxy the replicas
    listen on the same host, so that one answer holds for all doors.

    Returns
    -------
    str or None
        Such as ``127.0.0.1``; None where it cannot be told, which counts as beyond loopback.
    """
    try:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        options: object = ray.get(controller.get_http_config.remote(), timeout=ANSWER_SECONDS)
    except (AttributeError, ValueError, RayError) as error:  # another Ray, or no controller
        logger.warning("Ray Serve does not say what it is bound to (%s): taken for open", type(error).__name__)
        return None
    host = getattr(options, "host", None)
    return host if isinstance(host, str) else None
