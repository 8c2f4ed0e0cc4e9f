"""N-grams: counts and look-ups against tuples in a dictionary."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from retrieval_kd.ngrams import count_ngrams, find_ngrams, ngram_keys


def tuples(text: np.ndarray, longest: int) -> list[tuple[int, ...]]:
    ids = text.tolist()
    return [tuple(ids[at : at + n]) for n in range(1, longest + 1) for at in range(len(ids) - n + 1)]


@pytest.mark.parametrize(("longest", "at_least", "at_most"), [(1, 1, 999), (3, 2, 999), (5, 1, 40), (5, 3, 7)])
def test_counts_and_places_are_those_of_tuples(longest: int, at_least: int, at_most: int) -> None:
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 6, rng.integers(0, 12)) for _ in range(15)]
    keys, counts, pieces = count_ngrams(texts, longest, at_least, at_most)
    expected = Counter(one for text in texts for one in tuples(text, longest))
    frequent = {one: count for one, count in expected.items() if count >= at_least}
    found = {tuple(piece): int(count) for piece, count in zip(pieces, counts, strict=True)}
    assert len(found) == len(keys) == min(at_most, len(frequent))
    assert found.items() <= frequent.items(), "n-grams cross no border between texts"
    assert sorted(found.values(), reverse=True) == sorted(frequent.values(), reverse=True)[:at_most]
    assert (np.diff(keys.astype(object)) > 0).all()
    places = {tuple(piece): place for place, piece in enumerate(pieces)}
    for text in [*texts, rng.integers(0, 9, 30)]:
        wanted = sorted(places[one] for one in tuples(text, longest) if one in places)
        assert sorted(find_ngrams(text, keys, longest).tolist()) == wanted


def test_keys_of_a_large_vocabulary_differ() -> None:
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 30_000, 200_000)
    for n, keys in enumerate(ngram_keys(ids, 5), start=1):
        distinct = {tuple(ids[at : at + n].tolist()) for at in range(len(ids) - n + 1)}
        assert len(np.unique(keys)) == len(distinct)


def test_nothing_is_found_in_nothing() -> None:
    empty = np.zeros(0, np.int64)
    keys, counts, pieces = count_ngrams([empty], 3, 1, 9)
    assert (len(keys), len(counts), pieces) == (0, 0, [])
    assert len(find_ngrams(np.array([1, 2]), keys, 3)) == 0
    assert len(find_ngrams(empty, np.array([5], np.uint64), 3)) == 0
