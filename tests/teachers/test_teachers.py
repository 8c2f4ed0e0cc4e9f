"""Every kind of teacher keeps one contract, and gives the numbers of whoever defined them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import colbert
import numpy as np
import pytest
import sentence_transformers
import torch
from fake_endpoint import FakeEndpoint, Reply, ok, serve
from tiny import WORDS, collection_of, stored_as, tiny_classifier, tiny_masked_lm, tiny_sentence_transformer
from tiny_lm import save_tiny_lm
from transformers import AutoTokenizer

from retrieval_kd.students import load_student
from retrieval_kd.tables import Component, kinds
from retrieval_kd.teachers import (
    Archive,
    Embedder,
    ListJudge,
    PairJudge,
    Reader,
    Retriever,
    Teacher,
    bi_encoder,
    bm25,
    cross_encoder,
    load_teacher,
)
from retrieval_kd.types import InputError

RNG = np.random.default_rng(0)
DOCUMENTS = [" ".join(RNG.choice(WORDS, RNG.integers(3, 15))) for _ in range(13)] + ["sorted files of lists"]
QUERIES = [" ".join(RNG.choice(WORDS[7:], 3)) for _ in range(4)] + ["sort list file"]
PAIRS = [(query, document) for query in QUERIES for document in DOCUMENTS]
LEFT, RIGHT = [pair[0] for pair in PAIRS], [pair[1] for pair in PAIRS]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("tower", "other")):
        tiny_sentence_transformer(folder / f"{name}-transformer", seed=seed).save(str(folder / name))
    raw = tiny_sentence_transformer(folder / "raw-transformer", normalize=False)
    raw.prompts = {"query": "find: ", "document": "text: "}
    raw.save(str(folder / "raw"))
    colbert.stanford(folder / "colbert")
    for seed, name in enumerate(("head", "head-other")):
        (folder / name).mkdir()
        student = Component(kind="pair_head", model=str(folder / "tower"), hidden=[8])
        load_student(student, seed).save(folder / name)  # type: ignore[operator]
    save_tiny_lm(folder / "decoder")
    for seed, name in enumerate(("splade", "splade-other")):
        tiny_masked_lm(folder / name, seed=seed)
    tiny_classifier(folder / "one")
    tiny_classifier(folder / "one-other", seed=1)
    tiny_classifier(folder / "two", labels=2)
    tiny_classifier(folder / "three", labels=3)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def reranker() -> Iterator[FakeEndpoint]:
    """An endpoint whose scores are the lengths that its texts share."""

    def reply(path: str, body: Any) -> Reply:
        lengths = [len(text) % 7 + len(body["query"]) for text in body["documents"]]
        return ok({"results": [{"index": place, "relevance_score": length} for place, length in enumerate(lengths)]})

    with serve(reply) as endpoint:
        yield endpoint


Load = Callable[..., Teacher]


@pytest.fixture
def load(models: dict[str, Path], tmp_path: Path, reranker: FakeEndpoint) -> Load:
    """Load a teacher by kind, with a model that suits it."""

    def load_kind(kind: str, model: str | None = None, documents: Sequence[str] = DOCUMENTS, **options: Any) -> Teacher:
        default = {
            "bi_encoder": "tower",
            "bm25": None,
            "cross_encoder": "one",
            "late_interaction": "colbert",
            "llm_listwise": "decoder",
            "llm_pairwise": "decoder",
            "llm_pointwise": "decoder",
            "pair_head": "head",
            "sparse_encoder": "splade",
            "imported": None,
            "rerank_endpoint": None,
        }[kind]
        if kind == "imported":
            options |= {"file": tmp_path / "run.trec", "layout": "trec"}
            (tmp_path / "run.trec").write_text("q1 Q0 d1 1 0.5 x\n")
        if kind == "rerank_endpoint":
            options |= {"model": "m", "endpoint": {"url": reranker.url}}
        if model or default:
            options["model"] = str(models[model or default])
        return load_teacher(Component(kind=kind, **options), collection_of(documents))

    return load_kind


@pytest.mark.parametrize("kind", kinds("teachers"))
def test_contract(kind: str, load: Load) -> None:
    """A kind that is new has to be named in `load`, so that it is tested here too."""
    teacher = load(kind)
    assert isinstance(teacher, Teacher)
    assert [len(teacher.render(QUERIES, side)) for side in ("query", "document")] == [5, 5]
    left, right = teacher.render(LEFT, "query"), teacher.render(RIGHT, "document")
    if isinstance(teacher, PairJudge | ListJudge):  # tests/test_judgements.py
        assert isinstance(teacher, PairJudge) != isinstance(teacher, ListJudge)
        assert json.dumps(teacher.identity) == json.dumps(load(kind).identity)
        with pytest.raises(InputError, match="scores no single pair"):
            teacher.score(left, right)
        return
    scores = teacher.score(left, right)
    assert (scores.shape, scores.dtype) == ((len(PAIRS),), np.float32)
    assert json.dumps(teacher.identity) == json.dumps(load(kind).identity)
    if isinstance(teacher, Archive):  # tests/teachers/test_imported.py
        assert np.isnan(scores).all()
        return
    assert np.isfinite(scores).all()
    assert scores.std() > 0
    order = np.random.default_rng(1).permutation(len(PAIRS))
    shuffled = teacher.score([left[i] for i in order], [right[i] for i in order])
    np.testing.assert_allclose(shuffled, scores[order], atol=1e-5)
    np.testing.assert_allclose(teacher.score(left[:1], right[:1]), scores[:1], atol=1e-5)
    if isinstance(teacher, Embedder):
        assert teacher.embed(QUERIES, "query").dtype == np.float32
    if isinstance(teacher, Retriever):
        hits = teacher.retrieve(teacher.render(QUERIES, "query"), 6)
        assert hits.rows.shape == (5, 6)
        assert (hits.rows >= 0).any()
        for query, rows, found in zip(QUERIES, hits.rows, hits.scores, strict=True):
            rows, found = rows[rows >= 0], found[rows >= 0]
            assert len(set(rows.tolist())) == len(rows)
            np.testing.assert_array_equal(found, -np.sort(-found))
            scores = teacher.score([query] * len(rows), [DOCUMENTS[row] for row in rows])
            np.testing.assert_allclose(scores, found, rtol=0 if kind == "bm25" else 1e-5)


@pytest.mark.parametrize(
    ("kind", "once"),
    [
        ("bi_encoder", True),
        ("cross_encoder", False),
        ("late_interaction", True),
        ("pair_head", True),
        ("sparse_encoder", True),
    ],
)
def test_readers_count_the_tokens_that_they_feed_their_model(
    kind: str, once: bool, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes through the embedding of tokens, padding apart; encoders read equal texts once."""
    teacher: Any = load(kind)
    left, right = teacher.render(QUERIES[:2] + QUERIES[:1], "query"), teacher.render(DOCUMENTS[:3], "document")
    seen: list[int] = []
    forward = torch.nn.Embedding.forward

    def watch(self: Any, ids: torch.Tensor) -> torch.Tensor:
        if self.padding_idx is not None and self.num_embeddings > 48:  # the words, not positions or types
            seen.append(int((ids != self.padding_idx).sum()))
        return forward(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", watch)
    assert isinstance(teacher, Reader)
    count = teacher.count_tokens(left, right)
    assert seen == []
    teacher.score(left, right)
    assert sum(seen) == count > 0
    assert (teacher.count_tokens(left + left, right + right) == count) == once


@pytest.mark.parametrize(
    ("kind", "model"),
    [("bi_encoder", "tower"), ("cross_encoder", "one"), ("late_interaction", "colbert"), ("sparse_encoder", "splade")],
)
def test_fp32_is_fp32_for_halves_too(kind: str, model: str, models: dict[str, Path], tmp_path: Path) -> None:
    """transformers loads weights as they are kept; products are computed in the precision that is asked for."""
    scores = []
    for dtype in (torch.float16, torch.float32):
        folder = stored_as(tmp_path / str(dtype), models[model], dtype)
        teacher: Any = load_teacher(Component(kind=kind, model=str(folder)), collection_of(DOCUMENTS))
        scores.append(teacher.score(LEFT, RIGHT))
        if kind == "cross_encoder":
            network = teacher._loaded[0]
        else:
            network = teacher.model if kind == "late_interaction" else teacher.towers.model
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    np.testing.assert_allclose(*scores, rtol=1e-5)  # halves are off by a thousandth


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("bm25", {"k1": 1.2}),
        ("bm25", {"b": 0.75}),
        ("bm25", {"stemmer": "none"}),
        ("bm25", {"documents": DOCUMENTS[::-1]}),
        ("bi_encoder", {"model": "other"}),
        ("bi_encoder", {"max_length": 8}),
        ("bi_encoder", {"precision": "bf16"}),
        ("bi_encoder", {"model": "raw"}),
        ("cross_encoder", {"model": "one-other"}),
        ("cross_encoder", {"max_length": 12}),
        ("cross_encoder", {"precision": "bf16"}),
        ("late_interaction", {"query_length": 6}),
        ("late_interaction", {"document_length": 6}),
        ("late_interaction", {"precision": "bf16"}),
        ("llm_pointwise", {"max_length": 320}),
        ("llm_pointwise", {"precision": "bf16"}),
        ("llm_pointwise", {"answers": ["A", "B"]}),
        ("llm_pointwise", {"document_words": 2}),
        ("pair_head", {"model": "head-other"}),
        ("pair_head", {"max_length": 6}),
        ("pair_head", {"precision": "bf16"}),
        ("sparse_encoder", {"model": "splade-other"}),
        ("sparse_encoder", {"max_length": 6}),
        ("sparse_encoder", {"precision": "bf16"}),
    ],
)
def test_what_changes_scores_changes_the_identity(kind: str, changed: dict[str, Any], load: Load) -> None:
    before, after = load(kind), load(kind, **changed)
    assert before.identity != after.identity
    if "documents" not in changed:
        assert not np.array_equal(before.score(LEFT, RIGHT), after.score(LEFT, RIGHT))


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("bi_encoder", {"batch_size": 3}),
        ("bi_encoder", {"query_prompt": "q: "}),
        ("cross_encoder", {"batch_tokens": 50}),
        ("cross_encoder", {"document_prompt": "d: "}),
        ("late_interaction", {"batch_size": 3}),
        ("late_interaction", {"document_prompt": "d: "}),
        ("llm_pointwise", {"batch_tokens": 500}),
        ("pair_head", {"batch_size": 3}),
        ("pair_head", {"query_prompt": "q: "}),
        ("sparse_encoder", {"batch_tokens": 40}),
        ("sparse_encoder", {"query_prompt": "q: "}),
    ],
)
def test_batches_and_prompts_do_not(kind: str, changed: dict[str, Any], load: Load) -> None:
    """Prompts are part of the rendered text, which scores are kept under."""
    before, after = load(kind), load(kind, **changed)
    assert before.identity == after.identity
    np.testing.assert_allclose(after.score(LEFT, RIGHT), before.score(LEFT, RIGHT), atol=1e-5)


