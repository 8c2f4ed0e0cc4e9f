"""The losses once more, in numpy and scipy, one row at a time and with loops: what the tests compare with.

Most references map a row to the numbers that enter the mean, none where the row does not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist
from scipy.special import expit, log_softmax, logsumexp, rel_entr, softmax
from scipy.stats import entropy, pearsonr, rankdata

Array = np.ndarray


@dataclass
class Row:
    """One row's valid places alone: scores, labels, preferences, and where in the list they stand."""

    s: Array
    t: Array
    p: Array
    pi: Array
    places: Array

    def __len__(self) -> int:
        return len(self.s)


def rows_of(grids: dict[str, Any]) -> list[Row]:
    """The rows of `make_grids`."""
    student, teacher, valid, positive, preference = (np.asarray(grid) for grid in grids.values())
    return [
        Row(student[r][v], teacher[r][v], positive[r][v], preference[r][np.ix_(v, v)], np.flatnonzero(v))
        for r, v in enumerate(valid)
    ]


def margin_mse(row: Row) -> list[float]:
    leads = 0 in row.places
    return [((row.s[0] - s) - (row.t[0] - t)) ** 2 for s, t in zip(row.s[1:], row.t[1:], strict=True) if leads]


def margin_mse_all(row: Row) -> list[float]:
    error = row.s - row.t
    return [(left - right) ** 2 for left in error for right in error]


def mse(row: Row) -> list[float]:
    return list((row.s - row.t) ** 2)


def huber(row: Row, delta: float = 1.0) -> list[float]:
    return [e * e / 2 if e <= delta else delta * (e - delta / 2) for e in np.abs(row.s - row.t)]


def pearson(row: Row) -> list[float]:
    return [1 - pearsonr(row.s, row.t).statistic] if len(row) >= 2 else []


def approx_rank_mse(row: Row, temperature: float = 1.0, discount: str = "none") -> list[float]:
    smooth = [
        1 + sum(expit((row.s[j] - row.s[i]) / temperature) for j in range(len(row)) if j != i) for i in range(len(row))
    ]
    ranks = rankdata(-row.t)
    weights = {"none": [1.0] * len(row), "log2": 1 / np.log2(1 + ranks), "reciprocal": 1 / ranks}[discount]
    return [w * (a - b) ** 2 for w, a, b in zip(weights, smooth, ranks, strict=True)]


def choice(divergence: Callable[..., float]) -> Callable[..., list[float]]:
    """The reference of a divergence between the row's softmaxes."""

    def reference(
        row: Row, temperature: float = 1.0, teacher_temperature: float | None = None, squared: bool = True, **own: Any
    ) -> list[float]:
        if len(row) < 2:
            return []
        p = softmax(row.t / (teacher_temperature or temperature))
        q = softmax(row.s / temperature)
        return [(temperature**2 if squared else 1) * divergence(p, q, **own)]

    return reference


def kl(p: Array, q: Array) -> float:
    return rel_entr(p, q).sum()


def bd_kl(p: Array, q: Array, favoured: float = 2.0, uncertain: str = "reverse") -> float:
    reverse = (entropy(q) > entropy(p)) == (uncertain == "reverse")
    return kl(p, q) + favoured * kl(q, p) if reverse else favoured * kl(p, q) + kl(q, p)


def js(p: Array, q: Array, beta: float = 0.5) -> float:
    middle = beta * p + (1 - beta) * q
    return beta * kl(p, middle) + (1 - beta) * kl(q, middle)


def listnet(row: Row, temperature: float = 1.0, teacher_temperature: float | None = None) -> list[float]:
    p = softmax(row.t / (teacher_temperature or temperature))
    return [-(p * log_softmax(row.s / temperature)).sum()] if len(row) >= 2 else []


def dkd(row: Row, alpha: float = 1.0, beta: float = 1.0, temperature: float = 1.0) -> list[float]:
    if row.p.all() or not row.p.any():
        return []
    sides = [softmax(row.t / temperature), softmax(row.s / temperature)]
    split = [np.array([side[row.p].sum(), side[~row.p].sum()]) for side in sides]
    rest = [side[~row.p] / side[~row.p].sum() for side in sides]
    return [temperature**2 * (alpha * kl(*split) + beta * kl(*rest))]


