"""The doors of the service without Ray: who may ask, what may come in, what goes out, and what is written down."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError

from geneformer_ray.data.vocabulary import GeneVocabulary
from geneformer_ray.errors import InputError
from serve import keys as keys_module
from serve.api import create_api
from serve.keys import ApiKeys, check_keys, is_loopback
from serve.model import ServedModel
from serve.request_log import current_request_id, note
from serve.schemas import ClassifyRequest
from serve.settings import ServeSettings
from serve.strict_json import parse_json
from tests.unit.served import Direct, make_islets, serve_directory

FIRST, SECOND, THIRD = "first-key-0123456789", "second-key-0123456789", "third-key-0123456789"
CELL = {"counts": {"GENE01": 3, "GENE02": 9}}
JSON = {"content-type": "application/json"}


class Noted(Direct):
    """Says what it computes, as a replica does."""

    async def vectors(self, model: ServedModel, sequences: Sequence[np.ndarray], what: Any) -> np.ndarray:
        note(cells=len(sequences), tokens=sum(map(len, sequences)), model=model.name, version=model.version)
        return await super().vectors(model, sequences, what)


class Counted:
    """Metrics that a test can look at."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, int]] = []

    def request(self, route: str, status: int, seconds: float) -> None:
        assert seconds > 0
        self.requests.append((route, status))

    def batch(self, cells: int, tokens: int, padded_tokens: int, budget: int) -> None: ...
    def queued(self, seconds: float) -> None: ...
    def waiting(self, pieces: int) -> None: ...
    def cells(self, kind: Literal["classify", "embed"], number: int) -> None: ...
    def events(self, number: int) -> None: ...
    def model(self, name: str, version: int | None, digest: str) -> None: ...
    def swap(self) -> None: ...
    def refusal(self) -> None: ...


@pytest.fixture(scope="module")
def model(model_directory: Path, vocabulary: GeneVocabulary, tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    directory = tmp_path_factory.mktemp("doors") / "islets"
    make_islets(model_directory, vocabulary, directory)
    return serve_directory(directory)


@pytest.fixture(scope="module")
def service(model: ServedModel) -> Direct:
    return Noted(model, ServeSettings(max_body_bytes=100_000, body_seconds=0.3))


def send(api: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test") as client:
            return await client.request(method, path, **options)

    return asyncio.run(ask())


@pytest.fixture(scope="module")
def api(service: Direct) -> FastAPI:
    return create_api(service)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[dict[str, Any]]]:
    """The request log's lines so far."""
    caplog.set_level(logging.INFO, "geneformer.requests")
    return lambda: [json.loads(r.message) for r in caplog.records if r.name == "geneformer.requests"]


# ---------------------------------------------------------------------- who may ask


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def locked(service: Direct) -> FastAPI:
    return create_api(service, keys=ApiKeys(f"{FIRST}, anna {SECOND}"))


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("no-such-key-0123456789"),
        bearer(FIRST[:-1]),
        bearer(FIRST + "0"),
        bearer(f"{FIRST}, {SECOND}"),
        {"Authorization": FIRST},
        {"Authorization": f"Basic {FIRST}"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer \xff"},
        {"X-API-Key": FIRST},
    ],
)
def test_without_a_key_nothing_is_answered(locked: FastAPI, headers: dict[str, str]) -> None:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    for method, path in (("GET", "/v1/model"), ("POST", "/v1/classify"), ("GET", "/openapi.json"), ("GET", "/v1/x")):
        answer = send(locked, method, path, headers=raw, content=b"{")
        assert answer.status_code == 401, (path, answer.text)
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert answer.json()["error"]["field"] == "Authorization"
        assert FIRST not in answer.text


def test_two_authorization_headers_are_no_key(locked: FastAPI) -> None:
    both = [("authorization", f"Bearer {FIRST}"), ("authorization", f"Bearer {SECOND}")]
    assert send(locked, "GET", "/v1/model", headers=both).status_code == 401


@pytest.mark.parametrize("key", [FIRST, SECOND])
def test_every_key_opens(locked: FastAPI, key: str) -> None:
    assert send(locked, "GET", "/v1/model", headers=bearer(key)).status_code == 200
    assert send(locked, "GET", "/v1/model", headers={"authorization": f"bEARER  {key}"}).status_code == 200


