"""Language models that judge one document at a time: yes or no, or a grade."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from retrieval_kd.language_model import LanguageModel, LanguageModelOptions, open_model
from retrieval_kd.prompts import Prompt, check_template, cut_words, fill_template, read_grade
from retrieval_kd.tables import Positive
from retrieval_kd.usage import Interrupted

# style -> system message, prompt, (yes, no)
STYLES: dict[str, tuple[str, str, tuple[str, str]]] = {
    # Qwen3-Reranker, Zhang et al. 2025, arXiv:2506.05176
    "qwen3_reranker": (
        "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
        'Note that the answer can only be "yes" or "no".',
        "<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n"
        "<Query>: {query}\n<Document>: {document}",
        ("yes", "no"),
    ),
    # monoT5, Nogueira et al. 2020, arXiv:2003.06713
    "mono_t5": ("", "Query: {query} Document: {document} Relevant:", ("true", "false")),
    "grade": (
        "",
        "How well does the document answer the query? Give a grade from 0 (not at all) to {highest} (completely).\n\n"
        "Query: {query}\n\nDocument: {document}\n\nAnswer with the number of the grade alone.",
        ("", ""),
    ),
}


class Options(LanguageModelOptions):
    """Which model, and what it is asked. The style gives the prompt, unless it is given itself, and reads the answer.

    `grade` reads a number from the model's text; the others compare the probabilities of two next tokens.
    """

    style: Literal["qwen3_reranker", "mono_t5", "grade"] = "qwen3_reranker"
    system: str | None = None
    prompt: str | None = None  # with {query} and {document}
    answers: tuple[str, str] | None = None  # yes and no, one token each
    highest: Positive = 3  # grade
    max_tokens: Positive = 16  # of an answer with a grade

    @model_validator(mode="after")
    def _has_places(self) -> Options:
        check_template(self.prompt or STYLES[self.style][1], ["query", "document"])
        if self.style == "grade" and self.answers:
            raise ValueError('answers are for styles that compare probabilities; style = "grade" reads a number')
        return self


class LLMPointwise:
    """Scores by log P(yes) - log P(no), which are log-odds, or by the grade."""

    def __init__(self, options: Options, model: LanguageModel) -> None:
        system, prompt, answers = STYLES[options.style]
        self.options = options
        self.model = model
        self.system = system if options.system is None else options.system
        self.prompt = options.prompt or prompt
        self.answers = options.answers or answers
        self.usage = model.usage
        self.chunk = 8 * model.at_once

    @property
    def identity(self) -> dict[str, Any]:
        if self.options.style == "grade":
            read: dict[str, Any] = {"highest": self.options.highest, "max_tokens": self.options.max_tokens}
        else:
            read = {"answers": self.answers}
        asked = {"system": self.system, "prompt": self.prompt, "document_words": self.options.document_words}
        return {"kind": "llm_pointwise", **asked, **read, **self.model.identity}

    def render(self, texts: Sequence[str], side: str) -> list[str]:
        return list(texts)

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        """Log-odds or grades (n,) of pairs; NaN for a refusal and for an answer that holds neither."""
        prompts = [self._ask(query, document) for query, document in zip(queries, documents, strict=True)]
        try:
            if self.options.style == "grade":
                return self._grades(self.model.complete(prompts, self.options.max_tokens))
            return self._log_odds(self.model.log_probabilities(prompts, self.answers))
        except Interrupted as stop:
            read = self._grades if self.options.style == "grade" else self._log_odds
            raise Interrupted(str(stop), stop.places, read(stop.answers)) from None

    def _ask(self, query: str, document: str) -> Prompt:
        values = {"query": query, "highest": str(self.options.highest)}
        read = cut_words(document, self.options.document_words)
        return fill_template(self.prompt, values, {"document": [read]}, self.system)

    def _log_odds(self, rows: Any) -> NDArray[np.float32]:
        yes_no = np.asarray(rows, np.float64).reshape(-1, 2)
        return (yes_no[:, 0] - yes_no[:, 1]).astype(np.float32)

    def _grades(self, texts: Sequence[str | None]) -> NDArray[np.float32]:
        grades = [None if text is None else read_grade(text, self.options.highest) for text in texts]
        for text, grade in zip(texts, grades, strict=True):
            if grade is None and text is not None:
                self.usage.note(text)
        return np.array([np.nan if grade is None else grade for grade in grades], np.float32)


def load(options: Options, collection: object) -> LLMPointwise:
    """Make the teacher; the model is loaded, or its endpoint asked, when first needed."""
    return LLMPointwise(options, open_model(options))
