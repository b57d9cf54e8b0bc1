"""How many tokens are computed at once: what the free memory holds, and half of it where that was too much."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import BertConfig

    from geneformer_ray.compute.execution import Execution

__all__ = ["MOST_TOKENS", "VECTORS_A_TOKEN", "TokenBudget", "out_of_memory"]

logger = logging.getLogger(__name__)

# More at once is no faster: products are at their full rate, and on a CPU less of it stays in the cache.
MOST_TOKENS = {"cpu": 32_768, "cuda": 262_144}
# Of what is free when a worker starts: others of its machine start beside it.
FREE_SHARE = {"cpu": 0.25, "cuda": 0.6}
# Vectors of the model's width that one token has in memory at once, in a layer and in the comparison behind it.
VECTORS_A_TOKEN = 16
BYTES_A_NUMBER = 4
# How torch's allocator, C++, CUDA, cuBLAS and oneDNN say that memory was short, where that is a plain RuntimeError.
MESSAGES = ("can't allocate memory", "bad_alloc", "out of memory", "alloc_failed", "could not create a memory object")


class TokenBudget:
    """A bound on the tokens of one batch.

    Parameters
    ----------
    tokens
        The bound.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = max(1, tokens)

    @classmethod
    def of_free_memory(cls, execution: Execution, config: BertConfig) -> TokenBudget:
        """Take a share of the memory that is free on the device now."""
        device = execution.device
        free = torch.cuda.mem_get_info()[0] if device == "cuda" else _free_memory()
        a_token = BYTES_A_NUMBER * (VECTORS_A_TOKEN * config.hidden_size + config.intermediate_size)
        return cls(min(MOST_TOKENS[device], int(FREE_SHARE[device] * free) // a_token))

    def halve(self, failed: int) -> None:
        """Take half of what failed from now on; failures of smaller batches that were made before count once."""
        self.tokens = max(1, min(self.tokens, failed // 2))
        logger.warning("out of memory with %d tokens: batches of %d from now on", failed, self.tokens)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _free_memory() -> int:
    """Bytes of the host that new allocations can have; all of its memory where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(lines["MemAvailable"].split()[0]) * 1024


def out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory was short, on a GPU or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error).lower() for message in MESSAGES)
