"""Orders as language models write them."""

from __future__ import annotations

from collections.abc import Iterable


def complete_order(places: Iterable[int], count: int) -> list[int] | None:
    """The whole order of `count` documents that an answer means; None if it names none of them.

    Repeated places and those out of range are dropped, missing ones follow in the incoming order, as
    RankGPT does (Sun et al. 2023, arXiv:2304.09542, rank_gpt.py). An answer without any place is
    no answer: taken as RankGPT takes it, a refusal would be a vote for the incoming order.
    """
    named = list(dict.fromkeys(place for place in places if 0 <= place < count))
    return [*named, *(place for place in range(count) if place not in set(named))] if named else None
