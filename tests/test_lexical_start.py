"""The lexical start: its weights are BM25's, computed here by formula and by bm25s; its ridge regression is exact."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import bm25s
import numpy as np
import pytest
import scipy.sparse
import torch
from tiny import WORDS, tiny_sentence_transformer

from retrieval_kd import counting_encoder, lexical_start
from retrieval_kd.counting_encoder import MEANING, Terms, make_counting_model
from retrieval_kd.data import load_collection
from retrieval_kd.evaluate.quality import per_query
from retrieval_kd.lexical_start import count_terms, make_lexical_model, ridge
from retrieval_kd.recipe import PseudoQueries
from retrieval_kd.sparse_towers import encode_sparse, load_sparse_towers
from retrieval_kd.students import inference_free
from retrieval_kd.types import Hits, InputError
from retrieval_kd.vocabulary_head import head_of
from retrieval_kd.weights import MINILM

THRESHOLD = 0.15


def logits_of(terms: Terms, texts: list[list[int]], mean_length: float) -> torch.Tensor:
    """The largest logit of each term, (n, V); token 1 stands around each text."""
    model = make_counting_model(terms, [0, 1], [1, 1], mean_length, 64, THRESHOLD)
    with torch.inference_mode():
        return torch.stack([model(input_ids=torch.tensor([[1, *ids, 1]])).logits[0].max(0).values for ids in texts])


def test_attention_counts_as_bm25_does() -> None:
    """Against the formula, for texts of several lengths with a term 1 to 20 times in them."""
    rng = np.random.default_rng(0)
    size, mean_length = 500, 30.0
    nothing = torch.zeros(size, MEANING)
    terms = Terms(torch.ones(size), nothing, nothing)
    texts, expected = [], []
    for length in (10, 30, 60):
        for count in (1, 2, 4, 8):
            others = (rng.permutation(size - 10)[: length - count] + 10).tolist()
            texts.append(list(rng.permutation([5] * count + others)))
            k1, b = counting_encoder.K1, counting_encoder.B
            share = count / (count + k1 * (1 - b + b * length / mean_length)) + 1 / counting_encoder.GAIN
            own = 1 + 1 / counting_encoder.GAIN
            expected.append((share - THRESHOLD) / (own - THRESHOLD))
    found = logits_of(terms, texts, mean_length)
    np.testing.assert_allclose(found[:, 5], expected, atol=0.09)
    assert np.corrcoef(found[:, 5], expected)[0, 1] > 0.99
    for row, ids in zip(found, texts, strict=True):
        assert set(torch.nonzero(row > 0.05)[:, 0].tolist()) <= set(ids)


def test_a_small_step_changes_little() -> None:
    """Every weight moved by 1e-4, as Adam's first step does: what keeps the norms still does not multiply it."""
    generator = torch.Generator().manual_seed(0)
    size, texts = 400, torch.randint(2, 400, (8, 60), generator=generator)
    entries, directions = (torch.randn(size, MEANING, generator=generator) for _ in range(2))
    terms = Terms(torch.ones(size), entries, 0.02 * directions)
    model = make_counting_model(terms, [0, 1], [1, 1], 60.0, 64, THRESHOLD)
    before = model(input_ids=texts).logits
    before.clamp(min=0).amax(1)[:, :50].sum().backward()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.grad is not None:
                weight += 1e-4 * weight.grad.sign()
        after = model(input_ids=texts).logits
    assert (after - before).abs().max() < 0.15 * before.abs().max()


def test_terms_of_no_weight_stay_inactive_and_meaning_adds_to_the_others() -> None:
    rng = np.random.default_rng(1)
    size = 60
    weights = torch.ones(size)
    weights[7] = 0.0
    entries = torch.from_numpy(rng.normal(0, 0.5, (size, MEANING)).astype(np.float32))
    directions = torch.from_numpy(rng.normal(0, 0.5, (size, MEANING)).astype(np.float32))
    text = [7, 9, 11, 9, 13, 15]
    plain = logits_of(Terms(weights, torch.zeros_like(entries), torch.zeros_like(directions)), [text], 10.0)[0]
    found = logits_of(Terms(weights, entries, directions), [text], 10.0)[0]
    assert found[7] <= 0
    mean = entries[text].sum(0) / (len(text) + 2)  # the special tokens have no entry
    absent = [20, 30, 40, 50]  # the state of a token holds a little of its own entry, as well
    np.testing.assert_allclose((found - plain)[absent], (directions @ mean)[absent], atol=0.35)
    assert np.corrcoef((found - plain)[20:], (directions @ mean)[20:])[0, 1] > 0.97