def test_health_and_pages_need_no_key(locked: FastAPI) -> None:
    for path in ("/v2/health/live", "/v2/health/ready", "/docs", "/docs/docs.js"):
        assert send(locked, "GET", path).status_code == 200, path
    # What looks as if it lay there does not.
    for path in ("/v2/health", "/docs/../v1/model", "//v1/model", "/v2/health/../../v1/model", "/page"):
        answer = send(locked, "GET", httpx.URL("http://test").copy_with(raw_path=path.encode()))
        assert answer.status_code in (401, 404), path
    assert send(locked, "POST", "/v2/health/live").status_code == 401


def test_the_document_says_which_requests_need_a_key(locked: FastAPI, api: FastAPI) -> None:
    document = send(locked, "GET", "/openapi.json", headers=bearer(FIRST)).json()
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert operation["security"] == ([] if path.startswith("/v2/health/") else [{"key": []}]), path
    assert "securitySchemes" not in send(api, "GET", "/openapi.json").json()["components"]


def test_the_name_of_the_key_is_written_down_and_the_key_nowhere(
    locked: FastAPI, lines: Callable[[], list[dict[str, Any]]], caplog: pytest.LogCaptureFixture
) -> None:
    for key in (FIRST, SECOND, "wrong-key-0123456789"):
        send(locked, "GET", "/v1/model", headers=bearer(key))
    assert [line["key"] for line in lines()] == ["key1", "anna", None]
    for key in (FIRST, SECOND, "wrong-key-0123456789"):
        assert key not in caplog.text


def test_keys_come_and_go_with_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "RECHECK_SECONDS", 0.0)
    file = tmp_path / "keys"
    file.write_text(f"# who may ask\nanna {FIRST}  # until May\n\n{SECOND}\n")
    keys = ApiKeys(f"ops {THIRD}", str(file))
    assert len(keys) == 3
    assert [keys.name_of(key.encode()) for key in (FIRST, SECOND, THIRD)] == ["anna", "key4", "ops"]
    file.write_text(f"anna {SECOND}\n")
    os.utime(file, ns=(1, 1))
    assert [keys.name_of(key.encode()) for key in (FIRST, SECOND, THIRD)] == [None, "anna", "ops"]
    # A file that is broken or gone for a while locks nobody out who was in, and lets nobody else in.
    file.write_text("anna short\n")
    assert [keys.name_of(key.encode()) for key in (FIRST, SECOND)] == [None, "anna"]
    file.unlink()
    assert [keys.name_of(key.encode()) for key in (FIRST, SECOND)] == [None, "anna"]
    file.write_text(f"{FIRST}\n")
    assert [keys.name_of(key.encode()) for key in (FIRST, SECOND)] == ["key1", None]


def test_every_key_is_compared_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ApiKeys(f"{FIRST},{SECOND},{THIRD}")
    compared: list[tuple[int, int]] = []
    real = keys_module.hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return real(one, other)

    monkeypatch.setattr(keys_module.hmac, "compare_digest", compare)
    for key in (FIRST, THIRD, "x", "x" * 500):
        compared.clear()
        keys.name_of(key.encode())
        assert compared == [(32, 32)] * 3  # the same work wherever the key stands, and for one that stands nowhere


@pytest.mark.parametrize("text", ["secret", "a b secret-0123456789012", f"{FIRST} anna", "secret-\xe9-0123456789"])
def test_a_wrong_entry_is_refused_without_being_shown(text: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"\n{text}\n", encoding="utf-8")
    with pytest.raises(InputError, match="api_keys_file, line 2") as error:
        ApiKeys(file=str(tmp_path / "keys"))
    with pytest.raises(InputError, match="api_keys, entry 2") as other:
        ApiKeys(f"{SECOND},{text}")
    for word in text.split():
        assert len(word) < 3 or (word not in str(error.value) and word not in str(other.value))
    with pytest.raises(InputError, match="api_keys_file"):
        ApiKeys(file=str(tmp_path / "missing"))


