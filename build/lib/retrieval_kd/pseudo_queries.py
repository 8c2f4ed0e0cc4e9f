"""Pieces of documents that stand for queries where a collection has few or none."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from retrieval_kd.recipe import PseudoQueries

# A sentence ends with its mark before a blank and a capital, digit or quote, or at an empty line.
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9\"'(])|\n\s*\n")


def make_pseudo_queries(documents: Sequence[str], options: PseudoQueries) -> list[str]:
    """Sentences of the documents, each distinct one once, in the order of the documents.

    Between `minimum_words` and `maximum_words` long; of each document at most `per_document`,
    drawn with `seed`. With `whole_documents` each document follows its sentences, whatever its length.
    """
    rng = np.random.default_rng(options.seed)
    chosen: dict[str, None] = {}
    for document in documents:
        sentences = [" ".join(piece.split()) for piece in _SENTENCE_END.split(document)]
        fitting = [s for s in sentences if options.minimum_words <= len(s.split()) <= options.maximum_words]
        if options.per_document is not None and len(fitting) > options.per_document:
            keep = np.sort(rng.choice(len(fitting), options.per_document, replace=False))
            fitting = [fitting[place] for place in keep]
        chosen.update(dict.fromkeys([*fitting, document] if options.whole_documents else fitting))
    return list(chosen)
