"""Which code this is, as runs are tagged with it."""

from __future__ import annotations

import subprocess
from pathlib import Path

__all__ = ["code_revision"]


def code_revision() -> str:
    """Give the commit that this code is, marked where files differ from it; the version outside a checkout."""
    from importlib.metadata import PackageNotFoundError, version

    here = Path(__file__).resolve()
    try:
        # This file may lie in an environment inside some other project's checkout.
        subprocess.run(
            ["git", "ls-files", "--error-unmatch", here.name], cwd=here.parent, capture_output=True, check=True
        )
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(describe, cwd=here.parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        try:
            return version("geneformer-ray")
        except PackageNotFoundError:
            return "unknown"
