"""Uploaded h5ad files: streamed to disk under a limit, and read by a process that has little to lose."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
from fastapi import Request
from fastapi.routing import APIRoute
from pyarrow import ipc
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import Scope

import geneformer_ray
from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError
from serve.body_limit import UPLOAD_TYPES
from serve.cell_encoding import EncodedCell
from serve.errors import TooLargeError
from serve.h5ad_reader import CELLS_SCHEMA, ENCODED, REFUSED, REFUSED_CODE, UPLOADED, ReadingTask
from serve.model import ServedModel
from serve.schemas import CELL_ID_LENGTH, ReadingOptions
from serve.settings import ServeSettings

__all__ = ["UPLOAD_BODY", "UploadRoute", "Uploads"]

logger = logging.getLogger(__name__)

# What OpenAPI says of the route that takes JSON at the same path.
UPLOAD_BODY = {
    "requestBody": {
        "content": {kind.decode(): {"schema": {"type": "string", "format": "binary"}} for kind in sorted(UPLOAD_TYPES)}
    }
}
WRITTEN_AT_ONCE = 1 << 20
LOGGED = 2_000
# What the reader of a file finds in its environment: no keys, no proxies, and not the service's search path.
PACKAGES = dict.fromkeys(str(Path(file or "").resolve().parents[1]) for file in (__file__, geneformer_ray.__file__))
READER_ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(PACKAGES),
    "PYTHONDONTWRITEBYTECODE": "1",
    "LC_ALL": "C.UTF-8",
    # Threads and memory pools reserve address space, which is what the limit counts.
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    # HDF5 would look for libraries that unpack what it does not know itself.
    "HDF5_PLUGIN_PRELOAD": "::",
}


class UploadRoute(APIRoute):
    """A route that takes files only, beside another one at the same path that takes JSON."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Match by path, method and the body's kind."""
        kind = dict(scope.get("headers", ())).get(b"content-type", b"").partition(b";")[0].strip().lower()
        return super().matches(scope) if kind in UPLOAD_TYPES else (Match.NONE, {})


