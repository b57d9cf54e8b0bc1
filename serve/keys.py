"""Who may ask: API keys as bearer tokens, several at once, from a file or the environment."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import re
import time
from collections.abc import Iterable
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from geneformer_ray.errors import InputError
from serve.errors import send_error
from serve.request_log import note
from serve.settings import ServeSettings

__all__ = ["ApiKeys", "RequireKey", "check_keys", "is_loopback", "is_open_path"]

logger = logging.getLogger(__name__)

# What a bearer token may be made of (RFC 6750). Short keys can be guessed; a longer one is a file taken for a key.
_KEY = re.compile(r"[A-Za-z0-9\-._~+/]{16,512}=*")
_NAME = re.compile(r"[A-Za-z0-9\-._@]{1,64}")
RECHECK_SECONDS = 1.0
# Anyone may ask whether the service lives, and load the pages, which hold nothing of the model's.
OPEN_PATHS = frozenset({"/", "/docs"})
OPEN_FOLDERS = ("/v2/health/", "/page/", "/docs/")

_Named = tuple[str, bytes]


class ApiKeys:
    """The keys of a service, kept as digests. A file is read again when it has changed: keys come and go at any time.

    Parameters
    ----------
    given
        Keys separated by commas, each ``KEY`` or ``NAME KEY``.
    file
        A file of one key a line in the same form; ``#`` begins a comment.
    """

    def __init__(self, given: str = "", file: str | None = None) -> None:
        self._given = _parse(given.split(","), "api_keys, entry")
        self._file = None if file is None else Path(file)
        self._of_file: list[_Named] = []
        self._stamp: tuple[int, ...] = ()
        self._looked = 0.0
        if self._file is not None:
            self._read(self._file)

    def __len__(self) -> int:
        return len(self._given) + len(self._of_file)

    def name_of(self, key: bytes) -> str | None:
        """Give a key's name, or None for one that is not known; it takes the same time wherever the key stands."""
        self._read_again()
        digest = _digest(key)
        found = None
        for name, known in (*self._given, *self._of_file):
            if hmac.compare_digest(digest, known):
                found = name
        return found

    def _read_again(self) -> None:
        if self._file is None or time.monotonic() - self._looked < RECHECK_SECONDS:
            return
        try:
            if _stamp(self._file) != self._stamp:
                self._read(self._file)
                logger.info("the API keys were read again: there are %d", len(self))
        except InputError as error:
            # Said once a look, not once a request; the keys that were read last stay valid.
            logger.error("the API keys stay as they were: %s", error)
        except OSError as error:
            logger.error("the API keys stay as they were: %s", error.strerror)
        finally:
            self._looked = time.monotonic()

    def _read(self, file: Path) -> None:
        try:
            stamp = _stamp(file)
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "no text"
            raise InputError("api_keys_file", f"{file} ({why})", "a readable text file of one key a line") from None
        self._of_file = _parse(lines, "api_keys_file, line")
        self._stamp = stamp
        self._looked = time.monotonic()


def _stamp(file: Path) -> tuple[int, ...]:
    found = file.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino


def _parse(entries: Iterable[str], field: str) -> list[_Named]:
    """Read entries; what is wrong with one is said without showing it, for it may hold a key."""
    keys = []
    for number, entry in enumerate(entries, 1):
        words = entry.split("#")[0].split()
        if not words:
            continue
        takes = "KEY or NAME KEY: a key of 16 to 512 letters, digits and -._~+/, a name of up to 64"
        if len(words) > 2:
            raise InputError(f"{field} {number}", f"{len(words)} words", takes)
        name, key = (words[0] if len(words) == 2 else f"key{number}"), words[-1]
        if not _KEY.fullmatch(key):
            raise InputError(f"{field} {number}", f"a key of {len(key)} characters", takes)
        if not _NAME.fullmatch(name):
            raise InputError(f"{field} {number}", f"a name of {len(name)} characters", takes)
        keys.append((name, _digest(key.encode())))
    return keys


def _digest(key: bytes) -> bytes:
    # Keys are long and random, so a plain hash cannot be searched; it also makes all of one length for the comparison.
    return hashlib.sha256(key).digest()


def is_loopback(host: str | None) -> bool:
    """Tell whether only this machine reaches a host that a server is bound to; one that is not known counts as open."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def check_keys(settings: ServeSettings, bound_to: str | None) -> ApiKeys | None:
    """Decide whether requests need a key, and read the keys.

    Parameters
    ----------
    settings
        ``api_keys``, ``api_keys_file`` and ``require_api_key`` count.
    bound_to
        The host that the service listens on; None where it is not known.

    Returns
    -------
    ApiKeys or None
        None where requests need no key: on loopback without keys, and where the settings say so.

    Raises
    ------
    InputError
        If a key is needed and there is none: the service must not start.
    """
    given = "" if settings.api_keys is None else settings.api_keys.get_secret_value()
    keys = ApiKeys(given, settings.api_keys_file)
    beyond = not is_loopback(bound_to)
    needed = settings.require_api_key
    if needed is None:
        needed = beyond or bool(given) or settings.api_keys_file is not None
    if not needed:
        if beyond:
            logger.warning("bound to %s, and anyone may ask: require_api_key is off", bound_to or "an unknown host")
        return None
    if not len(keys):
        got = f"no key, for a service bound to {bound_to or 'an unknown host'}"
        raise InputError(
            "api_keys_file", got, "a file with a key, or GENEFORMER_SERVE_API_KEYS, or require_api_key: false"
        )
    return keys


class RequireKey:
    """Turn away requests without a key before anything of them is read.

    Parameters
    ----------
    app
        The application behind it.
    keys
        None lets everyone in.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys | None) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on, or answer 401."""
        if self.keys is None or scope["type"] == "lifespan" or _is_open(scope):
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        given = _bearer(scope)
        name = None if given is None else self.keys.name_of(given)
        if name is None:
            got = "no key" if given is None else "a key that is not known here"
            challenge = b"Bearer" if given is None else b'Bearer error="invalid_token"'
            takes = "Bearer and one of this service's API keys"
            await send_error(send, 401, "Authorization", got, takes, [(b"www-authenticate", challenge)])
            return
        note(key=name)
        await self.app(scope, receive, send)


def is_open_path(path: str) -> bool:
    """Tell whether a path may be read without a key."""
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDERS)


def _is_open(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
        return False
    return is_open_path(str(scope["path"]).removeprefix(scope.get("root_path", "").rstrip("/")))


def _bearer(scope: Scope) -> bytes | None:
    """Take the token of a request; of several Authorization headers nobody can say which one counts."""
    headers = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(headers) != 1:
        return None
    scheme, _, token = headers[0].partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" and token.strip() else None
