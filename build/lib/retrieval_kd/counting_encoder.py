"""BM25 inside an ordinary masked language model: one layer of BERT whose attention counts.

A token that attends to its like, among L tokens of which n are the same, gives them the share
    n e^a / (n e^a + (L - n) e^o + e^s) ~ n / (n + k1 (1 - b + b L / mean length)),
the saturation and normalisation by length of BM25: a is the score of a token and its like, o that of others, and s
that of the special tokens around a text, which take what is left. The share scales the token's code in the state
that the head reads. The remaining heads average a second table, so that each state also holds a vector of the whole
text, of which each term's weight has a linear part: terms that the text does not contain.

Sizes: state WIDTH = (CODE: a unit vector a term) + (1: special tokens) + (1: a constant) + (MEANING: the text's vector)
+ a rest of zeros. Source of BM25: Robertson and Zaragoza 2009; the construction is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from retrieval_kd.vocabulary_head import head_of

WIDTH, HEAD = 512, 32
COUNTING, AVERAGING = 8, 8  # attention heads
PIECE = HEAD - 1  # of the code that a counting head compares; its last coordinate belongs to special tokens
CODE, MEANING = COUNTING * PIECE, AVERAGING * HEAD
SPECIAL, CONSTANT, FIRST = CODE, CODE + 1, CODE + 2  # places in the state; FIRST of the text's vector
LARGE = 256.0  # the constant, beside which all else is small, so that norms change nothing
SHIFT = 6.0  # makes the head's activation function all but linear
GAIN = 16.0  # of what attention adds, beside which the token itself is small
K1, B = 0.9, 0.75


@dataclass(frozen=True)
class Terms:
    """What is known of each of V terms.

    Shapes: weights (V,), of a term that makes up all of a text, 0 where it is to stay inactive; entries and directions
    (V, MEANING): a text's vector is the mean of its tokens' entries, and the logit of a term is raised by the
    product with its direction.
    """

    weights: Tensor
    entries: Tensor
    directions: Tensor


def make_counting_model(
    terms: Terms, special: Sequence[int], around: Sequence[int], mean_length: float, length: int, threshold: float
) -> BertForMaskedLM:
    """The model, for texts of at most `length` tokens; `around` are the special tokens that stand around each.

    A term is active from the share `threshold` on: below it codes of different terms meet by chance.
    """
    config = BertConfig(
        vocab_size=len(terms.weights),
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=COUNTING + AVERAGING,
        intermediate_size=WIDTH,
        max_position_embeddings=length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        tie_word_embeddings=False,
    )
    model: Any = BertForMaskedLM(config)
    model.eval()
    codes = _codes(len(terms.weights))
    codes[list(special)] = 0.0
    with torch.no_grad():
        scale = _set_embeddings(model, codes, terms.entries, special, around)
        _set_attention(model, len(around), mean_length, scale)
        _set_norms(model)
        _set_head(model, codes, terms, threshold)
    made: BertForMaskedLM = model
    return made


def _codes(count: int) -> Tensor:
    """A random code for each term (V, CODE): pieces of equal length, of sum 0, together a unit vector."""
    drawn = torch.randn(count, COUNTING, PIECE, generator=torch.Generator().manual_seed(0))
    drawn -= drawn.mean(2, keepdim=True)
    unit: Tensor = drawn / torch.linalg.vector_norm(drawn, dim=2, keepdim=True)
    return (unit / math.sqrt(COUNTING)).reshape(count, CODE)


def _set_embeddings(model: Any, codes: Tensor, entries: Tensor, special: Sequence[int], around: Sequence[int]) -> float:
    """Write the table of terms; return what entries were multiplied by. Positions and segments count nothing."""
    embeddings = model.bert.embeddings
    for table in (embeddings.position_embeddings, embeddings.token_type_embeddings):
        nn.init.zeros_(table.weight)
    largest = float(entries.norm(dim=1).max())
    scale = 1.0 / largest if largest else 1.0
    table = embeddings.word_embeddings.weight
    table.zero_()
    table[:, :CODE] = codes
    table[:, CONSTANT] = LARGE
    table[:, FIRST : FIRST + MEANING] = scale * entries
    table[list(special), FIRST:] = 0.0
    table[list(around), SPECIAL] = 1.0
    return scale


def _set_attention(model: Any, around: int, mean_length: float, scale: float) -> None:
    attention, output = model.bert.encoder.layer[0].attention.self, model.bert.encoder.layer[0].attention.output.dense
    like = _like_score(K1 * B / mean_length)
    size = math.sqrt(like * math.sqrt(HEAD) * COUNTING)
    for linear in (attention.query, attention.key, attention.value, output):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    output.bias[CONSTANT] = LARGE
    for head in range(COUNTING):
        rows, piece = slice(head * HEAD, head * HEAD + PIECE), slice(head * PIECE, (head + 1) * PIECE)
        attention.query.weight[rows, piece] = size * torch.eye(PIECE)
        attention.key.weight[rows, piece] = size * torch.eye(PIECE)
        attention.value.weight[rows, piece] = torch.eye(PIECE)
        output.weight[piece, rows] = GAIN * torch.eye(PIECE)
        last = head * HEAD + PIECE
        if around:
            attention.query.bias[last] = like + math.log(K1 * (1 - B) / around)
            attention.key.weight[last, SPECIAL] = math.sqrt(HEAD)
    for head in range(AVERAGING):
        piece = slice(head * HEAD, (head + 1) * HEAD)
        rows = slice(COUNTING * HEAD + piece.start, COUNTING * HEAD + piece.stop)
        attention.query.bias[rows] = 1.0  # the keys, all 0, can learn what counts for more
        places = torch.arange(FIRST, FIRST + MEANING)[piece]
        attention.value.weight[rows, places] = torch.eye(HEAD) / scale
        output.weight[places, rows] = GAIN * torch.eye(HEAD)


def _like_score(share: float) -> float:
    """The score a of a token and its like at which any other token takes `share` of it on average.

    Scores of others are a times the cosine of random vectors of PIECE - 1 dimensions, normal with variance
    1 / (PIECE - 1): E e^(a cos) = e^(a^2 / 2 (PIECE - 1)); a is the lower root of a^2 / 2 (PIECE - 1) - a = log share.
    """
    dimensions = PIECE - 1
    return dimensions * (1 - math.sqrt(max(0.0, 1 + 2 * math.log(share) / dimensions)))


def _set_norms(model: Any) -> None:
    """Make each norm leave a state as it is, less its constant, and silence the feed-forward layer.

    The constant comes anew from the bias before each norm and ends there: weights that read it would turn a step of
    training, however small, into LARGE times as much.
    """
    layer, transform = model.bert.encoder.layer[0], model.cls.predictions.transform
    nn.init.zeros_(layer.output.dense.weight)
    nn.init.eye_(transform.dense.weight)
    layer.output.dense.bias[CONSTANT] = LARGE
    transform.dense.bias.fill_(SHIFT)
    transform.dense.bias[CONSTANT] = LARGE
    constant, shifted = torch.zeros(WIDTH), torch.full((WIDTH,), SHIFT)
    constant[CONSTANT] = shifted[CONSTANT] = LARGE
    for norm in (model.bert.embeddings.LayerNorm, layer.attention.output.LayerNorm, layer.output.LayerNorm):
        _leave(norm, constant)
    _leave(transform.LayerNorm, shifted)


def _leave(norm: nn.LayerNorm, typical: Tensor) -> None:
    """Set a norm to leave what a state has beside `typical`, near which it is."""
    norm.weight.fill_(float(typical.std(correction=0)))
    norm.bias.copy_(typical.mean() - typical)


def _set_head(model: Any, codes: Tensor, terms: Terms, threshold: float) -> None:
    """The logit of a term: its weight times (share - threshold), and the product of its direction and the text."""
    head = head_of(model)
    active = terms.weights > 0
    own = 1.0 / GAIN + 1.0  # of a text of one term alone
    scale = terms.weights / (own - threshold)
    rows, bias = torch.zeros(len(codes), WIDTH), torch.full((len(codes),), -1.0)
    rows[active, :CODE] = (scale[:, None] * codes / GAIN)[active]
    rows[active, FIRST : FIRST + MEANING] = terms.directions[active] / GAIN
    bias[active] = -threshold * scale[active]
    head.weight = nn.Parameter(rows)
    head.bias = nn.Parameter(bias)
