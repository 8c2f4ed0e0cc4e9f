"""Students: what is trained. The kind in a recipe is the module's name.

A module declares `Options` and `load(options)`; what it loads is a Student, an nn.Module whose forward
pass takes a Batch and gives Outputs. It also declares `TEACHER`, the kind of teacher that reads its saved
folder; `VECTORS`, the form of a text's vector, "dense" or "sparse" (see `index`), or None where a text has not one;
and `SEARCHES`, whether scores are products of those, so that the student can be indexed and exported. One that does not
search re-ranks.

A module whose students may start from the collection declares `reads_collection(options)`, and
`begin(options, documents, folder, precision)`, which saves in `folder`/model what `load` then starts from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from retrieval_kd.tables import Component, Precision, kind_module, options
from retrieval_kd.types import Side

Tokens = Sequence[NDArray[np.int32]]


@dataclass(frozen=True)
class Batch:
    """What a student reads in one step: B queries, U distinct documents, and who meets whom.

    Shapes: columns (B, C) int64, positions among the U documents, -1 where there is no candidate.
    `document_vectors` (U, D) stand in for the documents of a frozen tower, whose tokens are left out.
    """

    queries: Tokens
    documents: Tokens
    columns: Tensor
    document_vectors: Tensor | None = None
    micro_batch_tokens: int = 1024  # encoded at once, padding included
    gradient_caching: bool = False  # see gather.encode_sorted
    layers: bool = False  # whether the layers below the last are wanted too


@dataclass(frozen=True)
class Outputs:
    """What a student makes of a batch: scores of the candidates and, from one that encodes sides apart, the rest.

    Shapes: scores (B, C), 0 where there is no candidate; grid (B, U), every query against every document;
    queries (B, D) and documents (U, D), where a text has one vector. `layers` are the same for each layer, first to
    last, when the batch asks for them.
    """

    scores: Tensor
    grid: Tensor | None = None
    queries: Tensor | None = None
    documents: Tensor | None = None
    layers: Sequence[Outputs] = ()


class Student(Protocol):
    """Something that a stage trains. Implementations are nn.Modules."""

    frozen_documents: bool

    def tokenize(self, texts: Sequence[str], side: Side) -> list[list[int]]:
        """Token ids of texts as the student reads them, prompts included."""
        ...

    def __call__(self, batch: Batch) -> Outputs: ...

    def save(self, folder: Path) -> None:
        """Save into an existing folder, as Sentence Transformers loads it."""
        ...


def own_scores(grid: Tensor, columns: Tensor) -> Tensor:
    """The candidates' scores (B, C) out of the grid (B, U); 0 where there is no candidate."""
    if not grid.shape[1]:
        return grid.new_zeros(columns.shape)
    columns = columns.to(grid.device)
    return torch.where(columns >= 0, grid.gather(1, columns.clamp(min=0)), 0.0)


def begins(component: Component) -> bool:
    """Whether the student starts from the collection, so that `begin` comes before `load_student`."""
    module = kind_module("students", component.kind)
    return hasattr(module, "begin") and bool(module.reads_collection(options("students", component)))


def begin(component: Component, documents: Sequence[str], folder: Path, seed: int, precision: Precision) -> None:
    """Save in `folder`/model what the student starts from; `documents` are the collection's, as it reads them.

    A model that is read to make it runs in `precision`.
    """
    torch.manual_seed(seed)
    kind_module("students", component.kind).begin(options("students", component), documents, folder, precision)


def begun(component: Component, folder: Path) -> Component:
    """The component of a student whose start is saved in `folder`."""
    kept = {key: value for key, value in component.options.items() if key not in ("start", "layers", "revision")}
    return Component(kind=component.kind, **{**kept, "model": str(folder / "model")})


def load_student(component: Component, seed: int) -> nn.Module:
    """Make the untrained student that a recipe names; new weights, if any, are drawn with `seed`."""
    torch.manual_seed(seed)
    module = kind_module("students", component.kind)
    return cast(nn.Module, module.load(options("students", component)))
