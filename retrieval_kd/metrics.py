"""Names of metrics: every alias of the field is read, one form is printed."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from retrieval_kd.types import InputError

STANDARD = ("nDCG@10", "MRR@10", "R@100", "R@1000", "MAP")

Kind = Literal["nDCG", "MRR", "R", "MAP"]
KIND_OF: dict[str, Kind] = {
    "ndcg": "nDCG",
    "mrr": "MRR",
    "rr": "MRR",
    "recip_rank": "MRR",
    "r": "R",
    "recall": "R",
    "map": "MAP",
    "ap": "MAP",
}
# [[dataset_]similarity_]kind[@10], as Sentence Transformers, trec_eval, ir_measures, BEIR and MTEB write it
FORM = re.compile(
    rf"(?:(?:.+_)?(?:cosine|dot|euclidean|manhattan|maxsim)_)?({'|'.join(KIND_OF)})(?:(?:@|_at_|_cut_|_)([1-9]\d*))?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Metric:
    """A metric of rankings; `cutoff` is the number of results that count, None for all."""

    kind: Kind
    cutoff: int | None = None

    def __str__(self) -> str:
        return self.kind if self.cutoff is None else f"{self.kind}@{self.cutoff}"


def parse_metric(name: str) -> Metric:
    """The metric that `name` means in any of the usual spellings (nDCG@10, ndcg_cut_10, dot_ndcg@10).

    A name without a number has no cutoff: `recip_rank` is MRR over the whole list, as in trec_eval
    without -M. Recall must have one.
    """
    match = FORM.fullmatch(name.strip())
    if match is None:
        raise InputError(f"there is no metric {name!r}{_guess(name)}; write nDCG@K, MRR@K, R@K, MAP or MAP@K.")
    kind, cutoff = KIND_OF[match[1].lower()], match[2]
    if kind == "R" and cutoff is None:
        raise InputError(f"metric {name!r} has no cutoff; say how deep recall is taken, for example 'R@1000'.")
    return Metric(kind, int(cutoff) if cutoff else None)


def _guess(name: str) -> str:
    word, number = re.sub(r"(@|_at_|_cut_|_)?\d*$", "", name.lower()), re.search(r"[1-9]\d*$", name)
    near = difflib.get_close_matches(word, KIND_OF, n=1)
    if not near:
        return ""
    cutoff = int(number[0]) if number else 100 if KIND_OF[near[0]] == "R" else None
    return f"; did you mean '{Metric(KIND_OF[near[0]], cutoff)}'?"
