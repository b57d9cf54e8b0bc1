"""Start the service inside a running Ray, and stop it again."""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
import time
from collections.abc import Iterator

import httpx

import geneformer_ray.distribute  # noqa: F401  (sets what Ray reads when it is imported)

# isort: split
import ray
from ray import serve as ray_serve
from ray.serve.schema import LoggingConfig

from geneformer_ray.compute.model_directory import model_vocabulary, read_config
from geneformer_ray.errors import InputError, RegistryUnavailable
from geneformer_ray.progress import say
from serve.app import build
from serve.found_model import ModelSource
from serve.keys import check_keys
from serve.model_cache import ModelCache
from serve.settings import ServeSettings

__all__ = ["free_port", "running"]

APPLICATION = "geneformer"
HOST = "127.0.0.1"
READY_SECONDS = 30.0
# Serve gives a request up later than the service itself, whose answer says more.
SECONDS_AFTER_DEADLINE = 30.0


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def running(settings: ServeSettings, port: int = 0) -> Iterator[str]:
    """Serve inside the block.

    Parameters
    ----------
    settings
        As `ServeSettings.read` gives them.
    port
        Where to listen on 127.0.0.1; 0 picks a free port.

    Yields
    ------
    str
        The base URL, once the service is ready: ``http://127.0.0.1:PORT``.

    Raises
    ------
    InputError
        If the model cannot be served, or Serve runs on this cluster already: its options could not be set, and stopping
        it would end other applications.
    RuntimeError
        If Ray is not running, or the service does not become ready.
    """
    if not ray.is_initialized():
        raise RuntimeError("Ray is not running in this process: use geneformer_ray.distribute.cluster.connected()")
    there = ray_serve.status()
    if there.proxies or there.applications:
        raise InputError("Ray Serve", "running already on this cluster", "a cluster without it, or `serve deploy`")
    # Said here in one line; a replica would be tried several times and end in its own trace.
    check_keys(settings, HOST)
    source = ModelSource(settings.model, settings.tracking_uri, ModelCache(settings.cache_directory))
    try:
        found = source.find()
    except RegistryUnavailable:
        last = source.last_served()
        if last is None:
            raise
        found = last
    model_vocabulary(found.directory, settings.vocabulary, read_config(found.directory, "model"))
    application = build(settings.model_dump())
    port = port or free_port()
    # Its own lines tell of its parts, and that a second look at them changes nothing.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    ray_serve.start(
        proxy_location="HeadOnly",
        http_options={"host": HOST, "port": port, "request_timeout_s": settings.deadline_s + SECONDS_AFTER_DEADLINE},
        logging_config=quiet,
    )
    try:
        ray_serve.run(application, name=APPLICATION, route_prefix="/", logging_config=quiet)
        url = f"http://{HOST}:{port}"
        _wait_until_ready(url)
        say(f"Serve: {found.name}{'' if found.version is None else f' version {found.version}'} at {url}")
        yield url
    finally:
        # Ray prints on standard output that the controller, told to end, ended; that is for a job's summary only.
        with contextlib.redirect_stdout(sys.stderr):
            ray_serve.shutdown()


def _wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    answer = "no answer"
    while time.monotonic() < deadline:
        try:
            response = httpx.get(f"{url}/v2/health/ready", timeout=5)
        except httpx.TransportError as error:
            answer = str(error)
        else:
            if response.status_code == httpx.codes.OK:
                return
            answer = f"status {response.status_code}"
        time.sleep(0.1)
    raise RuntimeError(f"{url} is not ready after {READY_SECONDS:.0f} s: {answer}")