def test_ridge_solves_the_normal_equations() -> None:
    rng = np.random.default_rng(2)
    inputs = scipy.sparse.random_array((40, 25), density=0.2, rng=rng, dtype=np.float64).tocsr()
    targets = rng.normal(size=(40, 3))
    exact = np.linalg.solve((inputs.T @ inputs).toarray() + 0.5 * np.eye(25), inputs.T @ targets)
    np.testing.assert_allclose(ridge(inputs, targets, 0.5), exact, atol=1e-4)


def test_it_counts_the_models_tokens(tmp_path: Path) -> None:
    """Whose counts it takes, and whose common ones it leaves out."""
    rng = np.random.default_rng(3)
    words = [left + right for left in WORDS[7:] for right in ("", " x", " y", " q")][:120]
    texts = [" ".join(rng.choice(words, rng.integers(4, 14))) for _ in range(200)]
    tiny_sentence_transformer(tmp_path / "t", width=128).save(str(tmp_path / "plain"))
    with pytest.raises(InputError, match="there are none"):
        make_lexical_model(tmp_path / "plain", [], 24, 2, False, "fp32")
    module = make_lexical_model(tmp_path / "plain", texts, 24, 2, False, "fp32")
    head = head_of(module.auto_model)
    read = [module.tokenizer(text, add_special_tokens=False)["input_ids"][:24] for text in texts]
    assert any(len(set(ids)) < len(ids) for ids in read)
    counts = count_terms(module.tokenizer, texts, 24)
    for row, ids in zip(counts.toarray(), read, strict=True):
        assert {term: row[term] for term in np.flatnonzero(row)} == Counter(ids)
    texts_with = Counter(term for ids in read for term in set(ids))
    common = {term for term, number in texts_with.items() if number > 0.2 * len(texts)}
    assert common
    silent = np.flatnonzero(head.bias.detach().numpy() == -1)
    assert set(silent.tolist()) == common | set(module.tokenizer.all_special_ids)


@pytest.mark.slow
@pytest.mark.skipif("RKD_DATA" not in os.environ, reason="RKD_DATA is not set: no real collections")
def test_it_begins_where_bm25_is_on_scifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nDCG@10 of the untrained student against bm25s on the same tokens, among 420 documents."""
    monkeypatch.setattr(lexical_start, "SENTENCES", PseudoQueries(per_document=1, maximum_words=30))
    collection = load_collection("beir/scifact")
    queries = collection.split("test")
    relevant = {row for grades in queries.qrels for row in grades}
    others = [row for row in np.random.default_rng(0).permutation(len(collection)).tolist() if row not in relevant]
    rows = [*relevant, *others[: 420 - len(relevant)]]
    texts = [collection.documents[row] for row in rows]
    inference_free.begin(inference_free.Options(model=MINILM, start="lexical"), texts, tmp_path)
    towers = load_sparse_towers(str(tmp_path / "model"))
    documents = encode_sparse(towers, texts, "document", "fp32")
    student = (encode_sparse(towers, queries.texts, "query", "fp32") @ documents.T).toarray()
    tokenizer = towers.query[0].tokenizer
    read = [[tokenizer.tokenize(text) for text in some] for some in (texts, queries.texts)]
    bm25 = bm25s.BM25(k1=1.2, b=0.75)
    bm25.index(read[0], show_progress=False)
    baseline = np.stack([bm25.get_scores(tokens) for tokens in read[1]])

    def quality(scores: np.ndarray) -> float:
        places = np.argsort(-scores, axis=1, kind="stable")[:, :10]
        hits = Hits(np.array(rows, np.int32)[places], np.take_along_axis(scores, places, 1).astype(np.float32))
        return float(per_query(hits, queries, collection.document_ids, ["nDCG@10"])["nDCG@10"].mean())

    assert quality(student) > quality(baseline) - 0.01
    assert quality(baseline) > 0.7  # fewer documents are easier
