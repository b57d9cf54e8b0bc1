"""Who may run code or ask: Ray's token, a jobs API that turns away whoever has none, and the file of API keys."""

from __future__ import annotations

import ipaddress
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from geneformer_ray.finding import Finding, fault, note, ok, warning

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["RayToken", "check_api_keys", "check_jobs_api", "check_token", "find_token", "is_loopback"]

ANSWER_SECONDS = 5.0
MAKE_TOKEN = "ray get-auth-token --generate, and the same file (mode 0600) on every node and on this machine"
SET_MODE = "export RAY_AUTH_MODE=token, here and where `ray start` runs"
OTHERS = stat.S_IRWXG | stat.S_IRWXO
# A pod's user reads a mounted secret through its group (fsGroup): the file is the cluster's, and cannot be 0600.
OTHERS_OF_KEYS = stat.S_IWGRP | stat.S_IRWXO


@dataclass(frozen=True)
class RayToken:
    """The token that this process would show to a cluster.

    Parameters
    ----------
    source
        Where it stands: a variable or a file.
    file
        The file, where it is one.
    value
        The token; None where that file does not hold one.
    """

    source: str
    file: Path | None
    value: str | None

    def __repr__(self) -> str:
        return f"RayToken({self.source!r})"


def find_token(environment: Mapping[str, str] = os.environ) -> RayToken | None:
    """Find the token where Ray looks for it, in Ray's order."""
    if environment.get("RAY_AUTH_TOKEN"):
        return RayToken("RAY_AUTH_TOKEN", None, environment["RAY_AUTH_TOKEN"].strip())
    if environment.get("RAY_AUTH_TOKEN_PATH"):
        file = Path(environment["RAY_AUTH_TOKEN_PATH"]).expanduser()
        return RayToken(f"RAY_AUTH_TOKEN_PATH, {file}", file, _content(file))
    file = Path(environment.get("HOME") or Path.home(), ".ray", "auth_token")
    return RayToken(str(file), file, _content(file)) if file.exists() else None


def check_token(environment: Mapping[str, str], *, cluster: bool) -> Iterator[Finding]:
    """Look at how this process would prove itself to a cluster, before anything asks one.

    Parameters
    ----------
    environment
        As the person set it: later, this package gives a cluster of its own a token of its own.
    cluster
        Whether a running cluster is configured.
    """
    name, mode = "authentication.mode", environment.get("RAY_AUTH_MODE", "").lower()
    token = find_token(environment)
    if mode == "disabled":
        found = "RAY_AUTH_MODE=disabled: whoever reaches the cluster's ports runs code on it"
        yield (fault if cluster else warning)(name, found, SET_MODE)
        return
    if mode not in ("", "token"):
        yield fault(name, f"RAY_AUTH_MODE={mode}, which Ray does not know", "export RAY_AUTH_MODE=token")
        return
    if not cluster:
        yield ok(name, "token: a local cluster gets one of its own")
    elif not mode:
        found = "RAY_AUTH_MODE is not set: whether a token is used depends on what lies on each machine"
        yield warning(name, found, SET_MODE)
    elif token is None or not token.value:
        where = "none in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token" if token is None else token.source
        yield fault("authentication.token", f"RAY_AUTH_MODE=token without a token: {where}", MAKE_TOKEN)
        return
    else:
        yield ok(name, f"token, from {token.source}")
    if token is not None and token.file is not None:
        yield from _check_mode("authentication.token_file", token.file, OTHERS)


