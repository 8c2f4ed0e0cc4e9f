"""BEIR folders: corpus.jsonl, queries.jsonl, qrels/{split}.tsv."""

from __future__ import annotations

import json
from pathlib import Path

from retrieval_kd.files import read_lines
from retrieval_kd.types import Collection, InputError, Queries


def load_beir(folder: Path, allow_unknown_qrels: bool = False) -> Collection:
    """Read a BEIR folder; a document's text is its title, a space, and its text.

    The queries of a split are those judged in `qrels/{split}.tsv`; a file
    `queries.{split}.jsonl` without such judgements is a split for label-free distillation.
    Documents without any text keep their row and are counted in `notes`. With
    `allow_unknown_qrels`, judgements of absent documents are dropped and counted; otherwise they
    are an InputError, as are bad lines, doubled ids and unknown queries.
    """
    documents = read_texts(folder / "corpus.jsonl", with_title=True)
    row_of = {document_id: row for row, document_id in enumerate(documents)}
    notes = [f"read from {folder}"]
    if empty := sum(not text for text in documents.values()):
        notes.append(f"{empty} documents have no text; they keep their rows.")
    splits: dict[str, Queries] = {}
    queries = read_texts(folder / "queries.jsonl")
    for path in sorted((folder / "qrels").glob("*.tsv")):
        judged, unknown = _read_qrels(path, queries, row_of, allow_unknown_qrels)
        if unknown:
            notes.append(f"{path.name}: {unknown} judgements name absent documents and were dropped.")
        ids = [query_id for query_id in queries if query_id in judged]
        splits[path.stem] = Queries(
            ids, [queries[query_id] for query_id in ids], [judged[query_id] for query_id in ids]
        )
    for path in sorted(folder.glob("queries.*.jsonl")):
        name = path.name.removeprefix("queries.").removesuffix(".jsonl")
        if name not in splits:
            found = read_texts(path)
            splits[name] = Queries(list(found), list(found.values()))
    return Collection(folder.name, list(documents), list(documents.values()), splits, notes)


def read_texts(path: Path, with_title: bool = False) -> dict[str, str]:
    """Id -> text of a JSON Lines file with `_id`, `text` and, if `with_title`, perhaps a `title` put in front."""
    texts: dict[str, str] = {}
    for number, line in read_lines(path):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number}: not JSON ({error}): {line[:60]!r}.") from None
        if not isinstance(record, dict):
            raise InputError(f"{path}:{number}: expected a JSON object, found {line[:60]!r}.")
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
