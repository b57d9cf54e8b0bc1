"""The page in a real browser, served by real Ray Serve: mouse, keyboard, small screens, and no other host."""

from __future__ import annotations

import base64
import csv
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import anndata
import httpx
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
import uvicorn
from scipy import sparse

from geneformer_ray.compute.classifier import new_classifier
from geneformer_ray.compute.model_directory import save_model
from geneformer_ray.compute.pretraining import new_model
from geneformer_ray.data import storage
from geneformer_ray.data.shards import write_shard
from geneformer_ray.data.vocabulary import GeneVocabulary
from tests.conftest import randomise
from tests.unit.served import (
    LABELS,
    TASKS,
    Direct,
    make_multitask,
    offline_odds,
    offline_odds_by_task,
    serve_directory,
)

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

    from serve.keys import ApiKeys

pytestmark = [pytest.mark.integration, pytest.mark.browser]

GENES = [f"ENSG{number:011d}" for number in range(40)]
SYMBOLS = {gene: f"SYM{number}" for number, gene in enumerate(GENES)}
KEY = "a-key-that-is-long-enough"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# It is closed to the network; without these it tries to reach its maker's hosts all the same.
QUIET = (
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run",
    "--disable-gpu", "--disable-quic",
)  # fmt: skip


@dataclass(frozen=True)
class Site:
    """A running service, its model, and a file of cells."""

    url: str
    directory: Path
    vocabulary: GeneVocabulary
    cells: Path

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        response = httpx.get(self.url + path) if body is None else httpx.post(self.url + path, json=body, timeout=60)
        assert response.status_code == 200, response.text
        return response.json()


def make_trunk(directory: Path) -> GeneVocabulary:
    """A model of genes with symbols."""
    vocabulary = GeneVocabulary.from_medians(
        {gene: 1.0 + number / 7 for number, gene in enumerate(GENES)}, max_length=24, symbols=SYMBOLS
    )
    torch.manual_seed(0)
    trunk = new_model(vocabulary, layers=3, width=16, heads=2, feed_forward=24)
    randomise(trunk, 0.4)
    save_model(trunk, vocabulary, directory / "trunk")
    return vocabulary


def make_model(directory: Path) -> GeneVocabulary:
    """A classifier with symbols, states and examples."""
    vocabulary = make_trunk(directory)
    classifier, own = new_classifier(directory / "trunk", vocabulary, LABELS, "cls")
    with torch.no_grad():
        classifier.classifier.weight.normal_(std=2.0)
    classifier.save(directory / "islets", own)
    rng = np.random.default_rng(3)
    states = {label: rng.normal(size=16).round(4).tolist() for label in LABELS}
    (directory / "islets" / "states.json").write_text(json.dumps(states))
    genes = np.array([own.tokens[gene] for gene in GENES])
    examples = [
        {
            "cell_id": f"example {label}",
            "label": label,
            "input_ids": [own.cls_id, *rng.permutation(genes)[:12].tolist()],
        }
        for label in LABELS
    ]
    (directory / "islets" / "examples.json").write_text(json.dumps(examples))
    return own


def write_ranking(output: Path, rng: np.random.Generator) -> None:
    """As the statistics job does."""
    plan = {"job": "statistics", "test": "goal_shift", "screen": {"perturbation": "delete", "goal": "beta"}}
    storage.claim_output(str(output), plan, overwrite=False)
    table = pd.DataFrame(
        {"gene": GENES, "symbol": list(SYMBOLS.values()), "shift_to_beta": -np.sort(rng.normal(size=40))}
    )
    table["p_beta"], table["significant"] = 10.0 ** -np.arange(40), table["shift_to_beta"] < 0
    write_shard(str(output), "statistics", 0, pa.Table.from_pandas(table, preserve_index=False))
    storage.finish_output(str(output), plan, {})


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    from geneformer_ray.distribute.cluster import connected
    from serve.run import running
    from serve.settings import ServeSettings

    folder, rng = tmp_path_factory.mktemp("site"), np.random.default_rng(5)
    vocabulary = make_model(folder)
    write_ranking(folder / "statistics", rng)
    counts = rng.poisson(1.5, size=(60, 42)).astype(np.float32)
    obs = pd.DataFrame(index=[f"cell_{number}" for number in range(60)])
    var = pd.DataFrame(index=[*SYMBOLS.values(), "NOSUCH1", "NOSUCH2"])
    anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=var).write_h5ad(folder / "some cells.h5ad")
    settings = ServeSettings.read(
        {"model": str(folder / "islets"), "screen_results": str(folder / "statistics"), "max_candidate_genes": 30}
    )
    with connected(cpus=2), running(settings) as url:
        yield Site(url, folder / "islets", vocabulary, folder / "some cells.h5ad")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        message = f"no browser: none of {', '.join(BROWSERS)} is there"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    from playwright.sync_api import sync_playwright

    # As root, which containers run as, the browser has no sandbox of its own; it opens nothing but this page.
    alone = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=[*QUIET, *alone])
        yield browser
        browser.close()


