"""Language models that put a list in order, window by window from its end to its beginning."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from retrieval_kd.language_model import LanguageModel, LanguageModelOptions, open_model
from retrieval_kd.prompts import Prompt, check_template, cut_words, fill_template, read_ranking, windows
from retrieval_kd.tables import Positive
from retrieval_kd.targets import RankScore, rank_to_score
from retrieval_kd.types import InputError
from retrieval_kd.usage import Interrupted

# The words of RankGPT, Sun et al. 2023, arXiv:2304.09542, in one message, as RankZephyr reads them (arXiv:2312.02724).
SYSTEM = "You are RankGPT, an intelligent assistant that can rank passages based on their relevancy to the query."
PROMPT = (
    "I will provide you with {count} passages, each indicated by a numerical identifier []. Rank the passages based on "
    "their relevance to the search query: {query}.\n\n{documents}\n\nSearch Query: {query}.\nRank the {count} passages "
    "above based on their relevance to the search query. All the passages should be included and listed using "
    "identifiers, in descending order of relevance. The output format should be [] > [], e.g., [2] > [1]. Only respond "
    "with the ranking results, do not say any word or explain."
)


class Options(LanguageModelOptions):
    """Which model, what it is asked, and how scores are made of its ranks.

    The `depth` best candidates of a query, in the order in which they come in, are ranked.
    """

    system: str = SYSTEM
    prompt: str = PROMPT  # with {query}, {documents} and, if wanted, {count}
    window: Annotated[int, Field(ge=2)] = 20
    step: Positive = 10
    max_tokens: Positive = 256  # of an answer
    depth: Positive = 100
    scores: RankScore = "reciprocal"

    @model_validator(mode="after")
    def _fits(self) -> Options:
        check_template(self.prompt, ["query", "documents"])
        if self.step >= self.window:
            raise ValueError(f"step = {self.step} must be less than window = {self.window}, so that windows overlap")
        return self


class LLMListwise:
    """Ranks by permutations in words: `[3] > [1] > [2]`."""

    def __init__(self, options: Options, model: LanguageModel) -> None:
        self.options = options
        self.model = model
        self.usage = model.usage
        self.chunk = model.at_once

    @property
    def depth(self) -> int:
        return self.options.depth

    @property
    def identity(self) -> dict[str, Any]:
        asked = self.options.model_dump(include={"system", "prompt", "window", "step", "max_tokens", "document_words"})
        return {"kind": "llm_listwise", **asked, **self.model.identity}

    @property
    def conversion(self) -> dict[str, Any]:
        return self.options.model_dump(include={"depth", "scores"})

    def render(self, texts: Sequence[str], side: str) -> list[str]:
        return list(texts)

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        """An InputError: it ranks lists, so that one document alone has no score."""
        raise InputError("an llm_listwise teacher ranks the candidates of a query; it scores no single pair.")

    def rank(self, queries: Sequence[str], lists: Sequence[Sequence[str]]) -> list[NDArray[np.int64] | None]:
        """The order of each list, best first, as places in it; None if an answer of any window names no document.

        All lists move on by one window at a time, so that a model answers for several at once.
        """
        plans = [windows(len(list_), self.options.window, self.options.step) for list_ in lists]
        orders: dict[int, NDArray[np.int64] | None] = {
            number: np.arange(len(list_), dtype=np.int64) for number, list_ in enumerate(lists)
        }
        for turn in range(max(map(len, plans), default=0)):
            active = [number for number, plan in enumerate(plans) if turn < len(plan) and orders[number] is not None]
            asked = [
                self._ask(queries[number], [lists[number][place] for place in _window(orders, number, plans, turn)])
                for number in active
            ]
            try:
                texts = self.model.complete(asked, self.options.max_tokens)
            except Interrupted as stop:
                self._move(orders, plans, turn, [active[place] for place in stop.places], stop.answers)
                answered = {active[place] for place in stop.places}
                done = [
                    number
                    for number, plan in enumerate(plans)
                    if orders[number] is None or len(plan) <= turn + (number in answered)
                ]
                raise Interrupted(str(stop), done, [orders[number] for number in done]) from None
            self._move(orders, plans, turn, active, texts)
        return [orders[number] for number in range(len(lists))]

    def score_ranks(self, ranks: NDArray[np.float64]) -> NDArray[np.float32]:
        """Scores for ranks from 1."""
        return rank_to_score(ranks, self.options.scores).astype(np.float32)

    def _ask(self, query: str, documents: Sequence[str]) -> Prompt:
        # identifiers inside a passage would be taken for the passage's own
        read = [re.sub(r"\[(\d+)\]", r"(\1)", cut_words(text, self.options.document_words)) for text in documents]
        values = {"query": query, "count": str(len(read))}
        return fill_template(self.options.prompt, values, {"documents": read}, self.options.system)

    def _move(
        self,
        orders: dict[int, NDArray[np.int64] | None],
        plans: Sequence[Sequence[tuple[int, int]]],
        turn: int,
        numbers: Sequence[int],
        texts: Sequence[str | None],
    ) -> None:
        """Put the answers of one turn into the orders of the lists `numbers`."""
        for number, text in zip(numbers, texts, strict=True):
            inside = _window(orders, number, plans, turn)
            order = None if text is None else read_ranking(text, len(inside))
            if order is None:
                if text is not None:
                    self.usage.note(text)
                orders[number] = None
            else:
                inside[:] = inside[order]


def _window(
    orders: dict[int, NDArray[np.int64] | None], number: int, plans: Sequence[Sequence[tuple[int, int]]], turn: int
) -> NDArray[np.int64]:
    """The part of a list's order that its window of this turn covers, as a view."""
    order = orders[number]
    assert order is not None, "a list without an answer is not asked again"
    start, end = plans[number][turn]
    return order[start:end]


def load(options: Options, collection: object) -> LLMListwise:
    """Make the teacher; the model is loaded, or its endpoint asked, when first needed."""
    return LLMListwise(options, open_model(options))
