"""The embedded collection `pydocs`: Python's standard library, with questions programmers ask.

Documents are taken from the running interpreter: one for each public class and function that
has documentation of its own, titled by its qualified name. Nothing of them is shipped. The
questions and their graded judgements are ours, in `pydocs.jsonl` beside this file, one a line:
`{"_id", "text", "split": "train" | "test", "relevant": {"module.name": grade}}`, grade 2 for the
answer itself, 1 for a document that helps.
"""

from __future__ import annotations

import json
import sys
from importlib import resources
from typing import Any

from retrieval_kd.data.stdlib import read_stdlib
from retrieval_kd.types import Collection, Queries


def load_pydocs() -> Collection:
    """Build the collection: about 2,400 documents, and questions split into train and test.

    Judgements of names that this Python version lacks are dropped, and questions left without a
    judgement with them; `notes` say how many.
    """
    found = read_stdlib()
    row_of = {name: row for row, name in enumerate(found)}
    splits: dict[str, tuple[list[str], list[str], list[dict[int, int]]]] = {}
    missing = dropped = 0
    for question in questions():
        qrels = {row_of[name]: grade for name, grade in question["relevant"].items() if name in row_of}
        missing += len(question["relevant"]) - len(qrels)
        if not qrels:
            dropped += 1
            continue
        ids, texts, judged = splits.setdefault(question["split"], ([], [], []))
        ids.append(question["_id"])
        texts.append(question["text"])
        judged.append(qrels)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Collection(
        name="pydocs",
        document_ids=list(found),
        documents=[f"{title} {text}" for title, text in found.values()],
        splits={name: Queries(*parts) for name, parts in splits.items()},
        notes=[
            f"Python {version}: {missing} judged names are absent in this version and were dropped, "
            f"{dropped} questions with them."
        ],
    )


def questions() -> list[dict[str, Any]]:
    """The questions as stored, in file order, whatever this Python version has."""
    text = (resources.files("retrieval_kd.data") / "pydocs.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
