"""Batches of texts of similar length."""

from __future__ import annotations

import pytest

from retrieval_kd.gather import batches


@pytest.mark.parametrize(
    ("lengths", "tokens", "expected"),
    [
        ([3, 9, 4, 4, 0, 2], 8, [[1], [2, 3], [0, 5], [4]]),  # 9 is alone, though too long; 4 + 4; 3 + 2, padded to 6
        ([3, 9, 4, 4, 0, 2], 1, [[1], [2], [3], [0], [5], [4]]),
        ([2, 2, 2], 100, [[0, 1, 2]]),
        ([0, 0], 2, [[0, 1]]),
        ([], 8, []),
    ],
)
def test_batches_by_hand(lengths: list[int], tokens: int, expected: list[list[int]]) -> None:
    assert [places.tolist() for places in batches(lengths, tokens)] == expected
