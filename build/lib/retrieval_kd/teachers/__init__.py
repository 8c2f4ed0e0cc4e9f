"""Teachers: whoever judges a document for a query. The kind in a recipe is the module's name.

A module declares `Options` and `load(options, collection)`; what it loads is a Teacher. One that can
also search the collection is a Retriever, and may be a source of candidates; one that scores by
the dot product of vectors is an Embedder, whose vectors are kept and never computed twice; one
that has its judgements from elsewhere is an Archive.

One that compares documents with one another is a PairJudge or a ListJudge: its preferences or rankings are kept,
and scores are made of them anew each time. One that costs tokens or money is Metered; one that can say how many
tokens it would read is a Reader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.store.store import Store
from retrieval_kd.tables import Component, kind_module, options
from retrieval_kd.types import Collection, Hits, Side
from retrieval_kd.usage import Usage


@runtime_checkable
class Teacher(Protocol):
    """Judges pairs of texts."""

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that its scores depend on, other than the texts as it reads them."""
        ...

    def render(self, texts: Sequence[str], side: Side) -> list[str]:
        """The texts as the teacher reads them, prompts included."""
        ...

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        """Raw scores (n,) of n aligned pairs of rendered texts; NaN where it gives no answer."""
        ...


@runtime_checkable
class Retriever(Protocol):
    """Searches the collection it was loaded with."""

    def retrieve(self, queries: Sequence[str], k: int) -> Hits:
        """The `k` best documents of each rendered query, best first; ties by row."""
        ...


@runtime_checkable
class Embedder(Teacher, Protocol):
    """Scores by the dot product of vectors."""

    def tower_identity(self, side: Side) -> dict[str, Any]:
        """Everything that one side's vectors depend on, other than the rendered text."""
        ...

    def embed(self, texts: Sequence[str], side: Side) -> NDArray[np.float32]:
        """Vectors (n, D) of rendered texts."""
        ...


@runtime_checkable
class Archive(Teacher, Protocol):
    """Has its judgements from elsewhere; `score` answers NaN."""

    def read_into(self, store: Store) -> Mapping[str, int]:
        """Put all its judgements into its store, those that it lacks; returns counts."""
        ...


class _Judge(Teacher, Protocol):
    @property
    def conversion(self) -> dict[str, Any]:
        """What decides which questions are put to it, and how its answers become scores; no part of its identity."""
        ...


@runtime_checkable
class PairJudge(_Judge, Protocol):
    """Says which of two documents answers a query better."""

    def choose_pairs(self, query: str, count: int) -> NDArray[np.int64]:
        """The pairs (P, 2) of places, the lower first, that are asked of a list of `count` documents, best first."""
        ...

    def prefer(self, queries: Sequence[str], first: Sequence[str], second: Sequence[str]) -> NDArray[np.float32]:
        """Probabilities (n,) that the first document of n rendered triples is better; NaN for no answer.

        They do not depend on which of the two is called the first.
        """
        ...

    def score_list(self, preference: NDArray[np.float64]) -> NDArray[np.float32]:
        """Scores (C,) from the probabilities (C, C) that i beats j, NaN where not asked; each pair stands once."""
        ...


@runtime_checkable
class ListJudge(_Judge, Protocol):
    """Puts the documents of a list in order."""

    @property
    def depth(self) -> int:
        """How many of the best documents of a list are ranked."""
        ...

    def rank(self, queries: Sequence[str], lists: Sequence[Sequence[str]]) -> list[NDArray[np.int64] | None]:
        """The order of each list of rendered documents, best first, as places in it; None for no answer."""
        ...

    def score_ranks(self, ranks: NDArray[np.float64]) -> NDArray[np.float32]:
        """Scores for ranks from 1."""
        ...


@runtime_checkable
class Metered(Protocol):
    """Counts what it costs. It may stop before the end, by `usage.Interrupted`, which holds what it answered."""

    usage: Usage
    chunk: int  # questions that it is best given at once: few enough to lose if the run is killed


@runtime_checkable
class Reader(Protocol):
    """Reads tokens here, and can say how many without any other work."""

    def count_tokens(self, queries: Sequence[str], documents: Sequence[str]) -> int:
        """Tokens that `score` would read of these rendered texts; who reads texts one by one reads equal ones once."""
        ...


def scored_as(teacher: Teacher) -> list[Any]:
    """All that a teacher's scores depend on, other than the texts."""
    return [teacher.identity, teacher.conversion if isinstance(teacher, PairJudge | ListJudge) else None]


def load_teacher(component: Component, collection: Collection) -> Teacher:
    """Load the teacher a recipe names; the collection is for those that need its texts or ids."""
    module = kind_module("teachers", component.kind)
    return cast(Teacher, module.load(options("teachers", component), collection))
