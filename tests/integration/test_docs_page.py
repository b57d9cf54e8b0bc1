"""``/docs`` in a real browser: it draws every request, under its policy, and asks no other host."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
import uvicorn
from fastapi import FastAPI

from geneformer_ray.data.vocabulary import GeneVocabulary
from serve.api import create_api
from serve.keys import ApiKeys
from serve.settings import ServeSettings
from tests.integration.test_page import browser  # noqa: F401  (a fixture)
from tests.unit.served import Direct, make_islets, serve_directory

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = [pytest.mark.integration, pytest.mark.browser]

KEY = "a-key-of-this-test-0123456789"


@contextmanager
def listening(api: FastAPI) -> Iterator[str]:
    """Serve over a real socket, in a thread."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(api, log_config=None, access_log=False, lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


@pytest.mark.parametrize("key", ["", KEY])
def test_requests_are_drawn_and_tried(
    model_directory: Path,
    vocabulary: GeneVocabulary,
    tmp_path: Path,
    browser: Browser,  # noqa: F811
    key: str,
) -> None:
    make_islets(model_directory, vocabulary, tmp_path / "islets")
    service = Direct(serve_directory(tmp_path / "islets"), ServeSettings())
    with listening(create_api(service, keys=ApiKeys(key) if key else None)) as url:
        context = browser.new_context()
        context.set_default_timeout(30_000)
        page, asked, complaints = context.new_page(), list[str](), list[str]()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"{url}/docs")
        if key:
            field = page.get_by_label("This service asks for an API key")
            field.fill("not-the-key-0123456789")
            field.press("Enter")
            page.get_by_role("alert").get_by_text("not known here").wait_for()
            field.fill(key)
            field.press("Enter")
        page.locator(".opblock").first.wait_for()
        drawn = set(page.locator(".opblock-summary-path").evaluate_all("paths => paths.map(one => one.dataset.path)"))
        assert drawn == set(create_api(service).openapi()["paths"])
        page.locator(".opblock-summary", has_text="/v1/model").first.click()
        page.get_by_role("button", name="Try it out").click()
        with page.expect_response(f"{url}/v1/model") as answered:
            page.get_by_role("button", name="Execute").click()
        assert answered.value.status == 200
        page.locator(".live-responses-table").get_by_text("islets").first.wait_for()
        context.close()
    assert {urlsplit(one).netloc for one in asked if not one.startswith("data:")} == {urlsplit(url).netloc}
    # A browser reports the refused requests by itself; what its policy refused would stand here too.
    assert [text for text in complaints if "401" not in text] == []
