"""Statistics of many score lists at once, as pure functions of arrays.

Lists lie end to end: list i of L is values[starts[i]:starts[i + 1]], `starts` (L + 1,) rises strictly (no list
is empty), and every value is finite. Most functions give one number a list, NaN where there is none.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Starts = NDArray[np.int64]
Values = NDArray[np.floating]


def list_numbers(starts: Starts) -> NDArray[np.int64]:
    """The number of the list that each value belongs to. Shapes: (L + 1,) to (n,)."""
    return np.repeat(np.arange(len(starts) - 1), np.diff(starts))


def pairs_in(starts: Starts) -> NDArray[np.int64]:
    """The pairs of each list, n (n - 1) / 2. Shapes: (L + 1,) to (L,)."""
    sizes = np.diff(starts)
    return np.asarray(sizes * (sizes - 1) // 2)


def tied_pairs(starts: Starts, *values: Values) -> NDArray[np.int64]:
    """The pairs of each list that are equal in all of `values`. Shapes: values (n,) each, to (L,)."""
    lists = list_numbers(starts)
    order = np.lexsort((*values, lists))
    keys = np.stack([lists[order], *(value[order] for value in values)])
    first = np.flatnonzero(np.concatenate([[True], (keys[:, 1:] != keys[:, :-1]).any(0)]))
    runs = np.diff(first, append=keys.shape[1])
    return np.bincount(lists[order][first], runs * (runs - 1) / 2, len(starts) - 1).astype(np.int64)


def midranks(starts: Starts, values: Values) -> NDArray[np.float64]:
    """Ranks from 1 by ascending value within each list; equal values share the mean of theirs. Shapes: (n,) to (n,)."""
    lists = list_numbers(starts)
    order = np.lexsort((values, lists))
    value, of = values[order], lists[order]
    new = np.concatenate([[True], (value[1:] != value[:-1]) | (of[1:] != of[:-1])])
    run = np.cumsum(new) - 1
    place = np.arange(len(values)) - starts[of] + 1
    ranks = np.empty(len(values))
    ranks[order] = (np.bincount(run, place) / np.bincount(run))[run]
    return ranks


def auc(starts: Starts, values: Values, positive: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The chance that a positive of a list is valued above another of its documents, a tie counting half.

    By ranks: (R - P (P + 1) / 2) / (P N), R the sum of the ranks of the P positives among N others. NaN
    for a list without either. Shapes: values, positive (n,), to (L,).
    Source: Mann and Whitney 1947, doi:10.1214/aoms/1177730491.
    """
    positives, others = _counts(starts, positive)
    summed = np.add.reduceat(np.where(positive, midranks(starts, values), 0.0), starts[:-1])
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((summed - positives * (positives + 1) / 2) / (positives * others), np.float64)


