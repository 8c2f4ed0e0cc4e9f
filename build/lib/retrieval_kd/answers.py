"""Questions to a teacher and what becomes of the answers: kept as they come, and counted.

Whatever ends the work, the answers in hand are kept, so that nothing is asked again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.progress import say
from retrieval_kd.store.store import Keys, Store
from retrieval_kd.teachers import Metered, Teacher
from retrieval_kd.usage import Interrupted

COMMIT_SECONDS = 5.0  # a killed process loses at most this much work, or one chunk

Count = Callable[[int, int], None]


class Chunk(NamedTuple):
    """Questions that are put at once: the keys of each, and the arguments of the call that answers them."""

    keys: tuple[Keys, ...]  # each (n,)
    arguments: tuple[Any, ...]


Answers = tuple[tuple[Keys, ...], NDArray[np.float32]]  # keys, each (n,), and what was answered, (n, ...)


def answer(ask: Callable[..., NDArray[np.float32]], chunks: Iterable[Chunk]) -> Iterator[Answers]:
    """The answers to chunks of questions; of one that is cut short, those that there are, and then its Interrupted."""
    for keys, arguments in chunks:
        try:
            answers = ask(*arguments)
        except Interrupted as stop:
            places = list(stop.places)
            yield tuple(key[places] for key in keys), np.asarray(stop.answers, np.float32)
            raise
        yield keys, answers


def keep(answers: Iterable[Answers], append: Callable[..., None], count: Count) -> None:
    """Append answers as they come, every COMMIT_SECONDS and at the end, even if the end is an error."""
    waiting: list[tuple[NDArray[Any], ...]] = []
    committed = time.monotonic()

    def commit() -> None:
        columns = [np.concatenate(column) for column in zip(*waiting, strict=True)]
        waiting.clear()
        append(*columns)

    try:
        for keys, values in answers:
            waiting.append((*keys, values))
            count(len(values), int(np.isnan(values).any(axis=tuple(range(1, values.ndim))).sum()))
            if time.monotonic() - committed > COMMIT_SECONDS:
                commit()
                committed = time.monotonic()
    finally:
        if waiting:
            commit()


@contextmanager
def recording(store: Store, name: str, teacher: Teacher, what: Literal["pairs", "texts"] = "pairs") -> Iterator[Count]:
    """Record what the work inside costs, even if it fails; call what is yielded with answers and those without one.

    At the end it is said how many questions had no answer, and what the teacher said instead.
    """
    began, total, silent = time.monotonic(), 0, 0
    meter = teacher if isinstance(teacher, Metered) else None
    before = copy(meter.usage) if meter else None

    def count(answers: int, unanswered: int) -> None:
        nonlocal total, silent
        total += answers
        silent += unanswered

    try:
        yield count
    finally:
        tokens = meter.usage.tokens - before.tokens if meter and before else None
        money = meter.usage.money - before.money if meter and before else None
        if total or tokens:
            counts = {"pairs": 0, "texts": 0, what: total}
            seconds = time.monotonic() - began
            store.record(**counts, tokens=tokens or None, seconds=seconds, money=money or None)
        if meter and before and silent:
            said = f", but {', '.join(map(repr, meter.usage.unread))}" if meter.usage.unread else ""
            say(f"{name}: {silent:,} of {total:,} questions had no answer{said}; they are kept as such (NaN)")
        if meter and before and meter.usage.bounded > before.bounded:
            say(
                f"{name}: {meter.usage.bounded - before.bounded:,} answers were less likely than all tokens that the "
                "server shows, and count as likely as the last of these; raise endpoint.top_logprobs if it shows more"
            )
        if tokens:
            say(f"{name}: {tokens:,} tokens" + (f", {money:.4f} in the currency of the prices" if money else ""))
