"""Which sockets the processes of a cluster listen on: read from ``/proc``, as every process may do for its own user."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

LISTEN = "0A"


@dataclass(frozen=True, order=True)
class Listener:
    """A listening TCP socket, and the title of the process that holds it."""

    address: str
    port: int
    title: str

    @property
    def on_loopback(self) -> bool:
        return ipaddress.ip_address(self.address).is_loopback


def listeners(pids: Iterable[int]) -> list[Listener]:
    """Give the TCP sockets on which processes listen."""
    holders: dict[str, int] = {}
    for pid in pids:
        try:
            links = [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()]
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended while the list was read
        holders |= {link[len("socket:[") : -1]: pid for link in links if link.startswith("socket:[")}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == LISTEN and inode in holders:
                address, _, port = local.partition(":")
                title = Path(f"/proc/{holders[inode]}/cmdline").read_text().replace("\0", " ").strip()
                found.append(Listener(_decoded(address), int(port, 16), title))
    return sorted(found)


def _decoded(address: str) -> str:
    """Decode the kernel's notation: words of 32 bits, each in this machine's order of bytes."""
    words = struct.pack(f"={len(address) // 8}I", *(int(address[at : at + 8], 16) for at in range(0, len(address), 8)))
    if len(words) == 4:
        return socket.inet_ntop(socket.AF_INET, words)
    mapped = ipaddress.IPv6Address(words).ipv4_mapped
    return str(mapped or ipaddress.IPv6Address(words))
