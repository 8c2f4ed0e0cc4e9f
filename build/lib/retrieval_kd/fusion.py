"""Fusion of results: the lists of several searchers made one, and the weight under which two are best."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from retrieval_kd.targets import minmax
from retrieval_kd.types import Hits, InputError

# Tried as weights of the second list, each times the ratio of the lists' mean ranges of scores.
RELATIVE_WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0)


def fuse_hits(lists: Sequence[Hits], weights: Sequence[float], k: int | None = None) -> Hits:
    """Results scored by the weighted sum of several lists; a document that a list lacks gets its lowest score there.

    So a list whose scores are all equal, as that of a single result, changes no order; an empty one counts 0 for every
    document. Ties are in the order of rows. InputError for lists of other queries.
    Shapes: lists (Q, K), K perhaps different; Hits of the best `k` (Q, k), nothing left out if None: (Q, sum of K).
    Source: Lin et al. 2020, arXiv:2010.11386 (TCT-ColBERT); with `normalise_hits`, Lee 1997,
    doi:10.1145/258525.258587 (CombSUM).
    """
    counts = [len(hits) for hits in lists]
    if len(set(counts)) > 1:
        raise InputError(f"hits of {' and of '.join(map(str, counts))} queries cannot be fused; search the same ones.")
    width = sum(hits.rows.shape[1] for hits in lists)
    fused = Hits.none(counts[0], width if k is None else min(k, width))
    for query in range(counts[0]):
        known = [(hits.rows[query][hits.valid[query]], hits.scores[query][hits.valid[query]]) for hits in lists]
        found = np.unique(np.concatenate([rows for rows, _ in known]))  # rising
        total = np.zeros(len(found))
        for weight, (rows, scores) in zip(weights, known, strict=True):
            if len(rows):
                values = np.full(len(found), scores.min())
                values[np.searchsorted(found, rows)] = scores
                total += weight * values
        best = np.argsort(-total, kind="stable")[: fused.rows.shape[1]]
        fused.rows[query, : len(best)], fused.scores[query, : len(best)] = found[best], total[best]
    return fused


def normalise_hits(hits: Hits) -> Hits:
    """The same results with each query's scores from 0 to 1 (`minmax`); all 0 where they are equal. Shapes: (Q, K)."""
    scores = minmax(np.where(hits.valid, hits.scores, np.nan).astype(np.float32))
    return Hits(hits.rows, np.where(hits.valid, scores, -np.inf).astype(np.float32))


def tune_weight(
    first: Hits, second: Hits, measure: Callable[[Hits], float], k: int
) -> tuple[float, dict[float, float]]:
    """The weight of the second list under which `measure` of the best `k` is highest; what it was under each weight.

    The weights tried are RELATIVE_WEIGHTS times the ratio of the lists' mean ranges; of equally good ones the lowest.
    """
    ranges = [_mean_range(hits) for hits in (first, second)]
    unit = ranges[0] / ranges[1] if all(ranges) else 1.0
    found = {unit * weight: measure(fuse_hits([first, second], [1.0, unit * weight], k)) for weight in RELATIVE_WEIGHTS}
    return max(found, key=lambda weight: (found[weight], -weight)), found


def _mean_range(hits: Hits) -> float:
    """The mean difference between the highest and the lowest score of a list; 0 without results."""
    some = hits.valid.any(axis=1)
    if not some.any():
        return 0.0
    high = np.where(hits.valid, hits.scores, -np.inf)[some].max(axis=1)
    low = np.where(hits.valid, hits.scores, np.inf)[some].min(axis=1)
    return float((high - low).mean())
