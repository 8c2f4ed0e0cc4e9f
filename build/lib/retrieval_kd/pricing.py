"""The price of scores before they are paid for: how many questions are open, and what answering them takes.

Nothing is written. A teacher that runs here is timed on a sample of its open questions, whose answers are
thrown away; one behind an endpoint is not asked, since that costs money already: its earlier runs say what a question
takes, or the length of the texts does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.endpoint import Endpoint
from retrieval_kd.judgements import open_comparisons, open_rankings
from retrieval_kd.prompts import cut_words, windows
from retrieval_kd.sample import spread
from retrieval_kd.store.keys import first_of_each, text_keys
from retrieval_kd.store.store import Store
from retrieval_kd.teachers import Archive, Embedder, ListJudge, Metered, PairJudge, Reader, Teacher
from retrieval_kd.types import Hits, Side

TIMED_SECONDS = 0.5  # a sample that takes less is made larger
TOKENIZED = 1000  # questions whose tokens are counted
CHARACTERS_A_TOKEN = 4  # of English, roughly, where nobody says

Unit = Literal["pairs", "texts", "comparisons", "lists"]


@dataclass(frozen=True)
class Spent:
    """What a teacher's ledgers say was paid so far; `tokens` and `money` are None where no run counted them."""

    runs: int = 0
    pairs: int = 0
    texts: int = 0
    seconds: float = 0.0
    tokens: int | None = None
    money: float | None = None


@dataclass(frozen=True)
class Price:
    """What it takes to have every candidate scored by one teacher.

    `open` counts questions in their `unit`: pairs, texts to encode, comparisons of two documents, lists to rank. What
    nobody can say is None, and `notes` say where the numbers come from.
    """

    teacher: str
    kind: str
    pairs: int  # distinct ones
    stored: int | None  # of them; None where a judge's answers are no pairs
    unit: Unit
    open: int
    tokens: int | None = None
    seconds: float | None = None
    money: float | None = None
    spent: Spent = Spent()
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Open:
    """The open questions of a teacher: `ask` puts those at some places to it, `texts` are what it reads of them.

    `requests` are what an endpoint gets.
    """

    count: int
    requests: int
    ask: Callable[[Sequence[int]], object]
    texts: Callable[[Sequence[int]], list[tuple[list[str], list[str]]]]  # of each: queries, documents


def price(
    root: Path, name: str, teacher: Teacher, queries: Sequence[str], documents: Sequence[str], hits: Hits
) -> Price:
    """The price of scoring the pairs of `hits` (Q, K) that the teacher's store under `root` lacks."""
    kind = str(teacher.identity["kind"])
    store = Store.find(root, teacher.identity)
    keys = text_keys(teacher.render(queries, "query")), text_keys(teacher.render(documents, "document"))
    query_of, place = np.nonzero(hits.valid)
    left, right = keys[0][query_of], keys[1][hits.rows[query_of, place]]
    pairs = np.stack([query_of, hits.rows[query_of, place]], axis=1)[first_of_each(left, right)]
    counts: dict[str, Any] = {"teacher": name, "kind": kind, "pairs": len(pairs)}
    if isinstance(teacher, PairJudge | ListJudge):
        unit, questions = _judged(store, teacher, queries, documents, hits)
        rates = _rates(teacher, store, questions)
        return Price(**counts, stored=None, unit=unit, open=questions.count, spent=_spent([store]), **rates)
    found = np.zeros(len(pairs), np.bool_)
    if store is not None:
        _, found = store.find_scores(keys[0][pairs[:, 0]], keys[1][pairs[:, 1]])
    counts["stored"] = int(found.sum())
    missing = pairs[~found]
    if isinstance(teacher, Archive):
        note = ["read from its file; nothing is computed"] if len(missing) else []
        return Price(**counts, unit="pairs", open=len(missing), spent=_spent([store]), notes=note)
    if isinstance(teacher, Embedder):
        return _price_vectors(root, teacher, counts, queries, documents, missing, store)
    pairs_of_query = np.unique(keys[0][missing[:, 0]], return_counts=True)[1]
    requests = int(np.ceil(pairs_of_query / _option(teacher, "documents", 1)).sum())  # each about one query
    questions = _scored(teacher, queries, documents, missing, requests)
    rates = _rates(teacher, store, questions)
    return Price(**counts, unit="pairs", open=questions.count, spent=_spent([store]), **rates)