def mean_margin(starts: Starts, values: Values, positive: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The mean of a list's positives less that of its other documents; NaN without either. Shapes: (n,) to (L,)."""
    exact = values.astype(np.float64)
    positives, others = _counts(starts, positive)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(
            np.add.reduceat(np.where(positive, exact, 0.0), starts[:-1]) / positives
            - np.add.reduceat(np.where(positive, 0.0, exact), starts[:-1]) / others,
            np.float64,
        )


def kendall_tau(starts: Starts, left: Values, right: Values) -> NDArray[np.float64]:
    """Kendall's tau-b between two orders of each list, from -1 to 1; NaN where one of them ties every document.

    (C - D) / sqrt((n0 - n1) (n0 - n2)) of n0 pairs, C in the same order and D in opposite ones, n1 tied on the
    left and n2 on the right. D is counted as inversions, in n log n. Shapes: left, right (n,), to (L,).
    Source: Knight 1966, doi:10.1080/01621459.1966.10480879.
    """
    lists = list_numbers(starts)
    order = np.lexsort((right, left, lists))  # documents tied on the left are no inversions
    all_pairs, tied_left, tied_right = pairs_in(starts), tied_pairs(starts, left), tied_pairs(starts, right)
    swapped = _inversions(starts, right[order])
    surplus = all_pairs - tied_left - tied_right + tied_pairs(starts, left, right) - 2 * swapped
    ordered = (all_pairs - tied_left) * (all_pairs - tied_right).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(surplus / np.sqrt(ordered), np.float64)


def top_overlap(starts: Starts, left: Values, right: Values, k: int) -> NDArray[np.float64]:
    """The share of the best `k` on the left that are among the best `k` on the right.

    Ties are broken by place, the same for both. NaN for a list of `k` or fewer, where it could only be 1.
    Shapes: left, right (n,), to (L,).
    """
    both = _is_top(starts, left, k) & _is_top(starts, right, k)
    share = np.add.reduceat(both.astype(np.float64), starts[:-1]) / k
    return np.where(np.diff(starts) > k, share, np.nan)


def perplexity(starts: Starts, values: Values, temperature: float = 1.0) -> NDArray[np.float64]:
    """The effective number of documents of softmax(values / temperature): exp of its entropy, 1 to the size.

    Shapes: values (n,), to (L,).
    """
    lists = list_numbers(starts)
    exact = values.astype(np.float64)
    below = (exact - np.maximum.reduceat(exact, starts[:-1])[lists]) / temperature
    weights = np.exp(below)
    total = np.add.reduceat(weights, starts[:-1])
    return np.asarray(np.exp(np.log(total) - np.add.reduceat(weights * below, starts[:-1]) / total), np.float64)


def temperature_for(starts: Starts, values: Values, share: float) -> float | None:
    """The temperature at which a softmax over a list has an effective number of documents of `share` of its size.

    It is the mean over the lists of two documents or more that meets `share`; it rises with the temperature, and is
    found by bisection. None where no temperature meets it: too many ties, or lists too short.
    Shapes: values (n,).
    """
    sizes = np.diff(starts)
    kept = np.repeat(sizes > 1, sizes)
    values, sizes = values[kept], sizes[sizes > 1]
    if not len(sizes):
        return None
    starts = np.concatenate([[0], np.cumsum(sizes)])
    spread = float(values.max() - values.min())
    if not spread:
        return None

    def reached(logarithm: float) -> float:
        return float((perplexity(starts, values, spread * np.exp(logarithm)) / sizes).mean())

    low, high = np.log(1e-6), np.log(1e3)
    if not reached(low) < share < reached(high):
        return None
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if reached(middle) < share else (low, middle)
    return float(spread * np.exp(low))


def margins(starts: Starts, values: Values, positive: NDArray[np.bool_]) -> NDArray[np.float64]:
    """What the best positive of each list has above each other document, or its best document where none is positive.

    Shapes: values, positive (n,), to (m,): a number for each document that is not positive, but for a
    list's own best.
    """
    lists = list_numbers(starts)
    exact = values.astype(np.float64)
    led = np.logical_or.reduceat(positive, starts[:-1])[lists]
    leading = np.where(led, positive, _is_top(starts, values, 1))
    best = np.maximum.reduceat(np.where(leading, exact, -np.inf), starts[:-1])
    return (best[lists] - exact)[~leading]


def quantiles(counts: NDArray[np.int64], low: float, high: float, shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Quantiles read off a histogram of equal bins from `low` to `high`: where the bin that holds each begins.

    Less than a bin below numpy's `lower` quantile. Shapes: counts (bins,), shares (s,) from 0 to 1, to (s,).
    """
    below = np.cumsum(counts)
    places = np.floor(shares * (below[-1] - 1))
    return np.asarray(low + (high - low) / len(counts) * np.searchsorted(below, places, side="right"))


def _counts(starts: Starts, positive: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many documents of each list are positive, and how many are not."""
    positives = np.add.reduceat(positive.astype(np.int64), starts[:-1])
    return positives, np.diff(starts) - positives


def _is_top(starts: Starts, values: Values, k: int) -> NDArray[np.bool_]:
    """Whether each value is among the `k` highest of its list, the earlier of equal ones."""
    lists = list_numbers(starts)
    order = np.lexsort((-values, lists))  # stable
    top = np.empty(len(values), bool)
    top[order] = np.arange(len(values)) - starts[lists] < k
    return top


def _inversions(starts: Starts, values: Values) -> NDArray[np.int64]:
    """The pairs of each list in which the earlier value is the higher. Shapes: (n,) to (L,).

    Ranks are compared bit by bit from the highest: two differ first where the earlier has a 1 and the later a 0,
    among those whose higher bits are the same, which are kept together in their order.
    """
    lists = list_numbers(starts)
    ranks = np.unique(values, return_inverse=True)[1]
    group = lists
    found = np.zeros(len(starts) - 1)
    for bit in reversed(range(int(ranks.max(initial=0)).bit_length())):
        ones = (ranks >> bit) & 1
        before = np.cumsum(ones) - ones
        first = np.concatenate([[True], group[1:] != group[:-1]])
        before = before - before[first][np.cumsum(first) - 1]  # ones earlier in the group
        zeros = ones == 0
        found += np.bincount(lists[zeros], before[zeros], len(found))
        order = np.lexsort((ones, group))
        group = np.unique(group * 2 + ones, return_inverse=True)[1][order]
        ranks, lists = ranks[order], lists[order]
    return found.astype(np.int64)
