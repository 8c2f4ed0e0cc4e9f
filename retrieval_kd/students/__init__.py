"""Students: what is trained. The kind in a recipe is the module's name.

A module declares `Options` and `load(options)`; what it loads is a Student, an nn.Module whose forward
pass takes a Batch and gives Outputs. A student that encodes sides apart (`towers`) can be indexed
and exported; one that reads pairs can only re-rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from retrieval_kd.recipe import Component, kind_module, options
from retrieval_kd.towers import Side

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


@dataclass(frozen=True)
class Outputs:
    """What a student makes of a batch: vectors of both sides, or scores of the pairs alone.

    Shapes: queries (B, D), documents (U, D), scores (B, C).
    """

    scores: Tensor
    queries: Tensor | None = None
    documents: Tensor | None = None


class Student(Protocol):
    """Something that a stage trains. Implementations are nn.Modules."""

    frozen_documents: bool

    def tokenize(self, texts: Sequence[str], side: Side) -> list[list[int]]:
        """Token ids of texts as the student reads them, prompts included."""
        ...

    def __call__(self, batch: Batch, micro_batch: int) -> Outputs: ...

    def save(self, folder: Path) -> None:
        """Save into an existing folder, as Sentence Transformers loads it."""
        ...


def load_student(component: Component, seed: int) -> nn.Module:
    """Make the untrained student that a recipe names; new weights, if any, are drawn with `seed`."""
    import torch

    torch.manual_seed(seed)
    module = kind_module("students", component.kind)
    return cast(nn.Module, module.load(options("students", component)))
