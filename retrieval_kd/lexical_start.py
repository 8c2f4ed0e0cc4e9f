"""A start for sparse encoders where no language model's head is at hand: a text has the terms it consists of.

The head of an encoder is made from a collection by linear discriminants of its token states: the logit of a
term is high where the states are those of the term's own occurrences, and also where they are like them, which is a
first expansion. The result is an ordinary masked language model, which training goes on from.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers.base.modules import Transformer
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from retrieval_kd.gather import micro_batches
from retrieval_kd.progress import progress
from retrieval_kd.towers import keep_layers, pad
from retrieval_kd.types import InputError
from retrieval_kd.vocabulary_head import head_of, without_head

TOKENS = 150_000  # of the collection that are looked at
BATCH_TOKENS = 1024  # read at once, padding included
SHIFT = 6.0  # makes the head's activation function all but linear
PRIOR = 4.0  # occurrences that the guess of an unseen term's state counts for
RIDGE = 1e-3  # of the mean variance
NOISE = 5.0  # standard deviations of other tokens' discriminants that are no sign of the term
THRESHOLD = 0.4  # of the way from the mean state to the term's own, below which it is not active


@dataclass(frozen=True)
class States:
    """Sums over tokens of the states that a head reads. Shapes: counts (V,), sums (V, D), squares (D, D)."""

    counts: Tensor
    sums: Tensor
    squares: Tensor


def make_lexical_model(
    source: Path,
    texts: Sequence[str],
    layers: Sequence[int],
    max_length: int | None,
    sides: int,
    double: bool,
) -> Transformer:
    """The encoder `source` with a new head.

    A term of a text weighs about 1 where the encoder reads documents alone (`sides` is 1), since queries have
    the inverse document frequency; where it reads both, its root. `layers` are the numbers of those to keep. Raises
    InputError for an encoder whose masked language model has another head than a linear layer and a norm.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)  # the head is new, as meant
    try:
        model: Any = AutoModelForMaskedLM.from_pretrained(source, dtype=torch.float32).eval()
        tokenizer: Any = AutoTokenizer.from_pretrained(source)
    finally:
        transformers_logging.set_verbosity(verbosity)
    if layers:
        keep_layers(model.base_model, layers)
    fit_vocabulary(model, tokenizer)
    _make_linear(model)
    config = max_length or 512
    length = min(config, getattr(model.config, "max_position_embeddings", config), tokenizer.model_max_length)
    tokens = _sample(tokenizer, texts, length)
    frequency = torch.from_numpy(inverse_frequencies(tokens, len(tokenizer)))
    weights = torch.sqrt(frequency) if sides == 2 else (frequency > 0).float()
    states = _read(model, tokens, tokenizer.pad_token_id or 0)
    _set_head(model, states, tokenizer.all_special_ids, weights, double)
    with TemporaryDirectory(prefix="rkd-") as folder:  # the way to a module is by a saved model
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        module: Transformer = Transformer(folder, transformer_task="fill-mask", max_seq_length=length)
    return module


def fit_vocabulary(model: Any, tokenizer: Any) -> None:
    """Cut, or extend, embeddings and head to the tokenizer's terms: many a model's are padded to a round number."""
    if head_of(model).out_features != len(tokenizer):
        model.resize_token_embeddings(len(tokenizer))


def _make_linear(model: Any) -> None:
    """Set what lies between encoder and head to a norm: a unit matrix, shifted beyond the activation's bend."""
    base = {id(module) for module in model.base_model.modules()}
    added = [module for module in model.modules() if id(module) not in base and not list(module.children())]
    head = head_of(model)
    linear = [module for module in added if isinstance(module, nn.Linear) and module is not head]
    norms = [module for module in added if isinstance(module, nn.LayerNorm)]
    if len(linear) != 1 or len(norms) != 1 or linear[0].weight.shape[0] != linear[0].weight.shape[1]:
        raise InputError(
            f'student.start = "lexical": the head of {type(model).__name__} is not a linear layer and a norm; start '
            "from a masked language model with its own head."
        )
    with torch.no_grad():
        nn.init.eye_(linear[0].weight)
        if linear[0].bias is not None:
            linear[0].bias.fill_(SHIFT)
        nn.init.ones_(norms[0].weight)
        if norms[0].bias is not None:
            nn.init.zeros_(norms[0].bias)


