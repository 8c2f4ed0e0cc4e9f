"""Which candidates and queries a stage trains on: rules on teacher scores and ranks, as masks on the train set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from retrieval_kd.candidates import provenance
from retrieval_kd.losses import find_loss
from retrieval_kd.relations import Grid
from retrieval_kd.relations import deny as deny_by_guide
from retrieval_kd.stages import Filter, Guide, Stage, Term
from retrieval_kd.targets import fuse, softmax
from retrieval_kd.trainset import Tokens, TrainSet
from retrieval_kd.types import Hits, InputError


@dataclass(frozen=True)
class Curated:
    """What a stage reads: the train set of some queries, their numbers (Q,), and how many negatives were denied."""

    data: TrainSet
    queries: NDArray[np.int64]
    denied: int = 0

    def facts(self) -> dict[str, Any]:
        """For a manifest: how many queries and negatives there are, how many were denied, and who found the others."""
        found = negatives_by_source(self.data)
        return {
            "queries": len(self.data),
            "negatives": sum(found.values()),
            "denied": self.denied,
            "provenance": found,
        }


def curate(trainset: TrainSet, stage: Stage, student_ranks: NDArray[np.int64]) -> Curated:
    """The queries and candidates that the stage's `filter` and `deny` leave; see `kept_queries` and `deny`."""
    queries = np.arange(len(trainset))
    if stage.filter is not None:
        queries = kept_queries(trainset, stage.filter, student_ranks)
        trainset = take(trainset, queries)
    if stage.deny is None:
        return Curated(trainset, queries)
    left = deny(trainset, stage.deny)
    return Curated(left, queries, int(negatives_of(trainset).sum() - negatives_of(left).sum()))


def in_words(facts: Mapping[str, Any]) -> str:
    """The facts of what a stage reads as a line: "809 queries, 1,618 negatives (bm25 alone 60%, ...), 20 denied"."""
    found: Mapping[str, int] = facts["provenance"]
    total = max(1, sum(found.values()))
    alone = " alone" if len(found) > 1 else ""
    shares = [f"{name}{'' if ' + ' in name else alone} {count / total:.0%}" for name, count in found.items()]
    denied = f", {facts['denied']:,} more denied" if facts["denied"] else ""
    return f"{facts['queries']:,} queries, {facts['negatives']:,} negatives ({', '.join(shares)}){denied}"


def deny(trainset: TrainSet, guide: Guide) -> TrainSet:
    """The train set without the negatives that a teacher holds for too good (false negatives)."""
    assert trainset.hits is not None
    assert trainset.positive is not None
    assert trainset.scores is not None
    rows = np.array(trainset.hits.rows)
    scores = np.array(trainset.scores[list(trainset.teachers).index(guide.teacher)])
    values = torch.from_numpy(scores)
    grid = Grid(values, torch.from_numpy(rows >= 0), torch.from_numpy(np.array(trainset.positive)))
    kept = deny_by_guide(grid, values, guide.below_positive, guide.relative, guide.max_score).valid.numpy()
    return keep_places(trainset, kept)


def kept_queries(trainset: TrainSet, rule: Filter, student_ranks: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers of the queries whose first positive the student and the teacher rank as the rule says.

    `student_ranks` (Q,) are ranks from 1 of the best positive in what the student found; 0 if it found none.
    Raises InputError when no query is left.
    """
    assert trainset.positive is not None
    kept = np.asarray(np.any(trainset.positive, axis=1))
    if rule.student_rank is not None:
        kept &= (student_ranks >= rule.student_rank[0]) & (student_ranks <= rule.student_rank[1])
    if rule.teacher is not None:
        assert trainset.scores is not None
        scores = np.nan_to_num(trainset.scores[list(trainset.teachers).index(rule.teacher)], nan=-np.inf)  # (Q, K)
        best = np.where(trainset.positive, scores, -np.inf).max(1, keepdims=True)
        ranks = 1 + (scores > best).sum(1)
        kept &= np.isfinite(best[:, 0]) & (ranks >= rule.teacher_rank[0]) & (ranks <= rule.teacher_rank[1])
    if not kept.any():
        raise InputError(f"the filter {rule.model_dump()} leaves none of {len(kept)} queries; widen its ranks.")
    return np.flatnonzero(kept)


def keep_places(trainset: TrainSet, kept: NDArray[np.bool_]) -> TrainSet:
    """The train set with the candidates at `kept` (Q, K) alone."""
    assert trainset.hits is not None
    rows = np.where(kept, trainset.hits.rows, -1).astype(np.int32)
    return replace(trainset, hits=Hits(rows, np.where(kept, trainset.hits.scores, -np.inf)))


def negatives_by_source(trainset: TrainSet) -> dict[str, int]:
    """How many negatives each set of sources found; empty for a train set without candidates."""
    if trainset.hits is None or trainset.ranks is None:
        return {}
    return provenance(trainset.ranks, trainset.sources, negatives_of(trainset))


def negatives_of(trainset: TrainSet) -> NDArray[np.bool_]:
    """(Q, K), True where a candidate is not judged relevant."""
    assert trainset.hits is not None
    assert trainset.positive is not None
    return np.asarray(trainset.hits.valid & ~trainset.positive)


def target_entropy(term: Term, trainset: TrainSet, queries: int = 1000) -> float | None:
    """The mean entropy, in nats, of the distribution over a list that a term aims at, over the first `queries`.

    None for a term that aims at no distribution of stored scores.
    """
    numbers = [list(trainset.teachers).index(name) for name in term.teachers if name in trainset.teachers]
    loss = find_loss(term.loss)
    soft = "teacher" in loss.needs and "teacher_temperature" in loss.options
    if not soft or term.relation != "own" or not numbers or len(numbers) < len(term.teachers):
        return None
    assert trainset.scores is not None
    lists = fuse(np.asarray(trainset.scores[numbers, :queries]), term.normalize, term.shares, term.scale)
    chance = softmax(lists / (term.teacher_temperature or term.temperature or 1.0))
    return float(-(chance * np.log(np.maximum(chance, 1e-12))).sum(1).mean())


def take(trainset: TrainSet, queries: NDArray[np.int64]) -> TrainSet:
    """The train set of some of its queries."""

    def rows_of(array: NDArray[Any] | None) -> NDArray[Any] | None:
        return None if array is None else array[queries]

    def tokens_of(tokens: Tokens) -> Tokens:
        return Tokens.pack([tokens[query].tolist() for query in queries])

    hits = trainset.hits
    return replace(
        trainset,
        query_tokens=tokens_of(trainset.query_tokens),
        hits=None if hits is None else Hits(hits.rows[queries], hits.scores[queries]),
        scores=None if trainset.scores is None else trainset.scores[:, queries],
        ranks=None if trainset.ranks is None else trainset.ranks[:, queries],
        query_vectors={name: vectors[queries] for name, vectors in trainset.query_vectors.items()},
        live={name: (tokens_of(query), document) for name, (query, document) in trainset.live.items()},
        positive=rows_of(trainset.positive),
        preference_pairs=rows_of(trainset.preference_pairs),
        preferences=rows_of(trainset.preferences),
        clusters=rows_of(trainset.clusters),
    )
