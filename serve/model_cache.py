"""Copies of registered models on this machine: a service starts without its registry, with what it last served."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from geneformer_ray.compute.model_directory import weights_digest
from geneformer_ray.errors import InputError

__all__ = ["ModelCache"]

logger = logging.getLogger(__name__)

ALIASES, DIGEST = "aliases.json", "digest"
# Versions of one model that are kept: the one that serves, the one before it, and one on its way in.
KEPT = 3


@dataclass(frozen=True)
class ModelCache:
    """A directory ``NAME/VERSION/`` of whole copies, each with its digest beside it.

    Several replicas of a node share it: a copy is made beside its place and moved there.

    Parameters
    ----------
    directory
        Absolute; made when the first model is kept.
    """

    directory: Path

    def keep(self, name: str, version: int, source: Path, alias: str | None) -> Path:
        """Copy a version that was checked, note what the alias means; give the copy's directory."""
        place = self.directory / name / str(version)
        digest = weights_digest(source)
        if not _is_whole(place, digest):
            place.parent.mkdir(parents=True, exist_ok=True)
            beside = Path(tempfile.mkdtemp(prefix=f".{version}-", dir=place.parent))
            shutil.copytree(source, beside / "model")
            (beside / DIGEST).write_text(digest)
            shutil.rmtree(place, ignore_errors=True)
            try:
                beside.replace(place)
            except OSError:
                # Another replica was first; its copy is the same.
                shutil.rmtree(beside, ignore_errors=True)
                if not _is_whole(place, digest):
                    raise
        os.utime(place)
        if alias is not None:
            self._note(name, alias, version)
        self._forget_old(name)
        return place / "model"

    def find(self, name: str, alias: str | None, version: int | None) -> tuple[Path, int]:
        """Give the copy of a version, or of what an alias last meant here.

        Raises
        ------
        InputError
            If there is none, or its weights are no longer those that were kept.
        """
        if version is None:
            version = self._aliases(name).get(alias or "")
        place = self.directory / name / str(version)
        if version is None or not place.exists():
            wanted = f"models:/{name}{f'@{alias}' if alias else f'/{version}'}"
            raise InputError("model", f"{wanted}, which is not in {self.directory}", "a registry that answers")
        if not _is_whole(place, (place / DIGEST).read_text()):
            raise InputError("model", f"{place} with other weights than were kept there", "a registry that answers")
        return place / "model", version

    def _aliases(self, name: str) -> dict[str, int]:
        file = self.directory / name / ALIASES
        if not file.exists():
            return {}
        content: dict[str, int] = json.loads(file.read_text())
        return content

    def _note(self, name: str, alias: str, version: int) -> None:
        file = self.directory / name / ALIASES
        beside = file.with_name(f".{ALIASES}.{os.getpid()}.{time.monotonic_ns()}")
        beside.write_text(json.dumps({**self._aliases(name), alias: version}))
        beside.replace(file)

    def _forget_old(self, name: str) -> None:
        meant = {str(version) for version in self._aliases(name).values()}
        versions = [path for path in (self.directory / name).iterdir() if path.name.isdigit()]
        versions.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for path in versions[KEPT:]:
            if path.name not in meant:
                shutil.rmtree(path, ignore_errors=True)


def _is_whole(place: Path, digest: str) -> bool:
    return (place / DIGEST).exists() and (place / DIGEST).read_text() == digest == weights_digest(place / "model")
