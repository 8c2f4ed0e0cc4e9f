"""The page at /, in a browser without a screen: search, overlap, keyboard, the key, and nothing from elsewhere."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import DOCUMENTS, dense_run, running, sparse_run

from retrieval_kd.server import create_app, load_bm25, load_model

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
FLAGS += ["--disable-sync", "--no-first-run"]


@pytest.fixture(scope="module")
def runs(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    dense_run(folder / "tiny", exported)
    sparse_run(folder / "free", exported)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield launched
        launched.close()


def opened(browser: Any, address: str) -> tuple[Any, list[str], list[str]]:
    """A page, the addresses that it asks, and its errors."""
    page = browser.new_page(viewport={"width": 1180, "height": 820})
    asked: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    return page, asked, errors


def ids(page: Any, side: str) -> list[str]:
    items = page.locator(f"section[aria-label='Results on the {side}'] li[tabindex]")
    return [item.get_attribute("data-id") for item in items.all()]


def test_two_systems_side_by_side(browser: Any, runs: Path, tmp_path: Path) -> None:
    models = [load_model(str(runs / "tiny"), "fp32"), load_model(str(runs / "free")), load_bm25(str(runs / "tiny"))]
    with running(create_app(models)) as address:
        page, asked, errors = opened(browser, address)
        page.wait_for_selector("text=3 systems, 5 documents.")
        assert page.evaluate("document.activeElement.id") == "query"
        selects = page.locator("section select")
        assert [selects.nth(place).input_value() for place in (0, 1)] == ["bm25", "tiny"]
        page.keyboard.type("open a file")
        page.keyboard.press("Enter")
        page.wait_for_selector("li.both")
        left, right = ids(page, "left"), ids(page, "right")
        assert (left[0], right[0]) == ("open", "open")
        assert sorted(right) == sorted(DOCUMENTS)
        shared = [name for name in left if name in right]
        assert f"{len(shared)} of 5 documents in both lists, the first is the same." in page.inner_text("#summary")
        assert page.locator("li.both").count() == 2 * len(shared)
        assert "ms" in page.locator(".took").first.inner_text()
        marks = page.locator("section:nth-of-type(2) li").first.locator("mark")
        assert marks.all_inner_texts() == ["open", "file"]
        page.keyboard.press("ArrowDown")  # into the first list
        assert page.evaluate("document.activeElement.dataset.id") == "open"
        assert page.locator("section:nth-of-type(2) li.twin").get_attribute("data-id") == "open"
        page.keyboard.press("ArrowRight")  # the same document on the other side
        assert page.evaluate("document.activeElement.closest('section').ariaLabel") == "Results on the right"
        page.keyboard.press("ArrowDown")
        assert page.evaluate("document.activeElement.dataset.id") == right[1]
        page.keyboard.press("Enter")
        assert page.locator("li.open").get_attribute("data-id") == right[1]
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.id") == "query"
        selects.nth(0).select_option("free")
        page.wait_for_selector("section:first-of-type li:nth-child(2)")
        assert "left=free" in page.url
        assert len(ids(page, "left")) > len(left)  # the table knows the word "a", which BM25 leaves out
        page.screenshot(path=os.environ.get("RKD_SCREENSHOT", str(tmp_path / "page.png")), full_page=True)
        assert (tmp_path / "page.png").is_file() or "RKD_SCREENSHOT" in os.environ
        assert errors == []
        assert all(url.startswith(address) for url in asked if not url.startswith("data:"))
        page.goto("about:blank")
        page.goto(f"{address}/#q=date&left=tiny&right=free")  # a link to a comparison
        page.wait_for_selector("li[data-id=date]")
        assert [selects.nth(place).input_value() for place in (0, 1)] == ["tiny", "free"]
        page.close()


def test_one_system_and_a_text_that_looks_like_a_page(browser: Any, exported: Path, tmp_path: Path) -> None:
    """Texts are shown, never run."""
    run = dense_run(tmp_path / "tiny", exported)
    documents = run / "index/documents.jsonl"
    evil = "<img src=x onerror='document.title=1'><b>date</b>"
    documents.write_text(documents.read_text().replace('"text": "date"', f'"text": "{evil}"'))
    with running(create_app([load_model(str(run))])) as address:
        page, _, errors = opened(browser, address)
        page.wait_for_selector("text=One system")
        page.fill("#query", "date")
        page.click("button")
        page.wait_for_selector("li[tabindex]")
        assert page.locator("section").count() == 1
        assert evil in page.inner_text("ol")
        assert page.locator("li img").count() == 0
        assert page.title().startswith("Side by side")
        assert errors == []
        page.close()


def test_the_key_is_asked_for(browser: Any, runs: Path) -> None:
    with running(create_app([load_model(str(runs / "tiny"))], api_key="secret")) as address:
        page, _, _ = opened(browser, address)
        page.wait_for_selector("#key-row.shown")
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#summary.bad >> text=Send the API key")
        assert page.locator("section").count() == 0
        page.fill("#key", "secret")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=One system, 5 documents.")
        assert page.locator("section").count() == 1
        assert page.locator("#key-row.shown").count() == 0
        page.close()
