"""A start for sparse encoders where no language model's head is at hand: BM25 on word pieces, and what a text means.

The encoder is a new one of one layer (`counting_encoder`). Of the source model it has the tokenizer, and for
inference-free students what its vectors say: the vector of a document is approached by a sum over its terms, that of a
query too, so that their product is a sum of weights that each term of a query has in each document.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from sentence_transformers.base.modules import Transformer
from transformers import AutoTokenizer

from retrieval_kd.counting_encoder import MEANING, Terms, make_counting_model
from retrieval_kd.progress import progress
from retrieval_kd.pseudo_queries import make_pseudo_queries
from retrieval_kd.recipe import PseudoQueries
from retrieval_kd.tables import Precision
from retrieval_kd.towers import Towers, embed, load_towers
from retrieval_kd.types import InputError
from retrieval_kd.vocabulary_head import head_of

Array = NDArray[np.float32]
SAMPLE = 20_000  # documents that are looked at
SENTENCES = PseudoQueries(per_document=4, maximum_words=50)  # of theirs, which stand for queries
THRESHOLDS = {1: 0.15, 2: 0.25}  # of a term's share of a text, by sides: in short ones shares are large, of chance too
COMMON = 0.2  # share of the documents beyond which a term says nothing, and is not active
COSINE = 60.0  # units of BM25 (saturation times inverse document frequency) that a cosine of 1 counts for
RIDGE_DOCUMENT, RIDGE_QUERY = 1e-2, 3.0
ITERATIONS = 30


def make_lexical_model(
    source: Path, texts: Sequence[str], max_length: int | None, sides: int, double: bool, precision: Precision
) -> Transformer:
    """An encoder that gives texts the weights of BM25 in the tokens of `source`, made from a collection's `texts`.

    Where the encoder reads documents alone (`sides` is 1), queries have the inverse document frequency, and terms
    that a document does not contain weigh what the vectors of `source`, read in `precision`, say; where it reads both
    sides, either has the frequency's root. Raises InputError for no texts.
    """
    if not texts:
        raise InputError('student.start = "lexical" reads the documents, and there are none.')
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    length = min(max_length or 512, tokenizer.model_max_length)
    drawn = np.sort(np.random.default_rng(0).permutation(len(texts))[:SAMPLE])
    texts = [texts[place] for place in drawn]
    counts = count_terms(tokenizer, texts, length)
    frequency = inverse_frequencies(np.split(counts.indices, counts.indptr[1:-1]), len(tokenizer))
    active = np.bincount(counts.indices, minlength=len(tokenizer)) <= COMMON * len(texts)
    active[tokenizer.all_special_ids] = False
    weights = np.where(active, 1.0 if sides == 1 else np.sqrt(frequency), 0.0).astype(np.float32)
    entries = directions = np.zeros((len(tokenizer), MEANING), np.float32)
    if sides == 1:
        entries, directions = _meanings(source, tokenizer, texts, counts, frequency, precision)
        directions = (COSINE * directions / np.maximum(frequency, 1.0)[:, None]).astype(np.float32)
    around = tokenizer("")["input_ids"]
    mean_length = max(1.0, float(counts.sum() / len(texts)))
    logits = np.expm1(np.expm1(weights)) if double else np.expm1(weights)
    terms = Terms(*(torch.from_numpy(one) for one in (logits, entries, directions)))
    model = make_counting_model(terms, tokenizer.all_special_ids, around, mean_length, length, THRESHOLDS[sides])
    with TemporaryDirectory(prefix="rkd-") as folder:  # the way to a module is by a saved model
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        module: Transformer = Transformer(folder, transformer_task="fill-mask", max_seq_length=length)
    return module


def fit_vocabulary(model: Any, tokenizer: Any) -> None:
    """Cut, or extend, embeddings and head to the tokenizer's terms: many a model's are padded to a round number."""
    if head_of(model).out_features != len(tokenizer):
        model.resize_token_embeddings(len(tokenizer))


def count_terms(tokenizer: Any, texts: Sequence[str], length: int | None = None) -> Any:
    """How often each text has each term: csr_array (n, V) float32. Special tokens are left out."""
    batches = (list(texts[start : start + 1024]) for start in range(0, len(texts), 1024))
    cut = {"truncation": True, "max_length": length} if length else {"verbose": False}
    read = [ids for batch in batches for ids in tokenizer(batch, add_special_tokens=False, **cut)["input_ids"]]
    starts = np.cumsum([0, *(len(ids) for ids in read)])
    flat = np.fromiter((token for ids in read for token in ids), np.int64, count=int(starts[-1]))
    counts = scipy.sparse.csr_array((np.ones(len(flat), np.float32), flat, starts), shape=(len(texts), len(tokenizer)))
    counts.sum_duplicates()
    return counts


def inverse_frequencies(token_ids: Iterable[Sequence[int] | NDArray[Any]], size: int) -> Array:
    """log(1 + (N - n + 0.5) / (n + 0.5)) of each of `size` terms: N texts, n of them with the term.

    Source: Robertson and Zaragoza 2009 in Lucene's form, which is not negative.
    """
    counts, texts = np.zeros(size, np.int64), 0
    for ids in token_ids:
        counts[np.unique(np.asarray(ids, np.int64))] += 1
        texts += 1
    return np.log1p((texts - counts + 0.5) / (counts + 0.5)).astype(np.float32)


def _meanings(
    source: Path, tokenizer: Any, texts: Sequence[str], counts: Any, frequency: Array, precision: Precision
) -> tuple[Array, Array]:
    """Entries whose mean over a document's tokens is near its vector, and directions that sum to a sentence's.

    Both (V, MEANING), in the principal components of the documents' vectors, from whose mean document vectors count.
    """
    towers = load_towers(str(source))
    sentences = make_pseudo_queries(texts, SENTENCES)
    documents, queries = (_embed(towers, some, precision) for some in (texts, sentences))
    mean = documents.mean(0)
    components = np.linalg.svd(documents - mean, full_matrices=False)[2][:MEANING].T  # (D, at most MEANING)
    shares = counts.multiply(1 / np.maximum(counts.sum(1), 1.0)[:, None])
    weighed = shares.multiply(frequency[None]).tocsr()  # rare terms may say more
    entries = frequency[:, None] * ridge(weighed, (documents - mean) @ components, RIDGE_DOCUMENT)
    present = count_terms(tokenizer, sentences).sign()
    directions = ridge(present, queries @ components, RIDGE_QUERY)
    wide = ((0, 0), (0, MEANING - components.shape[1]))
    return np.pad(entries, wide), np.pad(directions, wide)


def _embed(towers: Towers, texts: Sequence[str], precision: Precision) -> Array:
    """Unit vectors (n, D)."""
    order, found = sorted(range(len(texts)), key=lambda place: len(texts[place])), []
    with progress("read what the collection means", len(texts)) as advance:
        for start in range(0, len(order), 512):
            part = [texts[place] for place in order[start : start + 512]]
            found.append(embed(towers, part, "document", precision))
            advance(len(part))
    vectors = np.concatenate(found)[np.argsort(order)]
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12), np.float32)


def ridge(inputs: Any, targets: Array, penalty: float) -> Array:
    """X that minimises |inputs X - targets|^2 + penalty |X|^2, by conjugate gradients from 0, one for each column.

    Shapes: inputs (n, V) sparse, targets (n, D); X (V, D).
    """
    residual = inputs.T @ targets
    found, direction, size = np.zeros_like(residual), residual.copy(), np.square(residual).sum(0)
    for _ in range(ITERATIONS):
        image = inputs.T @ (inputs @ direction) + penalty * direction
        step = size / np.maximum((direction * image).sum(0), 1e-30)
        found += step * direction
        residual -= step * image
        before, size = size, np.square(residual).sum(0)
        direction = residual + size / np.maximum(before, 1e-30) * direction
    return np.asarray(found, np.float32)
