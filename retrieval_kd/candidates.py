"""Candidate documents: results of several sources merged, with where each came from."""

from __future__ import annotations

from collections.abc import Collection as Container
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.files import load_hits, save_hits
from retrieval_kd.types import Hits


@dataclass(frozen=True)
class Candidates:
    """Merged candidates and their provenance.

    Shapes: hits (Q, K), scored by the best reciprocal rank that a source gave (0 for a positive
    that no source found); ranks (S, Q, K) int32, the rank from 1 in each of S sources, 0 if absent.
    """

    hits: Hits
    ranks: NDArray[np.int32]

    def save(self, folder: Path) -> None:
        """Write into an existing folder."""
        save_hits(folder, self.hits)
        np.save(folder / "ranks.npy", self.ranks)

    @classmethod
    def load(cls, folder: Path) -> Candidates:
        """Open what `save` wrote, memory-mapped."""
        return cls(load_hits(folder), np.load(folder / "ranks.npy", mmap_mode="r"))


def merge(sources: Sequence[Hits], depth: int, positives: Sequence[Container[int]] = ()) -> Candidates:
    """Take from the sources in turn, rank by rank, until each query has `depth` documents.

    A document that several sources found stands once. `positives` (one set of rows a query, for
    training only) come first, whether a source found them or not; those beyond half of `depth` come
    last, so that there is room for negatives.
    """
    count = len(sources[0])
    rows = np.full((count, depth), -1, np.int32)
    scores = np.full((count, depth), -np.inf, np.float32)
    ranks = np.zeros((len(sources), count, depth), np.int32)
    for query in range(count):
        found = [source.rows[query][source.rows[query] >= 0].tolist() for source in sources]
        rank_in = [{row: rank for rank, row in enumerate(list_, start=1)} for list_ in found]
        relevant = sorted(positives[query]) if len(positives) else []
        order = dict.fromkeys(relevant[: max(1, depth // 2)])
        for rank in range(max(map(len, found), default=0)):
            if len(order) >= depth:
                break
            order.update(dict.fromkeys(list_[rank] for list_ in found if rank < len(list_)))
        order.update(dict.fromkeys(relevant))
        for place, row in enumerate(list(order)[:depth]):
            rows[query, place] = row
            ranks[:, query, place] = [known.get(row, 0) for known in rank_in]
            scores[query, place] = max((1 / known[row] for known in rank_in if row in known), default=0.0)
    return Candidates(Hits(rows, scores), ranks)
