"""What a slow or paid teacher costs, and how one that stops half-way hands over what it has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from retrieval_kd.types import InputError


@dataclass
class Usage:
    """Running totals of a teacher since it was loaded."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    money: float = 0.0  # in the currency of the prices
    bounded: int = 0  # answers less likely than any that the server showed
    unread: list[str] = field(default_factory=list)  # the first answers that held no judgement

    @property
    def tokens(self) -> int:
        """Tokens read and written."""
        return self.input_tokens + self.output_tokens

    def note(self, answer: str) -> None:
        """Keep an answer that held no judgement, if it is among the first."""
        if len(self.unread) < 3:
            self.unread.append(answer[:60])


class Interrupted(InputError):  # noqa: N818 - an end, with what was done until then
    """A teacher stopped before the end of its questions; `answers` are those of the questions at `places`."""

    def __init__(self, message: str, places: Sequence[int], answers: Iterable[Any]) -> None:
        super().__init__(message)
        self.places = places
        self.answers = list(answers)