def check_jobs_api(address: str, token: RayToken | None, *, named: bool = True) -> Iterator[Finding]:
    """Ask the jobs API with and without the token: without, it must answer 401.

    Parameters
    ----------
    address
        Of the dashboard: ``http://HOST:8265``.
    token
        The one to show; None where there is none.
    named
        Whether the settings name the address. One that Ray tells is the head's own, often its loopback, and need not
        answer from here.
    """
    import httpx

    name, url = "authentication.jobs_api", f"{address.rstrip('/')}/api/version"
    try:
        without = httpx.get(url, timeout=ANSWER_SECONDS).status_code
        shown = None
        if token is not None and token.value:
            bearer = {"Authorization": f"Bearer {token.value}"}
            shown = httpx.get(url, timeout=ANSWER_SECONDS, headers=bearer).status_code
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeEncodeError) as error:
        found, forward = f"{address} does not answer: {type(error).__name__}: {error}", "ray dashboard cluster.yaml"
        if named:
            do = f"{forward} (forwards it to 127.0.0.1:8265), or correct RAY_API_SERVER_ADDRESS"
            yield fault(name, found, do)
        else:
            do = f"to submit jobs from here: {forward}, and export RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265"
            yield note(name, f"{found}; Ray tells it as the head sees it", do)
        return
    if without == 200:
        found = f"{address} answers without a token: whoever reaches it runs code on the cluster"
        yield fault(name, found, f"restart the cluster with RAY_AUTH_MODE=token for `ray start`; {MAKE_TOKEN}")
    elif without != 401:
        do = "an address of a Ray dashboard: http://HOST:8265"
        yield fault(name, f"{address} answers {without} without a token, where a jobs API answers 401", do)
    elif shown is None:
        yield fault(name, f"{address} wants a token, and none is known here", f"{SET_MODE}; {MAKE_TOKEN}")
    elif shown != 200:
        found = f"{address} answers {shown} to the token of {token.source if token else ''}: the cluster has another"
        yield fault(name, found, "copy the head's ~/.ray/auth_token to this machine (mode 0600)")
    else:
        yield ok(name, f"{address} answers 401 without the token and 200 with it")
    host = urlsplit(address).hostname
    if address.startswith("http:") and not is_loopback(host):
        found = f"{address} is beyond loopback, and http shows the token to the network between"
        yield (note if without == 401 else fault)(
            "authentication.dashboard", found, "--dashboard-host=127.0.0.1 at the head, and ray dashboard cluster.yaml"
        )


def check_api_keys(file: str | None, given: str | None, host: str) -> Iterator[Finding]:
    """Look at the service's API keys, which it needs beyond loopback.

    Parameters
    ----------
    file
        One key or name and key a line.
    given
        Keys separated by commas.
    host
        What the service is to listen on.
    """
    name = "keys.service"
    keys = sum(bool(entry.strip()) for entry in (given or "").split(","))
    if file is not None:
        path = Path(file).expanduser()
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "no text"
            do = "one KEY or NAME KEY a line; SECURITY.md has the command that adds one"
            yield fault(name, f"{path} cannot be read ({why})", do)
            return
        keys += sum(bool(line.partition("#")[0].strip()) for line in lines)
        yield from _check_mode("keys.file", path, OTHERS_OF_KEYS)
    beyond = not is_loopback(host)
    if keys:
        yield ok(name, f"{keys} API keys")
    elif beyond or file is not None:
        found = f"no API key, for a service on {host}" if file is None else f"no API key in {file}"
        do = "python -c 'import secrets; print(\"NAME\", secrets.token_urlsafe(32))' >> KEYS; chmod 600 KEYS; " \
             "export GENEFORMER_SERVE_API_KEYS_FILE=KEYS"  # fmt: skip
        yield fault(name, found, do)
    else:
        yield ok(name, f"none, and none needed on {host}")


def is_loopback(host: str | None) -> bool:
    """Whether only this machine reaches what listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def _check_mode(name: str, file: Path, others: int) -> Iterator[Finding]:
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & others:
        does = "read" if mode & others & (stat.S_IRGRP | stat.S_IROTH) else "change"
        yield fault(name, f"{file} has mode {mode:04o}: others may {does} it", f"chmod 600 {file}")
    elif mode & stat.S_IRGRP:
        yield note(name, f"{file}, mode {mode:04o}: its group may read it")
    else:
        yield ok(name, f"{file}, mode {mode:04o}")


def _content(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None  # the check of the file's mode, or of the token, tells it
