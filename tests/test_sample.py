"""Samples at equal distances."""

from __future__ import annotations

import pytest

from retrieval_kd.sample import spread


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [
        (10, 4, [0, 3, 6, 9]),
        (3, 5, [0, 1, 2]),
        (1, 2, [0]),
        (0, 3, []),
        (100, 2, [0, 99]),
        (128, 128, list(range(128))),
    ],
)
def test_spread_by_hand(count: int, size: int, expected: list[int]) -> None:
    assert spread(count, size) == expected