def _price_vectors(
    root: Path,
    teacher: Embedder,
    counts: dict[str, Any],
    queries: Sequence[str],
    documents: Sequence[str],
    missing: NDArray[np.int64],
    store: Store | None,
) -> Price:
    """An Embedder pays for the vectors of texts; the products cost nothing to speak of."""
    total, tokens, seconds = 0, 0, 0.0
    towers = []
    sides: tuple[tuple[Side, Sequence[str]], ...] = (("query", queries), ("document", documents))
    for column, (side, texts) in enumerate(sides):
        rendered = teacher.render([texts[place] for place in np.unique(missing[:, column])], side)
        rendered = list(dict.fromkeys(rendered))
        tower = Store.find(root, teacher.tower_identity(side))
        towers.append(tower)
        if tower is not None and rendered:
            _, found = tower.find_embeddings(text_keys(rendered))
            rendered = [text for text, has in zip(rendered, found, strict=True) if not has]
        if rendered:
            total += len(rendered)
            seconds += time_sample(len(rendered), partial(_embed, teacher, rendered, side))
            if isinstance(teacher, Reader):
                read = [rendered[place] for place in spread(len(rendered), TOKENIZED)]
                counted = teacher.count_tokens(*((read, []) if side == "query" else ([], read)))
                tokens += round(counted * len(rendered) / len(read))
    spent = _spent([store, *{str(tower.folder): tower for tower in towers if tower is not None}.values()])
    known = tokens if isinstance(teacher, Reader) else None
    notes = ["tokens and time from a sample of the texts"] if total else []
    return Price(**counts, unit="texts", open=total, tokens=known, seconds=seconds, spent=spent, notes=notes)


def _embed(teacher: Embedder, texts: Sequence[str], side: Side, places: Sequence[int]) -> object:
    return teacher.embed([texts[place] for place in places], side)


def _scored(
    teacher: Teacher,
    queries: Sequence[str],
    documents: Sequence[str],
    missing: NDArray[np.int64],
    requests: int,
) -> _Open:
    def texts(places: Sequence[int]) -> list[tuple[list[str], list[str]]]:
        chosen = missing[list(places)].tolist()
        left = teacher.render([queries[query] for query, _ in chosen], "query")
        right = teacher.render([documents[row] for _, row in chosen], "document")
        return [([query], [document]) for query, document in zip(left, right, strict=True)]

    def ask(places: Sequence[int]) -> object:
        read = texts(places)
        return teacher.score([query for (query,), _ in read], [document for _, (document,) in read])

    return _Open(len(missing), requests, ask, texts)


def _judged(
    store: Store | None, judge: PairJudge | ListJudge, queries: Sequence[str], documents: Sequence[str], hits: Hits
) -> tuple[Unit, _Open]:
    if isinstance(judge, PairJudge):
        asked = open_comparisons(store, judge, queries, documents, hits)

        def prefer(places: Sequence[int]) -> object:
            return judge.prefer(*(list(texts) for texts in zip(*(asked[place] for place in places), strict=True)))

        def compared(places: Sequence[int]) -> list[tuple[list[str], list[str]]]:
            both = (asked[place] for place in places)  # a language model is asked in both orders
            return [([query] * 2, [first, second, second, first]) for query, first, second in both]

        return "comparisons", _Open(len(asked), 2 * len(asked), prefer, compared)
    lists = open_rankings(store, judge, queries, documents, hits)

    def rank(places: Sequence[int]) -> object:
        return judge.rank([lists[place][0] for place in places], [lists[place][1] for place in places])

    def ranked(places: Sequence[int]) -> list[tuple[list[str], list[str]]]:
        read = []
        for place in places:
            query, texts = lists[place]
            inside = [text for start, end in plans[place] for text in texts[start:end]]  # in the order they come in
            read.append(([query] * len(plans[place]), inside))
        return read

    size, step = _option(judge, "window", judge.depth), _option(judge, "step", judge.depth)
    plans = [windows(len(texts), size, step) for _, texts in lists]
    return "lists", _Open(len(lists), sum(map(len, plans)), rank, ranked)


