"""Upstream's dictionaries as pickles, read by an unpickler that can make nothing but dictionaries of plain values.

A pickle is a program. This unpickler knows only the instructions that write text, numbers and dictionaries, and the two
calls that a numpy scalar is stored as; these are answered by stand-ins here, so that a pickle reaches no other code,
numpy's own included. Everything else is refused by its name before it is built.
"""

from __future__ import annotations

import codecs
import io
import pickle
import pickletools
import re
import struct
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from geneformer_ray.data import storage
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["read_pickled_dictionary"]

_TAKES = "a pickle of one dict with str keys and str, int, float or numpy scalars as values"

# What pickle writes, in any protocol, for dictionaries of text and numbers, and for the arguments of a numpy scalar.
_ADMITTED = (
    "PROTO FRAME STOP MARK POP POP_MARK DUP MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET "
    "EMPTY_DICT DICT SETITEM SETITEMS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 NONE NEWTRUE NEWFALSE "
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 GLOBAL STACK_GLOBAL REDUCE BUILD"
).split()
_REFUSED = {
    "EMPTY_LIST": "a list",
    "LIST": "a list",
    "EMPTY_SET": "a set",
    "FROZENSET": "a frozenset",
    "BYTEARRAY8": "a bytearray",
    "PERSID": "a persistent id",
    "BINPERSID": "a persistent id",
}

_MADE_BY_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_SIMPLE_DTYPE = re.compile(r"(b1|[iu][1248]|f[248]|U[0-9]{1,4})")


class _Refused(Exception):
    """The name of something that has no place in a dictionary of plain values."""


