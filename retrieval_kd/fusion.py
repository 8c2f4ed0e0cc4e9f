"""Hybrid search: two lists of results a query made one, as TCT-ColBERT fuses dense and sparse ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from retrieval_kd.types import Hits, InputError

# Tried as weights of the second list, each times the ratio of the lists' mean ranges of scores.
RELATIVE_WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0)


def fuse_hits(first: Hits, second: Hits, weight: float, k: int | None = None) -> Hits:
    """Results scored by first + `weight` * second; a document that one list lacks gets that list's lowest score.

    An empty list counts 0 for every document. Ties are in the order of rows. InputError for lists of other queries.
    Shapes: hits (Q, K) and (Q, J) of the same queries; Hits (Q, k), or (Q, K + J) with nothing left out.
    Source: Lin et al. 2020, arXiv:2010.11386 (TCT-ColBERT).
    """
    if len(first) != len(second):
        raise InputError(f"hits of {len(first)} and of {len(second)} queries cannot be fused; search the same ones.")
    width = first.rows.shape[1] + second.rows.shape[1]
    fused = Hits.none(len(first), width if k is None else min(k, width))
    for query in range(len(first)):
        lists = [
            (hits.rows[query][hits.valid[query]], hits.scores[query][hits.valid[query]]) for hits in (first, second)
        ]
        found = np.union1d(lists[0][0], lists[1][0])  # rising
        total = np.zeros(len(found))
        for share, (rows, scores) in zip((1.0, weight), lists, strict=True):
            values = np.full(len(found), scores.min(initial=np.inf) if len(rows) else 0.0)
            values[np.searchsorted(found, rows)] = scores
            total += share * values
        best = np.argsort(-total, kind="stable")[: fused.rows.shape[1]]
        fused.rows[query, : len(best)], fused.scores[query, : len(best)] = found[best], total[best]
    return fused


def tune_weight(
    first: Hits, second: Hits, measure: Callable[[Hits], float], k: int
) -> tuple[float, dict[float, float]]:
    """The weight of the second list under which `measure` of the best `k` is highest; what it was under each weight.

    The weights tried are RELATIVE_WEIGHTS times the ratio of the lists' mean ranges; of equally good ones the lowest.
    """
    ranges = [_mean_range(hits) for hits in (first, second)]
    unit = ranges[0] / ranges[1] if all(ranges) else 1.0
    found = {unit * weight: measure(fuse_hits(first, second, unit * weight, k)) for weight in RELATIVE_WEIGHTS}
    return max(found, key=lambda weight: (found[weight], -weight)), found


def _mean_range(hits: Hits) -> float:
    """The mean difference between the highest and the lowest score of a list; 0 without results."""
    some = hits.valid.any(axis=1)
    if not some.any():
        return 0.0
    high = np.where(hits.valid, hits.scores, -np.inf)[some].max(axis=1)
    low = np.where(hits.valid, hits.scores, np.inf)[some].min(axis=1)
    return float((high - low).mean())
