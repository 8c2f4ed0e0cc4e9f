"""Rules on candidates and queries, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import entropy

from retrieval_kd.stages import Filter, Guide, Stage, Term
from retrieval_kd.train.curate import Curated, curate, deny, in_words, kept_queries, take, target_entropy
from retrieval_kd.trainset import Tokens, TrainSet
from retrieval_kd.types import Hits, InputError

ROWS = np.array([[3, 1, 0, 2], [2, 0, 1, -1], [5, 4, 1, 0]], np.int32)
SCORES = np.array([[9.0, 7.0, 5.0, 9.5], [4.0, 3.9, np.nan, -np.inf], [1.0, 2.0, 3.0, 4.0]], np.float32)


@pytest.fixture
def trainset() -> TrainSet:
    """The first candidate is the positive, but for query 2, which has none."""
    positive = np.zeros(ROWS.shape, bool)
    positive[:2, 0] = True
    return TrainSet(
        query_tokens=Tokens.pack([[1], [2, 2], [3]]),
        document_tokens=Tokens.pack([[1]] * 6),
        hits=Hits(ROWS, np.where(ROWS >= 0, 1, -np.inf).astype(np.float32)),
        teachers=["other", "ce"],
        scores=np.stack([np.zeros_like(SCORES), SCORES]),
        positive=positive,
        query_vectors={"a": np.arange(6.0, dtype=np.float32).reshape(3, 2)},
    )


def test_deny(trainset: TrainSet) -> None:
    found = deny(trainset, Guide(teacher="ce", margin=3.0))
    # query 0: 7 and 9.5 are above 9 - 3; query 1: 3.9 is, the unscored one stays; query 2 has no positive
    assert found.hits.rows.tolist() == [[3, -1, 0, -1], [2, -1, 1, -1], [5, 4, 1, 0]]
    assert np.isneginf(found.hits.scores[0, 1])
    assert trainset.hits.rows.tolist() == ROWS.tolist()  # the one given is as it was


def test_deny_by_the_score_alone(trainset: TrainSet) -> None:
    absolute = deny(trainset, Guide(teacher="ce", max_score=3.5))
    # the positive stays; no query needs one
    assert absolute.hits.rows.tolist() == [[3, -1, -1, -1], [2, -1, 1, -1], [5, 4, 1, -1]]
    both = deny(trainset, Guide(teacher="ce", max_score=9.2, margin=0.3, relative=True))  # above 6.3, or above 9.2
    assert both.hits.rows.tolist() == [[3, -1, 0, -1], [2, -1, 1, -1], [5, 4, 1, 0]]


def keep_queries(trainset: TrainSet, rule: Filter, ranks: np.ndarray) -> TrainSet:
    return take(trainset, kept_queries(trainset, rule, ranks))


def test_what_a_stage_reads_is_told(trainset: TrainSet) -> None:
    ranks = np.zeros((2, *ROWS.shape), np.int32)
    ranks[0, :, 1:3], ranks[1, :, 2:] = 4, 9
    found = replace(trainset, sources=["bm25", "bi"], ranks=ranks)
    stage = Stage(
        steps=1,
        terms=(Term(loss="info_nce"),),
        filter=Filter(teacher="ce", teacher_rank=(1, 2)),
        deny=Guide(teacher="ce", margin=3.0),
    )
    curated = curate(found, stage, np.zeros(3, np.int64))
    assert curated.queries.tolist() == [0, 1]
    assert curated.data.hits.rows.tolist() == [[3, -1, 0, -1], [2, -1, 1, -1]]
    facts = curated.facts()
    # left: place 2 of both queries, which both found; denied: places 1 and 3 of the one, 1 of the other
    assert facts == {"queries": 2, "negatives": 2, "denied": 3, "provenance": {"bm25 + bi": 2}}
    assert in_words(facts) == "2 queries, 2 negatives (bm25 + bi 100%), 3 more denied"
    plain = curate(found, stage.model_copy(update={"filter": None, "deny": None}), np.zeros(3, np.int64))
    assert plain.queries.tolist() == [0, 1, 2]
    assert plain.facts()["provenance"] == {"no source": 1, "bm25": 3, "bi": 2, "bm25 + bi": 3}
    assert "bm25 alone 33%, bi alone 22%, bm25 + bi 33%" in in_words(plain.facts())
    assert Curated(replace(trainset, hits=None), np.arange(3)).facts()["negatives"] == 0


def test_filter_by_the_student_and_the_teacher(trainset: TrainSet) -> None:
    ranks = np.array([4, 2, 3])
    by_student = keep_queries(trainset, Filter(student_rank=(2, 15)), ranks)
    assert [by_student.query_tokens[place].tolist() for place in range(len(by_student))] == [[1], [2, 2]]
    by_teacher = keep_queries(trainset, Filter(teacher="ce", teacher_rank=(1, 1)), ranks)
    assert len(by_teacher) == 1  # of query 0 the teacher likes another document better
    assert by_teacher.query_tokens[0].tolist() == [2, 2]
    assert by_teacher.hits.rows.tolist() == [ROWS[1].tolist()]
    assert by_teacher.scores.shape == (2, 1, 4)
    assert by_teacher.query_vectors["a"].tolist() == [[2.0, 3.0]]
    assert by_teacher.positive.tolist() == [[True, False, False, False]]
    both = keep_queries(trainset, Filter(student_rank=(3, 4), teacher="ce", teacher_rank=(1, 2)), ranks)
    assert both.query_tokens[0].tolist() == [1]


def test_a_filter_that_leaves_nothing(trainset: TrainSet) -> None:
    with pytest.raises(InputError, match="leaves none of 3 queries; widen its ranks"):
        keep_queries(trainset, Filter(student_rank=(7, 9)), np.array([1, 2, 0]))


def test_how_undecided_a_target_is(trainset: TrainSet) -> None:
    lists = [[9.0, 7.0, 5.0, 9.5], [4.0, 3.9], [1.0, 2.0, 3.0, 4.0]]
    for temperature in (1.0, 4.0):
        term = Term(loss="kl", teachers=("ce",), teacher_temperature=temperature)
        expected = np.mean([entropy(softmax(np.array(one) / temperature)) for one in lists])
        assert target_entropy(term, trainset) == pytest.approx(expected, rel=1e-5)
    assert target_entropy(Term(loss="kl", teachers=("ce",), scale=100.0), trainset) < 0.1  # saturated
    assert target_entropy(Term(loss="margin_mse", teachers=("ce",)), trainset) is None
    assert target_entropy(Term(loss="kl", teachers=("snapshot",)), trainset) is None