@pytest.mark.parametrize("kind", ["bi_encoder", "cross_encoder", "late_interaction", "pair_head", "sparse_encoder"])
def test_prompts_are_rendered(kind: str, load: Load) -> None:
    teacher = load(kind, query_prompt="q: ", document_prompt="")
    assert teacher.render(["sort"], "query") == ["q: sort"]
    assert teacher.render(["sort"], "document") == ["sort"]


@pytest.mark.parametrize("model", ["tower", "raw"])
def test_bi_encoder_scores_as_sentence_transformers_does(model: str, load: Load, models: dict[str, Path]) -> None:
    """Prompts saved with the model, and the similarity that it declares: cosine."""
    teacher = load("bi_encoder", model)
    reference = sentence_transformers.SentenceTransformer(str(models[model]), device="cpu")
    queries, documents = reference.encode_query(QUERIES), reference.encode_document(DOCUMENTS)
    full = reference.similarity(queries, documents).numpy()
    if model == "tower":
        np.testing.assert_allclose(full, queries @ documents.T, atol=1e-6)
    got = teacher.score(teacher.render(LEFT, "query"), teacher.render(RIGHT, "document"))
    np.testing.assert_allclose(got.reshape(5, 14), full, atol=1e-6)
    assert teacher.render(["x"], "query") == [("find: " if model == "raw" else "") + "x"]


