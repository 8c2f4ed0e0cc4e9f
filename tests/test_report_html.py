"""The HTML report, opened in a browser: it draws what was measured, sorts, asks no network, and reports no error.

Skips, saying so, where playwright or chromium is absent.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrieval_kd.compare import compare, write_comparison
from retrieval_kd.evaluate.cost import Latency
from retrieval_kd.evaluate.per_query import Measured
from retrieval_kd.metrics import STANDARD
from retrieval_kd.report import System, write_report
from retrieval_kd.report_html import histogram_of, plot_of, point_of, table_of, write_html
from retrieval_kd.types import Collection, Hits, Queries

COUNT, DOCUMENTS = 40, 200
EVIL = "</script><script>document.title = 'taken'</script> <b>bold</b> & \u2028 end"
QUERIES = Queries(
    [f"q{n}" for n in range(COUNT)], [f"{EVIL} {n}" for n in range(COUNT)], [{n: 2, n + 50: 1} for n in range(COUNT)]
)
TEXTS = [f"document {n} {EVIL} " + "long " * 100 for n in range(DOCUMENTS)]
COLLECTION = Collection("beir/<tiny>", [f"d{n}" for n in range(DOCUMENTS)], TEXTS, {"test": QUERIES}, ["a <note>"])
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
FLAGS += ["--disable-sync", "--no-first-run"]


def system(seed: int, name: str, engine: str, **cost: Any) -> System:
    generator = np.random.default_rng(seed)
    rows = np.stack([generator.permutation(DOCUMENTS)[:60] for _ in range(COUNT)]).astype(np.int32)
    scores = -np.sort(-generator.normal(size=rows.shape).astype(np.float32), axis=1)
    rows[0, 50:], scores[0, 50:] = -1, -np.inf
    return System(name, engine, {metric: generator.random(COUNT) for metric in STANDARD}, Hits(rows, scores), **cost)


SYSTEMS = [
    system(0, "bm25", "bm25s"),
    system(1, "student", "onnx fp32", latency=Latency(2.4, 4.0, 40), parameters=15_600_000, bytes=62_800_000),
    system(2, "student-int8", "onnx int8", latency=Latency(0.94, 1.6, 40), parameters=9_600_000, bytes=16_500_000),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("html")
    write_report(folder, SYSTEMS, COLLECTION, "test", "bm25", {"recipe": "x.toml"})
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright (extra dev)")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs the program chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(written: Path, browser: Any) -> Iterator[Any]:
    page = opened(browser, written)
    yield page
    page.close()


def opened(browser: Any, path: Path) -> Any:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.problems, page.requests = [], []
    page.on("console", lambda message: page.problems.append(message.text))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto(path.as_uri())
    return page


def data_of(path: Path) -> Any:
    return json.loads(re.search(r'id="page">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)[1])


def column(page: Any, place: int) -> list[str]:
    return page.locator("#tables table").nth(0).locator(f"tbody tr td:nth-child({place})").all_inner_texts()


def test_no_error_and_no_network(page: Any, written: Path) -> None:
    assert page.problems == []
    assert [url for url in page.requests if not url.startswith("data:")] == [written.as_uri()]
    assert page.title() == "beir/<tiny>, test"
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", written.read_text(encoding="utf-8"))


def test_the_table_sorts_by_click_and_by_key(page: Any) -> None:
    heads = [head.strip() for head in page.locator("#tables th").all_inner_texts()]
    assert heads[:3] == ["system", "query engine", "nDCG@10"]
    assert "index MB" not in heads  # nobody has one
    names = [one.name for one in SYSTEMS]
    assert column(page, 1) == names
    ranked = sorted(names, key=lambda name: -SYSTEMS[names.index(name)].quality["nDCG@10"].mean())
    head = page.locator("#tables th").nth(2)
    head.locator("button").click()
    assert column(page, 1) == ranked
    assert head.get_attribute("aria-sort") == "descending"
    head.locator("button").press("Enter")
    assert column(page, 1) == ranked[::-1]
    latency = page.locator("#tables th").nth(heads.index("query p50 ms")).locator("button")
    latency.press("Space")
    assert column(page, 1) == ["student-int8", "student", "bm25"]  # the fastest first, and who was not timed last
    assert head.get_attribute("aria-sort") == "none"


def test_numbers_sort_as_numbers(tmp_path: Path, browser: Any) -> None:
    table = table_of("Numbers", ["n"], [[(9.0, "9")], [(10.0, "10")], [(None, "-")], [(-1.0, "-1")]])
    empty: dict[str, Any] = {"plots": [], "steps": None, "queries": None, "histograms": [], "lists": []}
    write_html(tmp_path / "page.html", {"title": "t", "subtitle": "", "tables": [table], **empty})
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    page.locator("#tables th button").click()
    assert column(page, 1) == ["10", "9", "-1", "-"]
    page.locator("#tables th button").click()
    assert column(page, 1) == ["-1", "9", "10", "-"]
    assert page.locator("section").count() == 2  # the table's, and that of the lists
    page.close()


def test_the_plots_show_every_system(page: Any) -> None:
    figures = page.locator("#plots figure")
    assert figures.locator("h3").all_inner_texts() == ["Quality against latency", "Quality against size"]
    assert figures.nth(0).locator("circle.point").count() == 2  # bm25 is a dashed line
    assert figures.nth(0).locator("svg text", has_text="bm25").count() == 1
    boxes = page.locator("#plots circle.point").evaluate_all("dots => dots.map(dot => dot.getBoundingClientRect().x)")
    assert boxes[0] > boxes[1]  # the slower one is further right
    assert page.locator("#histograms figure").count() == 3
    assert page.locator("#histograms rect.bar").count() == 3 * 2 * 30


def test_two_systems_are_compared_query_by_query(page: Any) -> None:
    ours, theirs = SYSTEMS[2].quality["nDCG@10"], SYSTEMS[0].quality["nDCG@10"]
    won, lost = (ours > theirs).sum(), (ours < theirs).sum()
    assert page.locator("#counts").inner_text() == f"B wins {won}, A wins {lost}, equal 0"
    assert page.locator("#scatter circle").count() == COUNT
    most = int(np.argmax(np.abs(ours - theirs)))
    first = page.locator("#queries details").nth(0)
    assert first.locator(".query").inner_text().endswith(f" {most}")
    first.locator("summary").focus()
    first.locator("summary").press("Enter")
    detail = first.locator(".detail")
    detail.wait_for()
    assert detail.locator("li").count() == 2 + 3 + 3
    assert detail.locator("li").nth(0).inner_text().startswith(f"d{most}: document {most} </script>")
    assert detail.locator("li").nth(0).inner_text().endswith("…")
    best = SYSTEMS[0].hits.rows[most, :3].tolist()
    assert [text.split(":")[0] for text in detail.locator("ol").nth(0).locator("li").all_inner_texts()] == [
        f"d{row}" for row in best
    ]
    page.select_option("#which", "win")
    assert page.locator("#queries .loss").count() == 0
    page.select_option("#system-a", "2")
    assert page.locator("#counts").inner_text() == f"B wins 0, A wins 0, equal {COUNT}"
    page.select_option("#system-a", "0")
    page.select_option("#which", "differ")
    assert page.problems == []


def test_light_and_dark_differ(page: Any) -> None:
    seen = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        seen.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    page.emulate_media(color_scheme="light")
    assert seen == ["rgb(255, 255, 255)", "rgb(22, 24, 26)"]


def test_the_page_holds_the_numbers_of_the_report(written: Path) -> None:
    page, report = data_of(written), json.loads((written.parent / "report.json").read_text(encoding="utf-8"))
    for place, (name, record) in enumerate(report["systems"].items()):
        (table,) = page["tables"]
        row = dict(zip([one["label"] for one in table["columns"]], table["rows"][place], strict=True))
        assert row["system"] == [name, name]
        assert row["nDCG@10"] == [record["nDCG@10"], f"{record['nDCG@10']:.3f}"]
        assert page["queries"]["values"]["MAP"][place] == [round(one, 4) for one in SYSTEMS[place].quality["MAP"]]
    assert page["queries"]["texts"][3].startswith(EVIL.replace("\u2028", " ")[:20])


def test_a_comparison_is_such_a_page(tmp_path: Path, browser: Any) -> None:
    measured = Measured(QUERIES.ids, {one.name: one.quality for one in SYSTEMS})
    found = compare(measured, "nDCG@10", rounds=500, facts={"collection": "<tiny>", "split": "test"})
    write_comparison(tmp_path / "compared.html", found, measured, QUERIES.texts)
    page = opened(browser, tmp_path / "compared.html")
    assert page.title() == "<tiny>, test"
    assert page.locator("#tables h2").all_inner_texts() == ["Systems", "Pairs"]
    ranked = list(found["systems"])
    assert column(page, 2) == ranked
    heads = page.locator("#tables table").nth(0).locator("th button")
    heads.nth(2).click()
    heads.nth(2).click()
    assert column(page, 2) == ranked[::-1]
    pairs = page.locator("#tables table").nth(1)
    pairs.locator("th button").nth(3).click()
    shown = pairs.locator("tbody tr td:nth-child(1)").all_inner_texts()
    by_p = sorted(found["pairs"], key=lambda pair: pair["adjusted_p"])
    assert shown == [f"{pair['first']}, {pair['second']}" for pair in by_p]
    best, second = (measured.systems[name]["nDCG@10"] for name in ranked[:2])
    assert page.locator("#counts").inner_text() == (
        f"B wins {(best > second).sum()}, A wins {(best < second).sum()}, equal 0"
    )
    first = page.locator("#queries details").nth(0)
    first.locator("summary").press("Enter")
    most = int(np.argmax(np.abs(best - second)))
    assert first.locator(".detail").inner_text() == f"Query q{most}"
    assert page.problems == []
    assert all(url.startswith(("file:", "data:")) for url in page.requests)
    page.close()


def test_a_histogram_is_numpy_s() -> None:
    hits = Hits(np.array([[0, 1, 2], [3, 4, -1]], np.int32), np.array([[3, 2, 1], [4, 0, -np.inf]], np.float32))
    queries = Queries(["a", "b"], ["", ""], [{0: 1, 9: 1}, {4: 1, 3: 0}])
    made = histogram_of("x", hits, queries)
    low, high = made["range"]
    assert (low, high) == pytest.approx((0, 4), abs=0.01)
    assert np.flatnonzero(made["relevant"]).tolist() == [0, int((3 - low) / (high - low) * 30)]
    assert sum(made["relevant"]) == pytest.approx(1)
    assert np.count_nonzero(made["other"]) == 3
    assert histogram_of("x", hits, Queries(["a", "b"], ["", ""])) is None
    assert histogram_of("x", hits, Queries(["a", "b"], ["", ""], [{9: 1}, {9: 1}])) is None


def test_a_page_without_numbers_that_json_lacks(tmp_path: Path) -> None:
    point = point_of("p", "g", float("nan"), None, 1.0)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_html(tmp_path / "page.html", {"plots": [plot_of("t", [point], "x", "y")]})
    assert not list(tmp_path.iterdir())