@pytest.fixture
def page(site: Site, browser: Browser) -> Iterator[Page]:
    yield from watched(browser, site.url)


def watched(browser: Browser, url: str, expected: str = "") -> Iterator[Page]:
    """Open the page; at the end nothing may have gone elsewhere, and the console must have no complaint."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(30_000)
    page, asked, complaints = context.new_page(), list[str](), list[str]()
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    page.goto(url)
    yield page
    hosts = {urlsplit(one).netloc for one in asked if not one.startswith("blob:")}
    context.close()
    assert hosts == {urlsplit(url).netloc}
    # A browser reports every refused request by itself; those that a test is about are no complaint.
    assert [text for text in complaints if not (expected and expected in text)] == []


def rows_of(place: Locator) -> list[list[str]]:
    """The texts of a table's rows."""
    rows: list[list[str]] = place.locator("tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.textContent.trim()))"
    )
    return rows


def shown(text: str) -> float:
    """A number as the page writes it."""
    return float(text.replace("−", "-").replace("+", "").removesuffix(" %")) / (100 if text.endswith("%") else 1)


def classify_example(page: Page, number: int) -> str:
    """Choose an example cell with the mouse; give its name."""
    page.locator("#example").select_option(str(number))
    page.locator("#example-go").click()
    page.locator("#cell tbody tr").first.wait_for()
    return page.locator("#example option:checked").inner_text()


def add_genes(page: Page, text: str) -> None:
    page.locator("#gene").fill(text)
    page.locator("#gene-add").click()


def test_it_says_what_is_served(site: Site, page: Page) -> None:
    page.locator("#ranking-result table").wait_for()
    model, text = site.ask("/v1/model"), page.locator("#model").inner_text()
    for part in (model["name"], model["digest"], model["pooling"], "not registered", ", ".join(LABELS)):
        assert part in text


def test_an_example_is_classified(site: Site, page: Page) -> None:
    assert classify_example(page, 1) == "beta: example beta"
    stored = json.loads((site.directory / "examples.json").read_text())[1]
    (odds,) = offline_odds(site.directory, site.vocabulary, [np.array(stored["input_ids"])])
    order = np.argsort(-odds)
    rows = rows_of(page.locator("#cell"))
    assert [row[0] for row in rows] == [LABELS[number] for number in order]
    np.testing.assert_allclose([shown(row[2]) for row in rows], odds[order], atol=6e-4)
    widths = page.locator("#cell .filled").evaluate_all("bars => bars.map(bar => bar.getAttribute('width'))")
    np.testing.assert_allclose([float(width[:-1]) / 100 for width in widths], odds[order], atol=6e-5)
    assert LABELS[order[0]] in page.locator("#types-status").inner_text()


