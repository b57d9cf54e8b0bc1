"""Where files lie: local paths and pyarrow filesystem URIs (s3://, gs://) through one small door.

Workers of a cluster share nothing but these paths. No commit relies on a rename, which object stores do not have:
an output counts once something written after it says so.
"""

from __future__ import annotations

import json
import os
import posixpath
import secrets
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyarrow import fs

from geneformer_ray.data.digests import digest_of
from geneformer_ray.errors import InputError, OutputExistsError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "absolute",
    "claim_output",
    "exists",
    "finish_output",
    "is_directory",
    "is_uri",
    "join",
    "list_files",
    "local_copy",
    "locate",
    "read_bytes",
    "read_json",
    "remove",
    "stamp",
    "upload",
    "write_bytes",
    "write_json",
]

# Names that begin with an underscore are passed over by readers of Parquet directories.
MANIFEST = "_manifest.json"
# How names of local files end until these are whole.
UNFINISHED = ".part"


def is_uri(path: str) -> bool:
    """Whether `path` names a filesystem (``s3://bucket/key``) rather than a local path."""
    return "://" in path


def absolute(path: str | os.PathLike[str]) -> str:
    """Give a URI unchanged and a local path as an absolute one: Ray workers have working directories of their own."""
    text = os.fspath(path)
    return text if is_uri(text) else os.path.abspath(os.path.expanduser(text))


def locate(path: str) -> tuple[fs.FileSystem, str]:
    """Split a path or URI into a pyarrow filesystem and the path inside it."""
    if not is_uri(path):
        return fs.LocalFileSystem(), absolute(path)
    try:
        filesystem, inside = fs.FileSystem.from_uri(path)
    except (ValueError, OSError) as error:
        raise InputError("path", path, f"a local path or a pyarrow filesystem URI ({error})") from error
    return filesystem, inside


def stamp(path: str) -> str:
    """Give a file's size and time of change: enough to tell that it is not the file of an earlier run.

    A directory is stamped by all files below it: its own times do not tell that one of them has changed.
    """
    info = _info(path)
    if info.type != fs.FileType.Directory:
        return f"{info.size} bytes, {info.mtime_ns}"
    filesystem, inside = locate(path)
    below = filesystem.get_file_info(fs.FileSelector(inside, recursive=True))
    files = sorted((item.path, item.size, item.mtime_ns) for item in below if item.is_file)
    return f"{len(files)} files, {digest_of([list(file) for file in files])}"


def _info(path: str) -> Any:
    """Ask a filesystem what lies at a path; one clear error where it cannot be asked."""
    filesystem, inside = locate(path)
    try:
        return filesystem.get_file_info(inside)
    except OSError as error:
        raise InputError("path", path, f"a place that can be reached ({' '.join(str(error).split())})") from error


def join(path: str, *parts: str) -> str:
    """Join below a path or URI."""
    return posixpath.join(path, *parts)


def exists(path: str) -> bool:
    """Whether anything lies at `path`."""
    return bool(_info(path).type != fs.FileType.NotFound)


def is_directory(path: str) -> bool:
    """Whether `path` is a directory."""
    return bool(_info(path).type == fs.FileType.Directory)


def list_files(path: str, suffix: str = "") -> list[str]:
    """List the files directly inside a directory, in name order, as paths or URIs like `path`."""
    filesystem, inside = locate(path)
    found = filesystem.get_file_info(fs.FileSelector(inside, allow_not_found=True))
    return sorted(join(path, item.base_name) for item in found if item.is_file and item.base_name.endswith(suffix))


def read_bytes(path: str) -> bytes:
    """Read a whole file."""
    filesystem, inside = locate(path)
    with filesystem.open_input_stream(inside) as stream:
        return bytes(stream.read())


