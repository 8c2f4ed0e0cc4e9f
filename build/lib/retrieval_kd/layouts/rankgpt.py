"""RankGPT's permutations (marco-train-100k-gpt3.5.json, arXiv:2304.09542), aligned with a passages file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retrieval_kd.layouts import Record
from retrieval_kd.layouts._files import from_objects, identifier, malformed, member, text, titled, whole
from retrieval_kd.layouts._permutations import complete_order
from retrieval_kd.types import InputError

FORM = 'a list of answers such as "[2] > [1] > [3]", one for each line of the passages file'
FORM_BESIDE = '{"query": "...", "retrieved_passages": [{"docid": "1", "text": "..."}]}'
BESIDE = "the JSON Lines of queries with their retrieved_passages"


def read(path: Path, beside: Path) -> Iterator[Record]:
    """One record an answer; one that names no passage has no ranking."""
    answers = whole(path, FORM, list)
    count = 0
    for count, record in enumerate(from_objects(beside, FORM_BESIDE, _parse), start=1):
        if count > len(answers):
            break
        where = f"{path}: answer {count}"
        try:
            places = [int(digits) - 1 for digits in re.findall(r"\d+", text(answers[count - 1]))]
        except ValueError as error:
            raise malformed(where, FORM, error) from None
        yield Record(
            query=record.query,
            document_ids=record.document_ids,
            documents=record.documents,
            ranking=complete_order(places, len(record)),
            where=where,
        )
    if count != len(answers):
        more = "more lines" if count > len(answers) else f"{count} lines"
        raise InputError(f"{path} has {len(answers)} answers and {beside} {more}; they must go line by line.")


def _parse(value: Any, where: str) -> Record:
    passages = member(value, "retrieved_passages", list)
    documents = [titled(passage) for passage in passages]
    ids = [identifier(passage.get("docid")) for passage in passages]
    return Record(query=member(value, "query", str), document_ids=ids, documents=documents, where=where)
