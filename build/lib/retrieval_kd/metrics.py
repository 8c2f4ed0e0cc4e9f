"""Names of metrics: every alias of the field is read, one form is printed.

nDCG@10           NDCG@10  ndcg_cut_10  ndcg_cut.10  ndcg_at_10  cosine_ndcg@10  NanoBEIR_mean_cosine_ndcg@10
MRR@10            RR@10  mrr_at_10  recip_rank -M 10
R@1000            Recall@1000  recall_1000  recall.1000  R@1K
MAP, MAP@100      AP  map_cut_100  map -M 100
R(rel=2)@1000     recall_1000 -l 2                 relevant from grade 2, whatever the collection says
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from retrieval_kd.types import InputError

PRIMARY = "nDCG@10"  # what reports test, and what is tuned and selected by, where nothing else is said
STANDARD = (PRIMARY, "MRR@10", "R@100", "R@1000", "MAP")

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
# [[dataset_]similarity_]kind[(rel=2)][@10], as Sentence Transformers, trec_eval, ir_measures, BEIR and MTEB write it,
# and trec_eval's options: -M results a query, -l the lowest relevant grade
FORM = re.compile(
    rf"(?:(?:.+_)?(?:cosine|dot|euclidean|manhattan|maxsim)_)?(?P<kind>{'|'.join(KIND_OF)})"
    r"(?:\(rel=(?P<rel>[1-9]\d*)\))?(?:(?:@|_at_|_cut[_.]|[_.])(?P<cutoff>[1-9]\d*)(?P<thousand>k)?)?"
    r"(?: -M (?P<M>[1-9]\d*))?(?: -l (?P<l>[1-9]\d*))?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Metric:
    """A metric of rankings; `cutoff` is the number of results that count, None for all.

    `relevance` is the lowest grade that is relevant, None for that of the collection. nDCG has none: its gains
    are the grades.
    """

    kind: Kind
    cutoff: int | None = None
    relevance: int | None = None

    def is_bounded(self, depth: int, documents: int | None = None) -> bool:
        """Whether lists of `depth` results are too short for this recall, of a collection of so many documents."""
        if self.kind != "R" or self.cutoff is None:
            return False
        return depth < (self.cutoff if documents is None else min(self.cutoff, documents))

    def __str__(self) -> str:
        name = self.kind if self.relevance is None else f"{self.kind}(rel={self.relevance})"
        return name if self.cutoff is None else f"{name}@{self.cutoff}"


def parse_metric(name: str) -> Metric:
    """The metric that `name` means in any of the usual spellings (nDCG@10, ndcg_cut_10, dot_ndcg@10).

    A name without a number has no cutoff: `recip_rank` is MRR over the whole list, as in trec_eval
    without -M. Recall must have one.
    """
    match = FORM.fullmatch(name.strip())
    if match is None:
        raise InputError(f"there is no metric {name!r}{_guess(name)}; write nDCG@K, MRR@K, R@K, MAP or MAP@K.")
    kind = KIND_OF[match["kind"].lower()]
    cutoff = _one(name, match["cutoff"], match["M"], "cutoffs", 1000 if match["thousand"] else 1)
    relevance = _one(name, match["rel"], match["l"], "relevant grades")
    if kind == "R" and cutoff is None:
        raise InputError(f"metric {name!r} has no cutoff; say how deep recall is taken, for example 'R@1000'.")
    if kind == "nDCG" and relevance is not None:
        raise InputError(f"metric {name!r}: the gains of nDCG are the grades, so that it has no lowest relevant one.")
    return Metric(kind, cutoff, relevance)


def _one(name: str, inside: str | None, option: str | None, what: str, times: int = 1) -> int | None:
    """The number that a name gives, in itself or as an option of trec_eval, but not both."""
    if inside and option:
        raise InputError(f"metric {name!r} has two {what}, {inside} and {option}; give one.")
    return int(inside) * times if inside else int(option) if option else None


def _guess(name: str) -> str:
    word, number = re.sub(r"(@|_at_|_cut_|_)?\d*$", "", name.lower()), re.search(r"[1-9]\d*$", name)
    near = difflib.get_close_matches(word, KIND_OF, n=1)
    if not near:
        return ""
    cutoff = int(number[0]) if number else 100 if KIND_OF[near[0]] == "R" else None
    return f"; did you mean '{Metric(KIND_OF[near[0]], cutoff)}'?"
