"""The doors of a real service: keys, what trickles in, the log's lines, and what comes out of Ray's metrics export."""

from __future__ import annotations

import json
import os
import re
import select
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from geneformer_ray.compute.classifier import new_classifier
from geneformer_ray.compute.model_directory import weights_digest
from geneformer_ray.data.vocabulary import GeneVocabulary

pytestmark = pytest.mark.integration

ANNA, BERT, CARA = "anna-key-0123456789", "bert-key-0123456789", "cara-key-0123456789"
BODY_SECONDS = 1.0
# Ray's agents gather every 10 seconds.
EXPORT_SECONDS = 60.0


@dataclass(frozen=True)
class Locked:
    """A running service that asks for a key."""

    url: str
    keys: Path
    digest: str
    logs: Path

    def ask(self, method: str, path: str, key: str | None = ANNA, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        headers |= options.pop("headers", {})
        return httpx.request(method, self.url + path, headers=headers, timeout=30, **options)

    def lines(self) -> list[dict[str, Any]]:
        """The request log of all replicas so far."""
        written = "\n".join(path.read_text(errors="replace") for path in sorted(self.logs.glob("worker-*.err")))
        return [json.loads(line) for line in written.splitlines() if line.startswith('{"time"')]


@pytest.fixture(scope="module")
def locked(
    model_directory: Path, vocabulary: GeneVocabulary, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Locked]:
    import ray

    from geneformer_ray.distribute.cluster import connected
    from serve.bound_host import bound_host
    from serve.run import running
    from serve.settings import ServeSettings

    folder = tmp_path_factory.mktemp("doors")
    classifier, own = new_classifier(model_directory, vocabulary, ["alpha", "beta"], "mean")
    classifier.save(folder / "islets", own)
    keys = folder / "keys"
    keys.write_text(f"anna {ANNA}\n")
    settings = ServeSettings.read(
        {
            "model": str(folder / "islets"),
            "api_keys_file": str(keys),
            "api_keys": f"ops {BERT}",
            "require_api_key": True,
            "body_seconds": BODY_SECONDS,
            "max_replicas": 1,
        }
    )
    with connected(cpus=2):
        assert bound_host() is None  # nobody serves yet
        logs = Path(ray._private.worker.global_worker.node.get_logs_dir_path())
        with running(settings) as url:
            assert bound_host() == "127.0.0.1"
            yield Locked(url, keys, weights_digest(folder / "islets"), logs)


def test_a_key_is_asked_for_and_keys_come_and_go(locked: Locked) -> None:
    assert locked.ask("GET", "/v2/health/ready", None).status_code == 200
    for key in (None, "nobodys-key-0123456789"):
        answer = locked.ask("GET", "/v1/model", key)
        assert (answer.status_code, answer.json()["error"]["field"]) == (401, "Authorization")
        assert answer.headers["www-authenticate"].startswith("Bearer")
    for key in (ANNA, BERT):
        assert locked.ask("GET", "/v1/model", key).status_code == 200
    assert locked.ask("GET", "/v1/model", CARA).status_code == 401
    locked.keys.write_text(f"anna {ANNA}\ncara {CARA}\n")
    time.sleep(1.2)  # the file is looked at once a second
    assert locked.ask("GET", "/v1/model", CARA).status_code == 200
    locked.keys.write_text(f"anna {ANNA}\n")
    time.sleep(1.2)
    assert [locked.ask("GET", "/v1/model", key).status_code for key in (ANNA, CARA)] == [200, 401]


def test_answers_carry_one_id_and_the_headers(locked: Locked) -> None:
    for path, given in (("/v1/model", {"X-Request-ID": "study-7"}), ("/v1/model", {}), ("/docs", {})):
        answer = locked.ask("GET", path, headers=given)
        assert answer.status_code == 200
        (found,) = answer.headers.get_list("x-request-id")
        assert found == given.get("X-Request-ID", found)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]


def talk(url: str, *parts: bytes, pause: float = 0.0) -> bytes:
    """Say something over a socket, and read until the other side ends or falls silent."""
    address = httpx.URL(url)
    with socket.create_connection((address.host, address.port), timeout=4) as connection:
        heard = b""
        try:
            for part in parts:
                connection.sendall(part)
                if select.select([connection], [], [], pause)[0]:
                    break  # what is sent after an answer would reset the connection, and lose it
            while more := connection.recv(65536):
                heard += more
        except (TimeoutError, ConnectionError):
            pass
        return heard


def test_a_body_that_trickles_is_given_up(locked: Locked) -> None:
    head = f"POST /v1/classify HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {ANNA}\r\n".encode()
    head += b"content-type: application/json\r\ncontent-length: 1000\r\n\r\n"
    heard = talk(locked.url, head, *[b" "] * 8, pause=0.25)
    assert heard.startswith(b"HTTP/1.1 408"), heard
    assert b'"field": "body"' in heard
    assert locked.ask("GET", "/v1/model").status_code == 200