def info_nce(row: Row, temperature: float = 1.0, combine: str = "sum_exp") -> list[float]:
    if not row.p.any():
        return []
    s = row.s / temperature
    if combine == "sum_exp":
        return [-logsumexp(log_softmax(s)[row.p])]
    positives = [s[row.p].sum()] if combine == "sum_logits" else list(s[row.p])
    return [np.mean([-log_softmax([positive, *s[~row.p]])[0] for positive in positives])]


def confidence_nce(row: Row, temperature: float = 1.0) -> list[float]:
    confidence = np.where(row.p, expit(row.t), 1 - expit(row.t))
    weighted = confidence * np.exp(row.s / temperature)
    return [-np.log(weighted[row.p].sum() / weighted.sum())] if row.p.any() else []


def bce(row: Row) -> list[float]:
    return list(-np.log(np.where(row.p, expit(row.s), 1 - expit(row.s))))


def stages(row: Row, order: Sequence[int]) -> list[float]:
    """Minus the log-probability of each choice along `order`, of what is left."""
    return [-log_softmax(row.s[order[k:]])[0] for k in range(len(order))]


def listmle(row: Row) -> list[float]:
    return [sum(stages(row, np.argsort(-row.t)))] if len(row) >= 2 else []


def p_listmle(row: Row) -> list[float]:
    weights = np.array([2.0 ** (len(row) - r) - 1 for r in range(1, len(row) + 1)])
    return [weights @ stages(row, np.argsort(-row.t)) / weights.sum()] if len(row) >= 2 else []


def pld(row: Row, teacher_temperature: float = 1.0) -> list[float]:
    order = sorted(range(len(row)), key=lambda i: (not row.p[i], -row.t[i]))
    return [softmax(row.t / teacher_temperature)[order] @ stages(row, order)] if len(row) >= 2 else []


def partial_pl(row: Row, depth: int = 2) -> list[float]:
    return [sum(stages(row, np.argsort(-row.t))[:depth])] if len(row) >= 2 else []


def rank_distil(
    row: Row,
    depth: int = 10,
    penalty: str = "softplus",
    margin: float = 0.0,
    weight: float = 1.0,
    temperature: float = 1.0,
) -> list[float]:
    order = np.argsort(-row.t)
    top, rest = order[:depth], order[depth:]
    match = temperature**2 * kl(softmax(row.t[top] / temperature), softmax(row.s[top] / temperature))
    excess = row.s[rest] - row.s[top[-1:]] + margin
    pressed = np.maximum(excess, 0) if penalty == "hinge" else np.log1p(np.exp(excess))
    return [match + weight * pressed.sum()] if len(row) >= 2 else []


def ordered(row: Row) -> list[tuple[int, int]]:
    """The pairs of which the teacher prefers the first."""
    return [(i, j) for i, j in permutations(range(len(row)), 2) if row.t[i] > row.t[j]]


def ranknet(row: Row, weights: str = "none") -> list[float]:
    weight = {"none": lambda a, b: 1.0, "gap": lambda a, b: a - b, "squared_gap": lambda a, b: abs(a * a - b * b)}
    return [weight[weights](row.t[i], row.t[j]) * math.log1p(math.exp(row.s[j] - row.s[i])) for i, j in ordered(row)]


def ranknet_soft(row: Row) -> list[float]:
    found = []
    for i, j in permutations(range(len(row)), 2):
        p, q = expit(row.t[i] - row.t[j]), expit(row.s[i] - row.s[j])
        found.append(-p * math.log(q) - (1 - p) * math.log(1 - q))
    return found


def preference_kl(row: Row, temperature: float = 1.0) -> list[float]:
    asked = [(i, j) for i, j in permutations(range(len(row)), 2) if np.isfinite(row.pi[i, j])]
    return [rel_entr([row.pi[i, j], 1 - row.pi[i, j]], softmax(row.s[[i, j]] / temperature)).sum() for i, j in asked]


