"""One teacher's scores summed up in two passes over its lists, two teachers compared, and what follows in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.diagnostics.lists import (
    Starts,
    auc,
    kendall_tau,
    margins,
    mean_margin,
    pairs_in,
    perplexity,
    quantiles,
    temperature_for,
    tied_pairs,
    top_overlap,
)

BINS = 2**16  # of the histogram that quantiles are read off
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
END = 1e-3  # share of the range within which a score counts as lying at its end
EFFECTIVE = 0.25  # share of a list that the suggested temperature spreads the softmax over
MARGINS = 0.95  # share of the margins that the suggested scale brings within 1
TOP = 10  # documents of the overlap and of nDCG
POINTED = 0.1  # nats of entropy below which one document of a list takes nearly all (methods with a softmax)

SATURATED, TIED, FLAT, SAME, OPPOSED = 0.1, 0.5, 0.9, 0.95, -0.05  # shares and taus that are worth a word

RELEVANT, NOT_RELEVANT, NOT_JUDGED = range(3)  # what the qrels say of a document


@dataclass(frozen=True)
class TeacherStats:
    """A teacher's scores in numbers. Shares are from 0 to 1; None where there is nothing to take the number from.

    `answered` pairs have a score, the others were asked in vain (NaN); all numbers below are of these. `tied` is the
    share of pairs of documents of one list with equal scores. `saturated_low` and `saturated_high` are shares of
    scores at the ends of the range. `auc` and `margin` set a query's relevant documents against all others in
    its list, judged or not, and are means over queries, as `ndcg` (of the teacher's order, at 10) is over the judged
    ones. `entropy` (nats) and `effective` (share of the list) are of a softmax over a list at temperature 1.

    `scale` is what brings 95 % of the margins within 1, the range of a student of unit vectors; `temperature` that at
    which a softmax over a list has an effective number of documents (exp of its entropy) of a quarter of the list.
    Both are of margins and lists as stored; a training list drawn at random from them has about the same share.
    """

    pairs: int
    answered: int
    queries: int
    coverage: float | None  # share of the split's queries with a score
    documents_min: int
    documents_median: float
    documents_max: int
    min: float
    quantiles: dict[str, float]  # off a histogram, to 1/65,536 of the range
    max: float
    mean: float
    std: float
    saturated_low: float
    saturated_high: float
    tied: float | None
    relevant: int | None  # judged relevant in the split
    relevant_scored: int | None
    auc: float | None
    margin: float | None
    ndcg: float | None
    entropy: float
    effective: float | None  # over lists of two documents or more
    scale: float | None
    temperature: float | None


@dataclass(frozen=True)
class Agreement:
    """Two teachers on the pairs that both have scored; means over queries, None where no query has such a number."""

    teachers: tuple[str, str]
    pairs: int
    queries: int
    kendall_tau: float | None  # tau-b within lists
    overlap: float | None  # of the best 10, over queries with more than 10 shared documents


@dataclass
class Extent:
    """The first pass: how many scores there are, and their range and mean."""

    pairs: int = 0
    answered: int = 0
    low: float = np.inf
    high: float = -np.inf
    total: float = 0.0

    def add(self, scores: NDArray[np.float32]) -> None:
        """Count more scores, NaN among them."""
        known = scores[np.isfinite(scores)].astype(np.float64)
        self.pairs += len(scores)
        if len(known):
            self.answered += len(known)
            self.low, self.high = min(self.low, float(known.min())), max(self.high, float(known.max()))
            self.total += float(known.sum())


@dataclass
class Tally:
    """The second pass: everything that goes by lists, or by the range and mean of all scores.

    `lists` holds numbers of each list, a block at a time; `sample` the lists that temperature and scale go by.
    """

    extent: Extent
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros((3, BINS), np.int64))
    ends: NDArray[np.int64] = field(default_factory=lambda: np.zeros(2, np.int64))
    squares: float = 0.0
    tied: int = 0
    compared: int = 0
    lists: dict[str, list[NDArray[np.float64]]] = field(default_factory=dict)
    sample: list[tuple[NDArray[np.float32], NDArray[np.bool_]]] = field(default_factory=list)

    def add(
        self,
        starts: Starts,
        scores: NDArray[np.float32],
        judged: NDArray[np.int64],
        ndcg: NDArray[np.float64],
        sampled: NDArray[np.bool_],
    ) -> None:
        """Add whole lists.

        Shapes: scores, judged (n,), what the qrels say of each document; ndcg (any,), of some of the lists;
        sampled (L,), which lists are kept.
        """
        low, high = self.extent.low, self.extent.high
        exact, spread = scores.astype(np.float64), (high - low) or 1.0
        bins = np.minimum((exact - low) / spread * BINS, BINS - 1).astype(np.int64)
        self.counts += np.bincount(judged * BINS + bins, minlength=3 * BINS).reshape(3, BINS)
        self.ends += [(exact <= low + END * (high - low)).sum(), (exact >= high - END * (high - low)).sum()]
        self.squares += float(((exact - self.extent.total / self.extent.answered) ** 2).sum())
        self.tied += int(tied_pairs(starts, scores).sum())
        self.compared += int(pairs_in(starts).sum())
        positive = judged == RELEVANT
        numbers = {
            "size": np.diff(starts).astype(np.float64),
            "auc": auc(starts, scores, positive),
            "margin": mean_margin(starts, scores, positive),
            "perplexity": perplexity(starts, scores),
            "ndcg": ndcg,
        }
        for name, values in numbers.items():
            self.lists.setdefault(name, []).append(values)
        for number in np.flatnonzero(sampled):
            one = slice(starts[number], starts[number + 1])
            self.sample.append((scores[one], positive[one]))

    def finish(self, queries: int | None, relevant: int | None) -> TeacherStats:
        """The numbers, given how many queries and judged relevant documents there are to cover (None: unknown)."""
        extent = self.extent
        lists = {name: np.concatenate(values) for name, values in self.lists.items()}
        sizes, counts = lists["size"], self.counts.sum(0)
        found = quantiles(counts, extent.low, extent.high, np.array(QUANTILES))
        several = sizes > 1
        scale, temperature = self._suggest()
        return TeacherStats(
            pairs=extent.pairs,
            answered=extent.answered,
            queries=len(sizes),
            coverage=len(sizes) / queries if queries else None,
            documents_min=int(sizes.min()),
            documents_median=float(np.median(sizes)),
            documents_max=int(sizes.max()),
            min=extent.low,
            quantiles={f"{share:g}": float(value) for share, value in zip(QUANTILES, found, strict=True)},
            max=extent.high,
            mean=extent.total / extent.answered,
            std=float(np.sqrt(self.squares / extent.answered)),
            saturated_low=float(self.ends[0] / extent.answered),
            saturated_high=float(self.ends[1] / extent.answered),
            tied=self.tied / self.compared if self.compared else None,
            relevant=relevant,
            relevant_scored=None if relevant is None else int(self.counts[RELEVANT].sum()),
            auc=mean_known(lists["auc"]),
            margin=mean_known(lists["margin"]),
            ndcg=mean_known(lists["ndcg"]),
            entropy=float(np.log(lists["perplexity"]).mean()),
            effective=mean_known((lists["perplexity"] / sizes)[several]),
            scale=scale,
            temperature=temperature,
        )

    def _suggest(self) -> tuple[float | None, float | None]:
        """The scale and the temperature of the sampled lists, to three digits."""
        starts = np.concatenate([[0], np.cumsum([len(scores) for scores, _ in self.sample])]).astype(np.int64)
        scores = np.concatenate([scores for scores, _ in self.sample])
        apart = np.abs(margins(starts, scores, np.concatenate([positive for _, positive in self.sample])))
        wide = float(np.quantile(apart, MARGINS)) if len(apart) else 0.0
        return _round(1 / wide if wide else None), _round(temperature_for(starts, scores, EFFECTIVE))


@dataclass
class Comparison:
    """Two teachers' scores of the documents that both have scored, list by list."""

    pairs: int = 0
    taus: list[NDArray[np.float64]] = field(default_factory=list)
    overlaps: list[NDArray[np.float64]] = field(default_factory=list)

    def add(self, starts: Starts, left: NDArray[np.float32], right: NDArray[np.float32]) -> None:
        """Add whole lists."""
        self.pairs += len(left)
        self.taus.append(kendall_tau(starts, left, right))
        self.overlaps.append(top_overlap(starts, left, right, TOP))

    def finish(self, left: str, right: str) -> Agreement:
        """The numbers."""
        taus = np.concatenate([np.zeros(0), *self.taus])
        overlaps = np.concatenate([np.zeros(0), *self.overlaps])
        return Agreement((left, right), self.pairs, len(taus), mean_known(taus), mean_known(overlaps))


def mean_known(values: NDArray[np.float64]) -> float | None:
    """The mean of the values that are not NaN; None if there is none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def advise(name: str, stats: TeacherStats) -> Iterator[str]:
    """What a number of one teacher's asks for, in plain words; nothing where nothing does."""
    if nan := stats.pairs - stats.answered:
        yield f"{name}: {nan:,} of {stats.pairs:,} pairs were asked in vain (NaN) and teach nothing."
    if stats.coverage is not None and stats.coverage < 1:
        yield f"{name}: {1 - stats.coverage:.1%} of the split's queries have no score; score them, or train without."
    if stats.relevant and stats.relevant_scored is not None and stats.relevant_scored < stats.relevant:
        missing = stats.relevant - stats.relevant_scored
        yield f"{name}: {missing:,} of {stats.relevant:,} relevant documents have no score."
    if stats.tied == 1:
        yield f"{name}: every list is tied; the teacher tells no documents apart."
        return
    if stats.tied is not None and stats.tied > TIED:
        yield f"{name}: {stats.tied:.0%} of the pairs in lists are tied; the teacher orders the others alone."
    ends = stats.saturated_low + stats.saturated_high
    if ends > SATURATED and stats.min >= 0 and stats.max <= 1:
        yield (
            f"{name}: scores are saturated: {ends:.0%} within {END:g} of the ends {stats.min:g} and {stats.max:g}; "
            "take logits."
        )
    elif ends > SATURATED:
        end, where = max((stats.saturated_low, stats.min), (stats.saturated_high, stats.max))
        yield f"{name}: {end:.0%} of the scores lie at the end of their range, {where:g}, with no order among them."
    if stats.auc is not None and stats.auc < 0.5:
        yield f"{name}: the teacher prefers negatives: AUC {stats.auc:.2f}; a sign, an id or a prompt may be wrong."
    if stats.temperature is not None and stats.effective is not None:
        remedy = f"teacher_temperature = {stats.temperature:g} spreads it over {EFFECTIVE:.0%} of the list"
        if stats.entropy < POINTED:
            yield f"{name}: a softmax over a list has {stats.entropy:.3f} nats, one document taking all; {remedy}."
        elif stats.effective > FLAT:
            yield f"{name}: a softmax over a list is flat, {stats.effective:.0%} of it at work; {remedy}."


def compare_in_words(agreement: Agreement) -> Iterator[str]:
    """What a number of two teachers asks for, in plain words."""
    left, right = agreement.teachers
    tau = agreement.kendall_tau
    if not agreement.pairs:
        yield f"{left} and {right} have no scored pair in common."
    elif tau is not None and tau > SAME:
        yield f"{left} and {right} order nearly alike (tau {tau:.2f}); one of them is enough."
    elif tau is not None and tau < OPPOSED:
        yield f"{left} and {right} disagree on most pairs (tau {tau:.2f}); see which of them the qrels are with."


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def coarse(counts: NDArray[np.int64], bins: int) -> NDArray[np.int64]:
    """Histograms of BINS bins in `bins` of them, a divisor of BINS. Shapes: (..., BINS) to (..., bins)."""
    return np.asarray(counts.reshape(*counts.shape[:-1], bins, -1).sum(-1))
