"""RankLLM's training conversations (RankZephyr, FIRST): system, prompt with lettered passages, answer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retrieval_kd.layouts import Record
from retrieval_kd.layouts._files import from_list, member
from retrieval_kd.layouts._permutations import complete_order

FORM = (
    '{"id": "1", "conversations": [{"value": system}, {"value": "...\\n[A] ...\\n[B] ...\\nSearch Query: ....\\nRank '
    'the 2 passages ..."}, {"value": "[B] > [A]"}]}'
)
LABEL = r"\[([A-Z]|\d+)\]"


def read(path: Path) -> Iterator[Record]:
    """One record a conversation, by text: the passages are as the prompt has them, which may be cut."""
    return from_list(path, FORM, _parse)


def _parse(value: Any, where: str) -> Record:
    turns = [member(turn, "value", str) for turn in member(value, "conversations", list)]
    if len(turns) != 3:
        raise ValueError(f"{len(turns)} turns, not system, prompt and answer")
    _, prompt, answer = turns
    listing, found, question = prompt.rpartition("Search Query: ")
    query = re.match(r"(.*?)\.\s*\nRank the ", question, re.DOTALL)
    if not found or query is None:
        raise ValueError("the prompt has no 'Search Query: ....' before its last 'Rank the'")
    _, *pieces = re.split(rf"(?m)^{LABEL} ?", listing)
    labels, documents = pieces[::2], [piece.strip() for piece in pieces[1::2]]
    if labels != [_label(place, labels[0]) for place in range(len(labels))]:
        raise ValueError(f"the passages are labelled {', '.join(labels)}, not one after the other")
    places = [labels.index(label) if label in labels else -1 for label in re.findall(LABEL, answer)]
    ranking = complete_order(places, len(documents))
    return Record(query=query[1], documents=documents, ranking=ranking, where=where)


def _label(place: int, first: str) -> str:
    return str(place + 1) if first.isdecimal() else chr(ord("A") + place)
