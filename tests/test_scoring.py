"""Teachers through the store: each judgement is made once, whatever happens on the way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from checksum_teacher import Checksum, checksum
from tiny import WORDS, collection_of, tiny_sentence_transformer

from retrieval_kd import answers, workers
from retrieval_kd.scoring import fill_scores, fill_vectors, rerank, retrieve
from retrieval_kd.store.keys import text_keys
from retrieval_kd.store.store import Store
from retrieval_kd.students import dense
from retrieval_kd.teachers import bm25
from retrieval_kd.teachers.bi_encoder import BiEncoder, Options, load
from retrieval_kd.types import Hits, InputError
from retrieval_kd.usage import Interrupted, Usage


class Fake(Checksum):
    """Counts what it is asked."""

    def __init__(self, identity: str = "fake", broken: bool = False) -> None:
        super().__init__(identity)
        self.broken = broken
        self.asked: list[tuple[str, str]] = []

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        assert not self.broken, "asked again"
        self.asked += zip(queries, documents, strict=True)
        return super().score(queries, documents)


QUERIES = ["sort a list", "read a file", "sort a list"]  # the last is the first again
DOCUMENTS = ["list sort", "unsure", "open file", "lock", "list sort"]
HITS = Hits(
    np.array([[0, 1, 2], [3, 0, -1], [4, 2, 3]], np.int32),
    np.array([[3, 2, 1], [2, 1, -np.inf], [3, 2, 1]], np.float32),
)


def expected(hits: Hits, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
    return np.array(
        [
            [-np.inf if row < 0 else checksum(f"query: {query}", f"document: {documents[row]}") for row in rows]
            for query, rows in zip(queries, hits.rows.tolist(), strict=True)
        ],
        np.float32,
    )


def test_a_pair_is_scored_once(tmp_path: Path) -> None:
    teacher = Fake()
    scores = fill_scores(tmp_path, "t", teacher, QUERIES, DOCUMENTS, HITS)
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, expected(HITS, QUERIES, DOCUMENTS))  # NaN and -inf in their places
    assert np.isnan(scores[0, 1])
    assert scores[1, 2] == -np.inf
    assert len(teacher.asked) == len(set(teacher.asked)) == 6  # of 8: two pairs of equal texts occur twice
    again = fill_scores(tmp_path, "renamed", Fake(broken=True), QUERIES, DOCUMENTS, HITS)
    np.testing.assert_array_equal(again, scores)  # NaN is an answer too
    other = Fake("another")
    fill_scores(tmp_path, "t", other, QUERIES, DOCUMENTS, HITS)
    assert len(other.asked) == 6
    assert [entry["pairs"] for entry in Store.open(tmp_path, "t", teacher.identity).ledger()] == [6]


def test_only_what_is_missing_is_scored(tmp_path: Path) -> None:
    fill_scores(tmp_path, "t", Fake(), QUERIES[:1], DOCUMENTS, Hits(HITS.rows[:1], HITS.scores[:1]))
    teacher = Fake()
    scores = fill_scores(tmp_path, "t", teacher, QUERIES, DOCUMENTS, HITS)
    assert teacher.asked == [  # the longest first, then in the order of the lists
        ("query: read a file", "document: list sort"),
        ("query: read a file", "document: lock"),
        ("query: sort a list", "document: lock"),
    ]
    np.testing.assert_array_equal(scores, expected(HITS, QUERIES, DOCUMENTS))


def test_a_teacher_that_stops_before_its_first_answer_says_why(tmp_path: Path) -> None:
    class Broke(Fake):
        usage, chunk = Usage(), 2

        def score(self, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
            raise Interrupted("the budget is spent", [], [])

    with pytest.raises(Interrupted, match="the budget is spent"):
        fill_scores(tmp_path, "t", Broke(), QUERIES, DOCUMENTS, HITS)
    store = Store.open(tmp_path, "t", Broke().identity)
    assert (store.parts("scores"), store.ledger()) == ([], [])


def test_nothing_to_score(tmp_path: Path) -> None:
    none = Hits(np.full((3, 2), -1, np.int32), np.full((3, 2), -np.inf, np.float32))
    assert (fill_scores(tmp_path, "t", Fake(broken=True), QUERIES, DOCUMENTS, none) == -np.inf).all()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_sentence_transformer(folder / "transformer").save(str(folder / "model"))
    return folder / "model"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that any bi-encoder encodes from here on."""
    texts: list[str] = []
    plain = BiEncoder.embed

    def counted(self: BiEncoder, rendered: Sequence[str], side: str) -> np.ndarray:
        texts.extend(rendered)
        return plain(self, rendered, side)

    monkeypatch.setattr(BiEncoder, "embed", counted)
    return texts


