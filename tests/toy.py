"""Toy collections: texts of the tiny models' words, written as BEIR writes a collection."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tiny import WORDS

Qrels = Mapping[int, Mapping[int, int]]  # the grade of each judged document of a query, by their numbers


def draw_texts(documents: int = 20, queries: int = 8, words: int = 3, seed: int = 1) -> tuple[list[str], list[str]]:
    """Documents of nine words, and queries of some words of the document with the same number."""
    rng = np.random.default_rng(seed)
    drawn = [" ".join(rng.choice(WORDS[7:], 9, replace=False)) for _ in range(documents)]
    return drawn, [" ".join(rng.choice(drawn[number].split(), words, replace=False)) for number in range(queries)]


def own_document(queries: int = 8) -> Qrels:
    """The document with the query's number is relevant."""
    return {number: {number: 1} for number in range(queries)}


def write_beir(folder: Path, documents: Sequence[str], queries: Sequence[str], splits: Mapping[str, Qrels]) -> Path:
    """Write documents d0, d1, ..., queries q0, q1, ... and the judgements of each split into `folder`, a new one."""
    (folder / "qrels").mkdir(parents=True)
    for file, letter, texts in (("corpus", "d", documents), ("queries", "q", queries)):
        lines = [json.dumps({"_id": f"{letter}{number}", "text": text}) + "\n" for number, text in enumerate(texts)]
        (folder / f"{file}.jsonl").write_text("".join(lines))
    for split, qrels in splits.items():
        lines = [f"q{query}\td{row}\t{grade}\n" for query, grades in qrels.items() for row, grade in grades.items()]
        (folder / f"qrels/{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder
