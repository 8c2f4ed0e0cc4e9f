"""BM25, as Lucene computes it, through bm25s. Both a teacher and a source of candidates."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import bm25s
import numpy as np
import Stemmer
from numpy.typing import NDArray
from pydantic import Field

from retrieval_kd.files import hash_texts
from retrieval_kd.tables import Table
from retrieval_kd.types import Collection, Hits, InputError


class Options(Table):
    """Anserini's defaults: k1 and b, Porter stems, English stop words; words of one letter count, as in Lucene."""

    k1: float = Field(default=0.9, ge=0)
    b: float = Field(default=0.4, ge=0, le=1)
    stemmer: Literal["porter", "english", "none"] = "porter"


class BM25:
    """BM25 over one collection: its statistics are part of what a score means."""

    def __init__(self, options: Options, documents: Sequence[str]) -> None:
        self.options = options
        self.documents = documents

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "bm25", **self.options.model_dump(), "collection": hash_texts(self.documents)}

    def render(self, texts: Sequence[str], side: str) -> list[str]:
        return list(texts)

    def retrieve(self, queries: Sequence[str], k: int) -> Hits:
        """The documents that share a term with the query, best first."""
        hits = Hits.none(len(queries), min(k, len(self.documents)))
        for number, query in enumerate(queries):
            every = self._scores(query)
            best = np.argsort(-every, kind="stable")[: hits.rows.shape[1]]
            best = best[every[best] > 0]
            hits.rows[number, : len(best)] = best
            hits.scores[number, : len(best)] = every[best]
        return hits

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        """Scores of pairs; the documents must be the collection's. 0 where no term is shared."""
        scores = np.empty(len(queries), np.float32)
        last, every = None, None
        for place, (query, document) in enumerate(zip(queries, documents, strict=True)):
            if query != last:
                last, every = query, self._scores(query)
            row = self._row_of.get(document)
            if row is None or every is None:
                raise InputError(f"BM25 was asked about a text that is not in its collection: {document[:60]!r}.")
            scores[place] = every[row]
        return scores

    def _scores(self, query: str) -> NDArray[np.float32]:
        """Scores (N,) of every document."""
        terms = [term for term in self._terms([query])[0] if term in self._index.vocab_dict]
        if not terms:
            return np.zeros(len(self.documents), np.float32)
        return np.asarray(self._index.get_scores(terms), np.float32)

    def _terms(self, texts: Sequence[str]) -> list[list[str]]:
        stemmer = None if self.options.stemmer == "none" else Stemmer.Stemmer(self.options.stemmer)
        tokens = bm25s.tokenize(
            list(texts),
            stopwords="en",
            token_pattern=r"(?u)\b\w+\b",
            stemmer=stemmer,
            return_ids=False,
            show_progress=False,
        )
        return [list(terms) for terms in tokens]

    @cached_property
    def _index(self) -> Any:
        index = bm25s.BM25(method="lucene", k1=self.options.k1, b=self.options.b)
        index.index(self._terms(self.documents), show_progress=False)
        return index

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {text: row for row, text in enumerate(self.documents)}


def load(options: Options, collection: Collection) -> BM25:
    """Make the teacher; the index is built when first needed."""
    return BM25(options, collection.documents)
