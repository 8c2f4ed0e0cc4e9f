"""Targets: what teachers said made comparable, softened, fused or turned into scores, as pure functions of arrays.

The statistics of a list are taken over its valid places, which are those that hold a finite number;
all others are NaN in what is returned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.types import InputError

if TYPE_CHECKING:
    from torch import Tensor

Normalize = Literal["none", "minmax", "zscore", "log_odds", "rank"]
RankScore = Literal["reciprocal", "negative_log", "negative"]
Number = TypeVar("Number", np.float32, np.float64)
Grid = TypeVar("Grid", "NDArray[np.float32]", "NDArray[np.float64]", "Tensor")


def minmax(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each list mapped to [0, 1] as (x - min) / (max - min + 1e-6); NaN where not finite.

    Shapes: (..., K) to (..., K).
    """
    scores = _finite(scores)
    low, high = _nan(np.nanmin, scores), _nan(np.nanmax, scores)
    return ((scores - low) / (high - low + 1e-6)).astype(np.float32)


def zscore(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each list shifted to mean 0 and scaled to population deviation 1 (plus 1e-6); NaN where not finite.

    Shapes: (..., K) to (..., K).
    """
    exact = _finite(scores).astype(np.float64)  # float32 would make a deviation of its own of a constant list
    return np.asarray((exact - _nan(np.nanmean, exact)) / (_nan(np.nanstd, exact) + 1e-6), np.float32)


def softmax(scores: NDArray[np.floating]) -> NDArray[np.float64]:
    """Row-wise softmax over finite places, 0 elsewhere; rows without any are all 0."""
    known = np.isfinite(scores)
    filled = np.where(known, scores, -np.inf)
    top = np.where(known.any(-1, keepdims=True), filled.max(-1, keepdims=True), 0.0)
    weights = np.where(known, np.exp(filled - top), 0.0)
    return np.asarray(weights / np.maximum(weights.sum(-1, keepdims=True), 1e-12))


def log_odds(probabilities: NDArray[Number], clip: float = 1e-6) -> NDArray[Number]:
    """log(p / (1 - p)) of each probability, held between `clip` and 1 - `clip`; NaN where not finite.

    Shapes: any. Raises InputError for what is no probability.
    """
    exact = _finite(probabilities).astype(np.float64)
    _check_probabilities(exact, "log_odds")
    held = np.clip(exact, clip, 1 - clip)
    return np.asarray(np.log(held) - np.log1p(-held), probabilities.dtype)


def rank(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Ranks from 1 by descending score; equal scores share the mean of their ranks; NaN where not finite.

    Shapes: (..., K) to (..., K).
    """
    scores = _finite(scores)

    def places(lists: NDArray[np.float32]) -> NDArray[np.intp]:
        return np.argsort(np.argsort(-lists, axis=-1, kind="stable"), axis=-1, kind="stable")

    # read forwards and backwards, equal scores are counted in both orders
    twice = places(scores) + places(scores[..., ::-1])[..., ::-1]
    return np.where(np.isnan(scores), np.nan, 1 + twice / 2).astype(np.float32)


def rank_to_score(ranks: NDArray[Number], form: RankScore = "reciprocal") -> NDArray[Number]:
    """Scores for ranks from 1, where a teacher gave an order alone: 1 / r, -log r, or -(r - 1).

    The form is a choice of spacing: losses on margins take it at its word, losses on orders do not
    see it. NaN stays NaN. Shapes: any.
    Source: reciprocal as in RankGPT's distillation, Sun et al. 2023, arXiv:2304.09542; -log r is the
    Plackett-Luce score of expected rank r.
    """
    if form == "reciprocal":
        return np.asarray(1 / ranks, ranks.dtype)
    return np.asarray(-np.log(ranks) if form == "negative_log" else 1 - ranks, ranks.dtype)


def bradley_terry(preference: NDArray[np.floating], ridge: float = 0.01) -> NDArray[np.float64]:
    """Scores whose differences are the log-odds of the pairwise preferences.

    Maximises the sum over asked (i, j) of p log sigmoid(b_i - b_j) + (1 - p) log sigmoid(b_j - b_i), less
    ridge / 2 * |b|^2, by Newton's method, to 1e-8. The ridge keeps a document that wins
    always at a finite score, and fixes the zero point.

    Shapes: preference (C, C), at (i, j) the probability that i beats j, NaN where not asked; the diagonal
    does not count. Returns (C,), NaN for a document in no asked pair.
    Raises InputError for what is no probability, and for a ridge that is not positive or too small to settle.
    Source: Bradley and Terry 1952, "Rank analysis of incomplete block designs".
    """
    if not ridge > 0:
        raise InputError(
            f"bradley_terry: ridge is {ridge}; it must be above 0, or a document that wins always has none."
        )
    wins = np.array(preference, np.float64)
    np.fill_diagonal(wins, np.nan)
    asked = np.isfinite(wins)
    wins = np.where(asked, wins, 0.5)
    _check_probabilities(wins, "bradley_terry")

    scores = np.zeros(len(wins))
    for _ in range(100):
        chances = (1 + np.tanh((scores[:, None] - scores) / 2)) / 2
        surplus = np.where(asked, wins - chances, 0.0)
        slope = surplus.sum(1) - surplus.sum(0) - ridge * scores
        bend = np.where(asked, chances * (1 - chances), 0.0)
        bend += bend.T
        step = np.linalg.solve(np.diag(bend.sum(1) + ridge) - bend, slope)
        scores = scores + step
        if np.abs(step).max(initial=0.0) < 1e-8:
            break
    else:
        raise InputError(f"bradley_terry: no maximum found in 100 steps; raise the ridge, which is {ridge}.")
    return np.where((asked | asked.T).any(1), scores, np.nan)


def soften_power(probabilities: NDArray[Number], temperature: float) -> NDArray[Number]:
    """p^(1 / temperature), renormalised: what a softmax at that temperature would give, from probabilities alone.

    From p at temperature 1 to uniform over what is likely at all. Shapes: (..., K) lists of sum 1.
    Source: Flouro and Chadwick 2026, arXiv:2601.03195.
    """
    return _renormalised(_finite(probabilities) ** (1 / temperature), probabilities)


def soften_uniform(probabilities: NDArray[Number], share: float) -> NDArray[Number]:
    """(1 - share) p + share / n: from p at share 0 to uniform at share 1. Shapes: (..., K) lists of sum 1."""
    known = _finite(probabilities)
    count = np.isfinite(known).sum(-1, keepdims=True)
    return _renormalised((1 - share) * known + share / np.maximum(count, 1), probabilities)


def soften_top(probabilities: NDArray[Number], depth: int) -> NDArray[Number]:
    """The `depth` likeliest keep p; all others share what is left of 1 alike.

    From p, where depth leaves one out or none, to uniform at depth 0. A list that its source cut off
    holds 0 at the hidden places. Two places that change order at the edge of the top change their
    values by a step. Shapes: (..., K).
    """
    known = _finite(probabilities)
    places = np.argsort(np.argsort(-known, axis=-1, kind="stable"), axis=-1, kind="stable")
    valid = np.isfinite(known)
    top, tail = valid & (places < depth), valid & (places >= depth)
    left = 1 - np.where(top, known, 0).sum(-1, keepdims=True)
    spread = np.maximum(left, 0) / np.maximum(tail.sum(-1, keepdims=True), 1)
    return _renormalised(np.where(tail, spread, known), probabilities)


def interpolate(student: Grid, teacher: Grid, tau: float) -> Grid:
    """(1 - tau) * student + tau * teacher: a target between what the student gives and what it should.

    The caller detaches the student, and brings both to one scale. Shapes: any, equal; arrays or tensors.
    Source: Shing et al. 2025 (TAID), arXiv:2501.16937.
    """
    return (1 - tau) * student + tau * teacher


def fuse(
    scores: NDArray[np.float32],
    normalize: Normalize | Sequence[Normalize] = "none",
    shares: Sequence[float] = (),
    scale: float = 1.0,
    select: NDArray[np.bool_] | None = None,
) -> NDArray[np.float32]:
    """Normalise every teacher's lists, average them with `shares`, multiply by `scale`.

    `normalize` is one way for all teachers, or one for each; "rank" is the reciprocal rank. Equal
    shares when none are given; shares are divided by their sum. With `select`, the average of a query is
    over its chosen teachers alone.

    Shapes: scores (T, Q, K) and select (T, Q) bool to (Q, K). A place that any teacher leaves open, of
    those chosen, is NaN, as is the list of a query for which none is chosen.
    """
    ways: dict[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]]
    ways = {"none": _finite, "minmax": minmax, "zscore": zscore, "log_odds": log_odds, "rank": _reciprocal_rank}
    if isinstance(normalize, str):
        normalised = ways[normalize](scores)
    else:
        normalised = np.stack([ways[way](lists) for way, lists in zip(normalize, scores, strict=True)])
    weights = np.asarray(shares or [1.0] * len(scores), np.float32)
    if select is None:
        return (scale * np.tensordot(weights / weights.sum(), normalised, axes=1)).astype(np.float32)
    chosen = select * weights[:, None]  # (T, Q)
    total = chosen.sum(0)
    total[total == 0] = np.nan
    terms = np.where(select[:, :, None], (chosen / total)[:, :, None] * normalised, 0)
    return (scale * np.where(np.isnan(total)[:, None], np.nan, terms.sum(0))).astype(np.float32)


def _reciprocal_rank(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    return rank_to_score(rank(scores))


def _check_probabilities(values: NDArray[np.float64], who: str) -> None:
    wrong = values[(values < 0) | (values > 1)]
    if wrong.size:
        raise InputError(f"{who} takes probabilities, from 0 to 1; it was given {wrong[0]:g}.")


def _renormalised(values: NDArray[Any], like: NDArray[Number]) -> NDArray[Number]:
    """Lists divided by their sums, NaN where `like` is not finite."""
    return np.asarray(np.where(np.isfinite(like), values / np.nansum(values, -1, keepdims=True), np.nan), like.dtype)


def _finite(scores: NDArray[Number]) -> NDArray[Number]:
    return np.where(np.isfinite(scores), scores, scores.dtype.type(np.nan))


def _nan(statistic: Callable[..., NDArray[Any]], scores: NDArray[np.floating]) -> NDArray[np.floating]:
    """A NaN-ignoring statistic of the last axis, kept as an axis; NaN for a list without scores."""
    empty = np.isnan(scores).all(-1, keepdims=True)
    value = statistic(np.where(empty, 0.0, scores), axis=-1, keepdims=True)
    return np.asarray(np.where(empty, np.nan, value), scores.dtype)
