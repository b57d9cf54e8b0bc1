"""Short hashes of what determines a run's rows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["code_digest", "digest_of"]

PACKAGE = Path(__file__).parents[1]


def digest_of(*values: Any) -> str:
    """Hash arrays (dtype, shape and content) and anything that JSON can hold."""
    sha = hashlib.sha256()
    for value in values:
        if isinstance(value, np.ndarray):
            sha.update(f"{value.dtype}{value.shape}".encode())
            sha.update(np.ascontiguousarray(value).tobytes())
        else:
            sha.update(json.dumps(value, sort_keys=True, ensure_ascii=False).encode())
    return sha.hexdigest()[:16]


def code_digest(*files: str) -> str:
    """Hash source files of this package, named from its root: what computes numbers, whatever it calls its version."""
    sha = hashlib.sha256()
    for file in files:
        sha.update(file.encode() + (PACKAGE / file).read_bytes())
    return sha.hexdigest()[:16]
