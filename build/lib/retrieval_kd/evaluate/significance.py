"""Whether a difference between two systems is one: paired tests, Holm's correction, bootstrap intervals, power.

All take per-query values (Q,) of the same queries in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.types import InputError

CELLS = 2**21  # random numbers held at once
ROUNDS = 10_000  # of a randomisation test and of a bootstrap
LEVEL = 0.05  # of significance: a corrected p below it is a difference
CONFIDENCE = 1 - LEVEL  # of intervals
EQUAL = 1e-12  # values of two queries closer than this are a tie

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """A system less the baseline: mean difference, p-values, and queries won, tied and lost."""

    difference: float
    p: float
    adjusted_p: float  # Holm, over all systems compared
    wins: int
    ties: int
    losses: int


@dataclass(frozen=True)
class Pair:
    """Two systems compared: mean of the first less the second, with its interval, p-values, and queries won and lost.

    `detectable` is the smallest true difference that queries which differ as much as these would show with 80 % power.
    """

    first: str
    second: str
    difference: float
    interval: tuple[float, float]
    p: float  # of the paired randomisation test
    adjusted_p: float  # Holm, over all pairs
    t_p: float  # of the paired t-test
    adjusted_t_p: float
    wins: int
    ties: int
    losses: int
    detectable: float | None  # None: no query differs, so that nothing is known of the spread


def paired_test(a: Values, b: Values, rounds: int = ROUNDS, seed: int = 0) -> float:
    """Two-sided p of a paired randomisation test on the mean of a - b, by random flips of signs.

    (1 + rounds at least as extreme) / (1 + rounds): never 0. Shapes: a, b (Q,).
    Source: Smucker et al. 2007, doi:10.1145/1321440.1321528; Phipson and Smyth 2010, arXiv:1603.05766.
    """
    differences = _differences(a, b)
    differences = differences[np.abs(differences) > EQUAL]  # a flip of 0 changes nothing
    total = differences.sum()
    bound = abs(total) - EQUAL * np.abs(differences).sum()  # equal sums may differ by rounding
    generator = np.random.default_rng(seed)
    extreme = 0
    for count in _portions(rounds, len(differences)):
        flipped = generator.integers(0, 2, (count, len(differences)), np.int8)  # (rounds, Q)
        extreme += int((np.abs(total - 2 * (flipped @ differences)) >= bound).sum())
    return (1 + extreme) / (1 + rounds)


def paired_t(a: Values, b: Values) -> float:
    """Two-sided p of the paired t-test; 1 when no query differs, or one alone shows no spread. Shapes: a, b (Q,)."""
    differences = _differences(a, b)
    if len(differences) < 2 or not np.any(np.abs(differences) > EQUAL):
        return 1.0
    from scipy.stats import ttest_rel

    return float(ttest_rel(a, b).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for their number by Holm's step-down method, in the order given.

    Source: Holm 1979, https://www.jstor.org/stable/4615733.
    """
    adjusted = [0.0] * len(p_values)
    worst = 0.0
    for done, number in enumerate(sorted(range(len(p_values)), key=lambda number: p_values[number])):
        worst = max(worst, min(1.0, p_values[number] * (len(p_values) - done)))
        adjusted[number] = worst
    return adjusted


def against_baseline(
    baseline: Values, systems: Mapping[str, Values], rounds: int = ROUNDS, seed: int = 0
) -> dict[str, Difference]:
    """Test each system against the baseline with `paired_test`, corrected by `holm`.

    Shapes: baseline and each system (Q,). A positive difference means better than the baseline.
    """
    p_values = [paired_test(values, baseline, rounds, seed) for values in systems.values()]
    compared = {}
    for (name, values), p, adjusted in zip(systems.items(), p_values, holm(p_values), strict=True):
        differences = _differences(values, baseline)
        compared[name] = Difference(float(differences.mean()), p, adjusted, *_counts(differences))
    return compared


def pairwise(systems: Mapping[str, Values], rounds: int = ROUNDS, level: float = LEVEL, seed: int = 0) -> list[Pair]:
    """Compare all systems with one another; each test is corrected by `holm` over all pairs.

    The intervals are of 1 - `level`; `detectable` is at `level` divided by the number of pairs, which is what the
    smallest of the corrected p-values has to meet. Shapes: each system (Q,).
    """
    names = list(combinations(systems, 2))
    differences = [_differences(systems[first], systems[second]) for first, second in names]
    p_values = [paired_test(systems[first], systems[second], rounds, seed) for first, second in names]
    t_values = [paired_t(systems[first], systems[second]) for first, second in names]
    return [
        Pair(
            first,
            second,
            float(values.mean()),
            bootstrap_interval(values, rounds, 1 - level, seed),
            *(p, adjusted_p, t_p, adjusted_t_p),
            *_counts(values),
            detectable(values, level / len(names)),
        )
        for (first, second), values, p, adjusted_p, t_p, adjusted_t_p in zip(
            names, differences, p_values, holm(p_values), t_values, holm(t_values), strict=True
        )
    ]


def detectable(differences: Values, level: float = LEVEL, power: float = 0.8) -> float | None:
    """The smallest true mean difference that a paired two-sided t-test at `level` finds with probability `power`.

    Given as many queries, whose differences have the spread of these (Q,); None where they do not differ or are
    fewer than two. Source: Cohen 1988, Statistical Power Analysis for the Behavioral Sciences, chapter 2.
    """
    if len(differences) < 2 or not np.any(np.abs(differences - differences.mean()) > EQUAL):
        return None
    return _effect(len(differences), level, power) * float(differences.std(ddof=1))


@cache
def _effect(count: int, level: float, power: float) -> float:
    """The smallest mean over standard deviation that `count` pairs show, from the noncentral t distribution."""
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    bound, root = t.ppf(1 - level / 2, count - 1), np.sqrt(count)

    def missing(effect: float) -> float:
        """What the chance of finding it lacks; the other side's is negligible."""
        return power - float(nct.sf(bound, count - 1, effect * root))

    high = 1 / root
    while missing(high) > 0:
        high *= 2
    return float(brentq(missing, 0, high))


def bootstrap_interval(
    values: Values, rounds: int = ROUNDS, confidence: float = CONFIDENCE, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean: (low, high). Shapes: values (Q,)."""
    if not len(values):
        raise InputError("an interval needs the values of at least one query; there are none.")
    generator = np.random.default_rng(seed)
    means = np.concatenate(
        [
            values[generator.integers(0, len(values), (count, len(values)))].mean(1)
            for count in _portions(rounds, len(values))
        ]
    )  # (rounds,)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _differences(a: Values, b: Values) -> Values:
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise InputError(
            f"paired values are one number a query, the same queries twice; these are {a.shape} and {b.shape}."
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError("paired values hold NaN or infinity; every query needs a value from both systems.")
    return np.asarray(a, np.float64) - np.asarray(b, np.float64)


def _counts(differences: Values) -> tuple[int, int, int]:
    """Queries won, tied and lost."""
    wins, losses = int((differences > EQUAL).sum()), int((differences < -EQUAL).sum())
    return wins, len(differences) - wins - losses, losses


def _portions(rounds: int, width: int) -> Iterator[int]:
    """Split `rounds` so that a portion times `width` stays within CELLS."""
    portion = max(1, CELLS // max(1, width))
    for start in range(0, rounds, portion):
        yield min(portion, rounds - start)
