"""Which queries and candidates meet at a step: a function of seed, stage and step, and nothing else.

So a resumed run needs no sampler state and replays nothing, and its batches are the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.stages import Stage
from retrieval_kd.trainset import TrainSet

BINS = 10  # of teacher margins, for sampling "bins" (TAS-B)


@dataclass(frozen=True)
class Draw:
    """The content of one step.

    Shapes: queries (B,) numbers of queries; rows (U,) distinct corpus rows; columns (B, C), positions
    in `rows`, -1 where there is no candidate; places (B, C), the candidates' places in the query's
    list. Without candidates C is 0, and `rows` are drawn for losses on document vectors alone.
    """

    queries: NDArray[np.int64]
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    places: NDArray[np.int64]


def draw(trainset: TrainSet, stage: Stage, seed: tuple[int, int], step: int, documents: int = 0) -> Draw:
    """Draw the batch of `step` (from 0); `seed` is the run's and the stage's number.

    Column 0 of a query is one of its positives, drawn if there are several; without positives it is
    the candidate that the first teacher likes best. The others are drawn from the list
    (`random`), are its first (`top`), or are drawn so that all sizes of the first teacher's margin come
    up alike (`bins`, of TAS-B, arXiv:2104.06967). `documents` is the number of corpus rows to draw
    from when there are no candidates.
    """
    queries = _queries(trainset, stage, seed, step)
    rng = np.random.default_rng([*seed, 1, step])
    if trainset.hits is None:
        rows = rng.choice(documents, min(stage.batch_size, documents), replace=False) if documents else np.zeros(0)
        nothing = np.zeros((len(queries), 0), np.int64)
        return Draw(queries, np.sort(rows).astype(np.int64), nothing, nothing)
    places = choose(trainset, stage, queries, rng)
    rows = np.take_along_axis(trainset.hits.rows[queries], places, axis=1).astype(np.int64)
    distinct, columns = np.unique(rows, return_inverse=True)
    columns = columns.reshape(rows.shape)
    if len(distinct) and distinct[0] == -1:
        distinct, columns = distinct[1:], columns - 1
    return Draw(queries, distinct, columns, places)


def _queries(trainset: TrainSet, stage: Stage, seed: tuple[int, int], step: int) -> NDArray[np.int64]:
    """The queries of a step.

    `plain`: consecutive slices of endless, newly shuffled epochs, none left out. `no_duplicates`: the
    same, with queries put off to a later batch that would meet their own text or first positive.
    `cluster`: all from one cluster, drawn by size (topic-aware sampling, arXiv:2104.06967).
    """
    count, size = len(trainset), stage.batch_size
    if stage.batching == "cluster":
        assert trainset.clusters is not None
        rng = np.random.default_rng([*seed, 0, step])
        members = np.flatnonzero(trainset.clusters == trainset.clusters[rng.integers(count)])
        return rng.permutation(members)[:size].astype(np.int64)
    if stage.batching == "no_duplicates":
        epoch = 0
        while step >= len(batches := _apart(trainset, size, seed, epoch)):
            step, epoch = step - len(batches), epoch + 1
        return batches[step]
    first, last = step * size, (step + 1) * size
    epochs = [
        np.random.default_rng([*seed, 0, e]).permutation(count) for e in range(first // count, (last - 1) // count + 1)
    ]
    offset = first - first // count * count
    return np.concatenate(epochs)[offset : offset + size]


@lru_cache(maxsize=4)
def _apart(trainset: TrainSet, size: int, seed: tuple[int, int], epoch: int) -> list[NDArray[np.int64]]:
    """One epoch in batches in which no query text and no first positive comes twice."""
    assert trainset.hits is not None
    first = np.asarray(trainset.hits.rows[:, 0])
    if trainset.positive is not None:
        first = np.where(
            trainset.positive.any(1), trainset.hits.rows[range(len(first)), trainset.positive.argmax(1)], -1
        )
    waiting = np.random.default_rng([*seed, 0, epoch]).permutation(len(trainset)).tolist()
    batches = []
    while waiting:
        taken: list[int] = []
        late: list[int] = []
        seen: set[object] = set()
        for place, query in enumerate(waiting):
            if len(taken) == size:
                late += waiting[place:]
                break
            keys = {trainset.query_tokens[query].tobytes(), *([int(first[query])] if first[query] >= 0 else [])}
            (late if keys & seen else taken).append(query)
            if taken and taken[-1] == query:
                seen |= keys
        batches.append(np.array(taken, np.int64))
        waiting = late
    return batches


def choose(trainset: TrainSet, stage: Stage, queries: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Places (B, C) of the candidates that take part, the leading one first; see `draw` for how they are drawn."""
    assert trainset.hits is not None
    valid = trainset.hits.rows[queries] >= 0  # (B, K)
    chance = rng.random(valid.shape)
    leading = np.zeros(valid.shape, bool) if trainset.positive is None else np.asarray(trainset.positive[queries])
    if trainset.scores is not None and len(trainset.scores):
        best = np.nan_to_num(trainset.scores[0, queries], nan=-np.inf)
        none = ~leading.any(1)
        leading[none, best[none].argmax(1)] = True
    head = np.where(leading & valid, chance, 2.0).argmin(1)  # a random one of the leading, else the first
    order = chance
    if stage.sampling == "top":
        order = np.broadcast_to(np.arange(valid.shape[1]), valid.shape)
    elif stage.sampling == "bins":
        order = _by_bins(trainset, queries, head, chance, rng)
    key = np.where(valid, order, np.inf)
    key[np.arange(len(queries)), head] = -1.0
    return np.argsort(key, axis=1, kind="stable")[:, : stage.candidates]


def _by_bins(
    trainset: TrainSet,
    queries: NDArray[np.int64],
    head: NDArray[np.int64],
    chance: NDArray[np.float64],
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """An order (B, K) that goes round bins of equal width of the first teacher's margin, at random within each.

    The bins that hold candidates take turns, in an order drawn anew each turn; unscored candidates come last.
    """
    assert trainset.scores is not None
    scores = np.where(np.isfinite(trainset.scores[0, queries]), trainset.scores[0, queries], np.nan)  # (B, K)
    margin = scores[np.arange(len(queries)), head][:, None] - scores
    order = np.full(margin.shape, np.inf)
    for row, values in enumerate(margin):
        known = np.flatnonzero(np.isfinite(values) & (np.arange(len(values)) != head[row]))
        if not len(known):
            continue
        low, high = values[known].min(), values[known].max()
        bins = np.minimum((values[known] - low) / max(high - low, 1e-12) * BINS, BINS - 1).astype(int)
        by_chance = np.argsort(chance[row, known])
        turn = np.zeros(len(known), int)  # how many of the same bin come earlier
        for number in range(BINS):
            inside = by_chance[bins[by_chance] == number]
            turn[inside] = np.arange(len(inside))
        order[row, known] = turn + rng.random(len(known))
    return np.where(np.isfinite(order), order, 1e6 + chance)
