"""Language models that compare two documents at a time, each pair in both orders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from retrieval_kd.language_model import LanguageModel, LanguageModelOptions, open_model
from retrieval_kd.prompts import Prompt, check_template, cut_words, fill_template, read_choice
from retrieval_kd.store.keys import text_keys
from retrieval_kd.tables import Positive
from retrieval_kd.targets import bradley_terry
from retrieval_kd.types import InputError
from retrieval_kd.usage import Interrupted

# style -> prompt, (the first is better, the second is better)
STYLES: dict[str, tuple[str, tuple[str, str]]] = {
    # the words of PRP, Qin et al. 2023, arXiv:2306.17563, but for the last line: a letter is one token
    "prp": (
        'Given a query "{query}", which of the following two passages is more relevant to the query?\n\n'
        'Passage A: "{first}"\n\nPassage B: "{second}"\n\nAnswer with A or B alone.',
        ("A", "B"),
    ),
    # duoT5, Pradeep et al. 2021, arXiv:2101.05667
    "duo_t5": ("Query: {query} Document0: {first} Document1: {second} Relevant:", ("true", "false")),
}


class Options(LanguageModelOptions):
    """Which model, what it is asked, about which pairs, and how scores are made of its preferences.

    Of the `depth` best candidates of a query, in the order in which they come in, each pair is asked, or those
    at most `window` places apart, or `pairs` of these, drawn with `seed`.
    """

    style: Literal["prp", "duo_t5"] = "prp"
    system: str = ""
    prompt: str | None = None  # with {query}, {first} and {second}
    answers: tuple[str, str] | None = None  # the first is better, the second is better
    read: Literal["log_probabilities", "text"] = "log_probabilities"  # text: for endpoints that give no probabilities
    max_tokens: Positive = 8  # of an answer read as text
    depth: Positive = 20
    window: Positive | None = None
    pairs: Positive | None = None
    seed: int = 0
    scores: Literal["bradley_terry", "wins"] = "bradley_terry"

    @model_validator(mode="after")
    def _has_places(self) -> Options:
        check_template(self.prompt or STYLES[self.style][0], ["query", "first", "second"])
        return self


class LLMPairwise:
    """Prefers by the mean of both orders, which removes the liking for a position."""

    def __init__(self, options: Options, model: LanguageModel) -> None:
        prompt, answers = STYLES[options.style]
        self.options = options
        self.model = model
        self.prompt = options.prompt or prompt
        self.answers = options.answers or answers
        self.usage = model.usage
        self.chunk = 4 * model.at_once

    @property
    def identity(self) -> dict[str, Any]:
        options = self.options
        asked = {"system": options.system, "prompt": self.prompt, "document_words": options.document_words}
        read: dict[str, Any] = {"answers": self.answers, "read": options.read}
        if options.read == "text":
            read["max_tokens"] = options.max_tokens
        return {"kind": "llm_pairwise", **asked, **read, **self.model.identity}

    @property
    def conversion(self) -> dict[str, Any]:
        return self.options.model_dump(include={"depth", "window", "pairs", "seed", "scores"})

    def render(self, texts: Sequence[str], side: str) -> list[str]:
        return list(texts)

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        """An InputError: it compares documents, so that one alone has no score."""
        raise InputError("an llm_pairwise teacher compares the candidates of a query; it scores no single pair.")

    def choose_pairs(self, query: str, count: int) -> NDArray[np.int64]:
        options = self.options
        first, second = np.triu_indices(min(count, options.depth), 1)
        near = second - first <= (options.window or count)
        pairs = np.stack([first[near], second[near]], axis=1)
        if options.pairs is None or len(pairs) <= options.pairs:
            return pairs
        rng = np.random.default_rng([options.seed, int(text_keys([query])[0])])
        return pairs[np.sort(rng.choice(len(pairs), options.pairs, replace=False))]

    def prefer(self, queries: Sequence[str], first: Sequence[str], second: Sequence[str]) -> NDArray[np.float32]:
        asked = [both for three in zip(queries, first, second, strict=True) for both in self._ask(*three)]
        try:
            if self.options.read == "text":
                chances = self._choices(self.model.complete(asked, self.options.max_tokens))
            else:
                chances = self._chances(self.model.log_probabilities(asked, self.answers))
        except Interrupted as stop:
            read = self._choices if self.options.read == "text" else self._chances
            known = dict(zip(stop.places, read(stop.answers), strict=True))
            whole = [pair for pair in range(len(queries)) if {2 * pair, 2 * pair + 1} <= known.keys()]
            both = np.array([[known[2 * pair], known[2 * pair + 1]] for pair in whole]).reshape(-1)
            raise Interrupted(str(stop), whole, _without_position(both)) from None
        return _without_position(chances)

    def score_list(self, preference: NDArray[np.float64]) -> NDArray[np.float32]:
        """Log-odds (C,) that fit the preferences, or the share of its comparisons that each document wins."""
        if self.options.scores == "bradley_terry":
            return bradley_terry(preference).astype(np.float32)
        asked = np.isfinite(preference)
        won = np.where(asked, preference, 0).sum(1) + np.where(asked, 1 - preference, 0).sum(0)
        count = asked.sum(1) + asked.sum(0)
        return np.where(count > 0, won / np.maximum(count, 1), np.nan).astype(np.float32)

    def _ask(self, query: str, first: str, second: str) -> list[Prompt]:
        """The question in both orders."""
        one, other = (cut_words(document, self.options.document_words) for document in (first, second))
        return [
            fill_template(self.prompt, {"query": query}, {"first": [left], "second": [right]}, self.options.system)
            for left, right in ((one, other), (other, one))
        ]

    def _chances(self, rows: Any) -> NDArray[np.float64]:
        """The probability that the document shown first is better, of the two answers alone."""
        two = np.asarray(rows, np.float64).reshape(-1, 2)
        return 1 / (1 + np.exp(two[:, 1] - two[:, 0]))

    def _choices(self, texts: Sequence[str | None]) -> NDArray[np.float64]:
        chosen = [None if text is None else read_choice(text, self.answers) for text in texts]
        for text, choice in zip(texts, chosen, strict=True):
            if choice is None and text is not None:
                self.usage.note(text)
        return np.array([np.nan if choice is None else 1.0 - choice for choice in chosen], np.float64)


def _without_position(chances: NDArray[np.float64]) -> NDArray[np.float32]:
    """(P(a | a first) + 1 - P(b | b first)) / 2, from the chances of the document shown first, two a pair."""
    both = chances.reshape(-1, 2)
    return ((both[:, 0] + 1 - both[:, 1]) / 2).astype(np.float32)


def load(options: Options, collection: object) -> LLMPairwise:
    """Make the teacher; the model is loaded, or its endpoint asked, when first needed."""
    return LLMPairwise(options, open_model(options))
