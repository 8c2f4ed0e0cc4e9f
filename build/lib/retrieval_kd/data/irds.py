"""Collections of ir_datasets, by id: `beir/scifact`, `msmarco-passage`, `cranfield`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import ir_datasets

from retrieval_kd.types import Collection, InputError, Queries, Texts


def load_irds(name: str, splits: Sequence[str], allow_unknown_qrels: bool = False) -> Collection:
    """Load the documents of `name`, and of its subsets `name/SPLIT` the queries and judgements.

    An id that has queries itself and no such subset (`cranfield`) gives them as split `test`.
    Downloads what ir_datasets does not hold yet.
    """
    try:
        dataset = ir_datasets.load(name)
    except KeyError:
        raise InputError(
            f"{name!r} is neither a BEIR folder (with corpus.jsonl), nor a folder below RKD_DATA, nor an "
            "ir_datasets id (see https://ir-datasets.com)."
        ) from None
    texts: dict[str, str] = {}
    for document in dataset.docs_iter():
        if document.doc_id in texts:
            raise InputError(f"ir_datasets {name!r}: document id {document.doc_id!r} occurs twice.")
        texts[document.doc_id] = _text(document)
    row_of = {document_id: row for row, document_id in enumerate(texts)}
    notes = [f"read through ir_datasets id {name}"]
    if empty := sum(not text for text in texts.values()):
        notes.append(f"{empty} documents have no text; they keep their rows.")
    found: dict[str, Queries] = {}
    dropped: dict[str, int] = {}
    for split in splits:
        try:
            subset = ir_datasets.load(f"{name}/{split}")
        except KeyError:
            if split != "test" or not dataset.has_queries():
                continue
            subset = dataset
        found[split], unknown = _queries(subset, row_of)
        if unknown and not allow_unknown_qrels:
            raise InputError(
                f"ir_datasets {name}/{split}: {unknown} judgements name documents that the collection lacks; "
                "to drop and count them, give --allow-unknown-qrels."
            )
        if unknown:
            notes.append(f"{split}: {unknown} judgements name absent documents and were dropped.")
            dropped[split] = unknown
    return Collection(name, list(texts), list(texts.values()), found, notes, dropped)


def read_rendering(name: str, stem: Literal["queries", "corpus"]) -> Texts:
    """All queries or documents of the ir_datasets id `name`, which renders those of another id (neuMARCO)."""
    try:
        dataset = ir_datasets.load(name)
    except KeyError:
        raise InputError(f"the rendering 'irds:{name}' is no ir_datasets id (see https://ir-datasets.com).") from None
    if not (dataset.has_queries() if stem == "queries" else dataset.has_docs()):
        raise InputError(f"the rendering 'irds:{name}' has no {'queries' if stem == 'queries' else 'documents'}.")
    if stem == "queries":
        texts = {query.query_id: query.default_text() for query in dataset.queries_iter()}
    else:
        texts = {document.doc_id: _text(document) for document in dataset.docs_iter()}
    return Texts(f"ir_datasets {name}", texts)


def _queries(subset: Any, row_of: dict[str, int]) -> tuple[Queries, int]:
    """The queries of a subset (those judged, where there are judgements) and the judgements dropped."""
    texts = {query.query_id: query.default_text() for query in subset.queries_iter()}
    if not subset.has_qrels():
        return Queries(list(texts), list(texts.values())), 0
    judged: dict[str, dict[int, int]] = {}
    unknown = 0
    for judgement in subset.qrels_iter():
        if judgement.doc_id not in row_of:
            unknown += 1
        elif judgement.query_id in texts:
            judged.setdefault(judgement.query_id, {})[row_of[judgement.doc_id]] = judgement.relevance
    ids = [query_id for query_id in texts if query_id in judged]
    return Queries(ids, [texts[i] for i in ids], [judged[i] for i in ids]), unknown


def _text(document: Any) -> str:
    """Title, a space, text, as BEIR does; for other records their default text."""
    if hasattr(document, "title") and hasattr(document, "text"):
        return f"{document.title} {document.text}".strip()
    return str(document.default_text()).strip()