class _DType:
    """Stands in for ``numpy.dtype``: a simple type's code and its byte order."""

    def __init__(self, code: object, *_copying: object) -> None:
        if not isinstance(code, str) or not _SIMPLE_DTYPE.fullmatch(code):
            # Objects above all: a numpy object is a pickle of its own.
            raise _Refused(f"numpy.dtype({code[:20]!r})" if isinstance(code, str) else "a numpy.dtype without a code")
        self.code, self.order = code, "="

    def build(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in ("<", ">", "|", "="):
            raise _Refused("a numpy.dtype of unknown form")
        if state[2:5] != (None, None, None):
            raise _Refused("a numpy.dtype with fields")
        self.order = state[1]


def _scalar(dtype: object = None, raw: object = None, *_more: object) -> object:
    """Stand in for numpy's maker of scalars; gives plain Python."""
    if not isinstance(dtype, _DType) or not isinstance(raw, bytes):
        raise _Refused("a numpy scalar of unknown form")
    kind = np.dtype(dtype.order.replace("|", "=") + dtype.code)
    if len(raw) != kind.itemsize or kind.itemsize == 0:
        raise _Refused(f"a numpy scalar of {len(raw)} bytes for {kind}")
    return np.frombuffer(raw, dtype=kind)[0].item()


def _latin_1(text: object = None, encoding: object = None, *_more: object) -> bytes:
    """Stand in for ``_codecs.encode``, as which protocols 0 to 2 store bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise _Refused("_codecs.encode")
    return codecs.latin_1_encode(text)[0]


_CALLS: dict[tuple[str, str], Any] = {
    **{(module, "scalar"): _scalar for module in _MADE_BY_NUMPY},
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _latin_1,
}


def _entry(content: object, key: object, value: object) -> None:
    # Checked before it is put in: hashing a strange key, such as a tuple nested a million times, can crash the process.
    if type(content) is not dict:
        raise _Refused(f"entries of {_kind(content)}")
    if type(key) is not str:
        raise _Refused(f"a key of type {_kind(key)}")
    if type(value) not in (str, int, float):
        raise _Refused(f"a value of type {_kind(value)}")
    content[key] = value


def _kind(value: object) -> str:
    return type(value).__name__.lstrip("_")


# The unpickler written in Python, whose table of instructions can be cut down: the one written in C gives out objects
# of copyreg's extension registry without asking, and allocates whatever size a pickle names.
class _Unpickler(pickle._Unpickler):
    dispatch: ClassVar[dict[int, Any]]
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    append: Callable[[object], None]
    read: Callable[[int], bytes]
    readline: Callable[[], bytes]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _CALLS:
            raise _Refused(_printable(f"{module}.{name}"))
        return _CALLS[module, name]

    def reduce(self) -> None:
        arguments, call = self.stack.pop(), self.stack[-1]
        if type(arguments) is not tuple or not any(call is known for known in _CALLS.values()):
            raise _Refused(f"a call of {_kind(call)}")
        self.stack[-1] = call(*arguments)

    def build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if not isinstance(made, _DType):
            raise _Refused(f"a state of {_kind(made)}")
        made.build(state)

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _entry(self.stack[-1], key, value)

    def set_items(self) -> None:
        items = self.pop_mark()
        for number in range(0, len(items), 2):
            _entry(self.stack[-1], items[number], items[number + 1])

    def make_dict(self) -> None:
        items = self.pop_mark()
        content: dict[str, Any] = {}
        for number in range(0, len(items), 2):
            _entry(content, items[number], items[number + 1])
        self.append(content)

    def instance(self) -> None:
        module, name = (self.readline()[:-1].decode("latin-1") for _ in range(2))
        raise _Refused(_printable(f"{module}.{name}"))


def _printable(name: str) -> str:
    return name.encode("unicode_escape").decode()[:100]


def _refuse(name: str) -> Callable[[_Unpickler], None]:
    def refuse(unpickler: _Unpickler) -> None:
        if name.startswith("EXT"):
            code = int.from_bytes(unpickler.read(int(name[3:])), "little")
            raise _Refused(f"the extension code {code}")
        raise _Refused(_REFUSED.get(name, f"the pickle instruction {name}"))

    return refuse


def _instructions() -> dict[int, Any]:
    own = {
        "REDUCE": _Unpickler.reduce,
        "BUILD": _Unpickler.build,
        "SETITEM": _Unpickler.set_item,
        "SETITEMS": _Unpickler.set_items,
        "DICT": _Unpickler.make_dict,
        "INST": _Unpickler.instance,
    }
    table: dict[int, Any] = {}
    for instruction in pickletools.opcodes:
        name, code = instruction.name, ord(instruction.code)
        if name in own:
            table[code] = own[name]
        elif name in _ADMITTED:
            table[code] = pickle._Unpickler.dispatch[code]
        else:
            table[code] = _refuse(name)
    return table


_Unpickler.dispatch = _instructions()


def read_pickled_dictionary(path: str, flag: str) -> dict[str, str | int | float]:
    """Read a pickled dictionary of plain values; numpy scalars become Python's.

    Parameters
    ----------
    path
        A local path or filesystem URI.
    flag
        Named in errors.

    Raises
    ------
    InputError
        If the pickle holds anything else, by the name of what was met; or if it is broken.
    """
    try:
        content = _Unpickler(io.BytesIO(storage.read_bytes(path))).load()
    except _Refused as met:
        raise InputError(flag, f"{path}, a pickle that holds {met}", _TAKES) from None
    except FileNotFoundError as error:
        raise InputError(flag, path, "a file that exists") from error
    except (
        *(pickle.UnpicklingError, EOFError, struct.error, OSError, MemoryError, OverflowError, RecursionError),
        *(ValueError, TypeError, LookupError, AttributeError),  # instructions in an order that no pickler writes
    ) as error:
        reason = _printable(str(error)) or type(error).__name__
        raise InputError(flag, f"{path}, a broken pickle ({reason})", _TAKES) from error
    if type(content) is not dict:
        raise InputError(flag, f"{path}, a pickle that holds {_kind(content)}", _TAKES)
    return content