def test_keys_are_asked_for_beyond_loopback(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(FIRST)
    file, given = {"api_keys_file": str(tmp_path / "keys")}, {"api_keys": FIRST}
    for host in ("127.0.0.1", "::1", "localhost", "127.8.0.1"):
        assert is_loopback(host)
        assert check_keys(ServeSettings(), host) is None
    for host in ("0.0.0.0", "::", "10.0.0.3", "service.lab", "", None):
        assert not is_loopback(host)
        with pytest.raises(InputError, match=r"require_api_key: false"):
            check_keys(ServeSettings(), host)
        assert check_keys(ServeSettings(require_api_key=False), host) is None
        assert check_keys(ServeSettings(**file), host) is not None
    for setting in (file, given):
        keys = check_keys(ServeSettings(**setting), "127.0.0.1")
        assert keys is not None
        assert keys.name_of(FIRST.encode()) == "key1"
        assert check_keys(ServeSettings(**setting, require_api_key=False), "127.0.0.1") is None
    with pytest.raises(InputError, match="no key"):
        check_keys(ServeSettings(require_api_key=True), "127.0.0.1")
    (tmp_path / "keys").write_text("# none yet\n")
    with pytest.raises(InputError, match="no key"):
        check_keys(ServeSettings(**file), "127.0.0.1")


def test_settings_show_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENEFORMER_SERVE_API_KEYS", FIRST)
    settings = ServeSettings.read()
    assert FIRST not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"
    again = ServeSettings.read(settings.model_dump())  # as the service is started
    assert again.api_keys is not None
    assert again.api_keys.get_secret_value() == FIRST
    for wrong in ({"api_keys": [FIRST]}, {"api_key": FIRST}):
        with pytest.raises(InputError) as error:
            ServeSettings.read(wrong)
        assert FIRST not in str(error.value)


# ---------------------------------------------------------------------- what may come in


def classify(api: FastAPI, content: bytes, headers: dict[str, str] = JSON) -> httpx.Response:
    return send(api, "POST", "/v1/classify", content=content, headers=headers)


BODY = json.dumps({"cells": [CELL]}).encode()


@pytest.mark.parametrize(
    ("content", "headers", "status", "field"),
    [
        (BODY, {}, 415, "Content-Type"),
        (BODY, {"content-type": "text/plain"}, 415, "Content-Type"),
        (BODY, {"content-type": "application/x-www-form-urlencoded"}, 415, "Content-Type"),
        (BODY, {"content-type": "multipart/form-data; boundary=x"}, 415, "Content-Type"),
        (BODY, {"content-type": ""}, 415, "Content-Type"),
        (gzip.compress(BODY), JSON | {"content-encoding": "gzip"}, 415, "Content-Encoding"),
        (BODY, JSON | {"content-encoding": "gzip, gzip"}, 415, "Content-Encoding"),
        (gzip.compress(b" " * 10**7), JSON, 422, "body"),
        (BODY, JSON | {"content-length": "99999999999999999999999999"}, 413, "body"),
        (b" " * 100_001, JSON, 413, "body"),
        (b"", JSON, 422, "body"),
        (b"\xff\xfe", JSON, 422, "body"),
        (b"[" * 90_000, JSON, 422, "body"),
        (b'{"a":' * 18_000, JSON, 422, "body"),
        (b'{"cells": [{"counts": {"GENE01": ' + b"9" * 90_000 + b"}}]}", JSON, 422, "body"),
        (b'{"cells": [{"counts": {"GENE01": 1e999}}]}', JSON, 422, "cells[0].counts.GENE01"),
        (b'{"cells": [{"counts": {"GENE01": NaN}}]}', JSON, 422, "body"),
        (b'{"cells": [{"counts": {"GENE01": -Infinity}}]}', JSON, 422, "body"),
        (b'{"cells": [{"counts": {"GENE01": 1, "GENE01": 2}}]}', JSON, 422, "body"),
        (b'{"cells": [], "cells": [{"input_ids": [3]}]}', JSON, 422, "body"),
        (b'{"cells": [{"counts": {"\\ud800": 1}}]}', JSON, 422, None),
        (b'{"cells": [{"input_ids": [3], "cell_id": "\\udfff"}]}', JSON, 422, None),
        (b'{"cells": [{"input_ids": [123456789012345678901234567890]}]}', JSON, 422, "cells[0].input_ids[0]"),
        (b"null", JSON, 422, "body"),
        (b"1", JSON, 422, None),
        (b'"' + b"x" * 50_000 + b'"', JSON, 422, None),
    ],
    ids=lambda value: "" if isinstance(value, bytes | dict) else None,
)
def test_hostile_bodies_get_a_clear_answer(
    api: FastAPI, content: bytes, headers: dict[str, str], status: int, field: str | None
) -> None:
    answer = classify(api, content, headers)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"field", "got", "takes"}
    assert all(error.values())
    assert len(answer.content) < 1500  # what was sent is not sent back
    if field is not None:
        assert error["field"] == field, answer.text


