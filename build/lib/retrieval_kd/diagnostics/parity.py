"""Parity of two engines: how far the scores that one teacher gives on them are apart, and its orders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.diagnostics.lists import kendall_tau
from retrieval_kd.evaluate.quality import per_query
from retrieval_kd.scoring import rerank
from retrieval_kd.types import Hits, InputError, Queries


@dataclass(frozen=True)
class Parity:
    """What sets the second engine's scores apart from the first's, on the pairs that both have answered."""

    pairs: int
    lists: int
    unanswered: int  # pairs that one of them alone has no answer to
    spread: float  # standard deviation of the first's scores, which errors are to be held against
    max_error: float
    mean_error: float
    kendall_tau: float | None  # tau-b within a query's list, the mean of the lists that have an order
    worst_tau: float | None  # of a list
    ndcg: tuple[float, float] | None  # nDCG@10 of the lists in the order of the first and of the second

    @property
    def facts(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**asdict(self), "ndcg_change": None if self.ndcg is None else self.ndcg[1] - self.ndcg[0]}


def compare(
    rows: NDArray[np.int32],
    first: NDArray[np.float32],
    second: NDArray[np.float32],
    queries: Queries | None = None,
    document_ids: Sequence[str] = (),
) -> Parity:
    """Compare two scores of every pair. nDCG@10 is that of the queries which have judgements.

    Shapes: rows (Q, K) of documents, -1 for none; first and second (Q, K), NaN for no answer. Raises InputError when
    no pair is answered by both.
    """
    one, two = (np.isfinite(scores) & (rows >= 0) for scores in (first, second))
    both = one & two
    if not both.any():
        raise InputError("there is no pair that both have scored, so nothing can be compared.")
    left, right = first[both].astype(np.float64), second[both].astype(np.float64)
    counts = both.sum(1)
    starts = np.concatenate([[0], np.cumsum(counts[counts > 0])]).astype(np.int64)
    taus = kendall_tau(starts, first[both], second[both])
    taus = taus[np.isfinite(taus)]
    errors = np.abs(left - right)
    return Parity(
        pairs=int(both.sum()),
        lists=len(starts) - 1,
        unanswered=int((one ^ two).sum()),
        spread=float(left.std()),
        max_error=float(errors.max()),
        mean_error=float(errors.mean()),
        kendall_tau=float(taus.mean()) if len(taus) else None,
        worst_tau=float(taus.min()) if len(taus) else None,
        ndcg=_ndcg(rows, both, (first, second), queries, document_ids),
    )


def _ndcg(
    rows: NDArray[np.int32],
    both: NDArray[np.bool_],
    scores: tuple[NDArray[np.float32], NDArray[np.float32]],
    queries: Queries | None,
    document_ids: Sequence[str],
) -> tuple[float, float] | None:
    judged = [place for place, grades in enumerate(queries.qrels if queries else ()) if grades and both[place].any()]
    if queries is None or not judged:
        return None
    hits = Hits(np.where(both, rows, -1)[judged], np.where(both, 0, -np.inf)[judged].astype(np.float32))
    first, second = (
        float(per_query(rerank(hits, one[judged]), queries.take(judged), document_ids, ["nDCG@10"])["nDCG@10"].mean())
        for one in scores
    )
    return first, second
