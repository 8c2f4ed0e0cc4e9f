"""BEIR folders: corpus.jsonl, queries.jsonl, qrels/{split}.tsv; and renderings, read when asked for.

queries.NAME.jsonl, corpus.NAME.jsonl   the rendering NAME: other texts under the same ids
conversations.jsonl                     the rendering `conversation` of queries
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from retrieval_kd.files import read_lines
from retrieval_kd.types import Collection, InputError, Queries, Texts

CONVERSATION = "conversation"
TURN_BREAK = " [SEP] "


def load_beir(
    folder: Path, splits: Sequence[str] = ("train", "dev", "test"), allow_unknown_qrels: bool = False
) -> Collection:
    """Read a BEIR folder; a document's text is its title, a space, and its text.

    The queries of a split are those judged in `qrels/{split}.tsv`. One of `splits` without such
    judgements is read from `queries.{split}.jsonl`, where there is one, for label-free distillation; no
    other file of that kind is opened, as it may be a rendering.
    Documents without any text keep their row and are counted in `notes`. With
    `allow_unknown_qrels`, judgements of absent documents are dropped and counted; otherwise they
    are an InputError, as are bad lines, doubled ids and unknown queries.
    """
    documents = read_texts(folder / "corpus.jsonl", with_title=True)
    row_of = {document_id: row for row, document_id in enumerate(documents)}
    notes = [f"read from {folder}"]
    if empty := sum(not text for text in documents.values()):
        notes.append(f"{empty} documents have no text; they keep their rows.")
    found: dict[str, Queries] = {}
    dropped: dict[str, int] = {}
    queries = read_texts(folder / "queries.jsonl")
    for path in sorted((folder / "qrels").glob("*.tsv")):
        judged, unknown = _read_qrels(path, queries, row_of, allow_unknown_qrels)
        if unknown:
            notes.append(f"{path.name}: {unknown} judgements name absent documents and were dropped.")
            dropped[path.stem] = unknown
        ids = [query_id for query_id in queries if query_id in judged]
        found[path.stem] = Queries(ids, [queries[query_id] for query_id in ids], [judged[query_id] for query_id in ids])
    for name in splits:
        path = folder / f"queries.{name}.jsonl"
        if name not in found and path.is_file():
            unjudged = read_texts(path)
            found[name] = Queries(list(unjudged), list(unjudged.values()))
    return Collection(folder.name, list(documents), list(documents.values()), found, notes, dropped)


def read_rendering(folder: Path, stem: Literal["queries", "corpus"], name: str) -> Texts:
    """Read the rendering `name` of a folder's queries or documents."""
    path = folder / f"{stem}.{name}.jsonl"
    if path.is_file():
        return Texts(str(path), read_texts(path, with_title=stem == "corpus"))
    conversations = folder / "conversations.jsonl" if stem == "queries" else None
    if name == CONVERSATION and conversations is not None and conversations.is_file():
        return Texts(str(conversations), read_conversations(conversations))
    known = [found.name.removeprefix(f"{stem}.").removesuffix(".jsonl") for found in folder.glob(f"{stem}.*.jsonl")]
    known += [CONVERSATION] if conversations is not None and conversations.is_file() else []
    raise InputError(
        f"there is no rendering {name!r}, as {path} does not exist; there are: {', '.join(sorted(known)) or 'none'}."
    )


def read_conversations(path: Path) -> dict[str, str]:
    """Id -> the whole conversation, most recent turn first, joined with " [SEP] ".

    So truncation takes the oldest turns. Reads JSON Lines with `_id` and `turns`, a list of objects with
    `text`, oldest first; whose turn it is, is not said.
    Source: Lupart et al. 2024, arXiv:2410.14609 (DiSCo).
    """
    texts: dict[str, str] = {}
    for number, record in _read_records(path):
        turns = record.get("turns")
        said = [turn.get("text") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
        query_id, spoken = record.get("_id"), [text.strip() for text in said if isinstance(text, str)]
        if not isinstance(query_id, str) or not spoken or len(spoken) < len(turns or []):
            raise InputError(
                f"{path}:{number}: expected a conversation such as "
                '{"_id": "q1", "turns": [{"speaker": "user", "text": "..."}]}.'
            )
        if query_id in texts:
            raise InputError(f"{path}:{number}: id {query_id!r} occurs a second time; ids are unique.")
        texts[query_id] = TURN_BREAK.join(reversed(spoken))
    return texts


def read_texts(path: Path, with_title: bool = False) -> dict[str, str]:
    """Id -> text of a JSON Lines file with `_id`, `text` and, if `with_title`, perhaps a `title` put in front."""
    texts: dict[str, str] = {}
    for number, record in _read_records(path):
        for key in ("_id", "text", "title") if with_title else ("_id", "text"):
            if not isinstance(record.get(key, "" if key == "title" else None), str):
                raise InputError(
                    f"{path}:{number}: {key!r} must be a string, found {record.get(key)!r}; "
                    'a line looks like {"_id": "d1", "title": "...", "text": "..."}.'
                )
        if record["_id"] in texts:
            raise InputError(f"{path}:{number}: id {record['_id']!r} occurs a second time; ids are unique.")
        title = record.get("title", "") if with_title else ""
        texts[record["_id"]] = f"{title} {record['text']}".strip()
    return texts


def _read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, JSON object) of a JSON Lines file."""
    for number, line in read_lines(path):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number}: not JSON ({error}): {line[:60]!r}.") from None
        if not isinstance(record, dict):
            raise InputError(f"{path}:{number}: expected a JSON object, found {line[:60]!r}.")
        yield number, record


def _read_qrels(
    path: Path, queries: dict[str, str], row_of: dict[str, int], allow_unknown: bool
) -> tuple[dict[str, dict[int, int]], int]:
    """(query id -> corpus row -> grade, number of judgements dropped) of a qrels file."""
    judged: dict[str, dict[int, int]] = {}
    unknown = 0
    for number, line in read_lines(path):
        fields = line.split("\t")
        if number == 1 and fields[0] == "query-id":
            continue
        if len(fields) != 3:
            raise InputError(
                f"{path}:{number}: a judgement has 3 tab-separated fields (query-id, corpus-id, score), "
                f"this line has {len(fields)}: {line[:60]!r}."
            )
        query_id, document_id, grade = fields
        if query_id not in queries:
            raise InputError(f"{path}:{number}: query {query_id!r} is not in queries.jsonl.")
        if document_id not in row_of:
            if not allow_unknown:
                raise InputError(
                    f"{path}:{number}: document {document_id!r} is not in corpus.jsonl; "
                    "to drop and count such judgements, give --allow-unknown-qrels."
                )
            unknown += 1
            continue
        grades = judged.setdefault(query_id, {})
        if row_of[document_id] in grades:
            raise InputError(f"{path}:{number}: {query_id!r} and {document_id!r} are judged a second time.")
        try:
            grades[row_of[document_id]] = int(grade)
        except ValueError:
            raise InputError(f"{path}:{number}: the grade {grade!r} is not a whole number.") from None
    return judged, unknown