def test_what_is_meant_is_read(api: FastAPI) -> None:
    for kind in ("application/json", "Application/JSON; charset=utf-8"):
        assert classify(api, BODY, {"content-type": kind, "content-encoding": "identity"}).status_code == 200
    # A GET's headers tell of no body.
    assert send(api, "GET", "/v1/model", headers={"content-type": "text/plain"}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("HEAD", "/v1/model", 405),
        ("OPTIONS", "/v1/classify", 405),
        ("DELETE", "/v1/model", 405),
        ("BREW", "/v1/model", 405),
        ("GET", "/v1/" + "x" * 20_000, 404),
        ("GET", "/v1/%00%ff%2e%2e%2f", 404),
        ("GET", "/v1/model?" + "x=1&" * 10_000, 200),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/docs/..%2fdocs_page.py", 404),
        ("GET", "/docs/%2e%2e", 404),
    ],
)
def test_odd_requests_get_a_clear_answer(api: FastAPI, method: str, path: str, status: int) -> None:
    url = httpx.URL("http://test").copy_with(raw_path=path.encode())
    answer = send(api, method, url, headers={"x-long": "y" * 50_000})
    assert answer.status_code == status, answer.text
    assert len(answer.content) < 5000


def test_strict_json_says_what_is_wrong() -> None:
    assert parse_json(b' {"a": [1, 2.5, null, "\\u00e9"], "b": {"a": 1}} ') == {"a": [1, 2.5, None, "é"], "b": {"a": 1}}
    for body, got in (
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "'b' twice"),
        (b"[NaN]", "NaN"),
        (b"[" * 10**6, "many levels"),
        (b"9" * 10_000, "thousands of digits"),
        (b"{,}", "character 1"),
        (b'{"a": "\xff"}', "UTF-8"),
    ):
        with pytest.raises(InputError, match=got):
            parse_json(body)


@pytest.mark.parametrize(
    "content",
    [
        b'{"cells":[{"input_ids":[%b"x"]}]}' % (b'"a",' * 20_000),
        b'{"cells":[%b1]}' % (b"1," * 40_000),
        b'{"cells":[{"counts":{%b"x":"b"}}]}' % b"".join(b'"%x":"a",' % i for i in range(8_000)),
        b'{%b"cells":[{"input_ids":[4]}]}' % b"".join(b'"%x":1,' % i for i in range(9_000)),
        b'{"cells":[{%b"input_ids":[4]}]}' % b"".join(b'"%x":1,' % i for i in range(9_000)),
    ],
    ids=["ids", "cells", "counts", "fields", "fields of a cell"],
)
def test_a_body_that_is_wrong_everywhere_is_refused_for_the_first_fault(content: bytes) -> None:
    """Else its faults are put together one by one: minutes and gigabytes for a body of the size allowed."""
    with pytest.raises(ValidationError) as error:
        ClassifyRequest.model_validate(json.loads(content))
    assert error.value.error_count() <= 2


# ---------------------------------------------------------------------- over a socket


