"""Which queries and candidates meet at a step: a function of seed, stage and step, and nothing else.

So a resumed run needs no sampler state and replays nothing, and its batches are the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.recipe import Stage
from retrieval_kd.trainset import TrainSet


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

    Queries are visited in a new random order each epoch, none left out. Column 0 of a query is one
    of its positives, drawn if there are several; without positives it is the candidate that the
    first teacher likes best. The others are drawn from the list (`random`) or are its first
    (`top`). `documents` is the number of corpus rows to draw from when there are no candidates.
    """
    queries = _epoch_slice(len(trainset), stage.batch_size, seed, step)
    rng = np.random.default_rng([*seed, 1, step])
    if trainset.hits is None:
        rows = rng.choice(documents, min(stage.batch_size, documents), replace=False) if documents else np.zeros(0)
        nothing = np.zeros((len(queries), 0), np.int64)
        return Draw(queries, np.sort(rows).astype(np.int64), nothing, nothing)
    places = _choose(trainset, stage, queries, rng)
    rows = np.take_along_axis(trainset.hits.rows[queries], places, axis=1).astype(np.int64)
    distinct, columns = np.unique(rows, return_inverse=True)
    columns = columns.reshape(rows.shape)
    if len(distinct) and distinct[0] == -1:
        distinct, columns = distinct[1:], columns - 1
    return Draw(queries, distinct, columns, places)


def _epoch_slice(count: int, size: int, seed: tuple[int, int], step: int) -> NDArray[np.int64]:
    """The queries of a step: consecutive slices of endless, newly shuffled epochs."""
    first, last = step * size, (step + 1) * size
    epochs = [
        np.random.default_rng([*seed, 0, e]).permutation(count) for e in range(first // count, (last - 1) // count + 1)
    ]
    offset = first - first // count * count
    return np.concatenate(epochs)[offset : offset + size]


def _choose(
    trainset: TrainSet, stage: Stage, queries: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.int64]:
    """Places (B, C) of the candidates that take part, the leading one first."""
    assert trainset.hits is not None
    valid = trainset.hits.rows[queries] >= 0  # (B, K)
    chance = rng.random(valid.shape)
    order = chance if stage.sampling == "random" else np.broadcast_to(np.arange(valid.shape[1]), valid.shape)
    leading = np.zeros(valid.shape, bool) if trainset.positive is None else np.asarray(trainset.positive[queries])
    if trainset.scores is not None and len(trainset.scores):
        best = np.nan_to_num(trainset.scores[0, queries], nan=-np.inf)
        none = ~leading.any(1)
        leading[none, best[none].argmax(1)] = True
    head = np.where(leading & valid, chance, 2.0).argmin(1)  # a random one of the leading, else the first
    key = np.where(valid, order, np.inf)
    key[np.arange(len(queries)), head] = -1.0
    return np.argsort(key, axis=1, kind="stable")[:, : stage.candidates]
