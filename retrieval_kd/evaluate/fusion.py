"""Fusion of results: lists of several systems made one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retrieval_kd.targets import minmax
from retrieval_kd.types import Hits


def fuse_runs(runs: Sequence[Hits], depth: int, shares: Sequence[float] = ()) -> Hits:
    """The union of each query's lists by the sum of their min-max normalised scores, the best `depth`; ties by row.

    A document that a list lacks has 0 there, as its last one has. `shares` weigh the lists, equally if none are given.
    Shapes: runs (Q, K), K perhaps different, to (Q, depth). Source: Lee 1997, doi:10.1145/258525.258587 (CombSUM).
    """
    weights = shares or [1.0] * len(runs)
    parts = [
        np.where(run.valid, minmax(np.where(run.valid, run.scores, np.nan).astype(np.float32)), 0.0) * weight
        for run, weight in zip(runs, weights, strict=True)
    ]
    rows = np.concatenate([run.rows for run in runs], axis=1)
    scores = np.concatenate(parts, axis=1)  # (Q, sum of K)
    fused = Hits.none(len(rows), depth)
    for query, (some, given) in enumerate(zip(rows, scores, strict=True)):
        found, place = np.unique(some, return_inverse=True)  # by row
        total = np.bincount(place, given, len(found))
        found, total = found[found >= 0], total[found >= 0]
        best = np.argsort(-total, kind="stable")[:depth]
        fused.rows[query, : len(best)], fused.scores[query, : len(best)] = found[best], total[best]
    return fused
