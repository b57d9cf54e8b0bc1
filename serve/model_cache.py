"""Copies of registered models on this machine: a service starts without its registry, with what it last served."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from geneformer_ray.compute.model_directory import weights_digest

__all__ = ["ModelCache"]

logger = logging.getLogger(__name__)

DIGEST, SERVED = "digest", "served-"
# Copies of one model that are kept beside those that serve.
KEPT = 3


@dataclass(frozen=True)
class ModelCache:
    """A directory ``NAME/VERSION/`` of whole copies, each with its digest beside it, and of what was served last.

    Several replicas of a node share it: a copy is made beside its place and moved there.

    Parameters
    ----------
    directory
        Absolute; made when the first model is kept.
    """

    directory: Path

    def copy_of(self, name: str, version: int, digest: str | None = None) -> Path | None:
        """Give the copy of a version, if it is whole and its weights are those that were kept, and are to be here."""
        place = self.directory / name / str(version)
        if not (place / DIGEST).exists():
            return None
        kept = (place / DIGEST).read_text()
        if digest not in (None, kept) or weights_digest(place / "model") != kept:
            logger.warning("%s holds other weights than it should: it is not used", place)
            return None
        return place / "model"

    def keep(self, name: str, version: int, source: Path) -> Path:
        """Copy a version that was checked; give the copy's directory."""
        place, digest = self.directory / name / str(version), weights_digest(source)
        if self.copy_of(name, version, digest) is None:
            place.parent.mkdir(parents=True, exist_ok=True)
            beside = Path(tempfile.mkdtemp(prefix=f".{version}-", dir=place.parent))
            try:
                shutil.copytree(source, beside / "model")
                (beside / DIGEST).write_text(digest)
                if self.copy_of(name, version, digest) is None:  # still: another replica may have been first
                    shutil.rmtree(place, ignore_errors=True)
                    beside.replace(place)
            except OSError:
                # Two that move at once: one of them finds the other's copy, which is the same.
                if self.copy_of(name, version, digest) is None:
                    raise
            finally:
                shutil.rmtree(beside, ignore_errors=True)
        os.utime(place)
        self._forget_old(name)
        return place / "model"

    def note(self, name: str, what: str, version: int) -> None:
        """Note that a version serves as what a service was asked for: an alias, or a number."""
        file = self.directory / name / f"{SERVED}{what}"
        if file.parent.exists():
            beside = Path(tempfile.mkstemp(prefix=".served-", dir=file.parent)[1])
            beside.write_text(str(version))
            beside.replace(file)

    def last(self, name: str, what: str) -> int | None:
        """Give the version that last served as `what`."""
        file = self.directory / name / f"{SERVED}{what}"
        return int(file.read_text()) if file.exists() else None

    def _forget_old(self, name: str) -> None:
        folder = self.directory / name
        serving = {file.read_text() for file in folder.glob(f"{SERVED}*")}
        copies = [path for path in folder.iterdir() if path.name.isdigit() and path.name not in serving]
        copies.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for path in copies[KEPT:]:
            shutil.rmtree(path, ignore_errors=True)
