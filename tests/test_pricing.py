"""The price of scores: what is open, what it takes, and that nothing is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_endpoint import FakeEndpoint, ok, serve
from test_judgements import Lists, Pairs
from tiny import collection_of, tiny_sentence_transformer
from toy import write_beir
from typer.testing import CliRunner

from retrieval_kd import cli, cli_pricing, pricing
from retrieval_kd.figures import ABSENT
from retrieval_kd.pricing import Price, price
from retrieval_kd.progress import console
from retrieval_kd.scoring import fill_scores
from retrieval_kd.store.store import Store
from retrieval_kd.tables import Component
from retrieval_kd.teachers import bi_encoder, load_teacher
from retrieval_kd.types import Hits

QUERIES = ["sort a list", "read a file", "sort a list"]  # the last is the first again
DOCUMENTS = ["list sort", "unsure", "open file", "lock", "list sort"]
HITS = Hits(
    np.array([[0, 1, 2], [3, 0, -1], [4, 2, 3]], np.int32),
    np.array([[3, 2, 1], [2, 1, -np.inf], [3, 2, 1]], np.float32),
)  # 8 pairs, of which 6 are distinct texts


class Fake:
    """Scores by length; has as many tokens as words; remembers what it is asked."""

    def __init__(self) -> None:
        self.identity = {"kind": "fake"}
        self.asked: list[tuple[str, str]] = []

    def render(self, texts: Sequence[str], side: str) -> list[str]:
        return [f"{side}: {text}" for text in texts]

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        pairs = list(zip(queries, documents, strict=True))
        self.asked += pairs
        return np.array([len(query) + len(document) for query, document in pairs], np.float32)

    def count_tokens(self, queries: Sequence[str], documents: Sequence[str]) -> int:
        return sum(len(text.split()) for text in [*queries, *documents])


def files(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in root.rglob("*")}


def test_what_is_stored_is_not_open_and_nothing_is_written(tmp_path: Path) -> None:
    teacher, root = Fake(), tmp_path / "store"
    first = price(root, "t", teacher, QUERIES, DOCUMENTS, HITS)
    assert (first.kind, first.pairs, first.stored, first.unit, first.open) == ("fake", 6, 0, "pairs", 6)
    words = [("sort a list", d) for d in ("list sort", "unsure", "open file", "lock")]
    words += [("read a file", d) for d in ("lock", "list sort")]
    assert first.tokens == sum(2 + len(query.split()) + len(document.split()) for query, document in words)
    assert first.seconds is not None
    assert first.seconds < 0.1
    assert (first.money, first.spent) == (None, pricing.Spent())
    assert not root.exists()
    fill_scores(root, "t", teacher, QUERIES[:1], DOCUMENTS, Hits(HITS.rows[:1], HITS.scores[:1]))
    teacher.asked.clear()
    before = files(root)
    second = price(root, "renamed", teacher, QUERIES, DOCUMENTS, HITS)
    assert files(root) == before
    assert (second.pairs, second.stored, second.open) == (6, 3, 3)
    assert set(teacher.asked) <= {(f"query: {query}", f"document: {document}") for query, document in words[3:]}
    assert (second.spent.runs, second.spent.pairs) == (1, 3)
    fill_scores(root, "t", teacher, QUERIES, DOCUMENTS, HITS)
    teacher.asked.clear()
    third = price(root, "t", teacher, QUERIES, DOCUMENTS, HITS)
    assert (third.stored, third.open, third.seconds, third.tokens, teacher.asked) == (6, 0, 0.0, None, [])


def test_time_is_that_of_a_sample(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """100 pairs at 10 ms each are a second, whatever the first call costs, and are not all asked."""
    clock = [0.0]
    monkeypatch.setattr(pricing, "perf_counter", lambda: clock[0])

    class Slow(Fake):
        def score(self, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
            clock[0] += 0.01 * len(queries) + (5.0 if not self.asked else 0.0)
            return super().score(queries, documents)

    monkeypatch.setattr(pricing, "TIMED_SECONDS", 0.1)
    teacher, documents = Slow(), [f"document {number}" for number in range(100)]
    hits = Hits(np.arange(100, dtype=np.int32)[None], np.zeros((1, 100), np.float32))
    found = price(tmp_path, "t", teacher, ["query"], documents, hits)
    assert found.seconds == pytest.approx(1.0)
    assert len(teacher.asked) == 2 + 32


def test_an_embedder_pays_for_texts(tmp_path: Path) -> None:
    tiny_sentence_transformer(tmp_path / "transformer").save(str(tmp_path / "model"))
    component = Component(kind="bi_encoder", model=str(tmp_path / "model"))
    teacher: Any = load_teacher(component, collection_of(DOCUMENTS))
    assert isinstance(teacher, bi_encoder.BiEncoder)
    root = tmp_path / "store"
    found = price(root, "t", teacher, QUERIES, DOCUMENTS, HITS)
    assert (found.pairs, found.stored, found.unit, found.open) == (6, 0, "texts", 2 + 4)
    tokenizer = teacher.towers.model.tokenizer
    texts = {*QUERIES, *DOCUMENTS}
    assert found.tokens == sum(len(tokenizer(text)["input_ids"]) for text in texts)
    assert not root.exists()
    fill_scores(root, "t", teacher, QUERIES[:1], DOCUMENTS, Hits(HITS.rows[:1], HITS.scores[:1]))
    again = price(root, "t", teacher, QUERIES, DOCUMENTS, HITS)
    assert (again.stored, again.open) == (3, 2)  # the second query, and "lock"
    assert again.spent.texts == 4
    assert again.spent.pairs == 3


@pytest.mark.parametrize(("judge", "unit", "count"), [(Pairs(), "comparisons", 4), (Lists(), "lists", 2)])
def test_judges_ask_what_they_will_ask(judge: Any, unit: str, count: int, tmp_path: Path) -> None:
    """The open questions are those that `fill_scores` puts."""
    from test_judgements import DOCUMENTS, HITS, QUERIES

    found = price(tmp_path / "store", "j", judge, QUERIES, DOCUMENTS, HITS)
    assert (found.unit, found.open, found.stored) == (unit, count, None)
    assert not (tmp_path / "store").exists()
    asked = type(judge)()
    fill_scores(tmp_path / "store", "j", asked, QUERIES, DOCUMENTS, HITS)
    assert len(asked.asked if isinstance(asked, Pairs) else asked.seen) == count
    after = price(tmp_path / "store", "j", type(judge)(broken=True), QUERIES, DOCUMENTS, HITS)
    assert (after.open, after.seconds, after.spent.pairs) == (0, 0.0, count)


@pytest.fixture
def endpoint() -> Any:
    def reply(path: str, body: Any) -> Any:
        results = [{"index": place, "relevance_score": 1.0} for place in range(len(body["documents"]))]
        return ok({"results": results, "usage": {"total_tokens": 30}})

    with serve(reply) as served:
        yield served


@pytest.mark.parametrize(("together", "requests"), [(32, 2), (4, 2), (3, 3), (1, 6)])
def test_an_endpoint_is_not_asked(endpoint: FakeEndpoint, tmp_path: Path, together: int, requests: int) -> None:
    """First by the length of the texts and the prices, then by what earlier runs took.

    A request holds documents of one query alone: of four and of two pairs here.
    """
    settings = {"url": endpoint.url, "input_price": 2.0, "request_price": 0.5, "requests_per_minute": 6000}
    component = Component(kind="rerank_endpoint", model="m", endpoint=settings, documents=together)
    teacher = load_teacher(component, collection_of(DOCUMENTS))
    found = price(tmp_path, "r", teacher, QUERIES, DOCUMENTS, HITS)
    pairs = [("sort a list", d) for d in ("list sort", "unsure", "open file", "lock")]
    pairs += [("read a file", d) for d in ("lock", "list sort")]
    tokens = round(sum(len(query + document) for query, document in pairs) / 4)
    assert found.tokens == tokens
    assert found.money == pytest.approx(tokens * 2e-6 + requests * 0.5)
    assert found.seconds == pytest.approx(requests * 60 / 6000)
    assert any("characters" in note for note in found.notes)
    assert endpoint.asked == []
    store = Store.open(tmp_path, "r", teacher.identity)
    store.record(pairs=12, texts=0, tokens=600, seconds=6.0, money=1.2)
    later = price(tmp_path, "r", teacher, QUERIES, DOCUMENTS, HITS)
    assert (later.tokens, later.money, later.seconds) == (300, pytest.approx(0.6), pytest.approx(3.0))
    assert (later.spent.tokens, later.spent.money, later.spent.runs) == (600, 1.2, 1)
    assert endpoint.asked == []


def test_a_language_model_compares_in_both_orders(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    """Of three, two and three documents; the pair of the first query that its copy has too is asked once."""
    settings = {"url": endpoint.url, "input_price": 2.0, "output_price": 1.0, "request_price": 0.5}
    judge = load_teacher(Component(kind="llm_pairwise", model="m", endpoint=settings), collection_of(DOCUMENTS))
    found = price(tmp_path, "p", judge, QUERIES, DOCUMENTS, HITS)
    asked = [("sort a list", "list sort", "unsure"), ("sort a list", "list sort", "open file")]
    asked += [("sort a list", "unsure", "open file"), ("read a file", "lock", "list sort")]
    asked += [("sort a list", "list sort", "lock"), ("sort a list", "open file", "lock")]
    assert (found.unit, found.open, found.stored) == ("comparisons", 6, None)
    assert found.tokens == round(2 * sum(len("".join(texts)) for texts in asked) / 4)
    assert found.money == pytest.approx(found.tokens * 2e-6 + 12 * 0.5)
    assert any("output_price" in note for note in found.notes)
    assert endpoint.asked == []


def test_a_language_model_ranks_by_windows(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    """Windows of two that move by one: two over each list of three documents, one over that of two."""
    settings = {"url": endpoint.url, "input_price": 2.0, "request_price": 0.5, "requests_per_minute": 60}
    component = Component(kind="llm_listwise", model="m", endpoint=settings, window=2, step=1)
    found = price(tmp_path, "l", load_teacher(component, collection_of(DOCUMENTS)), QUERIES, DOCUMENTS, HITS)
    read = ["sort a list", "unsure", "open file", "sort a list", "list sort", "unsure", "read a file", "lock"]
    read += ["list sort", "sort a list", "open file", "lock", "sort a list", "list sort", "open file"]
    assert (found.unit, found.open, found.stored) == ("lists", 3, None)
    assert found.tokens == round(len("".join(read)) / 4)
    assert found.money == pytest.approx(found.tokens * 2e-6 + 5 * 0.5)
    assert found.seconds == pytest.approx(5)
    assert endpoint.asked == []


def test_what_is_unknown_is_shown_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    console.quiet = False
    cli_pricing.show([Price("j", "pairs", pairs=1234, stored=None, unit="lists", open=7, seconds=7200.0)], False)
    shown = capsys.readouterr().out
    assert f"1,234 │ {ABSENT} " in shown
    assert "in all 2 hours" in shown


def test_the_command_prints_a_table_and_writes_nothing(tmp_path: Path) -> None:
    qrels = {0: {0: 1}, 1: {2: 1}}
    write_beir(tmp_path / "toy", DOCUMENTS, QUERIES, {"train": qrels, "test": qrels})
    tiny_sentence_transformer(tmp_path / "transformer").save(str(tmp_path / "model"))
    (tmp_path / "recipe.toml").write_text(
        f"""
        data = {{ collection = "{tmp_path / "toy"}" }}
        student = {{ kind = "dense", model = "{tmp_path / "model"}" }}
        [[teachers]]
        name = "lexical"
        kind = "bm25"
        [[teachers]]
        name = "later"
        kind = "cross_encoder"
        trained_by = "other.toml"
        """
    )
    out = ["--out", str(tmp_path / "work/toy")]

    def rkd(*arguments: str) -> Any:
        console.quiet = False
        return CliRunner().invoke(cli.app, [*arguments, *out], env={"COLUMNS": "200"})

    recipe = str(tmp_path / "recipe.toml")
    early = rkd("score", recipe, "--dry-run")
    assert "run `rkd mine" in str(early.exception)
    assert not (tmp_path / "work").exists()
    rkd("mine", recipe, "-q")
    before = files(tmp_path)
    untrained = rkd("score", recipe, "--dry-run")
    assert "'later' is trained by" in str(untrained.exception)
    assert files(tmp_path) == before
    text = Path(recipe).read_text()
    Path(recipe).write_text(text[: text.index("[[teachers]]", text.index("lexical"))])
    before = files(tmp_path)
    done = rkd("score", recipe, "--dry-run")
    assert done.exit_code == 0, done.output
    assert "lexical" in done.stdout
    assert "nothing" in done.stdout
    found = json.loads(rkd("score", recipe, "--dry-run", "--json").stdout.splitlines()[-1])["teachers"]
    assert files(tmp_path) == before
    (one,) = found
    assert (one["teacher"], one["stored"], one["spent"]["runs"]) == ("lexical", 0, 0)
    assert one["open"] == one["pairs"] > 0
    assert set(Price.__dataclass_fields__) <= set(one)
    for option in (["--processes", "2"], ["--engine-cluster", "ray"]):
        assert "leave --processes" in str(rkd("score", recipe, "--dry-run", *option).exception)
    console.quiet = False
