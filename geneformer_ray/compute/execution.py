"""The one place that decides device, dtype, attention kernel and thread count, each with its reason."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch

from geneformer_ray.errors import InputError

__all__ = ["Execution", "choose_execution", "use_threads"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Execution:
    """Where and how tensors are computed.

    Parameters
    ----------
    device
        ``cpu`` or ``cuda``.
    dtype
        What matrix products are computed in; weights and results stay float32.
    attention
        The attention implementation, as transformers names it.
    threads
        Threads of this process for CPU work.
    reason
        Why, for the log.
    """

    device: str
    dtype: torch.dtype
    attention: str
    threads: int
    reason: str

    def autocast(self) -> torch.autocast:
        """Give a context in which products are computed in `dtype`."""
        return torch.autocast(self.device, dtype=self.dtype, enabled=self.dtype != torch.float32)


def use_threads(cpus: float | None = None) -> int:
    """Set this process's threads to the CPUs it was given: oversubscribed threads are up to 100 times slower.

    Parameters
    ----------
    cpus
        CPUs of this process; by default what ``OMP_NUM_THREADS`` says, else all that the process may run on.
    """
    if cpus is None:
        said = os.environ.get("OMP_NUM_THREADS", "")
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
        cpus = int(said) if said.isdigit() else available
    threads = max(1, int(cpus))
    torch.set_num_threads(threads)
    # Libraries loaded later (numpy's BLAS, numba) read these.
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[variable] = str(threads)
    return threads


def choose_execution(precision: str = "fp32", *, cpus: float | None = None, gpu: bool | None = None) -> Execution:
    """Choose device, dtype, attention kernel and threads.

    Parameters
    ----------
    precision
        ``fp32``, ``bf16``, or ``auto``: bf16 where the hardware computes it faster.
    cpus
        CPUs of this process, as for :func:`use_threads`.
    gpu
        Whether to use a GPU; by default where there is one.
    """
    if precision not in ("fp32", "bf16", "auto"):
        raise InputError("--precision", precision, "fp32, bf16 or auto")
    threads = use_threads(cpus)
    on_gpu = torch.cuda.is_available() if gpu is None else gpu
    device = "cuda" if on_gpu else "cpu"
    if precision == "auto":
        fast = torch.cuda.is_bf16_supported() if on_gpu else bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
        dtype = torch.bfloat16 if fast else torch.float32
        why = f"auto: {'fast' if fast else 'no fast'} bfloat16 on this {'GPU' if on_gpu else 'CPU'}"
    else:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        why = f"{precision} was asked for"
    reason = f"{device}, {str(dtype).removeprefix('torch.')} ({why}), attention sdpa, {threads} threads"
    logger.info("execution: %s", reason)
    return Execution(device, dtype, "sdpa", threads, reason)