def lambda_rank(row: Row, scheme: str = "ndcg2++", k: int | None = None) -> list[float]:
    first = len(row) if k is None else k
    if len(row) < 2:
        return []
    gain = 2 ** (row.t - row.t.min()) - 1
    gain = gain / sum(g / math.log2(1 + r) for r, g in enumerate(sorted(gain, reverse=True)[:first], 1))
    rank = rankdata(-row.s)
    found = []
    for i, j in ordered(row):
        if min(rank[i], rank[j]) > first:
            continue
        apart = abs(rank[i] - rank[j])
        step = 1 / math.log2(1 + apart) - 1 / math.log2(2 + apart)
        swap = abs(1 / math.log2(1 + rank[i]) - 1 / math.log2(1 + rank[j]))
        weight = {"lambda": swap, "ndcg2": step, "ndcg2++": 10 * step + swap}[scheme] * abs(gain[i] - gain[j])
        found.append(-weight * math.log2(expit(row.s[i] - row.s[j])))
    return found


def embedding_mse(student: Array, teacher: Array) -> list[list[float]]:
    return [[((x - y) ** 2).sum()] for x, y in zip(student, teacher, strict=True)]


def embedding_cosine(student: Array, teacher: Array) -> list[list[float]]:
    return [[1 - x @ y / math.sqrt((x @ x) * (y @ y))] for x, y in zip(student, teacher, strict=True)]


def smooth_l1(e: float) -> float:
    return e * e / 2 if abs(e) <= 1 else abs(e) - 0.5


def rkd_distance(student: Array, teacher: Array) -> list[list[float]]:
    sides = [cdist(side, side) for side in (student, teacher)]
    left, right = (side / side[side > 0].mean() for side in sides)
    return [[smooth_l1(e) for e in row] for row in left - right]


def rkd_angle(student: Array, teacher: Array) -> list[list[float]]:
    def cosine(side: Array, i: int, j: int, k: int) -> float:
        one, two = side[j] - side[i], side[k] - side[i]
        length = np.linalg.norm(one) * np.linalg.norm(two)
        return one @ two / length if length > 0 else 0.0

    n = range(len(student))
    return [[smooth_l1(cosine(student, i, j, k) - cosine(teacher, i, j, k)) for j in n for k in n] for i in n]


def sinkhorn(
    rows: list[Row], temperature: float = 2.0, epsilon: float = 0.1, iterations: int = 20, slots: str = "rank"
) -> list[list[float]]:
    kept = [row for row in rows if len(row) >= 2]
    sides = np.zeros((2, len(kept), 1 + max(row.places.max() for row in kept)))
    for number, row in enumerate(kept):
        order = np.argsort(-row.t) if slots == "rank" else np.arange(len(row))
        for side, scores in zip(sides, (row.s, row.t), strict=True):
            side[number, np.arange(len(row)) if slots == "rank" else row.places] = softmax(scores / temperature)[order]
    cost = cdist(*sides, "cityblock")
    plan = np.exp(-cost / epsilon)
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdims=True)
        plan = plan / plan.sum(0, keepdims=True)
    costs = iter((plan * cost).sum(1))
    return [[next(costs)] if len(row) >= 2 else [] for row in rows]


BY_ROW: dict[str, Callable[..., list[float]]] = {
    "approx_rank_mse": approx_rank_mse,
    "bce": bce,
    "bd_kl": choice(bd_kl),
    "confidence_nce": confidence_nce,
    "dkd": dkd,
    "huber": huber,
    "info_nce": info_nce,
    "js": choice(js),
    "kl": choice(kl),
    "lambda_rank": lambda_rank,
    "listmle": listmle,
    "listnet": listnet,
    "margin_mse": margin_mse,
    "margin_mse_all": margin_mse_all,
    "mixed_kl": choice(lambda p, q, forward=0.5, reverse=0.5: forward * kl(p, q) + reverse * kl(q, p)),
    "mse": mse,
    "p_listmle": p_listmle,
    "partial_pl": partial_pl,
    "pearson": pearson,
    "pld": pld,
    "preference_kl": preference_kl,
    "rank_distil": rank_distil,
    "ranknet": ranknet,
    "ranknet_soft": ranknet_soft,
    "reverse_kl": choice(lambda p, q: kl(q, p)),
    "skew_kl": choice(lambda p, q, skew=0.1: kl(p, skew * p + (1 - skew) * q)),
}
OF_VECTORS = {
    "embedding_cosine": embedding_cosine,
    "embedding_mse": embedding_mse,
    "rkd_angle": rkd_angle,
    "rkd_distance": rkd_distance,
}