def test_a_plain_transformer_is_pooled_by_its_mean(load: Load, models: dict[str, Path]) -> None:
    teacher = load("bi_encoder", "tower-transformer")
    assert isinstance(teacher, bi_encoder.BiEncoder)
    tower = load("bi_encoder", "tower")
    np.testing.assert_allclose(teacher.embed(QUERIES, "query"), tower.embed(QUERIES, "query"), atol=1e-6)


@pytest.mark.parametrize("model", ["one", "two"])
@pytest.mark.parametrize("batch_tokens", [1, 60, 4096])
def test_cross_encoder_scores_as_sentence_transformers_does(
    model: str, batch_tokens: int, load: Load, models: dict[str, Path]
) -> None:
    teacher = load("cross_encoder", model, max_length=16, batch_tokens=batch_tokens)
    reference = sentence_transformers.CrossEncoder(str(models[model]), device="cpu", max_length=16)
    logits = reference.predict(PAIRS, activation_fn=torch.nn.Identity(), batch_size=7)
    expected = logits if model == "one" else logits[:, 1] - logits[:, 0]
    np.testing.assert_allclose(teacher.score(LEFT, RIGHT), expected, atol=1e-5)


def test_cross_encoder_of_three_classes(load: Load) -> None:
    with pytest.raises(InputError, match="has 3 classes; a cross-encoder teacher has one"):
        load("cross_encoder", "three").score(LEFT, RIGHT)