def test_a_dropped_file_is_classified_downloaded_and_perturbed(site: Site, page: Page, tmp_path: Path) -> None:
    page.locator("#gene-note").filter(has_text="up to 30").wait_for()
    content = base64.b64encode(site.cells.read_bytes()).decode()
    transfer = page.evaluate_handle(
        """([content, name]) => {
            const bytes = Uint8Array.from(atob(content), letter => letter.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name));
            return transfer;
        }""",
        [content, site.cells.name],
    )
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event("#drop", event, {"dataTransfer": transfer})
    page.locator("#csv").wait_for()
    with page.expect_download() as download:
        page.locator("#csv").click()
    download.value.save_as(tmp_path / "cell_types.csv")

    answer = httpx.post(
        f"{site.url}/v1/classify?top=4&return_input_ids=true", content=site.cells.read_bytes(), timeout=60,
        headers={"Content-Type": "application/x-hdf5"},
    ).json()  # fmt: skip
    cells = answer["cells"]
    odds = offline_odds(site.directory, site.vocabulary, [np.array(cell["input_ids"]) for cell in cells])
    with (tmp_path / "cell_types.csv").open(newline="") as file:
        saved = list(csv.DictReader(file))
    assert [row["cell_id"] for row in saved] == [f"cell_{number}" for number in range(60)]
    assert [row["predicted_label"] for row in saved] == [LABELS[number] for number in odds.argmax(axis=1)]
    np.testing.assert_allclose([[float(row[f"p_{label}"]) for label in LABELS] for row in saved], odds, atol=1e-5)
    assert {row["model_digest"] for row in saved} == {answer["model"]["digest"]}

    summary, first = page.locator("#types-result table").all()[:2]
    counted = {row[0]: int(row[1]) for row in rows_of(summary)}
    assert counted == pd.Series([cell["label"] for cell in cells]).value_counts().to_dict()
    unknown = [shown(row[4]) for row in rows_of(first)]
    np.testing.assert_allclose(unknown, [cell["unknown_share"] for cell in cells[:25]], atol=6e-4)
    page.get_by_role("navigation", name="Pages of cells").get_by_role("button", name="Next").click()
    page.get_by_role("button", name="Show cell cell_30").click()
    assert "cell_30" in page.locator("#perturb-cell").inner_text()

    # Its genes are suggested by symbol, though only token ids came with the answer.
    ids = cells[30]["input_ids"]
    symbols = [SYMBOLS[site.vocabulary.names[token]] for token in ids[1:]]
    page.locator("#cell-genes option").first.wait_for(state="attached")
    assert page.locator("#cell-genes option").evaluate_all("them => them.map(one => one.value)") == symbols
    add_genes(page, f"{symbols[0]}, {symbols[3].lower()}")
    page.get_by_role("button", name="Perturb", exact=True).click()
    page.locator("#perturb-result table").first.wait_for()
    assert {row[0] for row in rows_of(page.locator("#perturb-result table").first)} == {symbols[0], symbols[3]}


def test_perturbing_shows_the_services_ranking(site: Site, page: Page) -> None:
    classify_example(page, 0)
    stored = site.ask("/v1/examples")["cells"][0]
    page.locator("#gene-top").click()
    page.locator("#goal").select_option("beta")
    page.get_by_role("button", name="Perturb", exact=True).click()
    page.locator("#perturb-result table").first.wait_for()
    body = {"cell": {"input_ids": stored["input_ids"]}, "genes": stored["genes"], "goal": "beta", "affected_genes": 10}
    events = site.ask("/v1/perturb", body)["events"]
    rows = rows_of(page.locator("#perturb-result table").first)
    headings = page.locator("#perturb-result table").first.locator("thead th").all_inner_texts()
    assert [row[0] for row in rows] == ["+".join(event["symbols"]) for event in events]
    assert headings[:3] == ["Gene", "Moved (1 − cosine)", "Shift to beta"]
    np.testing.assert_allclose(
        [shown(row[1]) for row in rows], [1 - event["similarity"] for event in events], atol=6e-6
    )
    np.testing.assert_allclose(
        [shown(row[2]) for row in rows], [event["shifts"]["beta"] for event in events], atol=6e-6
    )
    change = headings.index("Change of p(beta)")
    np.testing.assert_allclose(
        [shown(row[change]) for row in rows], [event["probability_change"]["beta"] for event in events], atol=6e-5
    )
    affected = rows_of(page.locator("#perturb-result details").first.locator("table").nth(1))
    assert [row[:2] for row in affected] == [[one["symbol"], one["gene"]] for one in events[0]["affected_genes"]]


def test_an_error_says_what_is_taken(site: Site, browser: Browser) -> None:
    for page in watched(browser, site.url, expected="status of 422"):
        classify_example(page, 0)
        page.get_by_role("button", name="Perturb", exact=True).click()
        alert = page.locator("#perturb-error")
        assert "Takes: 1 to 30 genes" in alert.inner_text()
        add_genes(page, "SYM399")
        page.get_by_role("button", name="Perturb", exact=True).click()
        alert.filter(has_text="nearest: SYM39").wait_for()
        page.get_by_role("button", name="Remove SYM399").click()
        page.locator("#file").set_input_files(
            {"name": "broken.h5ad", "mimeType": "application/x-hdf5", "buffer": site.cells.read_bytes()[:2000]}
        )
        page.locator("#types-error .error").wait_for()
        assert "Takes:" in page.locator("#types-error").inner_text()
        assert page.locator("#gene").is_disabled()


