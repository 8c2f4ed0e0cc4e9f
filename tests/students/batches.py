"""Texts for tiny students, and batches in which every query meets every document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tiny import WORDS

from retrieval_kd.students import Batch

_RNG = np.random.default_rng(0)
QUERIES = [" ".join(_RNG.choice(WORDS, _RNG.integers(1, 6))) for _ in range(6)]
DOCUMENTS = [" ".join(_RNG.choice(WORDS, _RNG.integers(2, 40))) for _ in range(9)]  # some beyond the 24 tokens


def batch_of(
    student: Any, queries: Sequence[str], documents: Sequence[str], columns: torch.Tensor | None = None, **settings: Any
) -> Batch:
    """The texts as the student tokenizes them; without `columns`, all documents are candidates of each query."""
    tokens = [
        [np.array(ids, np.int32) for ids in student.tokenize(texts, side)]
        for texts, side in ((queries, "query"), (documents, "document"))
    ]
    every = torch.arange(len(documents)).repeat(len(queries), 1)
    return Batch(tokens[0], tokens[1], every if columns is None else columns, **settings)
