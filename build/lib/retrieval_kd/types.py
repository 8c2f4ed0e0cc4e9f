"""The shapes that flow through every step: Hits, Queries, Collection, and the one user error.

Shape letters, the same everywhere: Q queries, N documents, K results a query, B queries in a
batch, C candidates a query, T teachers, L tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Side = Literal["query", "document"]
SIDES: tuple[Side, Side] = ("query", "document")


class InputError(Exception):
    """A mistake of the caller: says what is wrong, where, and what to do about it."""


@dataclass(frozen=True)
class Hits:
    """Results of Q queries: candidates, teacher scores and runs alike.

    Shapes: rows (Q, K) int32, positions in the corpus, -1 where there is no result; scores
    (Q, K) float32, -inf where there is no result, NaN where a document was not scored.
    """

    rows: NDArray[np.int32]
    scores: NDArray[np.float32]

    def __post_init__(self) -> None:
        assert self.rows.shape == self.scores.shape, "rows and scores are both (Q, K)"
        assert self.rows.ndim == 2
        assert self.rows.dtype == np.int32
        assert self.scores.dtype == np.float32

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def valid(self) -> NDArray[np.bool_]:
        """(Q, K), True where there is a result."""
        return self.rows >= 0

    @staticmethod
    def none(queries: int, k: int) -> Hits:
        """Hits (queries, k) with every place missing, to be filled."""
        return Hits(np.full((queries, k), -1, np.int32), np.full((queries, k), -np.inf, np.float32))

    def top(self, k: int) -> Hits:
        """The first `k` columns."""
        return Hits(self.rows[:, :k], self.scores[:, :k])


@dataclass(frozen=True)
class Queries:
    """The queries of one split; `qrels[i]` maps a corpus row to the grade given for query i.

    `qrels` is empty when the split has no judgements (label-free distillation).
    """

    ids: Sequence[str]
    texts: Sequence[str]
    qrels: Sequence[Mapping[int, int]] = ()

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.texts)
        assert not self.qrels or len(self.qrels) == len(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, places: Sequence[int]) -> Queries:
        """The queries at `places`, in that order."""
        ids, texts = [self.ids[place] for place in places], [self.texts[place] for place in places]
        return Queries(ids, texts, [self.qrels[place] for place in places] if self.qrels else [])


@dataclass(frozen=True)
class Texts:
    """Texts of queries or documents by id, and where they were read, for messages."""

    where: str
    by_id: Mapping[str, str]

    def of(self, ids: Sequence[str], what: str) -> list[str]:
        """The texts of `ids`, in their order; InputError names the first (a `what`) that is missing."""
        for missing in (id_ for id_ in ids if id_ not in self.by_id):
            raise InputError(
                f"{self.where} has no {what} {missing!r}, whose text is asked for; add it, or read another rendering."
            )
        return [self.by_id[id_] for id_ in ids]


ReadTexts = Callable[[str], Texts]
ORIGINAL = "original"  # the rendering that every collection has: its texts as they are


def _has_none(name: str) -> Texts:
    raise InputError(f"there is no rendering {name!r}: this collection has its texts as they are ({ORIGINAL!r}) alone.")


@dataclass(frozen=True)
class Collection:
    """Documents, and queries by split. A row is a position in `documents`.

    A rendering is another text of the same queries or documents, under the same ids: a translation, a
    rewrite, a whole conversation. `read_queries` and `read_documents` read one by its name, when it is
    asked for. `notes` are what a reader of results has to know about this copy of the collection
    (documents without text, judgements dropped), printed with every report. `dropped` counts, by split, the judgements
    that named absent documents.
    """

    name: str
    document_ids: Sequence[str]
    documents: Sequence[str]
    splits: Mapping[str, Queries]
    notes: Sequence[str] = field(default=())
    dropped: Mapping[str, int] = field(default_factory=dict)
    read_queries: ReadTexts = _has_none
    read_documents: ReadTexts = _has_none

    def __len__(self) -> int:
        return len(self.document_ids)

    def split(self, name: str) -> Queries:
        """The queries of split `name`."""
        if name not in self.splits:
            raise InputError(
                f"collection {self.name!r} has no split {name!r}; it has {', '.join(sorted(self.splits)) or 'none'}."
            )
        return self.splits[name]

    def query_texts(self, queries: Queries, rendering: str = ORIGINAL) -> Sequence[str]:
        """The texts of `queries` in a rendering, which may lack other queries."""
        return queries.texts if rendering == ORIGINAL else self.read_queries(rendering).of(queries.ids, "query")

    def document_texts(self, rendering: str = ORIGINAL) -> Sequence[str]:
        """The texts of all documents, by row, in a rendering, which must have these documents and no others."""
        if rendering == ORIGINAL:
            return self.documents
        read = self.read_documents(rendering)
        texts = read.of(self.document_ids, "document")
        if len(read.by_id) > len(texts):
            unknown = next(iter(read.by_id.keys() - set(self.document_ids)))
            raise InputError(f"{read.where} has a document {unknown!r} that the collection {self.name!r} lacks.")
        return texts
