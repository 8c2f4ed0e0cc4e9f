"""Weights of vocabulary terms from token states, pooled over a text, without a tensor of texts x tokens x vocabulary.

A language model's head gives each token a logit for every term; a sparse encoder keeps one weight a term,
pool_i f(logit_i), f(x) = log(1 + relu(x)) or log(1 + log(1 + relu(x))). Logits are computed for a part of
the vocabulary at a time. Of max pooling only the place of each maximum is kept, and the gradient goes to the
active terms alone; sum pooling computes the logits a second time for the backward pass.
Source: Formal et al. 2021, arXiv:2107.05720 (sum), arXiv:2109.10086 (max); double log, Shen et al. 2025,
arXiv:2504.14839.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from retrieval_kd.types import InputError

Pooling = Literal["max", "sum"]
PART_BYTES = 8 * 2**20  # of logits that exist at once


def pool_vocabulary(
    hidden: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, pooling: Pooling = "max", double: bool = False
) -> Tensor:
    """The weight of each vocabulary term in each text: (n, V) float32, not negative.

    Logits are hidden @ weight.T + bias, in autocast's precision where that is on. `double` takes the
    logarithm twice. The gradients of weight and bias are added to their `.grad`; `torch.autograd.grad` gets none.

    Shapes: hidden (n, L, D), the head's input; mask (n, L), non-zero where a token counts, and a text without such
    has no weights; weight (V, D); bias (V,).
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    function: Any = _MaxPool if pooling == "max" else _SumPool
    return cast(Tensor, function.apply(hidden, mask.bool(), weight, bias, double))


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, double: bool) -> Tensor:
        n, length, _ = hidden.shape
        first = mask.int().argmax(1)  # a token that counts stands in for those that do not: no maximum is theirs
        own = hidden[torch.arange(n, device=hidden.device), first]
        filled = torch.where(mask[..., None], hidden, own[:, None])
        values = hidden.new_empty(n, len(weight), dtype=torch.float32)
        places = torch.empty(n, len(weight), dtype=torch.int32, device=hidden.device)
        for part in _parts(len(weight), n * length):
            found, at = _logits(filled, weight[part], None).max(2)  # (c, n)
            values[:, part], places[:, part] = found.T, at.T
        if bias is not None:
            values += bias
        _activate(values, double).mul_(mask.any(1, keepdim=True))
        if any(ctx.needs_input_grad):
            places = torch.where(mask.gather(1, places.long()), places, first[:, None].int())
            ctx.weight, ctx.bias, ctx.double = weight, bias, double
            ctx.save_for_backward(hidden, values, places)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, values, places = ctx.saved_tensors
        length, width = hidden.shape[1:]
        text, term = torch.nonzero((values > 0) & (gradient != 0), as_tuple=True)  # (m,) each
        slope = gradient[text, term] * _slope(values[text, term], ctx.double)
        place = text * length + places[text, term]
        states = hidden.reshape(-1, width).float()
        to_hidden = None
        if ctx.needs_input_grad[0]:
            to_hidden = _spread(place, term, slope, len(states), ctx.weight).view_as(hidden).to(hidden.dtype)
        if ctx.weight.requires_grad:
            terms, row = torch.unique(term, return_inverse=True)
            _grad(ctx.weight).index_add_(0, terms, _spread(row, place, slope, len(terms), states))
        if ctx.bias is not None and ctx.bias.requires_grad:
            _grad(ctx.bias).index_add_(0, term, slope)
        return to_hidden, None, None, None, None


class _SumPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, double: bool) -> Tensor:
        n, length, _ = hidden.shape
        values = hidden.new_empty(n, len(weight), dtype=torch.float32)
        for part in _parts(len(weight), n * length):
            found = _activate(_logits(hidden, weight[part], None if bias is None else bias[part]), double)
            values[:, part] = (found * mask).sum(2).T
        ctx.weight, ctx.bias, ctx.double = weight, bias, double
        ctx.save_for_backward(hidden, mask)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, mask = ctx.saved_tensors
        weight, bias = ctx.weight, ctx.bias
        n, length, width = hidden.shape
        states = hidden.reshape(-1, width).float()
        to_hidden = torch.zeros_like(states)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _parts(len(weight), n * length):
                found = _activate(_logits(hidden, weight[part], None if bias is None else bias[part]), ctx.double)
                slope = torch.where(found > 0, _slope(found, ctx.double), 0.0) * mask  # (c, n, L)
                slope = (slope * gradient[:, part].T[..., None]).flatten(1)
                to_hidden += slope.T @ weight[part].float()
                if weight.requires_grad:
                    _grad(weight)[part] += slope @ states
                if bias is not None and bias.requires_grad:
                    _grad(bias)[part] += slope.sum(1)
        return to_hidden.view_as(hidden).to(hidden.dtype), None, None, None, None


def _parts(terms: int, tokens: int) -> Iterator[slice]:
    """The vocabulary in parts whose logits take `PART_BYTES`."""
    size = max(16, PART_BYTES // (4 * max(1, tokens)))
    return (slice(start, min(start + size, terms)) for start in range(0, terms, size))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits (c, n, L) float32 of some terms; a text's tokens lie together, which is how they are pooled."""
    with torch.autocast(hidden.device.type, enabled=False):
        found = (weight.to(hidden.dtype) @ hidden.flatten(0, 1).T).float()
    if bias is not None:
        found += bias[:, None]
    return found.view(len(weight), *hidden.shape[:2])


def _activate(logits: Tensor, double: bool) -> Tensor:
    logits.relu_().log1p_()
    return logits.log1p_() if double else logits


def _slope(values: Tensor, double: bool) -> Tensor:
    """The derivative of the activation where it is positive, from its value: exp(-value), once for each logarithm."""
    return torch.exp(-values - torch.expm1(values)) if double else torch.exp(-values)


def _spread(rows: Tensor, columns: Tensor, values: Tensor, count: int, matrix: Tensor) -> Tensor:
    """The product of a sparse matrix (count, len(matrix)), given by its entries, and `matrix`: (count, D) float32."""
    sparse = torch.sparse_coo_tensor(torch.stack([rows, columns]), values, (count, len(matrix)), check_invariants=False)
    with torch.autocast(matrix.device.type, enabled=False):
        return cast(Tensor, torch.sparse.mm(sparse, matrix.detach().float()))


def _grad(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def head_of(model: Any) -> nn.Linear:
    """The last layer of a language model, from states to logits; InputError where the logits are not its output."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or getattr(model.config, "final_logit_softcapping", None):
        raise InputError(
            f"{type(model).__name__} does not end in a linear layer over its vocabulary, so that it cannot be a sparse "
            "encoder here."
        )
    return head


@contextmanager
def without_head(model: Any) -> Iterator[nn.Linear]:
    """Inside, the model's logits are what its head would have read: token states (n, L, D)."""
    head = head_of(model)
    head.forward = lambda states: states  # type: ignore[method-assign, assignment]
    try:
        yield head
    finally:
        del head.forward
