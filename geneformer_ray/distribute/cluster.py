"""Which Ray cluster a job runs on: the one of ``RAY_ADDRESS``, else a local one of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from typing import TYPE_CHECKING, NoReturn

import ray

from geneformer_ray.errors import InputError
from geneformer_ray.progress import say

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["check_workers", "connected", "cpus_of_cluster"]

OBJECT_STORE_BYTES = 512 * 1024**2


@contextlib.contextmanager
def connected(cpus: int | None = None) -> Iterator[None]:
    """Be connected to a Ray cluster inside the block.

    An existing connection of this process is used and left as it is. ``RAY_ADDRESS`` names a running cluster; without
    it a local one is started and stopped again, never a running one joined by chance.

    Parameters
    ----------
    cpus
        CPUs of a local cluster; by default all of this machine's.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        ray.init(
            address="local",
            num_cpus=cpus or len(os.sched_getaffinity(0)),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    else:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    _unwind_on_sigterm()
    say(f"Ray: {address or 'a local cluster'}, {cpus_of_cluster()} CPUs")
    try:
        yield
    finally:
        ray.shutdown()


def check_workers(number: int, cpus: float) -> None:
    """Refuse more workers than a local cluster has CPUs for: they would wait for ever. A running cluster may grow."""
    available = len(os.sched_getaffinity(0))
    if "RAY_ADDRESS" not in os.environ and number * cpus > available:
        got = f"{number} workers of {cpus:g} CPUs"
        raise InputError("--num-workers, --cpus-per-worker", got, f"at most {available} CPUs in all, this machine's")


def cpus_of_cluster() -> int:
    """Count the CPUs of the connected cluster."""
    return int(ray.cluster_resources().get("CPU", 0))


def _unwind_on_sigterm() -> None:
    """Let ``ray job stop`` (SIGTERM) end the job by unwinding it; ray.init replaces the handler, so it is set after."""

    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)
