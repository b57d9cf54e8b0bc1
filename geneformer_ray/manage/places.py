"""Whether a place can be written, read and cleared: tried with a small file, of which nothing is left behind."""

from __future__ import annotations

import contextlib
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from pyarrow import fs

from geneformer_ray.data import storage
from geneformer_ray.errors import InputError
from geneformer_ray.finding import Finding, fault, ok

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["check_place", "leave_word", "lent_folder", "read_word"]


@contextlib.contextmanager
def lent_folder(place: str) -> Iterator[str]:
    """Give a new folder below a place, and remove it afterwards with all that had to be made for it.

    Parameters
    ----------
    place
        A local path or URI, which may not exist yet.
    """
    missing = _missing_folders(place)
    folder = storage.join(place, f".doctor-{secrets.token_hex(6)}")
    try:
        yield folder
    finally:
        if missing is None or storage.is_directory(folder):
            storage.remove(folder)
        for above in missing or ():
            with contextlib.suppress(OSError):  # never made, or another job has begun to use it
                above.rmdir()


def leave_word(folder: str, who: str) -> None:
    """Write a small file that names its writer."""
    storage.write_bytes(storage.join(folder, who), who.encode())


def read_word(folder: str, who: str) -> str:
    """Read another's file; an empty answer means that it was read, anything else says why not."""
    try:
        content = storage.read_bytes(storage.join(folder, who)).decode(errors="replace")
    except OSError as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return "" if content == who else "its content is another's"


def check_place(name: str, place: str, do: str) -> Iterator[Finding]:
    """Write, read and delete a file at a place, from this process.

    Parameters
    ----------
    name
        Of the finding.
    place
        A local path or URI.
    do
        What to do where it fails.
    """
    try:
        with lent_folder(place) as folder:
            leave_word(folder, "driver")
            why = read_word(folder, "driver")
    except (OSError, InputError) as error:
        why = " ".join(str(error).split())
    if why:
        yield fault(name, f"{place} cannot be written and read: {why}", do)
    else:
        yield ok(name, f"{place}: written, read and cleared by this process")


def _missing_folders(place: str) -> list[Path] | None:
    """List the folders of a local path that do not exist, the deepest first; None for an object store."""
    filesystem, inside = storage.locate(place)
    if not isinstance(filesystem, fs.LocalFileSystem):
        return None
    at, missing = Path(inside), []
    while not at.is_dir() and at != at.parent:
        missing.append(at)
        at = at.parent
    return missing
