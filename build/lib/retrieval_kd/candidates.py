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

BLOCK = 4096  # queries whose ranks are read at once


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


def merge(
    sources: Sequence[Hits],
    depth: int,
    positives: Sequence[Container[int]] = (),
    quotas: Sequence[int | None] = (),
    skips: Sequence[int] = (),
) -> Candidates:
    """Take from the sources in turn, rank by rank, until each query has `depth` documents.

    A document that several sources found stands once, and counts for the one whose turn it was. A source with a quota
    fills that many places, or as many as it has documents; those without share the rest. The first `skips` documents
    of a source are not taken, though their ranks are known where another source found them. `positives` (one set of
    rows a query, for training only) come first, whether a source found them or not, and count for no quota; those
    beyond half of `depth` come last, so that there is room for negatives. `quotas` and `skips` are one a source.
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
        offered = [list_[skip:] for list_, skip in zip(found, skips or [0] * len(found), strict=True)]
        order.update(dict.fromkeys(_deal(offered, quotas or [None] * len(found), set(relevant), depth - len(order))))
        order.update(dict.fromkeys(relevant))
        for place, row in enumerate(list(order)[:depth]):
            rows[query, place] = row
            ranks[:, query, place] = [known.get(row, 0) for known in rank_in]
            scores[query, place] = max((1 / known[row] for known in rank_in if row in known), default=0.0)
    return Candidates(Hits(rows, scores), ranks)


def provenance(ranks: NDArray[np.int32], names: Sequence[str], places: NDArray[np.bool_]) -> dict[str, int]:
    """How many of the candidates at `places` were found by which sources: {"bm25": 31, "bm25 + minilm": 29, ...}.

    "no source" are those that none found. Shapes: ranks (S, Q, K), 0 where a source did not find a candidate; places
    (Q, K). Reads BLOCK queries at a time.
    """
    bits = 1 << np.arange(len(names))
    counts = np.zeros(2 ** len(names), np.int64)
    for start in range(0, len(places), BLOCK):
        some = slice(start, start + BLOCK)
        sets = np.tensordot(bits, ranks[:, some] > 0, axes=1)  # (B, K): the sources that found a candidate, as bits
        counts += np.bincount(sets[places[some]], minlength=len(counts))
    who = [" + ".join(name for bit, name in zip(bits, names, strict=True) if code & bit) for code in range(len(counts))]
    return {name or "no source": int(number) for name, number in zip(who, counts, strict=True) if number}


def _deal(offered: Sequence[list[int]], quotas: Sequence[int | None], taken: Container[int], room: int) -> list[int]:
    """The documents of one query that fill `room` places, in the order of the rank that they were dealt by."""
    dealt: dict[int, tuple[int, int]] = {}
    limited = [number for number, quota in enumerate(quotas) if quota is not None]
    for numbers in (limited, [number for number in range(len(quotas)) if number not in limited]):
        left = [quotas[number] or room for number in numbers]
        for rank in range(max((len(offered[number]) for number in numbers), default=0)):
            for place, number in enumerate(numbers):
                if len(dealt) == room:
                    break
                if left[place] and rank < len(offered[number]):
                    row = offered[number][rank]
                    if row not in dealt and row not in taken:
                        dealt[row] = rank, number
                        left[place] -= 1
            if len(dealt) == room or not any(left):
                break
    return sorted(dealt, key=lambda row: dealt[row])