TOY = ["red fox", "red red dog", "fox", "cat bird fox owl red hen", "owl"]


def lucene(term: str, number: int, k1: float, b: float) -> float:
    """BM25 of one term in document `number` of TOY, without the factor k1 + 1, which Lucene dropped."""
    documents = [text.split() for text in TOY]
    frequency = documents[number].count(term)
    holding = sum(term in document for document in documents)
    idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
    mean = sum(map(len, documents)) / len(documents)
    return idf * frequency / (frequency + k1 * (1 - b + b * len(documents[number]) / mean))


@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.2, 0.75), (2.0, 0.0)])
@pytest.mark.parametrize("query", ["red", "red fox", "owl unknown", "red red fox", "zebra"])
def test_bm25_by_formula(query: str, k1: float, b: float) -> None:
    """A term that stands twice in the query counts twice; an unknown one counts nothing."""
    teacher = bm25.load(bm25.Options(k1=k1, b=b, stemmer="none"), collection_of(TOY))
    expected = [sum(lucene(term, number, k1, b) for term in query.split()) for number in range(5)]
    np.testing.assert_allclose(teacher.score([query] * 5, TOY), expected, rtol=1e-5)
    hits = teacher.retrieve([query], 9)
    order = [number for number in sorted(range(5), key=lambda number: -expected[number]) if expected[number] > 0]
    assert hits.rows.tolist() == [order + [-1] * (5 - len(order))]
    np.testing.assert_allclose(hits.scores[0, : len(order)], [expected[number] for number in order], rtol=1e-5)
    assert (hits.scores[0, len(order) :] == -np.inf).all()


def test_bm25_by_hand() -> None:
    """`owl` stands in 2 of 5 documents of 13 words: idf ln(1 + 3.5 / 2.5); document 4 has 1 of a mean of 2.6 words."""
    teacher = bm25.load(bm25.Options(), collection_of(TOY))
    idf = math.log(1 + 3.5 / 2.5)
    assert teacher.score(["owl"], ["owl"])[0] == pytest.approx(idf / (1 + 0.9 * (0.6 + 0.4 / 2.6)), rel=1e-5)


def test_bm25_stems_and_stops() -> None:
    teacher = bm25.load(bm25.Options(), collection_of(["sorting lists", "sort", "the a"]))
    assert (teacher.score(["the sorted list"] * 3, teacher.documents) > 0).tolist() == [True, True, False]
    assert teacher.retrieve(["the"], 2).rows.tolist() == [[-1, -1]]
    plain = bm25.load(bm25.Options(stemmer="none"), collection_of(["sorting lists", "sort"]))
    assert plain.score(["sorted"] * 2, plain.documents).tolist() == [0.0, 0.0]


def test_bm25_ties_go_by_row_and_strangers_are_refused() -> None:
    teacher = bm25.load(bm25.Options(), collection_of(["fox", "dog", "fox", "fox"]))
    assert teacher.retrieve(["fox"], 2).rows.tolist() == [[0, 2]]
    with pytest.raises(InputError, match="not in its collection: 'wolf'"):
        teacher.score(["fox"], ["wolf"])


def test_tokenizer_of_the_classifier_is_whole(models: dict[str, Path]) -> None:
    """What the comparison above rests on: words of the test are no unknown tokens, and texts are cut at 16."""
    tokenizer = AutoTokenizer.from_pretrained(models["one"])
    lengths = [len(ids) for ids in tokenizer(LEFT, RIGHT)["input_ids"]]
    assert max(lengths) > 16 > min(lengths)
    assert tokenizer.unk_token_id not in np.concatenate(tokenizer(DOCUMENTS)["input_ids"])


def test_options_are_checked() -> None:
    with pytest.raises(InputError, match="teachers kind 'bm25': unknown key 'stemer'; did you mean 'stemmer'"):
        load_teacher(Component(kind="bm25", stemer="none"), collection_of(TOY))
    with pytest.raises(InputError, match="did you mean 'cross_encoder'"):
        load_teacher(Component(kind="cross_encodr"), collection_of(TOY))
    assert cross_encoder.Options(model="x").max_length == 512