@contextmanager
def listening(api: FastAPI) -> Iterator[int]:
    """Serve over a real socket, in a thread."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(api, log_config=None, access_log=False, lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(10)


def talk(port: int, *parts: bytes, pause: float = 0.0) -> bytes:
    """Say something, and read until the other side ends or falls silent."""
    with socket.create_connection(("127.0.0.1", port), timeout=3) as connection:
        for number, part in enumerate(parts):
            time.sleep(pause if number else 0)
            try:
                connection.sendall(part)
            except (BrokenPipeError, ConnectionResetError):
                break
        heard = b""
        try:
            while part := connection.recv(65536):
                heard += part
        except (TimeoutError, ConnectionResetError):
            pass
        return heard


HEAD = b"POST /v1/classify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


def test_a_body_that_trickles_is_given_up(api: FastAPI) -> None:
    with listening(api) as port:
        start = time.monotonic()
        heard = talk(port, HEAD + b"content-length: 1000\r\n\r\n", *[b"x"] * 10, pause=0.1)
        assert heard.startswith(b"HTTP/1.1 408"), heard
        assert b'"field": "body"' in heard
        # One that is only begun and never goes on, and one in chunks.
        assert talk(port, HEAD + b"content-length: 1000\r\n\r\n").startswith(b"HTTP/1.1 408")
        assert talk(port, HEAD + b"transfer-encoding: chunked\r\n\r\n2\r\n{ \r\n").startswith(b"HTTP/1.1 408")
        assert time.monotonic() - start < 8
        assert httpx.get(f"http://127.0.0.1:{port}/v2/health/live").status_code == 200


@pytest.mark.parametrize(
    "request_",
    [
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /v1/model HTTP/1.1\r\nbad header\r\n\r\n",
        HEAD + b"content-length: -5\r\n\r\n",
        HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\n{}",
        HEAD + b"transfer-encoding: chunked\r\n\r\nZZ\r\n{}\r\n",
        HEAD + b"x: " + b"y" * 200_000 + b"\r\n\r\n",
        b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
    ],
    ids=["garbage", "version", "header", "negative", "lengths", "chunk", "long header", "long path"],
)
def test_malformed_http_is_no_fault_of_ours(api: FastAPI, request_: bytes) -> None:
    with listening(api) as port:
        heard = talk(port, request_)
        assert not heard or re.match(rb"HTTP/1\.1 4\d\d", heard), heard[:200]
        assert httpx.get(f"http://127.0.0.1:{port}/v2/health/live").status_code == 200


def test_a_client_that_goes_away_in_its_body_leaves_a_line(
    api: FastAPI, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    with listening(api) as port:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(HEAD + b"content-length: 1000\r\n\r\n{")
            time.sleep(0.05)
        deadline = time.monotonic() + 3
        while not lines() and time.monotonic() < deadline:
            time.sleep(0.01)
    (line,) = lines()
    assert (line["status"], line["bytes_in"], line["bytes_out"]) == (499, 1, 0)


# ---------------------------------------------------------------------- what goes out


def test_every_answer_carries_the_headers(service: Direct, locked: FastAPI, api: FastAPI) -> None:
    failing = create_api(service)
    failing.add_api_route("/fails", broken)
    for application, method, path, status in (
        (api, "GET", "/v1/model", 200),
        (api, "GET", "/docs", 200),
        (api, "GET", "/docs/swagger-ui-bundle.js", 200),
        (api, "GET", "/nothing", 404),
        (api, "POST", "/v1/classify", 415),
        (locked, "GET", "/v1/model", 401),
        (failing, "GET", "/fails", 500),
    ):
        answer = send(application, method, path, content=b"{")
        assert answer.status_code == status, (path, answer.text)
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["frame-ancestors"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        for name, value in (
            ("x-content-type-options", "nosniff"),
            ("x-frame-options", "DENY"),
            ("referrer-policy", "no-referrer"),
            ("cross-origin-opener-policy", "same-origin"),
            ("cross-origin-resource-policy", "same-origin"),
            ("cache-control", "no-cache" if path.startswith("/docs") else "no-store"),
        ):
            assert answer.headers.get_list(name) == [value], (path, name)
        assert "strict-transport-security" not in answer.headers
        assert "access-control-allow-origin" not in answer.headers
    behind = send(api, "GET", "/v1/model", headers={"x-forwarded-proto": "https"})
    assert "max-age" in behind.headers["strict-transport-security"]


def broken() -> None:
    secret = {"GENE01": 812}
    raise RuntimeError(f"no room for {secret}")


def test_a_fault_shows_no_trace_and_leaves_a_line(
    service: Direct, lines: Callable[[], list[dict[str, Any]]], caplog: pytest.LogCaptureFixture
) -> None:
    failing = create_api(service)
    failing.add_api_route("/fails/{what}", broken_at)
    answer = send(failing, "GET", "/fails/GENE01?gene=GENE02")
    assert answer.status_code == 500
    assert answer.json()["error"]["field"] == "server"
    assert "Traceback" not in answer.text
    assert "RuntimeError" not in answer.text
    failure, request = lines()
    assert (failure["event"], failure["exception"]) == ("failure", "RuntimeError")
    assert failure["request_id"] == request["request_id"] == answer.headers["x-request-id"]
    assert failure["frames"][-1].endswith(" broken")  # where it was
    assert (request["route"], request["status"]) == ("/fails/{what}", 500)
    assert "GENE" not in caplog.text  # what it was about


def broken_at(what: str) -> None:
    broken()


@pytest.mark.parametrize("given", ["a", "A.b_c-9", "x" * 64, "", "x" * 65, "a b", "a\n", 'a"b', "\xe9", "../a", "{}"])
def test_requests_have_an_id(api: FastAPI, lines: Callable[[], list[dict[str, Any]]], given: str) -> None:
    if "\n" in given:
        given = given.strip()
    headers = [(b"x-request-id", given.encode("latin-1"))]
    answer = send(api, "GET", "/v1/model", headers=headers)
    found = answer.headers["x-request-id"]
    sound = re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given) is not None
    assert (found == given) == sound
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", found)
    assert [line["request_id"] for line in lines()] == [found]


def test_behind_serves_proxy_the_id_is_not_sent_twice(service: Direct) -> None:
    behind = create_api(service, behind_proxy=True)
    assert "x-request-id" not in send(behind, "GET", "/v1/model", headers={"x-request-id": "abc"}).headers
    # The proxy sends back what it was given; the id that the log knows comes beside it.
    assert re.fullmatch(
        "[0-9a-f]{32}", send(behind, "GET", "/v1/model", headers={"x-request-id": "a b"}).headers["x-request-id"]
    )


# ---------------------------------------------------------------------- what is written down


def test_a_line_tells_of_a_request_and_nothing_of_a_cell(
    service: Direct, model: ServedModel, lines: Callable[[], list[dict[str, Any]]], caplog: pytest.LogCaptureFixture
) -> None:
    counted = Counted()
    api = create_api(service, keys=ApiKeys(f"anna {FIRST}"), metrics=counted)
    cells = [{"counts": {"GENE01": 76543210, "GENE02": 98765432}, "cell_id": "patient-7"}, {"input_ids": [5, 6, 7]}]
    body = json.dumps({"cells": cells}).encode()
    answer = classify(api, body, JSON | bearer(FIRST) | {"x-request-id": "r1"})
    assert answer.status_code == 200, answer.text
    (line,) = lines()
    taken = line.pop("seconds")
    assert 0 < taken < 30
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line.pop("time"))
    assert line == {
        "event": "request",
        "request_id": "r1",
        "method": "POST",
        "route": "/v1/classify",
        "status": 200,
        "cells": 2,
        "tokens": 5,
        "events": 0,
        "model": "islets",
        "version": None,
        "key": "anna",
        "bytes_in": len(body),
        "bytes_out": len(answer.content),
    }
    send(api, "GET", "/v1/GENE01/patient-7?gene=GENE02", headers=bearer(FIRST))
    classify(api, body.replace(b"76543210", b"-76543210"), JSON | bearer(FIRST))
    assert [line["route"] for line in lines()] == ["/v1/classify", None, "/v1/classify"]
    for word in ("GENE", "patient", "76543210", "98765432"):
        assert word not in caplog.text
    assert counted.requests == [("/v1/classify", 200), ("none", 404), ("/v1/classify", 422)]


def test_notes_of_requests_at_once_are_kept_apart(lines: Callable[[], list[dict[str, Any]]]) -> None:
    from serve.metrics import NoMetrics
    from serve.request_log import RequestLog

    async def application(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(5):
            note(cells=int(scope["path"][1:]))
            await asyncio.sleep(0)
            await asyncio.to_thread(note, tokens=1)
        assert current_request_id() == f"r{scope['path'][1:]}"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def both() -> None:
        transport = httpx.ASGITransport(RequestLog(application, NoMetrics()))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await asyncio.gather(*(client.get(f"/{n}", headers={"x-request-id": f"r{n}"}) for n in range(1, 20)))

    asyncio.run(both())
    assert {line["request_id"]: (line["cells"], line["tokens"]) for line in lines()} == {
        f"r{n}": (5 * n, 5) for n in range(1, 20)
    }
    note(cells=3)  # outside of a request there is nothing to add to
    assert current_request_id() is None


# ---------------------------------------------------------------------- the page of requests


def test_docs_ask_no_other_host(api: FastAPI) -> None:
    page = send(api, "GET", "/docs").text
    # The policy lets neither other hosts nor anything inline in; the page must live with that.
    assert not re.search(r"https?://|//[a-z]", page)
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son[a-z]+=|\sstyle=", page)
    for name in re.findall(r'(?:src|href)="(docs/[^"]+)"', page):
        assert send(api, "GET", f"/{name}").status_code == 200, name
    assert send(api, "GET", "/redoc").status_code == 404
    first = send(api, "GET", "/docs/swagger-ui.css")
    again = send(api, "GET", "/docs/swagger-ui.css", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