def write_bytes(path: str, content: bytes) -> None:
    """Write a file, whole or not at all, making the directories above it.

    An object store shows nothing before it has all. A local file is written beside its place and moved there: what is
    left of a killed process has a name that readers of directories pass over.
    """
    filesystem, inside = locate(path)
    filesystem.create_dir(posixpath.dirname(inside), recursive=True)
    if not isinstance(filesystem, fs.LocalFileSystem):
        with filesystem.open_output_stream(inside) as stream:
            stream.write(content)
        return
    folder, name = os.path.split(inside)
    # Two attempts at one item may write at once: a worker that outlives its driver, and the resumed run's.
    beside = Path(folder, f".{name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        beside.write_bytes(content)
        beside.replace(inside)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def read_json(path: str, field: str = "path") -> Any:
    """Read a JSON file; one clear error where it is missing or broken."""
    try:
        return json.loads(read_bytes(path))
    except FileNotFoundError as error:
        raise InputError(field, path, "a file that exists") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(field, path, f"a readable JSON file ({error})") from error


def write_json(path: str, content: object) -> None:
    """Write a JSON file, keys as they come, readable by a person."""
    write_bytes(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def remove(path: str) -> None:
    """Delete a file, or a directory with all that it holds; nothing where there is none."""
    filesystem, inside = locate(path)
    if filesystem.get_file_info(inside).type == fs.FileType.Directory:
        filesystem.delete_dir(inside)
    elif exists(path):
        filesystem.delete_file(inside)


def local_copy(path: str) -> Path:
    """Give a local directory with the content of `path`: itself where it is local, else a fresh download."""
    if not is_uri(path):
        return Path(absolute(path))
    filesystem, inside = locate(path)
    target = tempfile.mkdtemp(prefix="geneformer-ray-")
    fs.copy_files(inside, target, source_filesystem=filesystem)
    return Path(target)


def upload(directory: Path, path: str) -> None:
    """Copy a local directory to a path or URI."""
    filesystem, inside = locate(path)
    filesystem.create_dir(inside, recursive=True)
    fs.copy_files(os.fspath(directory), inside, destination_filesystem=filesystem)


def claim_output(
    path: str, plan: dict[str, Any], *, overwrite: bool, resume: bool = False, inputs: Sequence[str | None] = ()
) -> bool:
    """Take an output directory for a job: empty, overwritten on request, or left from the very same plan.

    Parameters
    ----------
    path
        The output directory.
    plan
        What determines the rows (options, digests); kept in ``_manifest.json``.
    overwrite
        Delete what lies there.
    resume
        Whether this job can go on where an unfinished run of the same plan stopped.
    inputs
        What the job reads: none of it may lie in the output, or hold it.

    Returns
    -------
    bool
        True if an unfinished run of the same plan lies there, to be resumed.

    Raises
    ------
    OutputExistsError
        If something else lies there: rows of two plans are never mixed.
    """
    for source in filter(None, inputs):
        here, there = _real(path), _real(source)
        if here.startswith(there) or there.startswith(here):
            raise InputError("--output", f"{path}, beside {source}, which the job reads", "a directory of its own")
    filesystem, inside = locate(path)
    info = filesystem.get_file_info(inside)
    if info.type == fs.FileType.File:
        raise InputError("--output", path, "a directory, not a file")
    if info.type == fs.FileType.Directory:
        content = filesystem.get_file_info(fs.FileSelector(inside, recursive=False))
        if content and overwrite:
            if not exists(join(path, MANIFEST)):
                takes = f"the output of an earlier run, to be replaced: nothing is deleted where no {MANIFEST} lies"
                raise InputError("--overwrite", f"{path}, which holds other files", takes)
            filesystem.delete_dir_contents(inside)
        elif content:
            _refuse_unless_same(path, plan, resume=resume)
            if isinstance(filesystem, fs.LocalFileSystem):
                for left in Path(inside).rglob(f".*{UNFINISHED}"):
                    left.unlink(missing_ok=True)  # of a killed process
            return True
    try:
        filesystem.create_dir(inside, recursive=True)
        write_json(join(path, MANIFEST), {"finished": False, "plan": plan})
    except OSError as error:
        raise InputError("--output", path, f"a place that can be written ({' '.join(str(error).split())})") from error
    return False


def _real(path: str) -> str:
    """Give the one name of a place, whatever links and forms of paths lead to it."""
    filesystem, inside = locate(path)
    if isinstance(filesystem, fs.LocalFileSystem):
        return os.path.realpath(inside).rstrip("/") + "/"
    return f"{filesystem.type_name}://{inside.rstrip('/')}/"


def _refuse_unless_same(path: str, plan: dict[str, Any], *, resume: bool) -> None:
    manifest = join(path, MANIFEST)
    if not exists(manifest):
        raise OutputExistsError.at(path, "files that no run of this package finished")
    found = read_json(manifest, "--output")
    if found.get("finished"):
        raise OutputExistsError.at(path, "a finished run")
    if not resume:
        raise OutputExistsError.at(path, "an unfinished run")
    former, now = found.get("plan", {}), json.loads(json.dumps(plan))
    differing = [key for key in sorted(former.keys() | now.keys()) if former.get(key) != now.get(key)]
    if differing:
        what = "; ".join(f"{key} was {former.get(key)!r}, is {now.get(key)!r}" for key in differing[:3])
        raise OutputExistsError.at(path, f"an unfinished run of another plan ({what})")


def finish_output(path: str, plan: dict[str, Any], summary: dict[str, Any]) -> None:
    """Mark an output directory as whole: written last, so that its presence vouches for all the rest."""
    write_json(join(path, MANIFEST), {"finished": True, "plan": plan, "summary": summary})