def _sample(tokenizer: Any, texts: Sequence[str], length: int) -> list[list[int]]:
    """Token ids of texts drawn with a fixed seed, until there are `TOKENS`."""
    found: list[list[int]] = []
    count = 0
    for place in np.random.default_rng(0).permutation(len(texts)).tolist():
        if count >= TOKENS:
            break
        found.append(tokenizer(texts[place], truncation=True, max_length=length)["input_ids"])
        count += len(found[-1])
    if not found:
        raise InputError('student.start = "lexical" reads the documents, and there are none.')
    return found


def inverse_frequencies(token_ids: Iterable[Sequence[int]], size: int) -> NDArray[np.float32]:
    """log(1 + (N - n + 0.5) / (n + 0.5)) of each of `size` terms: N texts, n of them with the term.

    Source: Robertson and Zaragoza 2009 in Lucene's form, which is not negative.
    """
    counts, texts = np.zeros(size, np.int64), 0
    for ids in token_ids:
        counts[np.unique(np.asarray(ids, np.int64))] += 1
        texts += 1
    return np.log1p((texts - counts + 0.5) / (counts + 0.5)).astype(np.float32)


def _read(model: Any, tokens: Sequence[Sequence[int]], pad_id: int) -> States:
    """Sums of the states that the head would read, by the token that they belong to."""
    head = head_of(model)
    size, width = head.weight.shape
    counts, sums, squares = torch.zeros(size), torch.zeros(size, width), torch.zeros(width, width)
    lengths = np.array([len(ids) for ids in tokens], np.int64)
    order = np.argsort(lengths, kind="stable")
    with progress("read the collection's terms", len(order)) as advance, torch.inference_mode(), without_head(model):
        for places in micro_batches(order, lengths[order].tolist(), BATCH_TOKENS):
            features = pad([np.array(tokens[place], np.int32) for place in places], pad_id, torch.device("cpu"))
            mask = features["attention_mask"].bool()
            states, ids = model(**features).logits[mask], features["input_ids"][mask]
            counts.index_add_(0, ids, torch.ones(len(ids)))
            sums.index_add_(0, ids, states)
            squares += states.T @ states
            advance(len(places))
    return States(counts, sums, squares)


def _set_head(model: Any, states: States, special: Sequence[int], weights: Tensor, double: bool) -> None:
    """Write the discriminants into the head, which no longer shares the table of input embeddings.

    With m the mean state, S their covariance and m_v the mean state of a term, w_v = S^-1 (m_v - m) / M_v^2 and
    M_v^2 = (m_v - m)' S^-1 (m_v - m): the discriminant (h - m)' w_v is 1 at the term's own mean, 0 at
    the mean of all, and its standard deviation over all tokens is 1 / M_v. The states of rare terms are guessed from
    the table of input embeddings, by least squares.
    """
    total = states.counts.sum()
    mean = states.sums.sum(0) / total
    covariance = states.squares / total - mean[:, None] * mean
    covariance += RIDGE * covariance.diagonal().mean() * torch.eye(len(mean))
    own = _term_states(states, mean, model.get_input_embeddings().weight.detach())
    rows = torch.linalg.solve(covariance, (own - mean).T).T  # (V, D)
    strength = ((own - mean) * rows).sum(1).clamp(min=1e-6)  # (V,), M squared
    threshold = (NOISE / strength.sqrt()).clamp(THRESHOLD, 0.95)
    top = torch.expm1(torch.expm1(weights)) if double else torch.expm1(weights)
    scale = top / (1 - threshold)
    rows = rows * (scale / strength)[:, None]
    bias = -(rows @ mean) - scale * threshold
    rows[special] = 0.0
    bias[special] = -1.0
    head = head_of(model)
    model.config.tie_word_embeddings = False
    head.weight = nn.Parameter(rows.contiguous())
    head.bias = nn.Parameter(bias)


def _term_states(states: States, mean: Tensor, table: Tensor) -> Tensor:
    """The mean state of each term (V, D), drawn towards what its input embedding lets expect."""
    seen = states.counts > 0
    averages = states.sums[seen] / states.counts[seen, None]
    inputs = torch.cat([table, torch.ones(len(table), 1)], dim=1)
    known, share = inputs[seen], states.counts[seen].sqrt()[:, None]
    gram = (known * share).T @ (known * share)
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    guessed = mean + inputs @ torch.linalg.solve(gram, (known * share).T @ ((averages - mean) * share))
    found: Tensor = (states.sums + PRIOR * guessed) / (states.counts + PRIOR)[:, None]
    return found
