"""Teachers: whoever judges a document for a query. The kind in a recipe is the module's name.

A module declares `Options` and `load(options, collection)`; what it loads is a Teacher. One that can
also search the collection is a Retriever, and may be a source of candidates; one that scores by
the dot product of vectors is an Embedder, whose vectors are kept and never computed twice; one
that has its judgements from elsewhere is an Archive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.store.store import Store
from retrieval_kd.tables import Component, kind_module, options
from retrieval_kd.types import Collection, Hits

Side = Literal["query", "document"]


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


def load_teacher(component: Component, collection: Collection) -> Teacher:
    """Load the teacher a recipe names; the collection is for those that need its texts or ids."""
    module = kind_module("teachers", component.kind)
    return cast(Teacher, module.load(options("teachers", component), collection))
