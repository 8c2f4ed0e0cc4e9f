"""Token n-grams of a text as numbers: which ones a collection has, and which of them a text has, with numpy alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, 2^64 over the golden ratio


def ngram_keys(ids: NDArray[np.int64], longest: int) -> list[Keys]:
    """The 64-bit key of each n-gram of a text, by n from 1 to `longest`, each in the order of the text.

    A key is the value, modulo 2^64, of a polynomial in a fixed factor whose coefficients are the ids + 1.
    """
    one = ids.astype(np.uint64) + np.uint64(1)
    found = [one]
    for n in range(2, min(longest, len(one)) + 1):
        found.append(found[-1][:-1] * _FACTOR + one[n - 1 :])
    return found


def find_ngrams(ids: NDArray[np.int64], known: Keys, longest: int) -> NDArray[np.int64]:
    """Places in `known`, which rises, of the n-grams of a text that are there, as often as it has them."""
    if not len(ids) or not len(known):
        return np.zeros(0, np.int64)
    keys = np.concatenate(ngram_keys(ids, longest))
    places = known.searchsorted(keys)
    places[places == len(known)] = 0
    return np.asarray(places[known[places] == keys])


def count_ngrams(
    texts: Sequence[NDArray[np.int64]], longest: int, at_least: int, at_most: int
) -> tuple[Keys, NDArray[np.int64], list[list[int]]]:
    """The n-grams of token lists that come `at_least` so often, the `at_most` most frequent ones.

    Returns keys, which rise, how often each comes, and its token ids.
    """
    flat = np.concatenate([np.zeros(0, np.int64), *texts])
    owner = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    keys, counts, starts, sizes = [], [], [], []
    for n, found in enumerate(ngram_keys(flat, longest), start=1):
        inside = np.flatnonzero(owner[: len(owner) - n + 1] == owner[n - 1 :])  # of one text
        values, first, count = np.unique(found[inside], return_index=True, return_counts=True)
        frequent = count >= at_least
        keys.append(values[frequent])
        counts.append(count[frequent])
        starts.append(inside[first[frequent]])
        sizes.append(np.full(int(frequent.sum()), n))
    all_keys, all_counts = np.concatenate(keys), np.concatenate(counts)
    best = np.argsort(-all_counts, kind="stable")[:at_most]
    best = best[np.argsort(all_keys[best], kind="stable")]
    where, size = np.concatenate(starts)[best], np.concatenate(sizes)[best]
    pieces = [flat[start : start + n].tolist() for start, n in zip(where, size, strict=True)]
    return all_keys[best], all_counts[best].astype(np.int64), pieces