def test_an_embedders_scores_are_dot_products(model: Path, tmp_path: Path, encoded: list[str]) -> None:
    teacher = load(Options(model=str(model), query_prompt="query: "), collection_of(DOCUMENTS))
    scores = fill_scores(tmp_path, "bi", teacher, QUERIES, DOCUMENTS, HITS)
    assert sorted(encoded) == sorted(["query: sort a list", "query: read a file", *set(DOCUMENTS)])
    model_ = teacher.towers.model
    full = model_.encode([f"query: {text}" for text in QUERIES]) @ model_.encode(DOCUMENTS).T
    direct = np.where(HITS.valid, np.take_along_axis(full, np.maximum(HITS.rows, 0), 1), -np.inf)
    np.testing.assert_allclose(scores, direct, atol=1e-6)
    encoded.clear()
    np.testing.assert_array_equal(fill_scores(tmp_path, "bi", teacher, QUERIES, DOCUMENTS, HITS), scores)
    fill_vectors(tmp_path, "bi", teacher, DOCUMENTS, "document")
    hits = retrieve(tmp_path, "bi", teacher, QUERIES, DOCUMENTS, 3)
    assert encoded == []
    np.testing.assert_allclose(hits.scores, -np.sort(-full, axis=1)[:, :3], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(full, hits.rows, 1), hits.scores, atol=1e-6)


def test_vectors_come_in_the_order_of_the_texts(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "CHUNK", 3)
    monkeypatch.setattr(answers, "COMMIT_SECONDS", 0.0)
    teacher = load(Options(model=str(model)), collection_of([]))
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 12))) for _ in range(11)]
    texts += texts[:2]
    fill_vectors(tmp_path, "bi", teacher, texts[4:6], "document")
    got = fill_vectors(tmp_path, "bi", teacher, texts, "document")
    np.testing.assert_allclose(got, teacher.towers.model.encode(texts), atol=1e-6)
    assert Store.open(tmp_path, "x", teacher.tower_identity("document")).count("embeddings") == 11


def test_a_students_frozen_tower_is_the_teachers(model: Path, tmp_path: Path, encoded: list[str]) -> None:
    """Nothing is encoded again for a student whose document tower is the teacher, before or after it is saved."""
    teacher = load(Options(model=str(model)), collection_of([]))
    vectors = fill_vectors(tmp_path, "teacher", teacher, DOCUMENTS, "document")
    encoded.clear()
    document = {"model": str(model), "frozen": True}
    student = dense.load(dense.Options(model=str(model), layers=(0,), document=document))
    got = fill_vectors(tmp_path, "student", BiEncoder(student.towers), DOCUMENTS, "document")
    student.save(tmp_path / "saved")
    saved = load(Options(model=str(tmp_path / "saved")), collection_of([]))
    np.testing.assert_array_equal(fill_vectors(tmp_path, "saved", saved, DOCUMENTS, "document"), vectors)
    np.testing.assert_array_equal(got, vectors)
    assert encoded == []
    fill_vectors(tmp_path, "saved", saved, QUERIES, "query")
    assert len(encoded) == 2  # its query tower is another


def test_who_cannot_search_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="teacher 'fake' cannot search a collection"):
        retrieve(tmp_path, "fake", Fake(), QUERIES, DOCUMENTS, 3)
    hits = retrieve(tmp_path, "bm25", bm25.load(bm25.Options(), collection_of(DOCUMENTS)), QUERIES, DOCUMENTS, 3)
    assert hits.rows[:2].tolist() == [[0, 4, -1], [2, -1, -1]]
    assert not list(tmp_path.iterdir())  # what is searched for is not kept


def test_bm25_goes_through_its_index_once_a_query(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = bm25.load(bm25.Options(), collection_of(["lock", "list sort", "open the file", "sort a list of files"]))
    queries = ["sort a list", "open a file", "lock"]
    asked: list[str] = []
    scores_of = teacher._scores

    def counting(query: str) -> np.ndarray:
        asked.append(query)
        return scores_of(query)

    monkeypatch.setattr(teacher, "_scores", counting)
    hits = Hits(np.tile(np.arange(4, dtype=np.int32), (3, 1)), np.zeros((3, 4), np.float32))
    scores = fill_scores(tmp_path, "bm25", teacher, queries, teacher.documents, hits)
    assert sorted(asked) == sorted(queries)
    np.testing.assert_array_equal(scores, [scores_of(query) for query in queries])


def test_rerank_by_hand() -> None:
    scores = np.array([[0.5, np.nan, 2.0], [1.0, 1.0, 9.0], [-1.0, -2.0, -np.inf]], np.float32)
    got = rerank(HITS, scores)
    assert got.rows.tolist() == [[2, 0, -1], [3, 0, -1], [4, 2, -1]]  # ties keep their order; 9.0 has no document
    assert got.scores.tolist() == [[2.0, 0.5, -np.inf], [1.0, 1.0, -np.inf], [-1.0, -2.0, -np.inf]]


def test_keys_are_of_the_text_as_it_is_read(tmp_path: Path) -> None:
    fill_scores(tmp_path, "t", Fake(), QUERIES[:1], DOCUMENTS, Hits(HITS.rows[:1], HITS.scores[:1]))
    store = Store.open(tmp_path, "t", {"kind": "fake"})
    left, right = text_keys(["query: sort a list", "sort a list"]), text_keys(["document: lock", "document: open file"])
    assert store.find_scores(left, right[[1, 1]])[1].tolist() == [True, False]
