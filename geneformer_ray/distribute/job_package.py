"""What a submitted job takes along as its working directory: our packages, and the file of its ``--config``.

Nothing else of a checkout is any use to a job, which takes its paths absolute, as URIs, or below the shared storage.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CONFIG_FILE", "packed"]

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("geneformer_ray", "ray_jobs", "serve")
# The name that the file of --config has in the working directory.
CONFIG_FILE = "submitted_config.yaml"
MEBIBYTE = 1024**2
# Ray's jobs API answers 413 to more, and its packages are not compressed.
LARGEST_PACKAGE = 100 * MEBIBYTE
NAMED_AT_MOST = 3


@contextlib.contextmanager
def packed(config: Path | None = None, root: Path = ROOT) -> Iterator[Path]:
    """Copy what a job needs into a directory that is there inside the block.

    Parameters
    ----------
    config
        The local file of the job's ``--config``; it goes along as ``CONFIG_FILE``.
    root
        Where the packages lie.

    Raises
    ------
    InputError
        If it would be more than Ray takes; the largest files are named.
    """
    files = {
        path.relative_to(root): path
        for package in PACKAGES
        for path in sorted((root / package).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    if config is not None:
        files[Path(CONFIG_FILE)] = config
    _check_size({name: path.stat().st_size for name, path in files.items()})
    with tempfile.TemporaryDirectory(prefix="geneformer_job") as folder:
        for name, path in files.items():
            target = Path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        yield Path(folder)


def _check_size(sizes: dict[Path, int]) -> None:
    total = sum(sizes.values())
    if total > LARGEST_PACKAGE:
        largest = sorted(sizes, key=lambda name: sizes[name], reverse=True)[:NAMED_AT_MOST]
        named = ", ".join(f"{name} ({sizes[name] / MEBIBYTE:.0f} MiB)" for name in largest)
        got = f"{total / MEBIBYTE:.0f} MiB, the largest being {named}"
        raise InputError("working directory", got, f"{LARGEST_PACKAGE // MEBIBYTE} MiB at most: data do not travel so")
