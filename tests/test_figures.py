"""Figures as reports print them, by hand."""

from __future__ import annotations

import pytest

from retrieval_kd.figures import ABSENT, decimals, digits, interval, markdown_table, p_value, plain


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, ABSENT), (0.0494, "0.049"), (-0.5, "-0.500"), (1.204, "1.20"), (-12.34, "-12.3"), (1536.4, "1,536")],
)
def test_three_digits_that_matter(value: float | None, expected: str) -> None:
    assert digits(value) == expected


def test_values_intervals_and_tests() -> None:
    assert [decimals(0.12349), decimals(None)] == ["0.123", ABSENT]
    assert interval((0.1, 0.25)) == f"0.100{ABSENT}0.250"
    assert interval((-0.1, 0.25), signed=True) == "-0.100 to +0.250"
    assert [p_value(p) for p in (0.0009999, 0.001, 0.25, None)] == ["<0.001", "0.001", "0.250", ABSENT]
    assert plain({"of": ["a", "b"], "depth": 3}) == "of a and b, depth 3"


def test_a_table_in_markdown() -> None:
    assert markdown_table(["system", "MAP"], [["a|b\nc", "0.5"]], ["system"]) == [
        "| system | MAP |",
        "| --- | ---: |",
        "| a\\|b c | 0.5 |",
    ]