class Uploads:
    """Takes uploads, a few at a time.

    Parameters
    ----------
    settings
        The limits.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self._turns = asyncio.Semaphore(settings.upload_readers)

    async def cells(self, request: Request, served: ServedModel, options: ReadingOptions) -> list[EncodedCell]:
        """Take the file of a request and encode its cells for a model.

        Parameters
        ----------
        request
            Its body is the file.
        served
            The model that will answer.
        options
            How the file is read.

        Returns
        -------
        list of EncodedCell
            In the file's order; those that cannot be encoded say why.

        Raises
        ------
        InputError
            If the file is damaged, hostile or holds no counts, or takes too long.
        TooLargeError
            If it has too many bytes or cells, or takes too much memory.
        """
        served.cells.check_encodes_counts("body")
        with tempfile.TemporaryDirectory(prefix="geneformer-upload-", ignore_cleanup_errors=True) as scratch:
            directory = Path(scratch)
            await self._save(request, directory / UPLOADED)
            task = await asyncio.to_thread(self._task, directory, served, options)
            async with self._turns:
                await self._read(task)
            return await asyncio.to_thread(_encoded_cells, directory / ENCODED, served.vocabulary)

    async def _save(self, request: Request, path: Path) -> None:
        limit = self.settings.max_upload_bytes
        announced = request.headers.get("content-length", "")[:20]
        if announced.isdigit() and int(announced) > limit:
            raise TooLargeError("body", f"{int(announced):,} bytes", f"up to {limit:,} bytes; {self._offline}")
        received, waiting = 0, bytearray()
        try:
            with path.open("wb") as file:
                async for chunk in request.stream():
                    received += len(chunk)
                    if received > limit:
                        raise TooLargeError("body", f"over {limit:,} bytes", f"up to {limit:,} bytes; {self._offline}")
                    waiting += chunk
                    if len(waiting) >= WRITTEN_AT_ONCE:
                        # A full disk cache makes a write wait: the event loop does not wait with it.
                        await asyncio.to_thread(file.write, bytes(waiting))
                        waiting.clear()
                await asyncio.to_thread(file.write, bytes(waiting))
        except ClientDisconnect as error:
            raise InputError("body", "a connection that ended before the file did", "the whole file") from error

    @property
    def _offline(self) -> str:
        vocabulary = self.settings.vocabulary or "VOCABULARY"
        return (
            f"for more: the file in parts, or python -m ray_jobs.tokenize --input FILE --vocabulary {vocabulary} "
            "--output CELLS, whose cells python -m ray_jobs.embed and geneformer_ray.CellClassifier take in any number"
        )

    def _task(self, directory: Path, served: ServedModel, options: ReadingOptions) -> ReadingTask:
        settings = self.settings
        return ReadingTask(
            directory=str(directory),
            vocabulary=str(served.vocabulary_directory),
            counts=options.counts,
            gene_column=options.gene_column,
            allow_non_integer=options.allow_non_integer,
            max_cells=settings.max_upload_cells,
            max_genes=settings.max_genes,
            cell_id_length=CELL_ID_LENGTH,
            memory_bytes=settings.upload_memory_bytes,
            cpu_seconds=settings.upload_seconds,
        )

    async def _read(self, task: ReadingTask) -> None:
        """Run the reader; it ends with the request, whatever ends that."""
        directory = Path(task.directory)
        with (directory / "stderr").open("wb") as said:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "serve.h5ad_reader", task.as_json()],
                cwd=directory,
                env=READER_ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
            )
        try:
            # In a thread, for a loop that does not run in the main thread hears of no ended process.
            code = await asyncio.to_thread(_wait, process, self.settings.upload_seconds)
        finally:
            process.kill()
        if code == 0:
            return
        if code == REFUSED_CODE:
            self._refuse(json.loads((directory / REFUSED).read_text(encoding="utf-8")))
        if code is None or code < 0:
            # A limit of the kernel, or a fault that the file found in the library: the file's doing in each case.
            why = f"{self.settings.upload_seconds} s were not enough to read it" if code is None else f"signal {-code}"
            raise InputError("body", f"a file that its reader could not finish ({why})", "a whole h5ad file")
        said_last = (directory / "stderr").read_bytes()[-LOGGED:].decode(errors="replace")
        raise RuntimeError(f"the reader of an upload failed with exit code {code}: {said_last}")

    def _refuse(self, refusal: dict[str, Any]) -> None:
        field, got, takes = (str(refusal[part]) for part in ("field", "got", "takes"))
        if refusal["too_large"]:
            raise TooLargeError(field, got, f"{takes}; {self._offline}")
        raise InputError(field, got, takes)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Wait for the end of a process, None where it does not come in time."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def _encoded_cells(path: Path, vocabulary: GeneVocabulary) -> list[EncodedCell]:
    """Take the reader's cells, believing it no more than the file that it has read."""
    with pa.OSFile(str(path)) as source, ipc.open_file(source) as reader:
        table = reader.read_all()
    if not table.schema.equals(CELLS_SCHEMA):
        raise RuntimeError(f"the reader of an upload gave {table.schema}")
    table.validate(full=True)
    ids = table["input_ids"].combine_chunks()
    flat, offsets = ids.flatten().to_numpy(), ids.offsets.to_numpy()
    lengths = offsets[1:] - offsets[:-1]
    beyond = len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < len(vocabulary)
    if beyond or (len(lengths) and int(lengths.max()) > vocabulary.max_length):
        raise RuntimeError("the reader of an upload gave token ids that the model does not have, or too many")
    rows = zip(*(table[name].to_pylist() for name in ("cell_id", "unknown_share", "reason")), strict=True)
    return [
        EncodedCell(flat[start:stop], share, cell_id, reason)
        for start, stop, (cell_id, share, reason) in zip(offsets[:-1], offsets[1:], rows, strict=True)
    ]
