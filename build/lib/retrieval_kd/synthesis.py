"""Synthetic queries and passages: a language model's texts beside a collection's own, as a BEIR folder.

corpus.jsonl, queries.jsonl, qrels/*.tsv   the collection and what was made for it
synthetic.jsonl                            one line a text: whose it is, and how it was made
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from retrieval_kd.data import load_collection
from retrieval_kd.files import atomic, fingerprint, read_lines
from retrieval_kd.language_model import LanguageModel, LanguageModelOptions, open_model
from retrieval_kd.progress import progress, say
from retrieval_kd.prompts import check_template, cut_words, fill_template
from retrieval_kd.tables import Name, Positive, Table
from retrieval_kd.types import Collection, InputError, Side
from retrieval_kd.usage import Interrupted


class Made(Table):
    """One kind of text: made of every query, as a document, or of every document, as a query."""

    name: Name  # the end of the ids of these texts
    of: Side
    prompt: str  # with {query} or {document}
    system: str = ""
    grade: int = Field(default=1, ge=0)  # the judgement of the pair; 0 for a document that only looks relevant
    sample: Positive | None = None  # of so many queries or documents, drawn with the seed; absent: of all
    max_tokens: Positive = 256

    @model_validator(mode="after")
    def _has_place(self) -> Made:
        check_template(self.prompt, [self.of])
        return self


class Synthesis(Table):
    """What is made, of which collection, by which model."""

    collection: str
    split: str = "train"  # whose queries texts are made of, and whose judgements they join
    seed: int = 0
    model: LanguageModelOptions
    texts: tuple[Made, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_differ(self) -> Synthesis:
        names = [made.name for made in self.texts]
        if doubled := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two kinds of text are called {sorted(doubled)[0]!r}; names are unique")
        return self


def synthesize(options: Synthesis, folder: Path) -> dict[str, int]:
    """Make the texts that `folder` lacks, and write it as a BEIR folder; counts of texts made, kept and refused.

    Texts are on disk as they are made, so that a run that stopped goes on from there. Raises InputError for a
    folder whose texts were made in another way, and for ids that the collection has already.
    """
    collection = load_collection(options.collection)
    model = open_model(options.model)
    log, wanted = folder / "synthetic.jsonl", {made.name: _parents(made, collection, options) for made in options.texts}
    known = _read(log)
    folder.mkdir(parents=True, exist_ok=True)
    kept = len(known)
    for made in options.texts:
        how = _how(made, model, options)
        for line in known.values():
            if line["name"] == made.name and line["how"] != how:
                raise InputError(
                    f"{log} holds texts {made.name!r} that another model, prompt or seed made; give another folder, "
                    "or this kind of text another name."
                )
        missing = {id_: text for id_, text in wanted[made.name].items() if (made.name, id_) not in known}
        _make(made, missing, model, options, log, known)
    texts = [known[name, id_] for name, ids in wanted.items() for id_ in ids]
    _write(folder, collection, options.split, [line for line in texts if line["text"]])
    usage = model.usage
    if usage.tokens:
        say(f"{usage.tokens:,} tokens" + (f", {usage.money:.4f} in the currency of the prices" if usage.money else ""))
    refused = sum(not line["text"] for line in texts)
    return {"made": len(known) - kept, "texts": len(texts) - refused, "refused": refused, "tokens": usage.tokens}


def _parents(made: Made, collection: Collection, options: Synthesis) -> dict[str, str]:
    """Id and text of what the texts are made of, in the order of the collection."""
    if made.of == "query":
        queries = collection.split(options.split)
        ids, texts = queries.ids, queries.texts
    else:
        ids, texts = collection.document_ids, collection.documents
    places: Iterable[int] = range(len(ids))
    if made.sample is not None and made.sample < len(ids):
        places = np.sort(np.random.default_rng(options.seed).choice(len(ids), made.sample, replace=False)).tolist()
    return {ids[place]: texts[place] for place in places}


def _how(made: Made, model: LanguageModel, options: Synthesis) -> str:
    """A fingerprint of all that decides what is made of a text."""
    words = options.model.document_words
    return fingerprint([model.identity, made.of, made.system, made.prompt, made.max_tokens, words])


def _make(
    made: Made,
    missing: Mapping[str, str],
    model: LanguageModel,
    options: Synthesis,
    log: Path,
    known: dict[tuple[str, str], dict[str, Any]],
) -> None:
    """Make texts of what is missing, a chunk at a time, each chunk on disk before the next."""
    ids, size = list(missing), 8 * model.at_once
    about = {"name": made.name, "of": made.of, "grade": made.grade, "model": options.model.model, "seed": options.seed}
    about |= {"system": made.system, "prompt": made.prompt, "how": _how(made, model, options)}
    with progress(f"make {made.name}", len(ids)) as advance:
        for start in range(0, len(ids), size):
            chunk, stop = ids[start : start + size], None
            prompts = []
            for id_ in chunk:
                query, document = (missing[id_], []) if made.of == "query" else ("", [missing[id_]])
                read = [cut_words(text, options.model.document_words) for text in document]
                values, documents = ({"query": query}, {}) if made.of == "query" else ({}, {"document": read})
                prompts.append(fill_template(made.prompt, values, documents, made.system))
            try:
                texts: Sequence[str | None] = model.complete(prompts, made.max_tokens)
            except Interrupted as interruption:
                stop = interruption
                chunk, texts = [chunk[place] for place in stop.places], stop.answers
            lines: list[dict[str, Any]] = [
                {"id": f"{id_}-{made.name}", "parent": id_, "text": (text or "").strip() or None, **about}
                for id_, text in zip(chunk, texts, strict=True)
            ]
            with log.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
                file.flush()
                os.fsync(file.fileno())
            known.update({(made.name, line["parent"]): line for line in lines})
            if stop:
                raise stop
            advance(len(chunk))


def _read(log: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What was made before, by name and parent."""
    known = {}
    for number, text in read_lines(log) if log.exists() else ():
        try:
            line = json.loads(text)
            known[line["name"], line["parent"]] = line
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise InputError(f"{log}:{number}: no synthetic text ({error!r}); delete this line.") from None
    return known


