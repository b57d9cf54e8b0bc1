"""Files of the Hugging Face hub: ``ORG/REPO[/SUBFOLDER][@REVISION]``, fetched all at one commit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from geneformer_ray.data import storage
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["HubId", "named"]

_NAME = r"[\w-][\w.-]*"
_PATH = rf"{_NAME}(?:/{_NAME})*"  # no part begins with a dot, so that none leads out of the repository
_HUB_ID = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?:/(?P<folder>{_PATH})/?)?(?:@(?P<revision>{_PATH}))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubId:
    """A place on the hub.

    Parameters
    ----------
    repo
        ``ORG/REPO``.
    folder
        A subfolder or file of it; empty for the repository's root.
    revision
        Commit, branch or tag; None for the main branch.
    """

    repo: str
    folder: str
    revision: str | None

    @classmethod
    def parse(cls, text: str) -> HubId | None:
        """Read a hub id; None where `text` cannot be one, or where something of that name lies on this machine."""
        match = _HUB_ID.fullmatch(text)
        if match is None or storage.exists(text):
            return None
        return cls(match["repo"], match["folder"] or "", match["revision"])

    def fetch(self, patterns: Sequence[str], flag: str) -> Path:
        """Give the local folder or file of this place, after fetching what matches any of the patterns.

        Parameters
        ----------
        patterns
            As the hub's library takes them: from the repository's root, and ``*`` matches a slash too.
        flag
            Named in errors.
        """
        from huggingface_hub import snapshot_download

        # HTTPError is that of the library's HTTP client, whichever it uses: a proxy's errors are no HfHubHTTPError.
        from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

        try:
            root = Path(snapshot_download(self.repo, revision=self.revision, allow_patterns=list(patterns)))
        except (HTTPError, HFValidationError, OSError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            takes = f"a directory that exists, or a hub id that can be reached ({reason})"
            raise InputError(flag, self, takes) from error
        place = root / self.folder
        if not place.exists():
            takes = f"a place of {self.repo} that holds, at that revision, what {flag} needs"
            raise InputError(flag, self, takes)
        return place

    def __str__(self) -> str:
        place = f"{self.repo}/{self.folder}" if self.folder else self.repo
        return f"{place}@{self.revision}" if self.revision else place


def named(path: str | Path) -> str:
    """Name a file of the hub's cache by its hub id, at the commit that it belongs to; any other path by itself."""
    parts = Path(path).parts
    for number, (repo, snapshots, commit) in enumerate(zip(parts, parts[1:], parts[2:], strict=False)):
        if repo.startswith("models--") and snapshots == "snapshots" and _COMMIT.fullmatch(commit):
            return str(HubId(repo.removeprefix("models--").replace("--", "/"), "/".join(parts[number + 3 :]), commit))
    return str(path)
