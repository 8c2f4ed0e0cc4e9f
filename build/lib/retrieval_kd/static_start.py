"""Where tables of token vectors start: a teacher's vectors of single tokens, reduced by PCA and weighted.

Sources: Tulkens and van Dongen 2024 (Model2Vec), doi:10.5281/zenodo.17270888; Wada et al. 2025, arXiv:2506.04624.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers.base.modules import Normalize
from tokenizers import Tokenizer

from retrieval_kd.gather import micro_batches
from retrieval_kd.progress import progress
from retrieval_kd.sample import spread
from retrieval_kd.tables import Precision
from retrieval_kd.towers import Towers, autocast, pad, tokenize
from retrieval_kd.types import InputError

BATCH_TOKENS = 8192  # read at once, padding included
SENTENCE_TOKENS = 400_000  # of the documents whose token states are averaged
PRIOR = 1.0  # a token's own vector counts as much as so many of its states
_UNUSED = re.compile(r"\[unused\d+\]")


def piece_vectors(towers: Towers, pieces: Sequence[Sequence[int]], precision: Precision) -> NDArray[np.float32]:
    """The teacher's vector of each piece of text, given by token ids, read alone: (n, D), pooled, not normalised."""
    modules: list[Any] = [module for module in towers.document if not isinstance(module, Normalize)]
    before, after = special_tokens(modules[0].tokenizer)
    rows = [np.array([*before, *piece, *after], np.int32) for piece in pieces]
    lengths = np.array([len(row) for row in rows], np.int64)
    order = np.argsort(lengths, kind="stable")
    found: list[NDArray[np.float32]] = []
    with progress("read tokens", len(rows)) as advance, torch.inference_mode(), autocast(precision):
        for places in micro_batches(order, lengths[order].tolist(), BATCH_TOKENS):
            features: Any = pad([rows[place] for place in places], modules[0].tokenizer.pad_token_id or 0, _CPU)
            for module in modules:
                features = module(features)
            found.append(features["sentence_embedding"].float().numpy())
            advance(len(places))
    return np.concatenate(found)[np.argsort(order)]


_CPU = torch.device("cpu")


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and after a text."""
    bare, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise InputError(f"{type(tokenizer).__name__} puts its special tokens into a text, not around it.")


def plain_tokenizer(tokenizer: Any, max_length: int | None) -> Tokenizer:
    """The tokenizer without special tokens and padding; texts are cut at `max_length` tokens."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"a table needs a fast tokenizer (tokenizer.json), this one is {type(tokenizer).__name__}.")
    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.post_processor = None
    plain.no_padding()
    plain.no_truncation()
    if max_length is not None:
        plain.enable_truncation(max_length)
    return plain


def table_tokens(tokenizer: Any) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The ids of the tokens that have a vector, in order, and which of them a text may hold.

    Special tokens and places kept free have none. Those of padding and of unknown pieces count in the PCA and in the
    ranks, as Model2Vec's do, and add nothing to a text.
    """
    silent = {tokenizer.pad_token_id, tokenizer.unk_token_id}
    special = set(tokenizer.all_special_ids) - silent
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    ids = np.array([id_ for token, id_ in vocabulary if id_ not in special and not _UNUSED.match(token)], np.int64)
    return ids, np.array([id_ not in silent for id_ in ids])


def sentence_states(
    towers: Towers, texts: Sequence[str], alone: NDArray[np.float32], precision: Precision
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The mean state of each token in texts (V, D), and the mean of these in each text that was read (n, D).

    `alone` (V, D) are vectors of the tokens by themselves, to which those of rare tokens are drawn, moved by the
    difference of the means of all that were read. Texts are spread over `texts`, of `SENTENCE_TOKENS` tokens together.
    """
    first: Any = towers.document[0]
    read = [np.array(ids, np.int32) for ids in tokenize(towers.document, _sample(texts))]
    lengths = np.array([len(ids) for ids in read], np.int64)
    size, width = alone.shape
    sums, counts = torch.zeros(size, width), torch.zeros(size)
    order = np.argsort(lengths, kind="stable")
    with progress("read sentences", len(read)) as advance, torch.inference_mode(), autocast(precision):
        for places in micro_batches(order, lengths[order].tolist(), BATCH_TOKENS):
            features = first(pad([read[place] for place in places], first.tokenizer.pad_token_id or 0, _CPU))
            mask = features["attention_mask"].bool()
            ids = features["input_ids"][mask]
            sums.index_add_(0, ids, features["token_embeddings"][mask].float())
            counts.index_add_(0, ids, torch.ones(len(ids)))
            advance(len(places))
    seen = (counts > 0).numpy()
    means = (sums / counts.clamp(min=1)[:, None]).numpy()
    moved = alone + (means[seen].mean(0) - alone[seen].mean(0))
    weight = counts.numpy()[:, None]
    states = np.asarray((sums.numpy() + PRIOR * moved) / (weight + PRIOR), np.float32)
    special = set(first.tokenizer.all_special_ids)
    kept = [ids[~np.isin(ids, list(special))] for ids in read]
    return states, np.stack([states[ids].mean(0) for ids in kept if len(ids)])


def _sample(texts: Sequence[str]) -> list[str]:
    """Texts spread evenly over all, about `SENTENCE_TOKENS` tokens of them, a token taken for four characters."""
    length = sum(map(len, texts)) / max(1, len(texts)) / 4
    return [texts[place] for place in spread(len(texts), max(1, int(SENTENCE_TOKENS / max(1.0, length))))]


def principal_axes(vectors: NDArray[np.float32], dimension: int, drop: int = 0) -> NDArray[np.float64]:
    """Principal axes (D, `dimension`) of vectors (n, D), without the first `drop`; InputError for more than D."""
    width = vectors.shape[1]
    if drop + dimension > width:
        raise InputError(
            f"student.dimension = {dimension} and student.drop = {drop} ask for {drop + dimension} principal axes; "
            f"the teacher's vectors have {width}."
        )
    centred = vectors - vectors.mean(0, dtype=np.float64)
    _, axes = np.linalg.eigh(centred.T @ centred)
    return np.asarray(axes[:, ::-1][:, drop : drop + dimension])


def zipf_weights(count: int, a: float = 1e-4) -> NDArray[np.float64]:
    """Model2Vec's weights of tokens in the order of their frequency: a / (a + p), p their probability after Zipf.

    p of rank r from 1 is 1 / (r + 1) over the sum of all (smooth inverse frequency, Arora et al. 2017).
    """
    inverse = 1 / np.arange(2, count + 2)
    return np.asarray(a / (a + inverse / inverse.sum()))
