"""How reports print figures, and tables of them in Markdown."""

from __future__ import annotations

from collections.abc import Container, Sequence

ABSENT = "\N{EN DASH}"  # what is not known
BOUNDED = "†"  # marks a recall that the length of the lists bounds


def decimals(value: float | None) -> str:
    """A value of a metric."""
    return ABSENT if value is None else f"{value:.3f}"


def digits(value: float | None) -> str:
    """A measured number: three digits that matter, without an exponent."""
    if value is None:
        return ABSENT
    size = abs(value)
    return f"{value:,.{3 if size < 1 else 2 if size < 10 else 1 if size < 100 else 0}f}"


def interval(ends: Sequence[float], signed: bool = False) -> str:
    """An interval of values; of differences, which are `signed`, in words, since a dash would read as a minus."""
    low, high = ends
    return f"{low:+.3f} to {high:+.3f}" if signed else f"{low:.3f}\N{EN DASH}{high:.3f}"


def p_value(p: float | None) -> str:
    """The p of a test."""
    return ABSENT if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def plain(value: object) -> str:
    """A value of JSON in words."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(inner)}" for key, inner in value.items())
    return " and ".join(map(plain, value)) if isinstance(value, list | tuple) else str(value)


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]], texts: Container[str]) -> list[str]:
    """The lines of a table: columns whose head is in `texts` are set left, numbers right."""
    rule = ["---" if head in texts else "---:" for head in heads]
    return [
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
        for line in (heads, rule, *rows)
    ]