@pytest.mark.parametrize(
    "request_",
    [
        b"GARBAGE\r\n\r\n",
        b"GET /v1/model HTTP/1.1\r\nbad header\r\n\r\n",
        b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\n\r\n",
    ],
    ids=["garbage", "header", "long path"],
)
def test_malformed_http_is_no_fault_of_ours(locked: Locked, request_: bytes) -> None:
    heard = talk(locked.url, request_)
    assert not heard or re.match(rb"HTTP/1\.1 4\d\d", heard), heard[:200]
    assert locked.ask("GET", "/v1/model").status_code == 200


def exported() -> dict[tuple[str, str], float]:
    """What Ray exports of the service: (name, tags other than Serve's own) -> value."""
    import ray

    found: dict[tuple[str, str], float] = {}
    for node in ray.nodes():
        text = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=10).text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith("ray_geneformer_"):
                    assert sample.labels["deployment"] == "Geneformer"
                    assert sample.labels["application"] == "geneformer"
                    own = {k: v for k, v in sorted(sample.labels.items()) if k in TAGS}
                    key = (sample.name.removeprefix("ray_geneformer_"), ",".join(own.values()))
                    found[key] = found.get(key, 0.0) + sample.value
    return found


TAGS = ("digest", "kind", "name", "route", "status", "version", "le")


def test_metrics_come_out_of_rays_export(locked: Locked, vocabulary: GeneVocabulary) -> None:
    sequences = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14]]
    for _ in range(2):
        cells = [{"input_ids": ids} for ids in sequences]
        assert locked.ask("POST", "/v1/classify", json={"cells": cells}).status_code == 200
    assert locked.ask("POST", "/v1/classify", json={"cells": []}).status_code == 422
    assert locked.ask("POST", "/v1/embed", json={"cells": [{"input_ids": [4, 5]}]}).status_code == 200
    genes = [vocabulary.names[token] for token in (5, 6)]
    perturb = {"cell": {"input_ids": [5, 6, 7, 8]}, "genes": genes}
    assert locked.ask("POST", "/v1/perturb", json=perturb).status_code == 200

    deadline = time.monotonic() + EXPORT_SECONDS
    found = exported()
    while found.get(("events_total", "")) != 2 and time.monotonic() < deadline:
        time.sleep(1)
        found = exported()
    assert found["requests_total", "/v1/classify,200"] == 2
    assert found["requests_total", "/v1/classify,422"] == 1
    assert found["requests_total", "/v1/embed,200"] == 1
    assert found["requests_total", "/v1/perturb,200"] == 1
    assert found["request_seconds_count", "/v1/classify"] >= 3  # and the one that trickled
    assert 0 < found["request_seconds_sum", "/v1/embed"] < 30
    assert found["events_total", ""] == 2
    # Of a perturbation its cell before and after each event is computed as well: 4 + 3 + 3 tokens.
    assert found["cells_total", "embed"] == 1
    assert found["cells_total", "classify"] == 2 * 3 + 3
    assert found["tokens_total", ""] == 2 * (3 + 2 + 5) + 2 + (4 + 3 + 3)
    assert found.get(("padding_tokens_total", ""), 0) <= 2 * (2 + 3) + 2
    # Ray knows of a histogram's values only their buckets, so that its sums are rough and its counts exact.
    assert 4 <= found["batch_cells_count", ""] <= 10
    assert found["batch_tokens_count", ""] == found["batch_fill_count", ""] == found["batch_cells_count", ""]
    assert found["batch_tokens_bucket", "64.0"] == found["batch_tokens_count", ""]
    assert found["queue_seconds_count", ""] >= 4
    assert found["pieces_waiting", ""] == 0
    assert found["model", f"{locked.digest},islets,none"] == 1


def test_the_log_names_who_asked_and_nothing_of_a_cell(locked: Locked) -> None:
    body = {"cells": [{"counts": {"GENE01": 76543210, "GENE02": 98765432}, "cell_id": "patient-7"}]}
    assert locked.ask("POST", "/v1/classify", BERT, json=body, headers={"X-Request-ID": "last-one"}).status_code == 200
    deadline = time.monotonic() + 10
    found: list[dict[str, Any]] = []
    while not found and time.monotonic() < deadline:
        found = [line for line in locked.lines() if line["request_id"] == "last-one"]
    (line,) = found
    kept = ("event", "method", "route", "status", "cells", "tokens", "model", "version", "key")
    assert [line[name] for name in kept] == ["request", "POST", "/v1/classify", 200, 1, 2, "islets", None, "ops"]
    written = json.dumps(locked.lines())
    for secret in ("GENE", "patient", "76543210", ANNA, BERT, CARA):
        assert secret not in written
    assert os.environ.get("GENEFORMER_SERVE_API_KEYS") is None