def _option(teacher: Teacher, name: str, default: Any) -> Any:
    """What a kind's options say, where it has options and this one is among them."""
    return getattr(getattr(teacher, "options", None), name, default)


def _rates(teacher: Teacher, store: Store | None, questions: _Open) -> dict[str, Any]:
    """Tokens, seconds and money of all open questions, and where they come from."""
    if not questions.count:
        return {"tokens": None, "seconds": 0.0, "money": None}
    endpoint = _option(teacher, "endpoint", None)
    if isinstance(endpoint, Endpoint):
        return _endpoint_rates(teacher, endpoint, _spent([store]), questions)
    before = teacher.usage.tokens if isinstance(teacher, Metered) else 0
    asked = 0

    def ask(places: Sequence[int]) -> object:
        nonlocal asked
        asked += len(places)
        return questions.ask(places)

    seconds = time_sample(questions.count, ask, 2 if isinstance(teacher, Metered) else 32)
    notes = ["tokens and time from a sample of the questions"]
    tokens = None
    if isinstance(teacher, Metered):
        tokens = round((teacher.usage.tokens - before) * questions.count / asked)
    elif isinstance(teacher, Reader):
        places = spread(questions.count, TOKENIZED)
        read = questions.texts(places)
        counted = teacher.count_tokens([query for (query,), _ in read], [document for _, (document,) in read])
        tokens = round(counted * questions.count / len(places))
    else:
        notes = ["time from a sample of the questions"]
    return {"tokens": tokens, "seconds": seconds, "money": None, "notes": notes}


def _endpoint_rates(teacher: Teacher, endpoint: Endpoint, spent: Spent, questions: _Open) -> dict[str, Any]:
    notes, seconds = [], None
    if spent.pairs:
        share = questions.count / spent.pairs
        seconds = spent.seconds * share
        notes.append("time from its earlier runs")
    else:
        notes.append("nobody knows the time before it was asked once")
    if spent.pairs and spent.tokens is not None:
        tokens = round(spent.tokens * share)
        notes.append("tokens from its earlier runs")
    else:
        places = spread(questions.count, TOKENIZED)
        words = _option(teacher, "document_words", None)
        read = questions.texts(places)
        length = sum(len(text) for left, right in read for text in [*left, *(cut_words(one, words) for one in right)])
        tokens = round(length / CHARACTERS_A_TOKEN * questions.count / len(places))
        notes.append("tokens as a quarter of the texts' characters, without the words of its prompt and its answers")
    if endpoint.requests_per_minute:
        seconds = max(seconds or 0.0, 60 * questions.requests / endpoint.requests_per_minute)
    if spent.pairs and spent.money is not None:
        return {"tokens": tokens, "seconds": seconds, "money": spent.money * share, "notes": [*notes, "money too"]}
    money = tokens * endpoint.input_price / 1e6 + questions.requests * endpoint.request_price
    if endpoint.output_price:
        notes.append("the price of its answers (output_price) is not counted")
    elif not money:
        notes.append("it has no price: give input_price, output_price or request_price")
    return {"tokens": tokens, "seconds": seconds, "money": money or None, "notes": notes}


def time_sample(count: int, ask: Callable[[Sequence[int]], object], size: int = 32) -> float:
    """Seconds that `count` questions take, from a sample at equal distances that is asked after a first one."""
    ask(spread(count, 2))  # loads, compiles, allocates
    while True:
        places = spread(count, size)
        began = perf_counter()
        ask(places)
        seconds = perf_counter() - began
        if seconds > TIMED_SECONDS or len(places) == count:
            return seconds * count / len(places)
        size *= 4


def _spent(kept: Sequence[Store | None]) -> Spent:
    entries = [entry for store in kept if store is not None for entry in store.ledger()]

    def total(key: str) -> Any:
        known = [entry[key] for entry in entries if entry.get(key) is not None]
        return sum(known) if known else None

    return Spent(
        runs=len(entries),
        pairs=total("pairs") or 0,
        texts=total("texts") or 0,
        seconds=round(total("seconds") or 0.0, 3),
        tokens=total("tokens"),
        money=total("money"),
    )