def _write(folder: Path, collection: Collection, split: str, made: Sequence[dict[str, Any]]) -> None:
    """Write the BEIR files: the collection, and what was made for it."""
    documents = dict(zip(collection.document_ids, collection.documents, strict=True))
    queries = {
        id_: text
        for name in collection.splits
        for id_, text in zip(collection.split(name).ids, collection.split(name).texts, strict=True)
    }
    judged: dict[str, list[tuple[str, str, int]]] = {split: []}
    for name, its in collection.splits.items():
        judged[name] = [
            (query, collection.document_ids[row], grade)
            for query, grades in zip(its.ids, its.qrels, strict=bool(its.qrels))
            for row, grade in grades.items()
        ]
    for line in made:
        into = documents if line["of"] == "query" else queries
        if line["id"] in into:
            raise InputError(f"{collection.name!r} has an id {line['id']!r} already; give texts[].name another name.")
        into[line["id"]] = line["text"]
        pair = (line["parent"], line["id"]) if line["of"] == "query" else (line["id"], line["parent"])
        judged[split].append((*pair, line["grade"]))
    _lines(folder / "corpus.jsonl", ({"_id": id_, "title": "", "text": text} for id_, text in documents.items()))
    _lines(folder / "queries.jsonl", ({"_id": id_, "text": text} for id_, text in queries.items()))
    for name, pairs in judged.items():
        with atomic(folder / "qrels" / f"{name}.tsv") as scratch, scratch.open("w", encoding="utf-8") as file:
            file.write("query-id\tcorpus-id\tscore\n")
            file.writelines(f"{query}\t{document}\t{grade}\n" for query, document, grade in pairs)


def _lines(path: Path, records: Iterable[dict[str, str]]) -> None:
    with atomic(path) as scratch, scratch.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
