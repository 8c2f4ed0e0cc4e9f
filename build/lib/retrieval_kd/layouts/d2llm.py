"""D2LLM's pickles (arXiv:2406.17262): for each query its documents with the logits of yes and no. Read whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from retrieval_kd.layouts import Record
from retrieval_kd.layouts._files import malformed, number, shown, text
from retrieval_kd.layouts._pickles import load_pickle

FORM = "a pickle of {query: [(document, [logit of yes, logit of no])]}"


def read(path: Path) -> Iterator[Record]:
    """One record a query; a score is the logit of yes minus that of no."""
    for query, items in load_pickle(path, FORM).items():
        where = f"{path}: query {shown(query)}"
        try:
            documents, scores = [], []
            for item in items if isinstance(items, list) else [items]:
                if not isinstance(item, tuple | list) or len(item) != 2 or len(item[1]) != 2:
                    raise ValueError(f"{shown(item)} is not a document with two logits")
                documents.append(text(item[0]))
                scores.append(number(item[1][0]) - number(item[1][1]))
            yield Record(query=text(query), documents=documents, scores=scores, where=where)
        except (TypeError, ValueError) as error:
            raise malformed(where, FORM, error) from None
