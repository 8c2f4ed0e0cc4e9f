"""Judges through the store: no question is asked twice, and scores are made of what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_endpoint import Reply, chat_answer, ok, serve
from tiny import collection_of

from retrieval_kd import answers, judgements
from retrieval_kd import endpoint as endpoint_module
from retrieval_kd.progress import console
from retrieval_kd.scoring import fill_scores, find_preferences
from retrieval_kd.store.store import Store
from retrieval_kd.tables import Component
from retrieval_kd.targets import bradley_terry
from retrieval_kd.teachers import load_teacher, scored_as
from retrieval_kd.types import Hits, InputError
from retrieval_kd.usage import Interrupted, Usage

QUERIES = ["q1", "q2", "q1"]  # the last is the first again
DOCUMENTS = ["3 c", "1 a", "2 b", "0 z", "1 a"]
HITS = Hits(
    np.array([[0, 1, 2], [3, 1, 4], [0, 1, 2]], np.int32),
    np.array([[0.0, 1.0, 0.5], [1.0, 0.5, 0.2], [0.0, 1.0, 0.5]], np.float32),
)


def strength(document: str) -> int:
    return int(document.split()[0])


class Pairs:
    """Prefers the document with the higher number, 0.9 to 0.1; has no answer about "0 z"."""

    def __init__(self, stop_after: int | None = None, broken: bool = False, depth: int = 99) -> None:
        self.identity = {"kind": "pairs"}
        self.conversion = {"depth": depth}
        self.stop_after, self.broken, self.depth = stop_after, broken, depth
        self.asked: list[tuple[str, str, str]] = []
        self.usage, self.chunk = Usage(), 2

    def render(self, texts: Sequence[str], side: str) -> list[str]:
        return list(texts)

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        raise AssertionError("asked for single pairs")

    def choose_pairs(self, query: str, count: int) -> np.ndarray:
        return np.stack(np.triu_indices(min(count, self.depth), 1), axis=1)

    def prefer(self, queries: Sequence[str], first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        assert not self.broken, "asked again"
        triples = list(zip(queries, first, second, strict=True))
        room = len(triples) if self.stop_after is None else self.stop_after - len(self.asked)
        self.asked += triples[:room]
        self.usage.input_tokens += 10 * len(triples[:room])
        self.usage.money += 0.5 * len(triples[:room])
        answers = [np.nan if "0 z" in t else 0.9 if strength(t[1]) > strength(t[2]) else 0.1 for t in triples[:room]]
        if room < len(triples):
            raise Interrupted("the budget is spent", range(room), answers)
        return np.array(answers, np.float32)

    def score_list(self, preference: np.ndarray) -> np.ndarray:
        return bradley_terry(preference).astype(np.float32)


class Lists:
    """Ranks by the numbers, highest first; has no answer for a list that holds "0 z"."""

    def __init__(self, stop_after: int | None = None, broken: bool = False, depth: int = 99) -> None:
        self.identity = {"kind": "lists"}
        self.conversion = {"depth": depth}
        self.stop_after, self.broken, self.depth = stop_after, broken, depth
        self.seen: list[list[str]] = []
        self.usage, self.chunk = Usage(), 1

    def render(self, texts: Sequence[str], side: str) -> list[str]:
        return list(texts)

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        raise AssertionError("asked for single pairs")

    def rank(self, queries: Sequence[str], lists: Sequence[Sequence[str]]) -> list[np.ndarray | None]:
        assert not self.broken, "asked again"
        room = len(lists) if self.stop_after is None else self.stop_after - len(self.seen)
        self.seen += [list(one) for one in lists[:room]]
        orders = [
            None if "0 z" in one else np.argsort([-strength(text) for text in one], kind="stable")
            for one in lists[:room]
        ]
        if room < len(lists):
            raise Interrupted("the budget is spent", range(room), orders)
        return orders

    def score_ranks(self, ranks: np.ndarray) -> np.ndarray:
        return (1 / ranks).astype(np.float32)


def fill(root: Path, judge: Any, hits: Hits = HITS, queries: Sequence[str] = QUERIES) -> np.ndarray:
    return fill_scores(root, "judge", judge, queries, DOCUMENTS, hits)


def test_pairs_are_asked_once_in_the_order_of_the_candidates(tmp_path: Path) -> None:
    judge = Pairs()
    scores = fill(tmp_path, judge)
    assert judge.asked == [
        ("q1", "1 a", "2 b"),  # by candidate score, not by place: the positive in front has 0
        ("q1", "1 a", "3 c"),
        ("q1", "2 b", "3 c"),
        ("q2", "0 z", "1 a"),  # two candidates of one text are one document
    ]
    matrix = np.array([[np.nan, 0.9, 0.9], [np.nan, np.nan, 0.1], [np.nan] * 3])  # 3 c, 1 a, 2 b
    np.testing.assert_allclose(scores[0], bradley_terry(matrix), atol=1e-5)
    np.testing.assert_array_equal(scores[2], scores[0])
    assert np.isnan(scores[1]).all()
    np.testing.assert_array_equal(fill(tmp_path, Pairs(broken=True)), scores)  # no answer is an answer too
    store = Store.open(tmp_path, "judge", judge.identity)
    assert store.count("preferences") == 4
    assert store.count("scores") == 0
    entries = [{key: entry[key] for key in ("pairs", "tokens", "money")} for entry in store.ledger()]
    assert entries == [{"pairs": 4, "tokens": 40, "money": 2.0}]


def test_stored_preferences_count_whichever_stands_first(tmp_path: Path) -> None:
    fill(tmp_path, Pairs())
    turned = Hits(HITS.rows, (1 - HITS.scores).astype(np.float32))
    np.testing.assert_allclose(fill(tmp_path, Pairs(broken=True), turned), fill(tmp_path, Pairs()), atol=1e-5)


def test_only_the_chosen_pairs_make_scores(tmp_path: Path) -> None:
    """What else is stored does not change what a recipe gets."""
    before = fill(tmp_path / "one", Pairs(depth=2))
    fill(tmp_path / "two", Pairs())
    np.testing.assert_array_equal(fill(tmp_path / "two", Pairs(depth=2, broken=True)), before)
    assert np.isnan(before[0]).tolist() == [True, False, False]


def test_preferences_are_found_for_training(tmp_path: Path) -> None:
    judge = Pairs()
    fill(tmp_path, judge)
    pairs, chances = find_preferences(tmp_path, "judge", judge, QUERIES, DOCUMENTS, HITS)
    got = {(*pair, round(float(p), 3)) for pair, p in zip(pairs[0].tolist(), chances[0], strict=True)}
    assert got == {(1, 2, 0.1), (1, 0, 0.1), (2, 0, 0.1)}
    assert np.isnan(chances[1]).all()
    lone = Hits(HITS.rows[1:2], HITS.scores[1:2])
    with pytest.raises(InputError, match="no stored preference among the candidates"):
        find_preferences(tmp_path, "judge", judge, QUERIES[1:2], DOCUMENTS, lone)


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_stopped_and_gone_on(stop_after: int, tmp_path: Path) -> None:
    """What was answered when the budget was spent is kept, in the middle of a chunk too."""
    with pytest.raises(Interrupted, match="the budget is spent"):
        fill(tmp_path, Pairs(stop_after=stop_after))
    judge = Pairs()
    np.testing.assert_array_equal(fill(tmp_path, judge), fill(tmp_path / "other", Pairs()))
    assert len(judge.asked) == 4 - stop_after
    ledger = Store.open(tmp_path, "judge", judge.identity).ledger()
    assert [entry["pairs"] for entry in ledger] == [stop_after, 4 - stop_after]
    assert [entry["tokens"] for entry in ledger] == [10 * stop_after, 40 - 10 * stop_after]


def test_lists_are_ranked_once(tmp_path: Path) -> None:
    judge = Lists()
    scores = fill(tmp_path, judge)
    assert judge.seen == [["1 a", "2 b", "3 c"], ["0 z", "1 a"]]
    np.testing.assert_array_equal(scores[0], np.array([1, 1 / 3, 1 / 2], np.float32))
    np.testing.assert_array_equal(scores[2], scores[0])
    assert np.isnan(scores[1]).all()
    np.testing.assert_array_equal(fill(tmp_path, Lists(broken=True)), scores)
    store = Store.open(tmp_path, "judge", judge.identity)
    assert store.count("rankings") == 1
    assert store.count("scores") == 2  # the list without an answer


def test_a_ranking_of_more_documents_answers_for_fewer(tmp_path: Path) -> None:
    fill(tmp_path, Lists())
    few = Hits(HITS.rows[:1, [0, 2]], HITS.scores[:1, [0, 2]])
    np.testing.assert_array_equal(fill(tmp_path, Lists(broken=True), few, QUERIES[:1]), [[1, 0.5]])
    one = Hits(np.array([[1, -1]], np.int32), np.array([[1, -np.inf]], np.float32))
    np.testing.assert_array_equal(fill(tmp_path, Lists(broken=True), one, QUERIES[:1]), [[1, -np.inf]])
    more = Hits(np.array([[0, 1, 2, 3]], np.int32), np.array([[4, 3, 2, 1]], np.float32))
    judge = Lists(depth=3)
    np.testing.assert_array_equal(
        fill(tmp_path, judge, more, QUERIES[:1]), np.array([[1, 1 / 3, 1 / 2, np.nan]], np.float32)
    )
    assert judge.seen == []
    judge = Lists()
    assert np.isnan(fill(tmp_path, judge, more, QUERIES[:1])).all()
    assert judge.seen == [["3 c", "1 a", "2 b", "0 z"]]


def test_lists_stopped_and_gone_on(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="the budget is spent"):
        fill(tmp_path, Lists(stop_after=1))
    judge = Lists()
    fill(tmp_path, judge)
    assert judge.seen == [["0 z", "1 a"]]


def test_no_candidates(tmp_path: Path) -> None:
    none = Hits(np.full((3, 2), -1, np.int32), np.full((3, 2), -np.inf, np.float32))
    for judge in (Pairs(broken=True), Lists(broken=True)):
        assert (fill(tmp_path, judge, none) == -np.inf).all()
        assert Store.open(tmp_path, "judge", judge.identity).ledger() == []


def test_a_conversion_is_part_of_what_scores_depend_on() -> None:
    assert scored_as(Pairs(depth=2)) != scored_as(Pairs(depth=3))
    bm25 = load_teacher(Component(kind="bm25"), collection_of(["a"]))
    assert scored_as(bm25) == [bm25.identity, None]


def test_what_had_no_answer_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "quiet", False)
    judge = Pairs()
    judge.usage.unread.append("As a language model")
    judge.usage.money = 1.0
    with console.capture() as capture:
        fill(tmp_path, judge)
    said = capture.get()
    assert "judge: 1 of 4 questions had no answer, but 'As a language model'; they are kept as such (NaN)" in said
    assert "judge: 40 tokens, 2.0000 in the currency of the prices" in said


def reply(path: str, body: Any) -> Reply:
    text = body["messages"][-1]["content"]
    if "2 b" in text:
        return ok(chat_answer("Sorry", {"Sorry": -0.1}, tokens=(100, 1)))
    return ok(chat_answer("yes", {"yes": -0.5, "no": -0.5 - strength(text.split("Document>: ")[1])}, tokens=(100, 1)))


def test_a_budget_stops_a_run_that_goes_on_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs that were paid for are never sent again; refusals are kept; the ledger has tokens and money."""
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT", 0.001)
    with serve(reply) as server:
        endpoint = {"url": server.url, "concurrency": 1, "input_price": 1.0, "output_price": 2.0}

        def teacher(**options: Any) -> Any:
            return load_teacher(Component(kind="llm_pointwise", model="m", endpoint={**endpoint, **options}), [])

        with pytest.raises(InputError, match="budget_tokens = 150 is spent"):
            fill(tmp_path, teacher(budget_tokens=150))
        assert len(server.asked) == 2
        scores = fill(tmp_path, teacher())
        assert len(server.asked) == 5  # of 9 places: five distinct pairs
        np.testing.assert_allclose(scores, [[3, 1, np.nan], [0, 1, 1], [3, 1, np.nan]], atol=1e-6)
        np.testing.assert_array_equal(fill(tmp_path, teacher()), scores)
        assert len(server.asked) == 5
        ledger = Store.open(tmp_path, "judge", teacher().identity).ledger()
    assert [(entry["pairs"], entry["tokens"]) for entry in ledger] == [(2, 202), (3, 303)]
    assert ledger[1]["money"] == pytest.approx((300 * 1 + 3 * 2) / 1e6)


def test_a_killed_server_leaves_what_it_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(answers, "COMMIT_SECONDS", 99.0)
    with serve(lambda path, body: reply(path, body) if "q1" in str(body) else (503, {}, "")) as server:
        endpoint = {"url": server.url, "concurrency": 1, "retries": 1}
        teacher: Any = load_teacher(Component(kind="llm_pointwise", model="m", endpoint=endpoint), [])
        teacher.chunk = 2
        with pytest.raises(InputError, match="status 503"):
            fill(tmp_path, teacher)
        assert len(server.asked) == 3 + 2  # nothing more is asked once one has failed twice
    store = Store.open(tmp_path, "judge", teacher.identity)
    assert store.count("scores") == 3
    assert [entry["pairs"] for entry in store.ledger()] == [3]


def test_pairwise_and_listwise_over_http(tmp_path: Path) -> None:
    """Both kinds from the recipe's table to scores, with an endpoint that goes by the numbers."""

    def judge(path: str, body: Any) -> Reply:
        text = body["messages"][-1]["content"]
        if "Passage A" in text:
            first, second = (strength(text.split(f'Passage {letter}: "')[1]) for letter in "AB")
            return ok(chat_answer("A", {"A": -1.0, "B": -1.0 - (first - second)}))
        strengths = [strength(text.split(f"\n[{place}] ")[1]) for place in range(1, text.count("\n[") + 1)]
        order = sorted(range(len(strengths)), key=lambda place: -strengths[place])
        return ok(chat_answer(" > ".join(f"[{place + 1}]" for place in order)))

    with serve(judge) as server:
        for kind in ("llm_pairwise", "llm_listwise"):
            component = Component(kind=kind, model="m", endpoint={"url": server.url})
            scores = fill(tmp_path, load_teacher(component, []))
            asked = len(server.asked)
            np.testing.assert_array_equal(fill(tmp_path, load_teacher(component, [])), scores)
            assert len(server.asked) == asked
            if kind == "llm_listwise":
                np.testing.assert_allclose(scores, [[1, 1 / 3, 1 / 2], [1 / 2, 1, 1], [1, 1 / 3, 1 / 2]], rtol=1e-6)
            else:  # odds are those of differences of strength, which Bradley-Terry gives back
                np.testing.assert_allclose(scores[0] - scores[0, 1], [2, 0, 1], atol=0.1)
                assert asked == 2 * 4


def test_chunks_are_the_judges_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sizes = []
    judge = Pairs()
    plain = judge.prefer
    monkeypatch.setattr(judge, "prefer", lambda *columns: (sizes.append(len(columns[0])), plain(*columns))[1])
    fill(tmp_path, judge)
    assert sizes == [2, 2]
    assert judgements.CHUNK == 64