def test_the_ranking_is_sorted_searched_and_paged(page: Page) -> None:
    result, status = page.locator("#ranking-result"), page.locator("#ranking-status")
    result.locator("table").wait_for()
    assert [row[1] for row in rows_of(result)[:3]] == ["SYM0", "SYM1", "SYM2"]
    assert rows_of(result)[12][3] == "1.0e−12"  # a small p-value keeps its order of magnitude
    page.get_by_role("navigation", name="Pages of the ranking").get_by_role("button", name="Next").click()
    result.get_by_role("cell", name="SYM25", exact=True).wait_for()
    heading = result.get_by_role("button", name="shift to beta")
    heading.click()
    status.filter(has_text="sorted by shift to beta").wait_for()
    assert result.locator("[aria-sort=descending]").inner_text().startswith("shift to beta")
    heading.click()
    result.locator("[aria-sort=ascending]").wait_for()
    assert rows_of(result)[0][1] == "SYM39"
    page.locator("#search").fill("sym1")
    page.get_by_role("button", name="Search").click()
    status.filter(has_text="11 rows with “sym1”").wait_for()


def test_the_keyboard_is_enough(page: Page) -> None:
    page.locator("#ranking-result table").wait_for()
    reached = list[str]()

    def tab_to(place: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            name = page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()")
            outline = page.evaluate(
                """() => {
                    const at = document.activeElement;
                    const shown = at.classList.contains("covered") ? at.parentElement.querySelector(".button") : at;
                    return getComputedStyle(shown).outlineStyle;
                }"""
            )
            assert outline != "none", f"{name} shows no focus"
            reached.append(name)
            if name == place:
                return
        raise AssertionError(f"{place} is not reached: {reached}")

    tab_to("Skip to content")
    page.keyboard.press("Enter")
    tab_to("file")
    tab_to("example")
    page.keyboard.press("ArrowDown")
    tab_to("example-go")
    page.keyboard.press("Enter")
    page.locator("#cell tbody tr").first.wait_for()
    assert "example beta" in page.locator("#types-status").inner_text()
    symbol = page.locator("#cell-genes option").first.get_attribute("value") or ""
    tab_to("gene")
    page.keyboard.type(symbol)
    page.keyboard.press("Enter")
    assert page.locator("#genes li").count() == 1
    tab_to("together")
    page.keyboard.press("Space")
    tab_to("Perturb")
    page.keyboard.press("Enter")
    page.locator("#perturb-result table").first.wait_for()
    assert page.locator("#perturb-status").inner_text().startswith("1 event")
    tab_to("search")
    page.keyboard.type("SYM7")
    page.keyboard.press("Enter")
    page.locator("#ranking-status").filter(has_text="1 row with").wait_for()


def test_everything_has_a_name_and_enough_contrast(page: Page) -> None:
    page.locator("#ranking-result table").wait_for()
    classify_example(page, 2)
    page.locator("#gene-top").click()
    page.get_by_role("button", name="Perturb", exact=True).click()
    page.locator("#perturb-result table").first.wait_for()
    # What a screen reader finds, by role, without a name: nothing.
    roles = "button|textbox|combobox|checkbox|link|searchbox|region|navigation|table"
    unnamed = re.findall(rf'^\s*- (?:{roles})\b(?! ").*$', page.locator("body").aria_snapshot(), re.MULTILINE)
    assert unnamed == []
    for landmark in ("banner", "main", "contentinfo"):
        assert page.get_by_role(landmark).count() == 1
    assert page.locator("h1").count() == 1
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate(LOW_CONTRAST) == []


LOW_CONTRAST = """() => {
    const channels = (text) => text.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
        .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
        .reduce((sum, c, at) => sum + c * [0.2126, 0.7152, 0.0722][at], 0);
    const ground = (element) => {
        for (let at = element; at; at = at.parentElement) {
            const found = channels(getComputedStyle(at).backgroundColor);
            if (found.length < 4 || found[3] > 0) return found;
        }
        return [255, 255, 255];
    };
    const low = [];
    for (const element of document.querySelectorAll("body *")) {
        const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
        if (!own || !element.checkVisibility() || element.matches(":disabled, :disabled *")) continue;
        const [a, b] = [light(channels(getComputedStyle(element).color)), light(ground(element))].sort((x, y) => y - x);
        const contrast = (a + 0.05) / (b + 0.05);
        if (contrast < 4.5) low.push(`${element.tagName} ${element.textContent.trim().slice(0, 30)}: ${contrast}`);
    }
    return low;
}"""


@pytest.mark.parametrize("width", [380, 640])  # a phone, and a window of 1280 pixels at 200 %
def test_it_fits_small_screens(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.locator("#ranking-result table").wait_for()
    classify_example(page, 3)
    page.locator("#gene-top").click()
    page.get_by_role("button", name="Perturb", exact=True).click()
    page.locator("#perturb-result table").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for button in ("#example-go", "#gene-add", "#perturb-form [type=submit]"):
        box = page.locator(button).bounding_box()
        assert box is not None and 0 <= box["x"] and box["x"] + box["width"] <= width


@contextmanager
def without_ray(directory: Path, keys: ApiKeys | None = None) -> Iterator[str]:
    """Serve a model in this process."""
    from serve.api import create_api
    from serve.settings import ServeSettings

    api = create_api(Direct(serve_directory(directory), ServeSettings.read({"model": str(directory)})), keys=keys)
    server = uvicorn.Server(uvicorn.Config(api, port=0, log_level="error", ws="none", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def test_a_key_is_asked_for_and_kept_in_memory_only(site: Site, browser: Browser) -> None:
    from serve.keys import ApiKeys

    with without_ray(site.directory, ApiKeys(KEY)) as url:
        # It is refused without the key; and this service has no ranking.
        for page in watched(browser, url, expected="Failed to load resource"):
            page.locator("#model-error .error").wait_for()
            assert page.evaluate("document.activeElement.id") == "key"
            page.keyboard.type(KEY)
            page.keyboard.press("Enter")
            page.locator("#model dl").wait_for()
            page.locator("#ranking-about").filter(has_text="without screen_results").wait_for()
            classify_example(page, 0)
            kept = page.evaluate("[localStorage.length, sessionStorage.length, document.cookie, location.href]")
            assert kept == [0, 0, "", f"{url}/"]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A model of several tasks, and cells whose classes differ."""
    folder = tmp_path_factory.mktemp("several")
    vocabulary = make_multitask(folder / "trunk", make_trunk(folder), folder / "islets", "first_gene")
    counts = np.random.default_rng(5).poisson(0.4, size=(30, 40)).astype(np.float32)
    counts[7] = 0
    obs = pd.DataFrame(index=[f"cell_{number}" for number in range(30)])
    adata = anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=GENES))
    adata.write_h5ad(folder / "cells.h5ad")
    with without_ray(folder / "islets") as url:
        yield Site(url, folder / "islets", vocabulary, folder / "cells.h5ad")


def headings_of(table: Locator) -> list[str]:
    return table.locator("thead th").all_inner_texts()


def test_every_task_of_an_example_is_shown(several: Site, browser: Browser) -> None:
    stored = several.ask("/v1/examples")["cells"][1]
    odds = offline_odds_by_task(several.directory, several.vocabulary, [np.array(stored["input_ids"])])
    for page in watched(browser, several.url, expected="status of 404"):  # it has no ranking
        page.locator("#model dl").wait_for()
        model = page.locator("#model").inner_text()
        assert classify_example(page, 1) == "beta: example beta"
        tables, said = page.locator("#cell table").all(), page.locator("#types-status").inner_text()
        assert len(tables) == len(TASKS)
        for (task, labels), table in zip(TASKS.items(), tables, strict=True):
            order = np.argsort(-odds[task][0])
            assert ", ".join(labels) in model and f"Task {task}" in model
            assert headings_of(table)[0] == task
            assert [row[0] for row in rows_of(table)] == [labels[number] for number in order]
            np.testing.assert_allclose([shown(row[2]) for row in rows_of(table)], odds[task][0][order], atol=6e-4)
            assert f"{task}: {labels[order[0]]}, probability" in said
            assert f"{task}: {labels[order[0]]}, probability" in page.locator("#perturb-cell").inner_text()

        page.locator("#gene-top").click()
        page.locator("#goal").select_option("sex: male")
        page.get_by_role("button", name="Perturb", exact=True).click()
        page.locator("#perturb-result table").first.wait_for()
        body = {"cell": {"input_ids": stored["input_ids"]}, "genes": stored["genes"], "goal": "sex: male"}
        events = several.ask("/v1/perturb", body)["events"]
        ranking = page.locator("#perturb-result table").first
        headings, rows = headings_of(ranking), rows_of(ranking)
        assert [row[0] for row in rows] == ["+".join(event["symbols"]) for event in events]
        towards = [event["shifts"]["sex: male"] for event in events]
        np.testing.assert_allclose([shown(row[2]) for row in rows], towards, atol=6e-6)
        for task, labels in TASKS.items():
            best = labels[odds[task][0].argmax()]
            changes = [event["tasks"][task]["probability_change"][best] for event in events]
            at = headings.index(f"Change of p({task}: {best})")
            np.testing.assert_allclose([shown(row[at]) for row in rows], changes, atol=6e-5)
        assert headings[2] == "Shift to sex: male" and "Change of p(sex: male)" in headings
        detail = page.locator("#perturb-result details").first.locator("table").all()
        assert [headings_of(table)[0] for table in detail] == [*TASKS, "Gene"]
        for (task, labels), table in zip(TASKS.items(), detail[:-1], strict=True):
            changed = {row[0]: [shown(row[3]), shown(row[4])] for row in rows_of(table)}
            change, shifts = events[0]["tasks"][task]["probability_change"], events[0]["shifts"]
            expected = {label: [change[label], shifts[f"{task}: {label}"]] for label in labels}
            assert changed.keys() == expected.keys()
            np.testing.assert_allclose([changed[label] for label in labels], list(expected.values()), atol=6e-5)

        page.set_viewport_size({"width": 380, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 380
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate(LOW_CONTRAST) == []


def test_every_task_of_a_file_is_shown_and_downloaded(several: Site, browser: Browser, tmp_path: Path) -> None:
    cells = httpx.post(
        f"{several.url}/v1/classify?top=9", content=several.cells.read_bytes(), timeout=60,
        headers={"Content-Type": "application/x-hdf5"},
    ).json()["cells"]  # fmt: skip
    answered = [cell for cell in cells if not cell["reason"]]
    for page in watched(browser, several.url, expected="status of 404"):
        page.locator("#gene-note").filter(has_text="up to").wait_for()
        page.locator("#file").set_input_files(several.cells)
        page.locator("#csv").wait_for()
        with page.expect_download() as download:
            page.locator("#csv").click()
        download.value.save_as(tmp_path / "cell_types.csv")
        *summaries, first = page.locator("#types-result table").all()[: len(TASKS) + 1]
        assert headings_of(first)[1:-2] == [part for task in TASKS for part in (task, "Probability")]
        for number, (task, summary) in enumerate(zip(TASKS, summaries, strict=True)):
            counted = {row[0]: int(row[1]) for row in rows_of(summary)}
            labels = pd.Series([cell["tasks"][task]["label"] for cell in answered])
            assert counted == labels.value_counts().to_dict() and len(counted) > 1
            column = [row[1 + 2 * number] for row in rows_of(first)]
            assert [text for at, text in enumerate(column) if at != 7] == [
                cell["tasks"][task]["label"] for at, cell in enumerate(cells[:25]) if at != 7
            ]
        assert "1 without an answer" in page.locator("#types-status").inner_text()
    with (tmp_path / "cell_types.csv").open(newline="") as file:
        saved = list(csv.DictReader(file))
    assert saved[7]["reason"] and not saved[7]["predicted_label_sex"]
    for row, cell in zip((row for row in saved if not row["reason"]), answered, strict=True):
        assert row["predicted_label"] == cell["label"]
        for task in TASKS:
            said = cell["tasks"][task]
            assert (row[f"predicted_label_{task}"], float(row[f"conf_score_{task}"])) == (
                said["label"], said["probability"],
            )  # fmt: skip
            assert {name["label"]: float(row[f"p_{task}: {name['label']}"]) for name in said["top"]} == {
                name["label"]: name["probability"] for name in said["top"]
            }
