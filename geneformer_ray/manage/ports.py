"""Ports that a service or a dashboard wants: free, or taken by whom; and which process holds a file."""

from __future__ import annotations

import errno
import os
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from geneformer_ray.finding import Finding, fault, note, ok, warning

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["WORKER_PORTS", "check_port", "is_listening", "who_holds", "who_listens"]

# Ray gives these to its workers: `ray start` refuses them for its own services, and a worker may be faster than ours.
WORKER_PORTS = range(10_002, 20_000)
LISTENING = "0A"
RAYS_OWN = re.compile(r"ray::|/ray/(dashboard|_private|core)/")


def check_port(name: str, port: int, host: str = "127.0.0.1") -> Iterator[Finding]:
    """Try to listen on a port, and say who does where that fails."""
    check, what = f"ports.{name}", f"port {port} of {host}"
    if port in WORKER_PORTS:
        found = f"{what} is one of those that Ray gives to its workers ({WORKER_PORTS[0]} to {WORKER_PORTS[-1]})"
        yield warning(check, found, "choose another: below 10000, or 20000 and above")
        return
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            # As servers do: connections that have just ended do not count.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            yield fault(check, f"{what} cannot be listened on ({error.strerror})", "choose an address of this machine")
            return
        who = who_listens(port) or "a process of another user"
        if RAYS_OWN.search(who):
            yield note(check, f"{what} is taken by Ray itself: {who}")
        else:
            yield warning(check, f"{what} is taken by {who}", "end that program, or choose another port")
        return
    yield ok(check, f"{what} is free")


def is_listening(host: str, port: int, seconds: float = 3.0) -> bool:
    """Whether anything accepts a connection there."""
    try:
        with socket.create_connection((host, port), timeout=seconds):
            return True
    except OSError:
        return False


def who_listens(port: int) -> str | None:
    """Name the process that listens on a port of this machine; None where it may not be seen."""
    sockets = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            fields = line.split()
            if fields[3] == LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                sockets.add(f"socket:[{fields[9]}]")
    return _holder(sockets)


def who_holds(file: Path) -> str | None:
    """Name another process that has a file open; None where none is seen."""
    return _holder({str(file.resolve())}, but=os.getpid())


def _holder(targets: set[str], but: int | None = None) -> str | None:
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == but:
            continue
        try:
            if any(os.readlink(file) in targets for file in (entry / "fd").iterdir()):
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").split()
                # A command line may hold a token: its first words say who it is.
                return f"process {entry.name} ({' '.join(words[:3])[:80]})"
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended while the list was read, or is another user's
    return None
