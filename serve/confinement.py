"""What a process that parses a stranger's file may use: some memory, some seconds, no network, no other program.

A file that finds a fault in the HDF5 library would run as the service's user. The limits here end what runs away; the
system calls that reach the network, other programs and other processes are refused by the kernel (Linux).
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys

__all__ = ["confine"]

# Their numbers on x86-64 and on 64-bit ARM: socket, socketpair, io_uring_setup (which opens sockets too), execve,
# execveat, ptrace, process_vm_writev.
_REFUSED = {
    "x86_64": (0xC000003E, 317, (41, 53, 425, 59, 322, 101, 311)),
    "aarch64": (0xC00000B7, 277, (198, 199, 425, 221, 281, 117, 271)),
}
_X32 = 0x40000000  # from here on, numbers name the same calls for another way of calling
_NO_NEW_PRIVILEGES, _SET_FILTER, _ALL_THREADS = 38, 1, 1
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _REFUSE, _END = 0x7FFF0000, 0x00050001, 0x80000000  # 1 is EPERM


def confine(memory_bytes: int, cpu_seconds: int, file_bytes: int) -> None:
    """Limit this process for the rest of its life.

    Parameters
    ----------
    memory_bytes
        Of address space.
    cpu_seconds
        Of computing; then the kernel ends the process.
    file_bytes
        Of any one file that it writes.

    Raises
    ------
    OSError
        If the kernel does not take the limits: then nothing may be parsed.
    """
    for limit, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(limit)
        least = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (least, least))
    if sys.platform == "linux":
        _refuse_calls()


def _refuse_calls() -> None:
    machine = platform.machine()
    if machine not in _REFUSED:
        raise OSError(f"the system calls of {machine} are not known here: uploads need x86_64 or aarch64 on Linux")
    architecture, seccomp, refused = _REFUSED[machine]
    # Jumps count the instructions that are passed over; the last three answer.
    checks = [(_AT_LEAST, _X32), *((_EQUAL, number) for number in refused)]
    lines = [
        (_LOAD, 0, 0, 4),  # the architecture
        (_EQUAL, 0, len(checks) + 3, architecture),
        (_LOAD, 0, 0, 0),  # the call's number
        *((code, len(checks) - i, 0, value) for i, (code, value) in enumerate(checks)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
        (_RETURN, 0, 0, _END),
    ]
    program = b"".join(struct.pack("HBBI", *line) for line in lines)
    held = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("lines", ctypes.c_void_p))

    libc = ctypes.CDLL(None, use_errno=True)
    given = Program(len(lines), ctypes.addressof(held))
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.syscall(
        seccomp, _SET_FILTER, _ALL_THREADS, ctypes.byref(given)
    ):
        number = ctypes.get_errno()
        raise OSError(number, f"the kernel takes no filter of system calls ({os.strerror(number)})")
