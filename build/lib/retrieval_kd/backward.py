"""Backward passes that cost less and give the same gradient: of embedding tables, and of attention in bf16."""

from __future__ import annotations

from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS


def add_rows_in_place(model: nn.Module) -> None:
    """Have the gradient of each trainable embedding table added row by row to its `.grad`.

    PyTorch makes a table of zeros each time a table is used, once for every micro-batch, and adds them all
    up: a tenth of a step (measured). Gradients reach `.grad` alone: `torch.autograd.grad` gets none.
    """
    for module in model.modules():
        if type(module) is nn.Embedding and module.weight.requires_grad and module.max_norm is None:
            module.forward = MethodType(_look_up, module)  # type: ignore[method-assign]


def _look_up(module: nn.Embedding, ids: Tensor) -> Tensor:
    return cast(Tensor, cast(Any, _Rows).apply(module.weight, ids, module.padding_idx))


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding: int | None) -> Tensor:
        ctx.weight, ctx.padding = weight, padding
        ctx.save_for_backward(ids)
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        if ctx.weight.grad is None:
            ctx.weight.grad = torch.zeros_like(ctx.weight)
        ids, rows = ids.flatten(), gradient.flatten(0, -2).to(ctx.weight.dtype)
        if ctx.padding is not None:
            rows = rows.masked_fill((ids == ctx.padding)[:, None], 0.0)
        ctx.weight.grad.index_add_(0, ids, rows)
        return None, None, None


def attend_plainly(model: nn.Module) -> None:
    """Have a model's attention under bf16 autocast be two matrix products; the model is saved as before.

    On a CPU PyTorch's fused attention takes four to six times as long there, forward and back (measured).
    Queries, keys and values alone are kept for the backward pass, which attends once more. Attention
    that is causal or drops out stays fused, in float32.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation == "sdpa":
            module.set_attn_implementation(_PLAIN)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: queries, keys, values (B, heads, L, D) to (B, L, heads, D)."""
    causal = more.get("is_causal") or getattr(module, "is_causal", False)
    if query.dtype == torch.bfloat16 and not (dropout or causal) and query.shape == key.shape:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return cast(Any, _Attend).apply(query, key, value, mask, scale).transpose(1, 2).contiguous(), None
    with torch.autocast(query.device.type, enabled=False):
        wide = (query.float(), key.float(), value.float())
        out, _ = sdpa_attention_forward(module, *wide, mask, dropout=dropout, scaling=scaling, **more)
    return out.to(query.dtype), None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = (query * scale) @ key.transpose(-1, -2)  # (B, heads, L, L)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, -1) @ value


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, mask)
        with torch.autocast(query.device.type, enabled=False):
            return _attend(query, key, value, mask, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *saved, mask = ctx.saved_tensors
        query, key, value = inputs = [tensor.detach().requires_grad_() for tensor in saved]
        with torch.enable_grad(), torch.autocast(gradient.device.type, enabled=False):
            attended = _attend(query, key, value, mask, ctx.scale)
            return *torch.autograd.grad(attended, inputs, gradient), None, None


_PLAIN = "plain_bf16"
AttentionInterface.register(_PLAIN, _attention)
AttentionMaskInterface.register(_PLAIN, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
